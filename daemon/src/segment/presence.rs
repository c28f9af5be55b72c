//! What of a segment is there: holes and data, as the filesystem tells them (lseek(2),
//! `SEEK_DATA` and `SEEK_HOLE`).
//!
//! The fd's file position is moved. So an fd given here must be used with `pread` and `pwrite` only.
//! Not for an fd on a mount through which the segment is marked: `lseek` itself raises no events, but
//! what follows will.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::range::ByteRange;

/// True when no byte of `range` that lies within the file is in a hole. Nothing is always there.
pub fn present(fd: impl AsFd, range: ByteRange) -> nix::Result<bool> {
    Ok(holes(fd, range).next().transpose()?.is_none())
}

/// The holes in `range`, in order: not empty, not adjacent, cut to `range` and to the file.
pub fn holes<F: AsFd>(fd: F, range: ByteRange) -> Runs<F> {
    Runs { fd, at: range.offset(), end: range.end(), kind: Kind::Hole }
}

/// The data in `range`, in order: not empty, not adjacent, cut to `range` and to the file.
pub fn data<F: AsFd>(fd: F, range: ByteRange) -> Runs<F> {
    Runs { fd, at: range.offset(), end: range.end(), kind: Kind::Data }
}

/// Makes a hole of `range` (fallocate(2)).
pub fn punch(fd: impl AsFd, range: ByteRange) -> io::Result<()> {
    let signed = |number: u64| i64::try_from(number).map_err(io::Error::other);
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(fd, mode, signed(range.offset())?, signed(range.len())?)?)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Hole,
    Data,
}

/// See [`holes`] and [`data`]. Ends after an error.
#[derive(Debug)]
pub struct Runs<F> {
    fd: F,
    at: u64,
    end: u64,
    kind: Kind,
}

impl<F: AsFd> Runs<F> {
    /// The first byte of `kind` from `from` on. `None`: there is none.
    fn seek(&self, from: u64, kind: Kind) -> nix::Result<Option<u64>> {
        let Ok(from) = i64::try_from(from) else {
            return Ok(None);
        };
        let whence = match kind {
            Kind::Hole => Whence::SeekHole,
            Kind::Data => Whence::SeekData,
        };
        match lseek(&self.fd, from, whence) {
            Ok(at) => Ok(u64::try_from(at).ok()),
            // at or past the end of the file, or only a hole up to there
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The end of the file, or of the range if that comes first.
    fn limit(&self) -> nix::Result<u64> {
        let size = nix::sys::stat::fstat(&self.fd)?.st_size;
        Ok(self.end.min(u64::try_from(size).unwrap_or(0)))
    }

    fn run(&mut self) -> nix::Result<Option<ByteRange>> {
        let limit = self.limit()?;
        if self.at >= limit {
            return Ok(None);
        }
        let other = match self.kind {
            Kind::Hole => Kind::Data,
            Kind::Data => Kind::Hole,
        };
        // the end of a file counts as a hole: no longer ours
        let start = self.seek(self.at, self.kind)?.unwrap_or(limit);
        if start >= limit {
            return Ok(None);
        }
        let end = self.seek(start, other)?.unwrap_or(limit).min(limit);
        // A hole that was filled in between would give an empty run: one that moves on, all the same.
        self.at = end.max(start + 1);
        Ok(Some(ByteRange::between(start, self.at)))
    }
}

impl<F: AsFd> Iterator for Runs<F> {
    type Item = nix::Result<ByteRange>;

    fn next(&mut self) -> Option<Self::Item> {
        let run = self.run();
        if !matches!(run, Ok(Some(_))) {
            self.at = self.end;
        }
        run.transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::range::BLOCK;

    fn file() -> File {
        // /var/tmp: a tmpfs on /tmp would do too, but pages there may be larger than blocks
        tempfile::tempfile_in("/var/tmp").unwrap()
    }

    fn collect(runs: Runs<&File>) -> Vec<ByteRange> {
        runs.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn finds_holes_and_data() {
        let file = file();
        file.set_len(10 * BLOCK).unwrap();
        file.write_all_at(&[1; 2 * BLOCK as usize], 2 * BLOCK).unwrap();
        file.write_all_at(&[1; BLOCK as usize], 9 * BLOCK).unwrap();
        let blocks = |offset, len| ByteRange::new(offset * BLOCK, len * BLOCK);
        assert_eq!(collect(holes(&file, blocks(0, 10))), [blocks(0, 2), blocks(4, 5)]);
        assert_eq!(collect(data(&file, blocks(0, 10))), [blocks(2, 2), blocks(9, 1)]);
        assert_eq!(collect(holes(&file, blocks(3, 3))), [blocks(4, 2)]);
        assert_eq!(
            collect(data(&file, ByteRange::new(3 * BLOCK + 5, 100))),
            [ByteRange::new(3 * BLOCK + 5, 100)]
        );
        assert!(present(&file, blocks(2, 2)).unwrap());
        assert!(!present(&file, blocks(2, 3)).unwrap());
        assert!(!present(&file, blocks(0, 10)).unwrap());
    }

    #[test]
    fn past_the_end_there_is_nothing() {
        let file = file();
        file.set_len(BLOCK + 10).unwrap();
        let all = ByteRange::new(0, u64::MAX);
        assert_eq!(collect(holes(&file, all)), [ByteRange::new(0, BLOCK + 10)]);
        assert_eq!(collect(data(&file, all)), []);
        file.write_all_at(&[1; BLOCK as usize + 10], 0).unwrap();
        assert_eq!(collect(holes(&file, all)), []);
        assert_eq!(collect(data(&file, all)), [ByteRange::new(0, BLOCK + 10)]);
        assert!(present(&file, all).unwrap());
        for offset in [BLOCK + 10, 1 << 40, 1 << 63, u64::MAX] {
            assert_eq!(collect(holes(&file, ByteRange::new(offset, 10))), []);
            assert!(present(&file, ByteRange::new(offset, 10)).unwrap());
        }
        assert!(present(&file, ByteRange::new(0, 0)).unwrap());
    }

    #[test]
    fn an_error_is_the_last_word() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let mut runs = holes(&pipe, ByteRange::new(0, 10));
        // a pipe has size 0: nothing to look for, and no error either
        assert!(runs.next().is_none());
        let directory = File::open("/proc/self/fd").unwrap();
        assert!(data(&directory, ByteRange::new(0, 10)).count() <= 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn agrees_with_what_was_written(
            blocks in prop::collection::vec(any::<bool>(), 1..24),
            first in 0..24_u64,
            count in 0..24_u64,
        ) {
            let file = file();
            file.set_len(blocks.len() as u64 * BLOCK).unwrap();
            for (number, _) in blocks.iter().enumerate().filter(|(_, written)| **written) {
                file.write_all_at(&[1; BLOCK as usize], number as u64 * BLOCK).unwrap();
            }
            let range = ByteRange::new(first * BLOCK, count * BLOCK);
            for (runs, written) in [(holes(&file, range), false), (data(&file, range), true)] {
                let found: Vec<_> = collect(runs)
                    .into_iter()
                    .flat_map(|run| (run.offset() / BLOCK)..(run.end() / BLOCK))
                    .collect();
                let expected: Vec<_> = (first..first + count)
                    .filter(|n| blocks.get(*n as usize) == Some(&written))
                    .collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
