//! Inflating with a bound: the declared size, to the byte.

use flate2::{Decompress, FlushDecompress, Status};

use super::blob::Target;
use crate::source::FetchError;
use crate::source::git::wrong;

/// How much is inflated at a time.
const PIECE: usize = 64 << 10;

/// An inflater that is used again and again: it holds a window of 32 KiB and a buffer.
pub struct Inflater {
    stream: Decompress,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflater").finish_non_exhaustive()
    }
}

impl Default for Inflater {
    fn default() -> Self {
        Self { stream: Decompress::new(true), buffer: vec![0; PIECE] }
    }
}

/// How far a call of [`Inflater::inflate`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inflated {
    /// Bytes of input that were used.
    pub used: usize,
    pub written: usize,
    /// The stream has ended; its checksum is right.
    pub done: bool,
}

impl Inflater {
    /// Begins a new stream.
    pub fn reset(&mut self) {
        self.stream.reset(true);
    }

    /// Inflates some of `input` into `target`, which takes no more bytes than declared.
    pub fn inflate(&mut self, input: &[u8], target: &mut Target) -> Result<Inflated, FetchError> {
        let missing = usize::try_from(target.missing()).unwrap_or(usize::MAX);
        // With everything there, one byte of room shows whether the stream really ends.
        let room = missing.clamp(1, PIECE);
        let output = self.buffer.get_mut(..room).unwrap_or_default();
        let (before_in, before_out) = (self.stream.total_in(), self.stream.total_out());
        let status = self
            .stream
            .decompress(input, output, FlushDecompress::None)
            .map_err(|e| wrong(format!("an object can't be inflated: {e}")))?;
        let used = (self.stream.total_in() - before_in) as usize;
        let written = (self.stream.total_out() - before_out) as usize;
        target.write(self.buffer.get(..written).unwrap_or_default())?;
        let done = status == Status::StreamEnd;
        if !done && used == 0 && written == 0 && !input.is_empty() {
            return Err(wrong("an object's compressed bytes lead nowhere"));
        }
        Ok(Inflated { used, written, done })
    }
}
