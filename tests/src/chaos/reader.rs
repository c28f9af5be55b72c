//! A reader: reads ranges of files in all ways and compares every byte, until the board says that it
//! is over.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::board::{Access, Board, MAX_TREES, Outcome, Slot, outcome_of};
use super::content::Content;
use crate::access::{self, Kind};
use crate::repository::Random;

/// The exit code of a reader that got SIGBUS.
pub const BUS_EXIT: i32 = 7;

/// The longest range that is read in one go, in bytes.
const LONGEST: u64 = 256 << 10;

/// What a reader is told.
#[derive(Debug, Clone)]
pub struct Orders {
    pub board: PathBuf,
    /// The directory of the trees.
    pub trees: PathBuf,
    pub slot: usize,
    pub seed: u64,
    /// How long to pause between two accesses, on average.
    pub pause: Duration,
    /// An access that takes longer is the reader's end (SIGALRM). A blocked reader can be killed.
    pub limit: Duration,
    /// Say nothing about wrong bytes: there will be many.
    pub quiet: bool,
}

/// Where tree number `tree` is.
#[must_use]
pub fn tree_path(trees: &Path, tree: u64) -> PathBuf {
    trees.join(format!("t{tree}"))
}

/// The slot of this process, for the signal handler.
static SLOT: AtomicPtr<Slot> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_bus(_: libc::c_int) {
    // SAFETY: null or a slot of a mapped board, which is never unmapped. `finish` stores atomic
    // numbers and asks for the time: both may be done in a signal handler, as may `_exit`.
    unsafe {
        if let Some(slot) = SLOT.load(Ordering::SeqCst).as_ref() {
            slot.finish(Outcome::Bus);
        }
        libc::_exit(BUS_EXIT)
    }
}

/// Reads until it is over.
pub fn run(orders: &Orders) -> Result<()> {
    let board = Board::open(&orders.board)?;
    let slot = board.slots.get(orders.slot).context("there is no such slot")?;
    SLOT.store(std::ptr::from_ref(slot).cast_mut(), Ordering::SeqCst);
    let action = SigAction::new(SigHandler::Handler(on_bus), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does only what may be done in one.
    unsafe { sigaction(Signal::SIGBUS, &action)? };
    let mut random = Random::new(orders.seed);
    let limit = u32::try_from(orders.limit.as_secs()).unwrap_or(u32::MAX);
    while !board.is_over() {
        let tree = random.below(MAX_TREES);
        slot.in_use.store(tree as u64 + 1, Ordering::SeqCst);
        // whoever closes it looks for its users after that
        let chosen = board.trees[tree].is_open().then(|| choose(board, tree as u64, &mut random));
        if let Some((content, access)) = chosen.flatten() {
            nix::unistd::alarm::set(limit);
            perform(slot, orders, &content, &access);
            nix::unistd::alarm::cancel();
            slot.in_use.store(0, Ordering::SeqCst);
            thread::sleep(orders.pause.mul_f64(2.0 * random.unit()));
        } else {
            slot.in_use.store(0, Ordering::SeqCst);
            thread::sleep(Duration::from_micros(300));
        }
    }
    Ok(())
}

fn choose(board: &Board, number: u64, random: &mut Random) -> Option<(Content, Access)> {
    let tree = &board.trees[number as usize];
    let content = Content {
        seed: tree.seed.load(Ordering::Relaxed),
        files: tree.files.load(Ordering::Relaxed),
    };
    // what somebody has read, or is about to read, now and then
    let again = random.below(5) == 0;
    let n = if again {
        random.below(tree.cursor.load(Ordering::Relaxed).min(content.files) as usize) as u64
    } else {
        if tree.is_read() {
            return None;
        }
        tree.cursor.fetch_add(1, Ordering::Relaxed)
    };
    if n >= content.files {
        return None;
    }
    let file = content.nth(n);
    let size = content.size(file);
    let (offset, length) = match random.below(3) {
        0 => (0, size.min(LONGEST)),
        1 => (random.below(size as usize) as u64, 1 + random.below(4096) as u64),
        _ => (random.below(size as usize) as u64, 1 + random.below(64 << 10) as u64),
    };
    let how = Access::how(random.below(Kind::READS.len()), !again);
    let shard = tree.shard.load(Ordering::Relaxed);
    let length = length.min(size - offset);
    Some((content, Access { tree: number, file, offset, length, how, shard }))
}

fn perform(slot: &Slot, orders: &Orders, content: &Content, access: &Access) {
    let expected = content.bytes(access.file, access.offset, access.length);
    let path = tree_path(&orders.trees, access.tree).join(content.path(access.file));
    let kind = Kind::READS[access.kind() % Kind::READS.len()];
    slot.announce(access);
    let got = access::content(kind, &path, access.offset, access.length as usize, &orders.trees);
    slot.reads.fetch_add(1, Ordering::Relaxed);
    let outcome = match &got {
        Ok(got) => {
            slot.bytes.fetch_add(got.len() as u64, Ordering::Relaxed);
            compare(got, &expected)
        }
        Err(error) => outcome_of(error),
    };
    slot.finish(outcome);
    if !orders.quiet && matches!(outcome, Outcome::Zeros | Outcome::Wrong) {
        tell(outcome, access, &path, kind, got.as_deref().unwrap_or_default(), &expected);
    }
}

/// What the bytes are. Right bytes are never zero.
fn compare(got: &[u8], expected: &[u8]) -> Outcome {
    if got == expected {
        Outcome::Right
    } else if got.contains(&0) {
        Outcome::Zeros
    } else {
        Outcome::Wrong
    }
}

fn tell(outcome: Outcome, access: &Access, path: &Path, kind: Kind, got: &[u8], expected: &[u8]) {
    let first = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(got.len());
    let zeros = got.iter().filter(|byte| **byte == 0).count();
    // at once, so that lines of different readers don't mix
    let line = format!(
        "{outcome:?}: {kind:?} of {} bytes at {} of {}: {} came, {zeros} of them zero, wrong from \
         {first} on\n",
        access.length,
        access.offset,
        path.display(),
        got.len()
    );
    let _ = io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_bytes_are() {
        assert_eq!(compare(b"abc", b"abc"), Outcome::Right);
        assert_eq!(compare(b"a\0c", b"abc"), Outcome::Zeros);
        assert_eq!(compare(b"axc", b"abc"), Outcome::Wrong);
        assert_eq!(compare(b"ab", b"abc"), Outcome::Wrong);
    }
}
