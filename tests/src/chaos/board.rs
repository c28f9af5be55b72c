//! Shared memory of the chaos program and its readers.
//!
//! A reader announces an access in its slot before it begins and writes down what came of it in a ring.
//! So the program knows at any time who reads what since when, also of a reader that is blocked.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

pub const MAX_READERS: usize = 256;
pub const MAX_TREES: usize = 32;
/// Accesses of a reader that are kept.
const RING: usize = 512;

/// All that is shared. Everything is an atomic number: any bytes are a valid board.
#[repr(C)]
pub struct Board {
    /// Readers end by themselves once this is not 0.
    pub over: AtomicU64,
    pub trees: [TreeSlot; MAX_TREES],
    pub slots: [Slot; MAX_READERS],
}

/// A tree that can be read.
#[repr(C)]
#[derive(Debug)]
pub struct TreeSlot {
    /// Odd: it is open. Goes up by one at each opening and closing.
    pub generation: AtomicU64,
    pub seed: AtomicU64,
    pub files: AtomicU64,
    /// Which of its files are read next, by [`Content::nth`](super::content::Content::nth).
    pub cursor: AtomicU64,
    pub shard: AtomicU64,
}

/// A reader.
#[repr(C)]
#[derive(Debug)]
pub struct Slot {
    pub pid: AtomicU64,
    /// Odd: it is at what is announced.
    serial: AtomicU64,
    announced: [AtomicU64; 6],
    /// The tree that it uses, and one.
    pub in_use: AtomicU64,
    pub reads: AtomicU64,
    pub bytes: AtomicU64,
    /// How many accesses are in the ring, from the beginning.
    done: AtomicU64,
    ring: [[AtomicU64; 8]; RING],
}

/// What is read. `shard`: of the daemon that serves the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    pub tree: u64,
    pub file: u64,
    pub offset: u64,
    pub length: u64,
    /// Nobody had read the file before, and how it was read: see [`kind`](Self::kind).
    pub how: u64,
    pub shard: u64,
}

const COLD: u64 = 1 << 32;

impl Access {
    #[must_use]
    pub fn how(kind: usize, cold: bool) -> u64 {
        kind as u64 | if cold { COLD } else { 0 }
    }

    /// The place in [`Kind::READS`](crate::access::Kind::READS).
    #[must_use]
    pub fn kind(&self) -> usize {
        (self.how & 0xffff) as usize
    }

    /// Nobody had asked for the file before.
    #[must_use]
    pub fn is_cold(&self) -> bool {
        self.how & COLD != 0
    }
}

/// What came of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Right,
    /// Bytes that are zero and should not be.
    Zeros,
    Wrong,
    Errno(i32),
    /// SIGBUS, and the reader ended.
    Bus,
}

impl Outcome {
    const ERRNO: u64 = 1000;

    fn code(self) -> u64 {
        match self {
            Self::Right => 0,
            Self::Zeros => 1,
            Self::Wrong => 2,
            Self::Bus => 3,
            Self::Errno(errno) => Self::ERRNO + u64::from(errno.unsigned_abs()),
        }
    }

    fn of(code: u64) -> Self {
        match code {
            0 => Self::Right,
            1 => Self::Zeros,
            2 => Self::Wrong,
            3 => Self::Bus,
            _ => Self::Errno(code.saturating_sub(Self::ERRNO) as i32),
        }
    }
}

/// An access that is over. Times by [`now`](super::now).
#[derive(Debug, Clone, Copy)]
pub struct Done {
    pub access: Access,
    pub began: u64,
    pub ended: u64,
    pub outcome: Outcome,
}

/// An access that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    /// Tells it from all others of this reader.
    pub serial: u64,
    pub access: Access,
    pub began: u64,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

impl Board {
    /// A new one in the file `path`, which must not exist.
    pub fn create(path: &Path) -> Result<&'static Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_len(size_of::<Self>() as u64)?;
        Self::map(&file)
    }

    pub fn open(path: &Path) -> Result<&'static Self> {
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() != size_of::<Self>() as u64 {
            bail!("{} is no board of this program's", path.display());
        }
        Self::map(&file)
    }

    fn map(file: &File) -> Result<&'static Self> {
        let size = NonZeroUsize::new(size_of::<Self>()).context("an empty board")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new shared mapping where the kernel wants it, of a file that has the size and is
        // never truncated. It is never unmapped.
        let address = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0)? };
        // SAFETY: mapped for good, aligned to a page, and made of atomic numbers alone, for which any
        // bytes will do, also those that another process is writing.
        Ok(unsafe { address.cast::<Self>().as_ref() })
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst) != 0
    }

    /// Whether a reader is at something in this tree, or about to be.
    #[must_use]
    pub fn is_used(&self, tree: usize) -> bool {
        self.slots.iter().any(|slot| slot.in_use.load(Ordering::SeqCst) == tree as u64 + 1)
    }
}

impl TreeSlot {
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.generation.load(Ordering::SeqCst) % 2 == 1
    }

    /// Opens it or closes it.
    pub fn turn(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// All of its files have been asked for.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.cursor.load(Ordering::Relaxed) >= self.files.load(Ordering::Relaxed)
    }
}

impl Slot {
    /// From now on the reader is at `access`. Gives the time.
    pub fn announce(&self, access: &Access) -> u64 {
        let began = super::now();
        let Access { tree, file, offset, length, how, shard } = *access;
        let place = tree << 32 | file;
        for (cell, value) in self.announced.iter().zip([place, offset, length, how, shard, began]) {
            cell.store(value, Ordering::Relaxed);
        }
        self.serial.fetch_add(1, Ordering::SeqCst);
        began
    }

    /// What is announced is over. May be called in a signal handler.
    pub fn finish(&self, outcome: Outcome) {
        let number = self.done.load(Ordering::Relaxed);
        let entry = &self.ring[number as usize % RING];
        for (cell, value) in entry.iter().zip(&self.announced) {
            cell.store(value.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        entry[6].store(super::now(), Ordering::Relaxed);
        entry[7].store(outcome.code(), Ordering::Relaxed);
        self.done.store(number + 1, Ordering::SeqCst);
        self.serial.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether something is announced.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.serial.load(Ordering::SeqCst) % 2 == 1
    }

    /// What is announced, if anything is.
    #[must_use]
    pub fn announced(&self) -> Option<Announced> {
        for _ in 0..1000 {
            let serial = self.serial.load(Ordering::SeqCst);
            if serial.is_multiple_of(2) {
                return None;
            }
            let (access, began) = access(&self.announced);
            if self.serial.load(Ordering::SeqCst) == serial {
                return Some(Announced { serial, access, began });
            }
        }
        None
    }

    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    /// The accesses from number `from` on that are still in the ring.
    #[must_use]
    pub fn since(&self, from: u64) -> Vec<Done> {
        let end = self.done();
        // the oldest may be overwritten while it is read
        let first = from.max(end.saturating_sub(RING as u64 - 8));
        let entries = (first..end).map(|number| {
            let entry = &self.ring[number as usize % RING];
            let (access, began) = access(entry);
            let ended = entry[6].load(Ordering::Relaxed);
            Done { access, began, ended, outcome: Outcome::of(entry[7].load(Ordering::Relaxed)) }
        });
        entries.collect()
    }
}

fn access(cells: &[AtomicU64]) -> (Access, u64) {
    let mut values = [0; 6];
    for (value, cell) in values.iter_mut().zip(cells) {
        *value = cell.load(Ordering::Relaxed);
    }
    let [place, offset, length, how, shard, began] = values;
    let access =
        Access { tree: place >> 32, file: place & 0xffff_ffff, offset, length, how, shard };
    (access, began)
}

/// An error as an outcome.
#[must_use]
pub fn outcome_of(error: &io::Error) -> Outcome {
    Outcome::Errno(error.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_announced_and_what_came_of_it() {
        let scratch = crate::scratch::Scratch::new("board").unwrap();
        let path = scratch.path().join("board");
        let board = Board::create(&path).unwrap();
        let slot = &Board::open(&path).unwrap().slots[3];
        let access = Access {
            tree: 2,
            file: 70_000,
            offset: 5,
            length: 9,
            how: Access::how(4, true),
            shard: 1,
        };
        assert!(board.slots[3].announced().is_none());
        slot.announce(&access);
        let seen = board.slots[3].announced().unwrap();
        assert_eq!((seen.access, seen.access.kind(), seen.access.is_cold()), (access, 4, true));
        slot.finish(Outcome::Errno(5));
        assert!(board.slots[3].announced().is_none());
        for n in 0..2 * RING as u64 {
            slot.announce(&Access { file: n, ..access });
            slot.finish(Outcome::Right);
        }
        let done = board.slots[3].since(0);
        assert!(done.len() < RING && done.len() > RING / 2);
        assert_eq!(done.last().unwrap().access.file, 2 * RING as u64 - 1);
        assert_eq!(board.slots[3].since(1_000_000).len(), 0);
        assert_eq!(Outcome::of(Outcome::Errno(107).code()), Outcome::Errno(107));
    }
}
