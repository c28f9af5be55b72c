//! What readers have just been denied.
//!
//! One access of a process can become many events: when the kernel's read-ahead is denied, the page
//! fault or `read` behind it asks again page by page (`mm/filemap.c`, `fs/erofs/fileio.c`). If each
//! of these waited for the deadline anew, the reader would not end by it. So what a process was
//! denied a moment ago it is denied at once; others are not held to that.

use std::collections::VecDeque;
use std::time::Duration;

use crate::fanotify::DenyErrno;
use crate::ids::SegmentId;
use crate::range::ByteRange;
use crate::worker::schedule::Now;

/// How long a denial holds. A page follows the one before within microseconds.
const HOLDS: Duration = Duration::from_secs(2);
/// So many are kept in mind.
const KEPT: usize = 1024;

#[derive(Debug)]
struct Denial {
    until: Now,
    pid: i32,
    segment: SegmentId,
    /// All of the objects that were wanted.
    range: ByteRange,
    errno: DenyErrno,
    reason: String,
}

/// Denials that hold, oldest first.
#[derive(Debug, Default)]
pub(super) struct Denials(VecDeque<Denial>);

impl Denials {
    /// A process was denied `range`.
    pub(super) fn add(
        &mut self,
        now: Now,
        pid: i32,
        (segment, range): (SegmentId, ByteRange),
        errno: DenyErrno,
        reason: &str,
    ) {
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        let reason = reason.to_owned();
        self.0.push_back(Denial { until: now + HOLDS, pid, segment, range, errno, reason });
    }

    /// What a process gets for `range` if it was denied some of it a moment ago.
    pub(super) fn find(
        &mut self,
        now: Now,
        pid: i32,
        segment: SegmentId,
        range: ByteRange,
    ) -> Option<(DenyErrno, String)> {
        while self.0.front().is_some_and(|denial| denial.until <= now) {
            self.0.pop_front();
        }
        let denial = self.0.iter().find(|denial| {
            (denial.pid, denial.segment) == (pid, segment) && denial.range.overlaps(range)
        })?;
        Some((denial.errno, denial.reason.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_holds_for_a_moment_and_for_one_process() {
        let mut denials = Denials::default();
        let (segment, range) = (SegmentId(1), ByteRange::new(0, 100));
        let at = Now::from_secs;
        denials.add(at(10), 7, (segment, range), DenyErrno::Eio, "gone");
        let again = ByteRange::new(50, 10);
        let expected = Some((DenyErrno::Eio, "gone".to_owned()));
        assert_eq!(denials.find(at(11), 7, segment, again), expected);
        assert_eq!(denials.find(at(11), 8, segment, again), None);
        assert_eq!(denials.find(at(11), 7, SegmentId(2), again), None);
        assert_eq!(denials.find(at(11), 7, segment, ByteRange::new(100, 10)), None);
        assert_eq!(denials.find(at(12), 7, segment, again), None);
    }
}
