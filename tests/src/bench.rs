//! Benchmarks: each beside its peer, in the same run, on the same machine.

pub mod calls;
pub mod cold;
pub mod fetch;
pub mod fuse;
pub mod images;
pub mod import;
pub mod memory;
pub mod table;
pub mod warm;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::process::Run;
use crate::proxy::{Quality, Traffic};
use crate::state_fs::StateFs;
use crate::world::{Setting, World};

/// Longest time for one step of a benchmark.
const PATIENCE: Duration = Duration::from_secs(1800);

/// A daemon behind a proxy with this round trip.
pub fn world(name: &str, round_trip: Duration) -> Result<World> {
    World::with(name, setting(round_trip))
}

fn setting(round_trip: Duration) -> Setting {
    let proxy = Some(Quality::round_trip(round_trip));
    Setting { proxy, state_fs: StateFs::Host, ..Setting::default() }
}

/// How long `work` takes.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let started = Instant::now();
    let result = work()?;
    Ok((started.elapsed(), result))
}

/// The shortest of `times` runs.
pub fn best_of(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..times {
        best = best.min(timed(&mut work)?.0);
    }
    Ok(best)
}

/// What passed the proxy during `work`, and how long it took.
pub fn measured(world: &World, work: impl FnOnce() -> Result<()>) -> Result<Cost> {
    let before = world.proxy()?.traffic();
    let (time, ()) = timed(work)?;
    let after = world.proxy()?.traffic();
    Ok(Cost { time, traffic: difference(before, after) })
}

/// Time and traffic of one step.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    pub time: Duration,
    pub traffic: Traffic,
}

impl Cost {
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let sum = |a: Traffic, b: Traffic| Traffic {
            up_bytes: a.up_bytes + b.up_bytes,
            down_bytes: a.down_bytes + b.down_bytes,
            connections: a.connections + b.connections,
            requests: a.requests + b.requests,
            faults: a.faults + b.faults,
        };
        Self { time: self.time + other.time, traffic: sum(self.traffic, other.traffic) }
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.traffic.up_bytes + self.traffic.down_bytes
    }
}

fn difference(before: Traffic, after: Traffic) -> Traffic {
    Traffic {
        up_bytes: after.up_bytes - before.up_bytes,
        down_bytes: after.down_bytes - before.down_bytes,
        connections: after.connections - before.connections,
        requests: after.requests - before.requests,
        faults: after.faults - before.faults,
    }
}

/// Runs a shell script with `$1` as `place`.
fn shell(script: &str, place: &Path) -> Result<()> {
    Run::shell(script, &[place]).time_out(PATIENCE).check().map(drop)
}

/// `git clone ARGUMENTS` through the proxy, and `git status`, which has to say nothing.
fn git_clone(world: &World, name: &str, place: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("git");
    command.args(["clone", "-q"]).args(arguments).arg(world.url(name)).arg(place);
    command.env("HOME", world.path("home")).env("GIT_CONFIG_NOSYSTEM", "1");
    Run::new(command).time_out(PATIENCE).check()?;
    clean_status(world, place)
}

fn hydrant_clone(world: &World, name: &str, place: &Path) -> Result<()> {
    let place_text = place.to_string_lossy().into_owned();
    let arguments = ["clone", "--history=none", &world.url(name), &place_text];
    world.daemon.hydrant(&arguments)?.time_out(PATIENCE).check()?;
    clean_status(world, place)
}

fn clean_status(world: &World, place: &Path) -> Result<()> {
    let status = world.git(place, &["status", "--porcelain"]).check()?;
    if !status.stdout.is_empty() {
        bail!("git status in {} says:\n{}", place.display(), status.text());
    }
    Ok(())
}
