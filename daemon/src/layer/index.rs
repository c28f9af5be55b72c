//! The index of a layer: its [`Span`]s, and what came out before each of them.
//!
//! As a file, all numbers little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8, 4 | `hydrspan`, version |
//! | 1, 1, 2 | compression (0 none, 1 gzip, 2 zstd), whether it was [pinned](super::pinned) (1), zeros |
//! | 4 | number of spans |
//! | 8, 8 | the layer's length uncompressed, compressed |
//! | 32, 32 | SHA-256 of the compressed layer, of the uncompressed one (`diff_id`) |
//! | 32, 8 | SHA-256 and length of all windows |
//! | 4 | CRC-32 of all before and of the records |
//! | 76 each | the records |
//! | | the windows, each a zstd frame of its own, in the order of their spans; unless they have yet to come |
//!
//! A record: the span's length in the segment (8), start and length in the compressed layer (8, 8), codec (1: 0 identity,
//! 1 gzip, 2 deflate, 3 zstd), bits (1), length of the window (2), length and CRC-32 of its frame (4, 4), SHA-256 (32),
//! what that is of (8): `u64::MAX` all of the span's bytes in the segment, `u64::MAX - 1` its compressed bytes, else so
//! many bytes at its start ([`Proof`]).
//!
//! Head and records are some 80 bytes for each 512 KiB of a layer. The windows, up to 32 KiB each before they are compressed
//! and zeros where nothing refers to them (`window.rs`), are most of an index. So at a registry they are a [blob](WindowsBlob) of their
//! own, of which those that are needed can be fetched ([`Index::frames_at`]). A window that is wrong makes a span that its digest
//! refuses.
//!
//! Version 2 has nothing about the windows in its head, and has always all of them.

use std::io::{self, Read, Write};
use std::ops::Range;

use thiserror::Error;

use super::digest::{Digest, Hasher};
use super::indexer::{Compression, MAX_LAYER};
use super::span::{Codec, Proof, Span, TRAILER};
use crate::range::ByteRange;
use crate::sys::inflate::WINDOW;
use crate::version::{self, OtherVersion};

/// The version of the format.
pub const VERSION: u32 = 3;
const MAGIC: &[u8; 8] = b"hydrspan";
/// The length of what comes before the records, in bytes.
const HEAD_LEN: usize = 144;
/// That of the version before.
const HEAD_LEN_BEFORE: usize = 104;
const RECORD_LEN: usize = 76;
const WHOLE: u64 = u64::MAX;
const COMPRESSED: u64 = u64::MAX - 1;
/// The most spans that a layer has.
pub const MAX_SPANS: usize = 1 << 22;
/// A frame is hardly ever longer than what it holds.
const MAX_FRAME: u32 = 2 * WINDOW as u32;
/// zstd's level for windows: beyond it they get hardly smaller.
const LEVEL: i32 = 6;

/// Why an index can't be made or used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IndexError {
    #[error(transparent)]
    Version(#[from] OtherVersion),
    #[error("the layer's index is damaged: {0}; remove it, the layer is then indexed again")]
    Damaged(&'static str),
    #[error("the layer has more than {MAX_SPANS} spans")]
    TooManySpans,
    #[error("a window could not be compressed")]
    Window,
    #[error("the window of span {0} is not at hand")]
    NoWindow(usize),
}

/// Where the frame of a window is among the windows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Frame {
    start: u64,
    len: u32,
    crc: u32,
}

/// All windows of an index one after the other, as a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowsBlob {
    pub digest: Digest,
    /// In bytes.
    pub len: u64,
}

/// What the start of an index's file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    compression: Compression,
    /// As [`Index::is_pinned`].
    pub pinned: bool,
    count: usize,
    /// Bytes before the records.
    len: usize,
    uncompressed_len: u64,
    compressed_len: u64,
    digest: Digest,
    diff_id: Digest,
    /// The windows that the file may have at its end. `None`: not said, and it has them.
    pub windows: Option<WindowsBlob>,
}

/// The spans of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    compression: Compression,
    pinned: bool,
    uncompressed_len: u64,
    compressed_len: u64,
    digest: Digest,
    diff_id: Digest,
    spans: Vec<Span>,
    /// For each span.
    frames: Vec<Frame>,
    /// All windows, or none.
    windows: Vec<u8>,
    windows_blob: Option<WindowsBlob>,
    /// Where the windows are in its file.
    windows_at: u64,
}

impl Index {
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// It came with the image ([`pinned`](super::pinned)): nobody has seen all of the segment yet, and
    /// [`diff_id`](Self::diff_id) is what the image says.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.pinned
    }

    /// The same, as it is known to somebody else: nobody here has seen the segment.
    #[must_use]
    pub fn into_pinned(mut self) -> Self {
        self.pinned = true;
        self
    }

    /// The length of the segment in bytes.
    #[must_use]
    pub fn uncompressed_len(&self) -> u64 {
        self.uncompressed_len
    }

    /// The length of the layer as the registry has it, in bytes.
    #[must_use]
    pub fn compressed_len(&self) -> u64 {
        self.compressed_len
    }

    /// The digest of the layer as the registry has it.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The digest of the segment.
    #[must_use]
    pub fn diff_id(&self) -> Digest {
        self.diff_id
    }

    /// All spans. They cover the segment without gaps, in order.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The numbers of the spans that have a byte in the blocks of `range`: these have to be decoded
    /// before a reader may see it.
    #[must_use]
    pub fn spans_for(&self, range: ByteRange) -> Range<usize> {
        let range = range.to_blocks().clamp(self.uncompressed_len);
        if range.is_empty() {
            return 0..0;
        }
        let first = self.spans.partition_point(|span| span.uncompressed.end() <= range.offset());
        let end = self.spans.partition_point(|span| span.uncompressed.offset() < range.end());
        first..end
    }

    /// Where among all windows the frames of the windows of these spans are, one after the other. Nowhere, with no bytes, if none of
    /// them needs one.
    #[must_use]
    pub fn frames_at(&self, spans: Range<usize>) -> ByteRange {
        let frames = self.frames.get(spans).unwrap_or_default();
        let ends = frames.first().zip(frames.last());
        ends.map_or(ByteRange::new(0, 0), |(first, last)| {
            ByteRange::between(first.start, last.end())
        })
    }

    /// Where the windows are in the file, in bytes from its start.
    #[must_use]
    pub fn windows_at(&self) -> u64 {
        self.windows_at
    }

    /// What the windows are, if there are any and the file says so.
    #[must_use]
    pub fn windows_blob(&self) -> Option<WindowsBlob> {
        self.windows_blob.filter(|blob| blob.len > 0)
    }

    /// The windows that were read with the index: all or none.
    #[must_use]
    pub fn windows(&self) -> &[u8] {
        &self.windows
    }

    /// The window of a span, out of the windows that were read with the index: what is before it, or zeros where nothing refers to
    /// that. Empty where none is needed.
    pub fn window(&self, span: usize) -> Result<Vec<u8>, IndexError> {
        let at = self.frames_at(span..span.saturating_add(1));
        if at.is_empty() {
            return self.unpack_window(span, &[]);
        }
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let frame = self.windows.get(place(at.offset())..place(at.end()));
        self.unpack_window(span, frame.ok_or(IndexError::NoWindow(span))?)
    }

    /// Whether this is the frame of a span's window; of no bytes, where none is needed.
    #[must_use]
    pub fn is_frame(&self, span: usize, bytes: &[u8]) -> bool {
        let known = self.frames.get(span).copied().unwrap_or_default();
        let is_right = || known.len == 0 || crc32fast::hash(bytes) == known.crc;
        bytes.len() == known.len as usize && is_right()
    }

    /// The window of a span, out of its frame ([`frames_at`](Self::frames_at)).
    pub fn unpack_window(&self, span: usize, frame: &[u8]) -> Result<Vec<u8>, IndexError> {
        if !self.is_frame(span, frame) {
            return Err(IndexError::Damaged("a window's checksum is wrong"));
        }
        let of = self.spans.get(span).map_or(0, Span::window_len);
        if of == 0 {
            return Ok(Vec::new());
        }
        let window = zstd::bulk::decompress(frame, of).unwrap_or_default();
        if window.len() == of {
            Ok(window)
        } else {
            Err(IndexError::Damaged("a window is of another length"))
        }
    }

    /// Writes the file, with the windows that there are.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        self.write_head(&mut out)?;
        out.write_all(&self.windows)
    }

    /// Writes the file without the windows.
    pub fn write_head(&self, mut out: impl Write) -> io::Result<()> {
        let mut head = Vec::with_capacity(HEAD_LEN);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&[self.compression as u8, u8::from(self.pinned), 0, 0]);
        head.extend_from_slice(&(self.spans.len() as u32).to_le_bytes());
        head.extend_from_slice(&self.uncompressed_len.to_le_bytes());
        head.extend_from_slice(&self.compressed_len.to_le_bytes());
        head.extend_from_slice(self.digest.as_bytes());
        head.extend_from_slice(self.diff_id.as_bytes());
        let blob = self.windows_blob.ok_or_else(|| io::Error::other("its windows are not here"))?;
        head.extend_from_slice(blob.digest.as_bytes());
        head.extend_from_slice(&blob.len.to_le_bytes());
        let mut records = Vec::with_capacity(self.spans.len() * RECORD_LEN);
        for (span, frame) in self.spans.iter().zip(&self.frames) {
            let (codec, bits, window) = match span.codec {
                Codec::Identity => (0, 0, 0),
                Codec::Gzip => (1, 0, 0),
                Codec::Deflate { bits, window } => (2, bits, window as u16),
                Codec::Zstd => (3, 0, 0),
            };
            records.extend_from_slice(&span.uncompressed.len().to_le_bytes());
            records.extend_from_slice(&span.compressed.offset().to_le_bytes());
            records.extend_from_slice(&span.compressed.len().to_le_bytes());
            records.extend_from_slice(&[codec, bits]);
            records.extend_from_slice(&window.to_le_bytes());
            records.extend_from_slice(&frame.len.to_le_bytes());
            records.extend_from_slice(&frame.crc.to_le_bytes());
            records.extend_from_slice(span.digest.as_bytes());
            let proof = match span.proof {
                Proof::Whole => WHOLE,
                Proof::Compressed => COMPRESSED,
                Proof::Start(len) => len,
            };
            records.extend_from_slice(&proof.to_le_bytes());
        }
        head.extend_from_slice(&checksum(&head, &records).to_le_bytes());
        out.write_all(&head)?;
        out.write_all(&records)
    }

    /// Reads the part of a file that is before the windows, from its start.
    pub fn read(mut file: impl Read) -> io::Result<Result<Self, IndexError>> {
        let mut bytes = start_of(&mut file)?;
        let len = match Head::parse(&bytes) {
            Ok(head) => head.windows_at(),
            Err(error) => return Ok(Err(error)),
        };
        file.take(len.saturating_sub(bytes.len() as u64)).read_to_end(&mut bytes)?;
        // one of the version before may be shorter than the head of this one
        bytes.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        Ok(Self::parse(&bytes))
    }

    /// Reads an index: the whole file, or the part without the windows.
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        let damaged = |what| Err(IndexError::Damaged(what));
        let mut fields = Fields { rest: bytes };
        let head = fields.head()?;
        let Head { compression, pinned, uncompressed_len, compressed_len, digest, diff_id, .. } =
            head;
        let crc = fields.u32()?;
        let records = fields.take(head.count * RECORD_LEN)?;
        if checksum(&bytes[..head.len - 4], records) != crc {
            return damaged("its checksum is wrong");
        }
        if uncompressed_len > MAX_LAYER {
            return damaged("the layer can't be so large");
        }
        let windows = fields.rest;
        let (mut spans, mut frames) =
            (Vec::with_capacity(head.count), Vec::with_capacity(head.count));
        let (mut at, mut start) = (0u64, 0u64);
        let mut before = ByteRange::new(0, 0);
        for record in records.chunks_exact(RECORD_LEN) {
            let mut fields = Fields { rest: record };
            let len = fields.u64()?;
            let (offset, compressed) = (fields.u64()?, fields.u64()?);
            let [codec, bits] = fields.array()?;
            let window = u32::from(u16::from_le_bytes(fields.array()?));
            let frame = Frame { start, len: fields.u32()?, crc: fields.u32()? };
            let digest = fields.digest()?;
            let proof = match fields.u64()? {
                WHOLE => Proof::Whole,
                COMPRESSED if pinned => Proof::Compressed,
                // there has to be room for what says how much came out
                proved if pinned && proved.checked_add(TRAILER).is_some_and(|end| end <= len) => {
                    Proof::Start(proved)
                }
                _ => return damaged("a span is proved by nothing"),
            };
            let codec = match (compression, codec, bits, window) {
                (Compression::None, 0, 0, 0) if len == compressed && proof == Proof::Whole => {
                    Codec::Identity
                }
                (Compression::Gzip, 1, 0, 0) => Codec::Gzip,
                (Compression::Gzip, 2, 0..8, 0..=0x8000) => Codec::Deflate { bits, window },
                (Compression::Zstd, 3, 0, 0) => Codec::Zstd,
                _ => return damaged("a span is of no kind"),
            };
            let end = at.checked_add(len).filter(|end| *end <= uncompressed_len && len > 0);
            let Some(end) = end else { return damaged("a span is outside the layer") };
            let range = ByteRange::new(offset, compressed);
            if offset < before.offset() || compressed == 0 || range.end() > compressed_len {
                return damaged("a span is outside the compressed layer");
            }
            if u64::from(window) > at || (window > 0) != (frame.len > 0) || frame.len > MAX_FRAME {
                return damaged("a window has an impossible length");
            }
            start += u64::from(frame.len);
            let uncompressed = ByteRange::between(at, end);
            spans.push(Span { uncompressed, compressed: range, codec, digest, proof });
            frames.push(frame);
            (at, before) = (end, range);
        }
        if at != uncompressed_len {
            return damaged("its spans are not the layer");
        }
        if head.windows.is_some_and(|blob| blob.len != start) {
            return damaged("its windows are those of another");
        }
        if !windows.is_empty() && windows.len() as u64 != start {
            return damaged("it is cut short");
        }
        let windows = windows.to_vec();
        let here = || windows.len() as u64 == start;
        let windows_blob = head.windows.or_else(|| here().then(|| WindowsBlob::of(&windows)));
        Ok(Self {
            compression,
            pinned,
            uncompressed_len,
            compressed_len,
            digest,
            diff_id,
            spans,
            frames,
            windows,
            windows_blob,
            windows_at: head.windows_at(),
        })
    }
}

impl WindowsBlob {
    fn of(windows: &[u8]) -> Self {
        Self { digest: Digest::of(windows), len: windows.len() as u64 }
    }
}

impl Head {
    /// Reads it out of the start of a file. What is behind the head is not looked at.
    pub fn parse(start: &[u8]) -> Result<Self, IndexError> {
        Fields { rest: start }.head()
    }

    /// Reads it out of a file, from its start.
    pub fn read(file: impl Read) -> io::Result<Self> {
        Self::parse(&start_of(file)?).map_err(io::Error::other)
    }

    /// Where the windows are in the file, in bytes from its start.
    #[must_use]
    pub fn windows_at(&self) -> u64 {
        (self.len + self.count * RECORD_LEN) as u64
    }
}

impl Frame {
    /// Where the next one is.
    fn end(&self) -> u64 {
        self.start + u64::from(self.len)
    }
}

/// The first [`HEAD_LEN`] bytes of a file, or all of it.
fn start_of(file: impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(HEAD_LEN);
    file.take(HEAD_LEN as u64).read_to_end(&mut start)?;
    Ok(start)
}

fn checksum(head: &[u8], records: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(records);
    crc.finalize()
}

/// Numbers out of bytes.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], IndexError> {
        let (taken, rest) =
            self.rest.split_at_checked(len).ok_or(IndexError::Damaged("it is cut short"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], IndexError> {
        self.take(N)?.try_into().map_err(|_| IndexError::Damaged("it is cut short"))
    }

    fn u32(&mut self) -> Result<u32, IndexError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, IndexError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn digest(&mut self) -> Result<Digest, IndexError> {
        Ok(Digest::from_bytes(self.array()?))
    }

    /// All that comes before the checksum.
    fn head(&mut self) -> Result<Head, IndexError> {
        if self.take(8)? != MAGIC {
            return Err(IndexError::Damaged("it is none"));
        }
        let version = self.u32()?;
        version::check("the layer's index", version.into(), VERSION.into())?;
        let [compression, pinned @ 0..=1, 0, 0] = self.array()? else {
            return Err(IndexError::Damaged("its head is wrong"));
        };
        let compression = match compression {
            0 => Compression::None,
            1 => Compression::Gzip,
            2 => Compression::Zstd,
            _ => return Err(IndexError::Damaged("the layer is compressed in an unknown way")),
        };
        let count = self.u32()? as usize;
        if count > MAX_SPANS {
            return Err(IndexError::TooManySpans);
        }
        let (uncompressed_len, compressed_len) = (self.u64()?, self.u64()?);
        let (digest, diff_id) = (self.digest()?, self.digest()?);
        let (len, windows) = match version {
            VERSION => (HEAD_LEN, Some(WindowsBlob { digest: self.digest()?, len: self.u64()? })),
            _ => (HEAD_LEN_BEFORE, None),
        };
        Ok(Head {
            compression,
            pinned: pinned == 1,
            count,
            len,
            uncompressed_len,
            compressed_len,
            digest,
            diff_id,
            windows,
        })
    }
}

/// Collects the spans of a layer.
#[derive(Debug, Default)]
pub(super) struct Maker {
    spans: Vec<Span>,
    frames: Vec<Frame>,
    windows: Vec<u8>,
    /// The span that is not closed: codec, starts, its bytes so far.
    open: Option<Open>,
    /// Where the gzip member starts.
    member: u64,
}

#[derive(Debug)]
struct Open {
    codec: Codec,
    start: u64,
    compressed: u64,
    frame: Frame,
    hasher: Hasher,
    len: u64,
    end: (u64, u64),
}

impl Maker {
    /// Closes the span so far and begins another at these bytes of the segment and of the compressed layer.
    pub fn begin(&mut self, codec: Codec, start: u64, compressed: u64) -> Result<(), IndexError> {
        self.close();
        if self.spans.len() >= MAX_SPANS {
            return Err(IndexError::TooManySpans);
        }
        let frame = Frame { start: self.windows.len() as u64, ..Frame::default() };
        let end = (start, compressed);
        let hasher = Hasher::default();
        self.open = Some(Open { codec, start, compressed, frame, hasher, len: 0, end });
        Ok(())
    }

    /// The window of the open span, which has none yet.
    pub fn window(&mut self, window: &[u8]) -> Result<(), IndexError> {
        if let Some(Open { frame, .. }) = &mut self.open
            && !window.is_empty()
        {
            let bytes = zstd::bulk::compress(window, LEVEL).map_err(|_| IndexError::Window)?;
            frame.len = u32::try_from(bytes.len()).map_err(|_| IndexError::Window)?;
            frame.crc = crc32fast::hash(&bytes);
            self.windows.extend_from_slice(&bytes);
        }
        Ok(())
    }

    /// Adds bytes to the open span.
    pub fn update(&mut self, bytes: &[u8]) {
        if let Some(open) = &mut self.open {
            open.hasher.update(bytes);
            open.len += bytes.len() as u64;
        }
    }

    /// The open span may end here.
    pub fn end_at(&mut self, uncompressed: u64, compressed: u64) {
        if let Some(open) = &mut self.open {
            open.end = (uncompressed, compressed);
        }
    }

    /// A gzip member starts here in the segment.
    pub fn member_at(&mut self, uncompressed: u64) {
        self.member = uncompressed;
    }

    pub fn member(&self) -> u64 {
        self.member
    }

    /// How many bytes the open span has.
    pub fn len(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.len)
    }

    fn close(&mut self) {
        // a span of no bytes is nobody's
        let Some(open) = self.open.take().filter(|open| open.len > 0) else { return };
        let (end, compressed_end) = open.end;
        self.spans.push(Span {
            uncompressed: ByteRange::between(open.start, end),
            compressed: ByteRange::between(open.compressed, compressed_end),
            codec: open.codec,
            digest: open.hasher.finish(),
            proof: Proof::Whole,
        });
        self.frames.push(open.frame);
    }

    pub fn finish(
        mut self,
        compression: Compression,
        compressed_len: u64,
        digest: Digest,
        diff_id: Digest,
    ) -> Result<Index, IndexError> {
        // the window of a span of no bytes, which can only be the last
        if let Some(open) = self.open.as_ref().filter(|open| open.len == 0) {
            self.windows.truncate(open.frame.start as usize);
        }
        self.close();
        Ok(self.into_index(compression, false, compressed_len, digest, diff_id))
    }

    /// Adds a span of an index that somebody else has made, with its window.
    pub fn add(&mut self, span: Span, window: &[u8]) -> Result<(), IndexError> {
        self.begin(span.codec, span.uncompressed.offset(), span.compressed.offset())?;
        self.window(window)?;
        if let Some(open) = self.open.take() {
            self.frames.push(open.frame);
            self.spans.push(span);
        }
        Ok(())
    }

    /// An index of what was [added](Self::add).
    pub fn pinned(
        self,
        compression: Compression,
        compressed_len: u64,
        digest: Digest,
        diff_id: Digest,
    ) -> Index {
        self.into_index(compression, true, compressed_len, digest, diff_id)
    }

    fn into_index(
        self,
        compression: Compression,
        pinned: bool,
        compressed_len: u64,
        digest: Digest,
        diff_id: Digest,
    ) -> Index {
        let uncompressed_len = self.spans.last().map_or(0, |span| span.uncompressed.end());
        let windows_at = HEAD_LEN + self.spans.len() * RECORD_LEN;
        Index {
            compression,
            pinned,
            uncompressed_len,
            compressed_len,
            digest,
            diff_id,
            spans: self.spans,
            frames: self.frames,
            windows_blob: Some(WindowsBlob::of(&self.windows)),
            windows: self.windows,
            windows_at: windows_at as u64,
        }
    }
}
