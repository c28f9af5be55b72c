//! How hard the background fill may press a registry: hardly while readers wait, as hard as is of use once they are quiet.

use std::time::Duration;

/// Pieces of one registry under way while readers wait. A worker makes small requests of them, one after the other: with fewer pieces
/// the line would be idle between two of them.
pub const LEAST: usize = 4;
/// The same when nobody has waited for a while.
pub const MOST: usize = 12;
/// Bytes of one registry's segments under way of what was read before. With more of them, what is needed first would share the
/// line with what is needed later; with much less, compressed, a long line would be idle between two of them.
pub const REPLAYED: u64 = 8 << 20;
/// What a container wants at its start goes first: a layer is not filled as soon as it is mounted.
pub const HEAD_START: Duration = Duration::from_millis(100);
/// Readers who have not waited for so long have what they want, for now.
const QUIET: Duration = Duration::from_millis(300);
/// From then on so many pieces more may be under way each time this has passed.
const STEP: Duration = Duration::from_millis(100);
const MORE: usize = 2;

/// What was asked for so long ago hangs: others do not wait for it.
const SLOW: Duration = Duration::from_secs(60);

/// The wait after a piece that did not come; it doubles with each that is tried after that.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// How many pieces of a registry may be under way when it has been quiet for so long.
pub fn limit(quiet: Duration) -> usize {
    let Some(since) = quiet.checked_sub(QUIET) else { return LEAST };
    let steps = usize::try_from(since.as_millis() / STEP.as_millis()).unwrap_or(usize::MAX);
    steps.saturating_add(1).saturating_mul(MORE).saturating_add(LEAST).min(MOST)
}

/// How much longer it has to be quiet for a higher [`limit`]; `None`: there is none.
pub fn until_more(quiet: Duration) -> Option<Duration> {
    if limit(quiet) == MOST {
        return None;
    }
    let Some(since) = quiet.checked_sub(QUIET) else { return Some(QUIET - quiet) };
    let steps = u32::try_from(since.as_millis() / STEP.as_millis()).ok()?;
    STEP.checked_mul(steps.checked_add(1)?)?.checked_sub(since)
}

/// Whether something that began, or was heard of last, at that time is slow.
pub fn is_slow(now: Duration, since: Duration) -> bool {
    until_slow(now, since).is_none()
}

/// How much longer until then; `None`: it is.
pub fn until_slow(now: Duration, since: Duration) -> Option<Duration> {
    SLOW.checked_sub(now.saturating_sub(since)).filter(|left| !left.is_zero())
}

/// When a layer's pieces may be asked for. Times are since any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    until: Duration,
    /// The latest wait; zero: nothing has failed since something came.
    wait: Duration,
}

impl Backoff {
    /// Nothing has failed, and nothing is asked for before this time.
    pub fn from(start: Duration) -> Self {
        Self { until: start, wait: Duration::ZERO }
    }

    /// How much longer to wait; `None`: not at all.
    pub fn left(&self, now: Duration) -> Option<Duration> {
        self.until.checked_sub(now).filter(|left| !left.is_zero())
    }

    /// It failed when it was tried last: one piece will tell whether to go on.
    pub fn is_probing(&self) -> bool {
        !self.wait.is_zero()
    }

    /// A piece that was asked for at `begun` has not come. Those that were under way beside it say nothing new.
    pub fn failed(&mut self, now: Duration, begun: Duration) {
        if !self.is_probing() || begun >= self.until {
            self.wait = (self.wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
            self.until = now.saturating_add(self.wait);
        }
    }

    /// It has come. `true`: so all is well.
    pub fn came(&mut self, begun: Duration) -> bool {
        let counts = begun >= self.until;
        if counts {
            self.wait = Duration::ZERO;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn it_goes_up_step_by_step_when_it_is_quiet() {
        let at = [0, 299, 300, 399, 400, 500, 600, 699, 700, 100_000];
        let limits = at.map(|quiet| limit(ms(quiet)));
        assert_eq!(limits, [4, 4, 6, 6, 8, 10, 12, 12, 12, 12]);
        assert_eq!(limit(Duration::MAX), MOST);
        for quiet in (0..600).map(ms) {
            let more = until_more(quiet).unwrap();
            assert!(limit(quiet + more) > limit(quiet), "{quiet:?}");
            assert_eq!(limit(quiet + more - ms(1)), limit(quiet), "{quiet:?}");
        }
        assert_eq!(until_more(ms(600)), None);
        assert_eq!(until_more(Duration::MAX), None);
    }

    #[test]
    fn waits_double_and_end_with_what_comes() {
        let mut backoff = Backoff::from(ms(100));
        assert_eq!(backoff.left(ms(40)), Some(ms(60)));
        assert_eq!(backoff.left(ms(100)), None);
        assert!(!backoff.is_probing());
        let mut now = ms(200);
        for wait in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            backoff.failed(now, now);
            assert!(backoff.is_probing());
            assert_eq!(backoff.left(now), Some(Duration::from_secs(wait)));
            now += Duration::from_secs(wait);
        }
        assert!(backoff.came(now));
        assert!(!backoff.is_probing() && backoff.left(now).is_none());
        backoff.failed(now, now);
        assert_eq!(backoff.left(now), Some(FIRST_WAIT));
    }

    /// A dozen that fail together are one failure, and one that comes beside them is no sign of better times.
    #[test]
    fn what_was_under_way_says_nothing_new() {
        let mut backoff = Backoff::from(ms(0));
        let begun = ms(100);
        backoff.failed(ms(200), begun);
        backoff.failed(ms(900), begun);
        assert_eq!(backoff.left(ms(900)), Some(ms(300)));
        assert!(!backoff.came(begun));
        assert!(backoff.is_probing());
        // later than the wait, and asked for before it
        backoff.failed(ms(5000), begun);
        assert_eq!(backoff.left(ms(5000)), None);
    }
}
