//! The hole map of a file: lseek(2), `SEEK_DATA` and `SEEK_HOLE`.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::range::ByteRange;

/// `None`: there is neither data nor hole at `offset` or after it, since the file ends there.
fn seek(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    match lseek(file, offset, whence) {
        Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The parts of `range` that are data, in order, neighbours joined.
pub fn data_ranges(file: &File, range: ByteRange) -> io::Result<Vec<ByteRange>> {
    let mut found: Vec<ByteRange> = Vec::new();
    let mut at = range.offset();
    while at < range.end() {
        let Some(start) = seek(file, at, Whence::SeekData)? else { break };
        if start >= range.end() {
            break;
        }
        // Punched meanwhile: no progress would be made.
        let end = seek(file, start, Whence::SeekHole)?.unwrap_or(start).max(start);
        let end = if end == start { start + 1 } else { end };
        match found.last_mut() {
            Some(last) if last.end() == start => *last = ByteRange::between(last.offset(), end),
            _ => found.push(ByteRange::between(start, end)),
        }
        at = end;
    }
    Ok(found)
}

/// The parts of `range` that are holes, in order.
pub fn holes(file: &File, range: ByteRange) -> io::Result<Vec<ByteRange>> {
    let mut found = Vec::new();
    let mut at = range.offset();
    for data in data_ranges(file, range)? {
        if data.offset() > at {
            found.push(ByteRange::between(at, data.offset()));
        }
        at = data.end();
    }
    if at < range.end() {
        found.push(ByteRange::between(at, range.end()));
    }
    Ok(found)
}

/// Where the first hole starts: the file's end if there is none before.
pub fn first_hole(file: &File) -> io::Result<u64> {
    Ok(seek(file, 0, Whence::SeekHole)?.unwrap_or(0))
}
