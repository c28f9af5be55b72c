//! The origin's weather: fine most of the time, with stretches in which it breaks in one way or another.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::origin::Origin;
use super::{MS, now};
use crate::proxy::{Fault, Proxy};
use crate::repository::Random;

/// `stall_secs` of the daemon. A request that went out before the end of a stretch may be answered wrongly after
/// it, but not later than this: the worker gives up a request of which nothing comes for so long, and whoever
/// waits for it is served by the next one, by an origin that is well. Nothing else of a stretch outlives it: an
/// object fails at its third wrong answer, and what is refused, cut off or late is asked for again.
pub const STALL: u64 = 2000 * MS;

/// From the last wrong byte until the reader has its error: the worker, the supervisor and the reader each need a
/// turn on processors that all of them share.
const TELLING: u64 = 1000 * MS;

/// What happens in a stretch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    Resets,
    Stalls,
    ServerErrors,
    FlippedBits,
    CutShort,
    OtherObjects,
    Refused,
    Held,
    /// A fault here and there.
    Drizzle,
}

const ALL: [Weather; 9] = [
    Weather::Resets,
    Weather::Stalls,
    Weather::ServerErrors,
    Weather::FlippedBits,
    Weather::CutShort,
    Weather::OtherObjects,
    Weather::Refused,
    Weather::Held,
    Weather::Drizzle,
];

/// A stretch that has begun; `to` is far away as long as it has not ended.
#[derive(Debug, Clone, Copy)]
pub struct Stretch {
    pub weather: Weather,
    pub from: u64,
    pub to: u64,
}

/// All stretches so far.
#[derive(Debug, Default)]
pub struct Almanac {
    stretches: Mutex<Vec<Stretch>>,
}

impl Almanac {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Stretch>> {
        self.stretches.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Whether the origin was broken at any moment of this time.
    #[must_use]
    pub fn was_bad(&self, from: u64, to: u64) -> bool {
        self.lock().iter().any(|s| s.from <= to && from <= s.to)
    }

    /// Whether a read that began and failed then may have failed for the origin: it was broken at the moment of the
    /// failure, or had been just before, and somebody asked for the bytes while it was. Gives the time from the
    /// end of the stretch to the failure.
    #[must_use]
    pub fn excuses(&self, began: u64, failed: u64) -> Option<u64> {
        let stretches = self.lock();
        let of_it = stretches.iter().filter(|s| {
            let asked = began <= s.to.saturating_add(STALL);
            let told = s.from <= failed && failed <= s.to.saturating_add(STALL + TELLING);
            asked && told
        });
        of_it.map(|s| failed.saturating_sub(s.to)).min()
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// How long it was bad, all in all.
    #[must_use]
    pub fn bad(&self) -> Duration {
        let now = now();
        Duration::from_nanos(self.lock().iter().map(|s| s.to.min(now) - s.from).sum())
    }
}

/// Makes weather until `over`; no stretch begins while `calm`.
pub fn run(
    proxy: &Proxy,
    origin: &Origin,
    almanac: &Almanac,
    seed: u64,
    over: impl Fn() -> bool,
    calm: impl Fn() -> bool,
) {
    let mut random = Random::new(seed);
    let pause = |random: &mut Random, from: usize, to: usize, end: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_millis((from + random.below(to - from)) as u64);
        while Instant::now() < until && !end() {
            thread::sleep(Duration::from_millis(20));
        }
    };
    loop {
        pause(&mut random, 4000, 12_000, &over);
        if over() {
            return;
        }
        if calm() {
            continue;
        }
        let weather = ALL[random.below(ALL.len())];
        almanac.lock().push(Stretch { weather, from: now(), to: u64::MAX / 2 });
        let end = || over() || calm();
        begin(weather, proxy, origin, &mut random);
        if weather == Weather::Drizzle {
            for _ in 0..40 {
                if end() {
                    break;
                }
                let fault = fault(ALL[random.below(5)], &mut random);
                proxy.fail_next(1, fault);
                thread::sleep(Duration::from_millis(50));
            }
        } else {
            pause(&mut random, 300, 2500, &end);
        }
        proxy.heal();
        origin.lie(false);
        if let Some(last) = almanac.lock().last_mut() {
            last.to = now();
        }
    }
}

fn fault(weather: Weather, random: &mut Random) -> Fault {
    match weather {
        Weather::Resets => Fault::ResetAfter(random.below(30_000) as u64),
        Weather::Stalls => Fault::StallAfter(random.below(30_000) as u64),
        Weather::FlippedBits => Fault::FlipAt(20 + random.below(5000)),
        Weather::CutShort => Fault::CutAfter(random.below(20_000)),
        _ => Fault::status([500, 502, 503][random.below(3)]),
    }
}

fn begin(weather: Weather, proxy: &Proxy, origin: &Origin, random: &mut Random) {
    match weather {
        Weather::OtherObjects => origin.lie(true),
        Weather::Refused => proxy.refuse(),
        Weather::Held => proxy.hold(),
        Weather::Drizzle => {}
        _ => proxy.fail_always(fault(weather, random)),
    }
}

#[cfg(test)]
impl Almanac {
    /// Of stretches, each from and to a time.
    pub(super) fn of(stretches: &[(u64, u64)]) -> Self {
        let weather = Weather::FlippedBits;
        let all = stretches.iter().map(|(from, to)| Stretch { weather, from: *from, to: *to });
        Self { stretches: Mutex::new(all.collect()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1000 * MS;

    #[test]
    fn a_failure_is_the_origins_only_if_it_was_asked_while_it_was_broken() {
        let almanac = Almanac::of(&[(10 * SECOND, 12 * SECOND)]);
        let excuses = |began: u64, failed: u64| almanac.excuses(began * MS, failed * MS);
        // in it, and from before
        assert_eq!(excuses(10_500, 11_000), Some(0));
        assert_eq!(excuses(3_000, 10_001), Some(0));
        // what it broke arrives
        assert_eq!(excuses(11_900, 12_300), Some(300 * MS));
        assert_eq!(
            excuses(12_100, 12_300),
            Some(300 * MS),
            "for the same object as another reader"
        );
        assert_eq!(excuses(13_999, 15_000), Some(3 * SECOND));
        // before it, or when all that it broke is over
        assert_eq!(excuses(9_000, 9_999), None);
        assert_eq!(excuses(14_001, 14_002), None);
        assert_eq!(excuses(11_000, 15_001), None, "however long it has waited");
        assert!(almanac.was_bad(9 * SECOND, 10 * SECOND) && almanac.was_bad(SECOND, 20 * SECOND));
        assert!(!almanac.was_bad(12 * SECOND + 1, 20 * SECOND));
    }

    #[test]
    fn the_daemon_is_told_how_long_a_stall_is() {
        let secs = STALL / SECOND;
        for configuration in super::super::run::CONFIGURATIONS {
            assert!(configuration.contains(&format!("stall_secs = {secs}\n")));
        }
    }
}
