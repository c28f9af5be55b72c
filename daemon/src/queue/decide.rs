//! What an event asks for: a pure decision, the same in both queues.

use crate::fanotify::DenyErrno;
use crate::range::ByteRange;

/// What becomes of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// No content is read: allow.
    Allow,
    /// All that is read is there: allow, and say that it was read.
    Touched(ByteRange),
    /// This has to be there first: within the segment, not empty, in whole blocks (the last of
    /// which ends past the segment if its size is no multiple of a block).
    Fetch(ByteRange),
    /// It is not known what is read, so nothing can vouch for the bytes.
    Deny(DenyErrno),
}

/// What becomes of an event that accesses `range` of a segment of `size` bytes. `present` says
/// whether a range (as in [`Decision::Fetch`]) is there.
///
/// `range` is as the kernel gives it: in whole pages, and no more than that. `count == 0` is real
/// (`FICLONE`, a read of nothing), so is an offset past the end (a read until end of file, `truncate`),
/// and so is a range that begins within and ends past it (a mapping, `fs/notify/fsnotify.c:
/// fsnotify_pre_content` doesn't look at the size).
pub fn decide<E>(
    range: Option<ByteRange>,
    size: u64,
    present: impl FnOnce(ByteRange) -> Result<bool, E>,
) -> Result<Decision, E> {
    let Some(range) = range else {
        return Ok(Decision::Deny(DenyErrno::Eio));
    };
    let range = range.clamp(size);
    if range.is_empty() {
        return Ok(Decision::Allow);
    }
    let range = range.to_blocks();
    Ok(if present(range)? { Decision::Touched(range) } else { Decision::Fetch(range) })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::range::BLOCK;

    const SIZE: u64 = 10 * BLOCK;

    fn absent(range: Option<ByteRange>, size: u64) -> Decision {
        decide(range, size, |_| Ok::<_, Infallible>(false)).unwrap()
    }

    fn some(offset: u64, len: u64) -> Option<ByteRange> {
        Some(ByteRange::new(offset, len))
    }

    #[test]
    fn what_is_missing_is_fetched_and_what_is_there_touched() {
        let range = ByteRange::new(4096, 8192);
        assert_eq!(absent(Some(range), SIZE), Decision::Fetch(range));
        let there = decide(Some(range), SIZE, |asked| {
            assert_eq!(asked, range);
            Ok::<_, Infallible>(true)
        });
        assert_eq!(there.unwrap(), Decision::Touched(range));
    }

    #[test]
    fn nothing_is_read() {
        for range in [
            some(0, 0),
            some(4096, 0),
            some(SIZE, 4096),
            some(SIZE + 4096, 4096),
            some(SIZE, 0),
            some(u64::MAX, 1),
        ] {
            assert_eq!(absent(range, SIZE), Decision::Allow, "{range:?}");
        }
        assert_eq!(absent(some(0, 4096), 0), Decision::Allow, "an empty segment");
    }

    #[test]
    fn a_mapping_past_the_end() {
        let last = Decision::Fetch(ByteRange::new(SIZE - BLOCK, BLOCK));
        assert_eq!(absent(some(SIZE - BLOCK, 16 * BLOCK), SIZE), last);
        let all = Decision::Fetch(ByteRange::new(0, SIZE));
        assert_eq!(absent(some(0, u64::MAX), SIZE), all);
        assert_eq!(absent(some(0, u64::MAX), SIZE - 100), all, "the last block is whole");
    }

    #[test]
    fn an_event_that_does_not_say_what_it_reads_is_denied() {
        assert_eq!(absent(None, SIZE), Decision::Deny(DenyErrno::Eio));
    }

    #[test]
    fn an_error_is_passed_on() {
        assert_eq!(decide(some(0, 1), SIZE, |_| Err("lseek")), Err("lseek"));
    }

    proptest! {
        #[test]
        fn what_is_fetched_has_all_that_is_read(offset: u64, len: u64, size in 0..1_u64 << 50) {
            match absent(some(offset, len), size) {
                Decision::Fetch(range) => {
                    let read = ByteRange::new(offset, len).clamp(size);
                    prop_assert!(!read.is_empty());
                    prop_assert!(range.offset() <= read.offset() && read.end() <= range.end());
                    prop_assert_eq!(range.offset() % BLOCK, 0);
                    prop_assert_eq!(range.len() % BLOCK, 0);
                    prop_assert!(range.end() < size + BLOCK);
                }
                Decision::Allow => prop_assert!(len == 0 || offset >= size),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
