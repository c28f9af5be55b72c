//! Inflating a raw deflate stream (RFC 1951) that can be entered in its midst.
//!
//! `zlib-rs` gives what that needs (to stop at the ends of blocks, how many bits of the last byte are
//! left, to begin with some bits and a window) through its C interface only.

use std::ffi::c_int;
use std::fmt;

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateInit2_, inflatePrime,
    inflateReset, inflateSetDictionary, z_stream, zlibVersion,
};

/// How far back a deflate stream refers, in bytes.
pub const WINDOW: usize = 32 << 10;

/// No header and no trailer, a window of 2^15 bytes.
const RAW: c_int = -15;

/// A decompressor.
pub struct Inflate {
    /// Boxed, because the state behind it may refer to it.
    stream: Box<z_stream>,
}

/// What a step has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub consumed: usize,
    pub produced: usize,
    pub at: At,
}

/// Where a step has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Somewhere: more input or more room is needed.
    Midst,
    /// Between two blocks: so many bits (fewer than 8) of the last byte consumed belong to the next.
    BlockEnd { bits: u8 },
    /// Behind the last block.
    End,
}

/// What is given is no deflate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not what deflate makes")]
pub struct NotDeflate;

impl Inflate {
    /// At the start of a stream.
    pub fn new() -> Result<Self, NotDeflate> {
        let mut stream = Box::new(z_stream::default());
        let size = c_int::try_from(size_of::<z_stream>()).map_err(|_| NotDeflate)?;
        // SAFETY: `stream` is a valid z_stream with the default allocator, and as large as said.
        let result = unsafe { inflateInit2_(&raw mut *stream, RAW, zlibVersion(), size) };
        if result == Z_OK { Ok(Self { stream }) } else { Err(NotDeflate) }
    }

    /// Back to the start of a stream.
    pub fn reset(&mut self) -> Result<(), NotDeflate> {
        // SAFETY: `stream` was initialised by `new`.
        let result = unsafe { inflateReset(&raw mut *self.stream) };
        if result == Z_OK { Ok(()) } else { Err(NotDeflate) }
    }

    /// To a place between two blocks: `bits` bits (fewer than 8) are left of `byte`, the one before, and
    /// `window` is what came out until there, at most the last [`WINDOW`] bytes.
    pub fn enter(&mut self, bits: u8, byte: u8, window: &[u8]) -> Result<(), NotDeflate> {
        self.reset()?;
        if bits > 7 || window.len() > WINDOW {
            return Err(NotDeflate);
        }
        if bits > 0 {
            let value = c_int::from(byte >> (8 - bits));
            // SAFETY: `stream` was initialised by `new`.
            let result = unsafe { inflatePrime(&raw mut *self.stream, c_int::from(bits), value) };
            if result != Z_OK {
                return Err(NotDeflate);
            }
        }
        if !window.is_empty() {
            let len = u32::try_from(window.len()).map_err(|_| NotDeflate)?;
            // SAFETY: `stream` was initialised by `new`; `window` has `len` bytes, which are only
            // read, and only during the call.
            let result =
                unsafe { inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), len) };
            if result != Z_OK {
                return Err(NotDeflate);
            }
        }
        Ok(())
    }

    /// Inflates `input` into `output` until one of them or a block ends.
    pub fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, NotDeflate> {
        let available = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let (before_in, before_out) = (available(input.len()), available(output.len()));
        let stream = &mut *self.stream;
        (stream.next_in, stream.avail_in) = (input.as_ptr(), before_in);
        (stream.next_out, stream.avail_out) = (output.as_mut_ptr(), before_out);
        // SAFETY: `stream` was initialised by `new`; the two pointers are those of slices of at least
        // the lengths said, `output` exclusive, and are not used after this call.
        let result = unsafe { inflate(&raw mut *stream, Z_BLOCK) };
        let consumed = (before_in - stream.avail_in) as usize;
        let produced = (before_out - stream.avail_out) as usize;
        (stream.next_in, stream.avail_in) = (std::ptr::null(), 0);
        (stream.next_out, stream.avail_out) = (std::ptr::null_mut(), 0);
        let at = match result {
            Z_STREAM_END => At::End,
            // 128: between blocks; 64: behind the last; below that the number of bits left over
            Z_OK | Z_BUF_ERROR => match u8::try_from(stream.data_type ^ 128) {
                Ok(bits @ 0..8) => At::BlockEnd { bits },
                _ => At::Midst,
            },
            _ => return Err(NotDeflate),
        };
        Ok(Step { consumed, produced, at })
    }
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: `stream` was initialised by `new` and is not used again.
        unsafe { inflateEnd(&raw mut *self.stream) };
    }
}

// SAFETY: the stream's memory is its own alone, allocated by the global allocator, and tied to no
// thread.
unsafe impl Send for Inflate {}

impl fmt::Debug for Inflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflate").finish_non_exhaustive()
    }
}
