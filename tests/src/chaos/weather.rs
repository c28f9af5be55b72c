//! The origin's weather: fine most of the time, with stretches in which it breaks in one way or another.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::origin::Origin;
use super::{MS, now};
use crate::proxy::{Fault, Proxy};
use crate::repository::Random;

/// For so long after a stretch, what was asked for in it may still fail.
const AFTER: u64 = 8000 * MS;

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

    /// Whether something that went on in this time may have met a fault.
    #[must_use]
    pub fn was_bad(&self, from: u64, to: u64) -> bool {
        self.lock().iter().any(|s| s.from <= to && from <= s.to.saturating_add(AFTER))
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
