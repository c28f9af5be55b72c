//! A layer, streamed once: its bytes, its digests, and an index of it.

use thiserror::Error;
use zstd::stream::raw::{Decoder as ZstdDecoder, Operation};

use super::digest::Hasher;
use super::gunzip::{At, Gunzip};
use super::index::{Index, IndexError, Maker};
use super::span::{Codec, PIECE, zstd_decoder};
use super::window::Window;
use crate::range::BLOCK;
use crate::sys::inflate::WINDOW;

/// A span ends at the first possible place behind so many bytes of the segment.
pub const SPAN: u64 = 512 << 10;

/// The longest layer in bytes, uncompressed: an image addresses 2^32 blocks of 512 bytes in a device.
pub const MAX_LAYER: u64 = 512 * (u32::MAX as u64);

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// Tells by the first bytes of a layer, of which there should be [`MAGIC_LEN`](Self::MAGIC_LEN).
    #[must_use]
    pub fn detect(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // a frame, or one that is skipped
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// How many bytes [`detect`](Self::detect) looks at.
    pub const MAGIC_LEN: usize = 4;
}

/// Why a layer can't be taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IndexerError {
    #[error(
        "the layer is damaged at byte {at} of its compressed form: {what}; pull it again, or \
         have the image pushed again"
    )]
    Damaged { at: u64, what: &'static str },
    #[error(
        "the layer ends too early, after {0} compressed bytes; pull it again, or have the image pushed again"
    )]
    Truncated(u64),
    #[error("the layer is larger than {MAX_LAYER} bytes")]
    TooLarge,
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// Takes a layer in pieces of any length.
#[derive(Debug)]
pub struct Indexer {
    span: u64,
    state: State,
    /// Compressed bytes that were taken, and bytes that came out.
    taken: u64,
    given: u64,
    digest: Hasher,
    diff_id: Hasher,
    maker: Maker,
}

impl Default for Indexer {
    fn default() -> Self {
        Self::new(SPAN)
    }
}

enum State {
    /// The first bytes, until it is known what they are.
    Start(Vec<u8>),
    Identity,
    Gzip {
        gunzip: Gunzip,
        output: Output,
        /// The last byte that was taken.
        last: u8,
        /// Of the open span, until it is known what that needs of it.
        window: Option<Window>,
    },
    Zstd {
        decoder: ZstdDecoder<'static>,
        output: Vec<u8>,
        /// Between two frames.
        between: bool,
    },
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Start(_) => "Start",
            Self::Identity => "Identity",
            Self::Gzip { .. } => "Gzip",
            Self::Zstd { .. } => "Zstd",
        })
    }
}

/// What came out last: at most [`WINDOW`] bytes that were given, then room for what comes.
struct Output {
    buffer: Vec<u8>,
    /// Where what comes next goes.
    at: usize,
}

impl Output {
    fn new() -> Self {
        Self { buffer: vec![0; WINDOW + PIECE], at: 0 }
    }

    fn room(&mut self) -> &mut [u8] {
        if self.at == self.buffer.len() {
            let start = self.at - WINDOW;
            self.buffer.copy_within(start.., 0);
            self.at = WINDOW;
        }
        &mut self.buffer[self.at..]
    }

    /// The last bytes, as many as a window has; `since` came since the start of the member.
    fn window(&self, since: u64) -> &[u8] {
        let len = usize::try_from(since).unwrap_or(WINDOW).min(WINDOW).min(self.at);
        &self.buffer[self.at - len..self.at]
    }
}

impl Indexer {
    /// With spans of about `span` bytes.
    #[must_use]
    pub fn new(span: u64) -> Self {
        Self {
            span: span.max(1).next_multiple_of(BLOCK),
            state: State::Start(Vec::new()),
            taken: 0,
            given: 0,
            digest: Hasher::default(),
            diff_id: Hasher::default(),
            maker: Maker::default(),
        }
    }

    /// Takes the next compressed bytes; what they make goes to `sink`, in order. After an error it is of
    /// no more use.
    pub fn push<E: From<IndexerError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.digest.update(bytes);
        if let State::Start(start) = &mut self.state {
            start.extend_from_slice(bytes);
            if start.len() < Compression::MAGIC_LEN {
                return Ok(());
            }
            let start = self.detect()?;
            return self.take(&start, sink);
        }
        self.take(bytes, sink)
    }

    /// Ends the layer.
    pub fn finish<E: From<IndexerError>>(
        mut self,
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Index, E> {
        if let State::Start(_) = self.state {
            let start = self.detect()?;
            self.take(&start, sink)?;
        }
        let compression = match &self.state {
            State::Gzip { gunzip, .. } => {
                // so its last member has ended, and the window of the last span is kept
                if !gunzip.is_at_end() {
                    return Err(IndexerError::Truncated(self.taken).into());
                }
                Compression::Gzip
            }
            State::Zstd { between, .. } => {
                if !between {
                    return Err(IndexerError::Truncated(self.taken).into());
                }
                Compression::Zstd
            }
            State::Start(_) | State::Identity => {
                self.maker.end_at(self.given, self.taken);
                Compression::None
            }
        };
        let (digest, diff_id) = (self.digest.finish(), self.diff_id.finish());
        let index = self.maker.finish(compression, self.taken, digest, diff_id);
        Ok(index.map_err(IndexerError::from)?)
    }

    /// How many bytes have come out so far.
    #[must_use]
    pub fn uncompressed_len(&self) -> u64 {
        self.given
    }

    fn detect(&mut self) -> Result<Vec<u8>, IndexerError> {
        let State::Start(start) = &mut self.state else { return Ok(Vec::new()) };
        let start = std::mem::take(start);
        let no_memory = |_| IndexerError::Damaged { at: 0, what: "there is no memory" };
        (self.state, _) = match Compression::detect(&start) {
            Compression::None => (State::Identity, self.maker.begin(Codec::Identity, 0, 0)?),
            Compression::Gzip => {
                let gunzip = Gunzip::new();
                let gunzip = gunzip.map_err(|what| IndexerError::Damaged { at: 0, what })?;
                let state = State::Gzip { gunzip, output: Output::new(), last: 0, window: None };
                (state, self.maker.begin(Codec::Gzip, 0, 0)?)
            }
            Compression::Zstd => {
                let decoder = zstd_decoder().map_err(no_memory)?;
                let state = State::Zstd { decoder, output: vec![0; PIECE], between: true };
                (state, self.maker.begin(Codec::Zstd, 0, 0)?)
            }
        };
        Ok(start)
    }

    fn take<E: From<IndexerError>>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self.state {
            State::Start(_) => Ok(()),
            State::Identity => self.take_plain(bytes, sink),
            State::Gzip { .. } => self.take_gzip(bytes, sink),
            State::Zstd { .. } => self.take_zstd(bytes, sink),
        }
    }

    fn take_plain<E: From<IndexerError>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            let left = self.span - self.given % self.span;
            let (piece, rest) = bytes.split_at(bytes.len().min(left as usize));
            if self.maker.len() >= self.span {
                self.maker.end_at(self.given, self.taken);
                let begun = self.maker.begin(Codec::Identity, self.given, self.taken);
                begun.map_err(IndexerError::from)?;
            }
            self.taken += piece.len() as u64;
            self.given += piece.len() as u64;
            check_len(self.given)?;
            self.diff_id.update(piece);
            self.maker.update(piece);
            sink(piece)?;
            bytes = rest;
        }
        Ok(())
    }

    fn take_gzip<E: From<IndexerError>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let State::Gzip { gunzip, output, last, window } = &mut self.state else { return Ok(()) };
        loop {
            let step = gunzip.step(bytes, output.room());
            let step = step.map_err(|what| IndexerError::Damaged { at: self.taken, what })?;
            let (taken, rest) = bytes.split_at(step.consumed);
            bytes = rest;
            *last = taken.last().copied().unwrap_or(*last);
            if let Some(open) = window {
                open.push(taken, step.produced);
                // a member has nothing to do with the one before
                if open.is_ready() || step.at == At::Member {
                    keep(&mut self.maker, window)?;
                }
            }
            self.taken += step.consumed as u64;
            self.given += step.produced as u64;
            check_len(self.given)?;
            let piece = &output.buffer[output.at..output.at + step.produced];
            output.at += step.produced;
            self.diff_id.update(piece);
            self.maker.update(piece);
            if !piece.is_empty() {
                sink(piece)?;
            }
            match step.at {
                At::Midst => {}
                At::Member => {
                    // the next member may not come: the span ends here, and begins when it does
                    self.maker.end_at(self.given, self.taken);
                    self.maker.member_at(self.given);
                    if self.maker.len() >= self.span {
                        let begun = self.maker.begin(Codec::Gzip, self.given, self.taken);
                        begun.map_err(IndexerError::from)?;
                    }
                }
                At::Block { bits } => {
                    if self.maker.len() >= self.span {
                        let before = output.window(self.given - self.maker.member());
                        self.maker.end_at(self.given, self.taken);
                        let codec = Codec::Deflate { bits, window: before.len() as u32 };
                        let start = self.taken - u64::from(bits > 0);
                        keep(&mut self.maker, window)?;
                        let begun = self.maker.begin(codec, self.given, start);
                        begun.map_err(IndexerError::from)?;
                        *window = Some(Window::new(bits, *last, before));
                    }
                }
            }
            if step.consumed == 0 && step.produced == 0 {
                return Ok(());
            }
        }
    }

    fn take_zstd<E: From<IndexerError>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let State::Zstd { decoder, output, between } = &mut self.state else { return Ok(()) };
        loop {
            if bytes.is_empty() && *between {
                return Ok(());
            }
            let step = decoder.run_on_buffers(bytes, output);
            let step = step.map_err(|_| IndexerError::Damaged {
                at: self.taken,
                what: "it is not what zstd makes",
            })?;
            bytes = &bytes[step.bytes_read..];
            self.taken += step.bytes_read as u64;
            self.given += step.bytes_written as u64;
            check_len(self.given)?;
            let piece = &output[..step.bytes_written];
            self.diff_id.update(piece);
            self.maker.update(piece);
            if !piece.is_empty() {
                sink(piece)?;
            }
            if step.bytes_read == 0 && step.bytes_written == 0 {
                return Ok(());
            }
            *between = step.remaining == 0;
            if *between {
                self.maker.end_at(self.given, self.taken);
                if self.maker.len() >= self.span {
                    let begun = self.maker.begin(Codec::Zstd, self.given, self.taken);
                    begun.map_err(IndexerError::from)?;
                }
            }
        }
    }
}

/// Keeps what the open span needs of its window, if it has one that is not kept yet.
fn keep(maker: &mut Maker, window: &mut Option<Window>) -> Result<(), IndexerError> {
    match window.take() {
        Some(window) => Ok(maker.window(&window.finish())?),
        None => Ok(()),
    }
}

fn check_len(len: u64) -> Result<(), IndexerError> {
    if len <= MAX_LAYER { Ok(()) } else { Err(IndexerError::TooLarge) }
}
