//! A span: bytes of a segment and the compressed bytes that they are made of.
//!
//! This is the one model of access: a plain tar, gzip or zstd layer compiles to spans
//! ([`indexer`](super::indexer)), and whoever fetches and fills knows nothing else of formats.

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
    /// Of its bytes in the segment: what comes out is believed only with this.
    pub digest: Digest,
}

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
        if self.uncompressed.len() > MAX_IN_MEMORY {
            return Err(SpanError::TooLong(self.uncompressed));
        }
        let mut bytes = Vec::with_capacity(self.uncompressed.len() as usize);
        let mut decoder = Decoder::new(self, window)?;
        decoder.push(compressed, &mut |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<_, SpanError>(())
        })?;
        decoder.finish()?;
        Ok(bytes)
    }
}

/// Decodes one span, as its bytes come.
#[derive(Debug)]
pub struct Decoder {
    span: Span,
    inner: Inner,
    hasher: Hasher,
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
        let hasher = Hasher::default();
        Ok(Self { span: span.clone(), inner, hasher, produced: 0, consumed: 0, piece })
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
        let want = self.span.uncompressed.len();
        if let Inner::Identity = self.inner {
            self.produced += input.len() as u64;
            self.hasher.update(input);
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
            self.produced += produced as u64;
            self.hasher.update(&self.piece[..produced]);
            if produced > 0 {
                sink(&self.piece[..produced])?;
            }
            if consumed == 0 && produced == 0 {
                break;
            }
        }
        if input.is_empty() { Ok(()) } else { Err(damaged("there is more behind its end").into()) }
    }

    /// Verifies that all that came out is the span.
    pub fn finish(self) -> Result<(), SpanError> {
        if self.produced != self.span.uncompressed.len() {
            return Err(SpanError::Damaged(self.span.compressed, "it ends too early"));
        }
        if self.hasher.finish() == self.span.digest {
            Ok(())
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
