//! A span: bytes of a segment and the compressed bytes that they are made of.
//!
//! This is the one model of access: a plain tar, gzip or zstd layer compiles to spans
//! ([`indexer`](super::indexer)), and so do the indexes that images bring along ([`pinned`](super::pinned)); whoever
//! fetches and fills knows nothing else of formats.

use thiserror::Error;
use zstd::stream::raw::{Decoder as ZstdDecoder, Operation};

use super::digest::{Digest, Hasher};
use super::gunzip::Gunzip;
use crate::range::ByteRange;

/// The longest span that [`Span::decode`] decodes in memory, in bytes. A longer one needs a [`Decoder`].
pub const MAX_IN_MEMORY: u64 = 64 << 20;

/// How much is inflated at a time, in bytes.
pub(super) const PIECE: usize = 128 << 10;

/// One unit of decompression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its bytes in the segment. Starts and ends are at no block's in general.
    pub uncompressed: ByteRange,
    /// What has to be fetched of the compressed layer. Neighbours may share a byte.
    pub compressed: ByteRange,
    pub codec: Codec,
    /// What comes out is believed only with this.
    pub digest: Digest,
    pub proof: Proof,
}

/// What the digest of a span is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// All its bytes in the segment.
    Whole,
    /// So many bytes at its start. What follows are headers of the archive, whose length is not known before they are
    /// decoded: the span has room for them, then zeros, and in its last [`TRAILER`] bytes stands how many bytes came
    /// out (a little-endian number). No file has bytes there; the headers count once the whole archive is proved.
    Start(u64),
    /// Its compressed bytes.
    Compressed,
}

/// The length of what ends a span of [`Proof::Start`], in bytes.
pub const TRAILER: u64 = 8;

/// How to decode a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// The bytes are the segment's.
    Identity,
    /// Whole gzip members, or the start of one.
    Gzip,
    /// In the midst of a gzip member, between two deflate blocks: the upper `bits` bits (fewer than 8) of the
    /// first byte belong to the span. `window` bytes before the span are needed.
    Deflate { bits: u8, window: u32 },
    /// Whole zstd frames.
    Zstd,
}

/// Why a span can't be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpanError {
    #[error("the compressed bytes {0} of the layer are damaged: {1}")]
    Damaged(ByteRange, &'static str),
    #[error("bytes {0} of the layer are not those that it was indexed with")]
    Digest(ByteRange),
    #[error("span {0} is too long to be decoded at once")]
    TooLong(ByteRange),
}

impl Span {
    /// How many bytes of the segment before the span are needed to decode it. They are in the index
    /// ([`Index::window`](super::index::Index::window)), and in the segment, once the span before is there.
    #[must_use]
    pub fn window_len(&self) -> usize {
        match self.codec {
            Codec::Deflate { window, .. } => window as usize,
            _ => 0,
        }
    }

    /// Decodes and verifies a span of at most [`MAX_IN_MEMORY`] bytes. `compressed` is what
    /// [`compressed`](Self::compressed) names, `window` has [`window_len`](Self::window_len) bytes.
    pub fn decode(&self, compressed: &[u8], window: &[u8]) -> Result<Vec<u8>, SpanError> {
        let len = self.uncompressed.len();
        if len > MAX_IN_MEMORY {
            return Err(SpanError::TooLong(self.uncompressed));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        let mut decoder = Decoder::new(self, window)?;
        decoder.push(compressed, &mut |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<_, SpanError>(())
        })?;
        let came = decoder.finish()?;
        if let Proof::Start(_) = self.proof {
            bytes.resize(len.saturating_sub(TRAILER) as usize, 0);
            bytes.extend_from_slice(&came.to_le_bytes());
        }
        Ok(bytes)
    }

    /// How many bytes of a span, as it is in the segment, are the archive's; `None`: the archive has more there than
    /// the span has room for.
    #[must_use]
    pub fn archived(&self, bytes: &[u8]) -> Option<usize> {
        let Proof::Start(_) = self.proof else { return Some(bytes.len()) };
        let (rest, trailer) = bytes.split_last_chunk::<{ TRAILER as usize }>()?;
        let came = usize::try_from(u64::from_le_bytes(*trailer)).ok()?;
        (came <= rest.len()).then_some(came)
    }
}

/// Decodes one span, as its bytes come.
#[derive(Debug)]
pub struct Decoder {
    span: Span,
    inner: Inner,
    hasher: Hasher,
    /// How much is given, and hashed, of what comes out.
    room: u64,
    proved: u64,
    produced: u64,
    consumed: u64,
    piece: Vec<u8>,
}

enum Inner {
    Identity,
    Gzip(Gunzip),
    Zstd(ZstdDecoder<'static>),
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Identity => "Identity",
            Self::Gzip(_) => "Gzip",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl Decoder {
    /// `window` has [`Span::window_len`] bytes.
    pub fn new(span: &Span, window: &[u8]) -> Result<Self, SpanError> {
        let damaged = |what| SpanError::Damaged(span.compressed, what);
        if window.len() != span.window_len() {
            return Err(damaged("the window is of another length"));
        }
        let inner = match span.codec {
            Codec::Identity => Inner::Identity,
            Codec::Gzip => Inner::Gzip(Gunzip::new().map_err(damaged)?),
            Codec::Deflate { bits, .. } => {
                Inner::Gzip(Gunzip::within(bits, window).map_err(damaged)?)
            }
            Codec::Zstd => Inner::Zstd(zstd_decoder().map_err(|_| damaged("there is no memory"))?),
        };
        let piece = match inner {
            Inner::Identity => Vec::new(),
            _ => vec![0; PIECE],
        };
        let len = span.uncompressed.len();
        let (room, proved) = match span.proof {
            Proof::Whole => (len, len),
            Proof::Start(proved) => (len.saturating_sub(TRAILER), proved),
            Proof::Compressed => (len, 0),
        };
        let (span, hasher) = (span.clone(), Hasher::default());
        Ok(Self { span, inner, hasher, room, proved, produced: 0, consumed: 0, piece })
    }

    /// Takes the next compressed bytes and gives what they make to `sink`. Nobody may see that before
    /// [`finish`](Self::finish) has verified it. What is more than the span has is an error.
    pub fn push<E: From<SpanError>>(
        &mut self,
        mut input: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let damaged = |what| SpanError::Damaged(self.span.compressed, what);
        self.consumed = self.consumed.saturating_add(input.len() as u64);
        if self.consumed > self.span.compressed.len() {
            return Err(damaged("there is more than the span has").into());
        }
        if self.span.proof == Proof::Compressed {
            self.hasher.update(input);
        }
        // what has room for headers may have more of them
        let want = match self.span.proof {
            Proof::Start(_) => MAX_IN_MEMORY,
            _ => self.span.uncompressed.len(),
        };
        if let Inner::Identity = self.inner {
            self.produced += input.len() as u64;
            if self.span.proof == Proof::Whole {
                self.hasher.update(input);
            }
            return sink(input);
        }
        loop {
            let left = want - self.produced;
            // one byte of room more, so that what is too long is seen
            let room = usize::try_from(left).unwrap_or(usize::MAX).saturating_add(1).min(PIECE);
            let room = &mut self.piece[..room];
            let (consumed, produced) = match &mut self.inner {
                Inner::Identity => return Ok(()),
                Inner::Gzip(gunzip) => {
                    let step = gunzip.step(input, room).map_err(damaged)?;
                    (step.consumed, step.produced)
                }
                Inner::Zstd(decoder) => {
                    let step = decoder.run_on_buffers(input, room);
                    let step = step.map_err(|_| damaged("it is not what zstd makes"))?;
                    (step.bytes_read, step.bytes_written)
                }
            };
            if produced as u64 > left {
                // A span may end in the midst of a byte, or of what a deflate block's start gives.
                return Err(damaged("more comes out than the span has").into());
            }
            input = &input[consumed..];
            let before = self.produced;
            self.produced += produced as u64;
            let up_to = |end: u64| usize::try_from(end.saturating_sub(before)).unwrap_or(produced);
            self.hasher.update(&self.piece[..up_to(self.proved).min(produced)]);
            let given = &self.piece[..up_to(self.room).min(produced)];
            if !given.is_empty() {
                sink(given)?;
            }
            if consumed == 0 && produced == 0 {
                break;
            }
        }
        if input.is_empty() { Ok(()) } else { Err(damaged("there is more behind its end").into()) }
    }

    /// Verifies that all that came out is the span; gives how many bytes that were.
    pub fn finish(self) -> Result<u64, SpanError> {
        let enough = match (self.span.proof, &self.inner) {
            (Proof::Start(proved), Inner::Gzip(gunzip)) => {
                self.produced >= proved && gunzip.is_at_end()
            }
            (Proof::Start(proved), _) => self.produced >= proved,
            _ => self.produced == self.span.uncompressed.len(),
        };
        if !enough {
            return Err(SpanError::Damaged(self.span.compressed, "it ends too early"));
        }
        if self.hasher.finish() == self.span.digest {
            Ok(self.produced)
        } else {
            Err(SpanError::Digest(self.span.uncompressed))
        }
    }
}

/// A decoder that refuses windows of more than 128 MiB.
pub(super) fn zstd_decoder() -> std::io::Result<ZstdDecoder<'static>> {
    let mut decoder = ZstdDecoder::new()?;
    decoder.set_parameter(zstd::stream::raw::DParameter::WindowLogMax(27))?;
    Ok(decoder)
}
