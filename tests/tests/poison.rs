//! Workers that end by their own fault, or do not end at all: what kills three is given up and left alone,
//! who is silent is replaced, and other shards do not notice.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hydrant_api::{Cleared, FailedEvent, QueueEvent};
use hydrant_tests::access::Kind;
use hydrant_tests::process::until;
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{Crowd, End, access, end, expect_right, start};
use hydrant_tests::repository::lonely;
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(60);

fn failed(world: &World) -> Result<Vec<FailedEvent>> {
    let output = world.daemon.check(&["queue", "--failed", "--json"])?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Waits until the one event that waits is with another worker than `before`.
fn with_a_worker_after(world: &World, before: &[i32]) -> Result<(QueueEvent, i32)> {
    until("its event is with another worker", PATIENCE, || {
        let event = world.daemon.admin().queue().ok()?.into_iter().next()?;
        let worker = event.worker_pid.filter(|worker| !before.contains(worker))?;
        Some((event, worker))
    })
}

fn deaths(world: &World) -> Result<u64> {
    Ok(world.daemon.status()?.shards.iter().map(|shard| shard.worker_deaths).sum())
}

/// An event whose workers crash three times is given up and put on record. Who reads the same is
/// refused at once and costs no worker, also after the supervisor's death, until it is cleared.
#[test]
#[ignore = "needs root"]
fn root_what_kills_three_workers_is_quarantined() -> Result<()> {
    let setting = Setting { proxy: Some(Quality::default()), ..Setting::default() };
    let world = World::with("poison", setting)?;
    let (tree, files) = world.lonely_tree(3, 300_000)?;
    let (poison, poison_truth) = &files[0];
    ensure!(failed(&world)?.is_empty());

    world.proxy()?.hold();
    let reader = start(Kind::Read, poison, poison_truth)?;
    let mut workers = Vec::new();
    let mut event = None;
    for _ in 0..3 {
        let (with, worker) = with_a_worker_after(&world, &workers)?;
        // as by a bug in the worker
        kill(Pid::from_raw(worker), Signal::SIGABRT)?;
        workers.push(worker);
        event = Some(with);
    }
    let event = event.context("no event")?;
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Errno(libc_eio()), "{got:?}");

    let records = until("there is a record", PATIENCE, || {
        failed(&world).ok().filter(|records| !records.is_empty())
    })?;
    let [record] = &records[..] else { anyhow::bail!("{records:?}") };
    ensure!(record.id == event.id && record.path == event.path, "{record:?} {event:?}");
    ensure!(record.directory.as_deref() == tree.to_str(), "{record:?}");
    ensure!(record.process.comm.as_deref() == Some("hydrant-access"), "{record:?}");
    ensure!(record.state == "quarantined" && record.attempts == 3, "{record:?}");
    ensure!(record.deaths.len() == 3, "{record:?}");
    ensure!(record.deaths.iter().all(|death| death.contains("SIGABRT")), "{record:?}");
    // all of the object, whatever part of it was read
    ensure!(record.count >= 300_000, "{record:?}");
    let text = world.daemon.check(&["queue", "--failed"])?.text();
    ensure!(text.contains("quarantined for") && text.contains("SIGABRT"), "{text}");

    // the origin does not answer yet: an errno at once can't have come from there
    let before = deaths(&world)?;
    for kind in [Kind::Read, Kind::Pread] {
        let got = access(kind, poison, poison_truth)?;
        ensure!(got == End::Errno(libc_eio()), "{kind:?}: {got:?}");
    }
    ensure!(deaths(&world)? == before, "a reader of what is in quarantine cost a worker");
    world.proxy()?.heal();
    expect_right(Kind::Read, &files[1].0, &files[1].1)?;

    let old = world.daemon.kill_supervisor()?;
    until("there is another supervisor", PATIENCE, || {
        world.daemon.status().ok().filter(|status| status.pid != old.as_raw())
    })?;
    let got = access(Kind::Read, poison, poison_truth)?;
    ensure!(got == End::Errno(libc_eio()), "after a restart: {got:?}");
    expect_right(Kind::Read, &files[2].0, &files[2].1)?;

    let cleared = world.daemon.check(&["queue", "--failed", "--clear", "--json"])?;
    let cleared: Cleared = serde_json::from_slice(&cleared.stdout)?;
    ensure!(cleared.cleared == 1, "{cleared:?}");
    expect_right(Kind::Read, poison, poison_truth)?;
    ensure!(failed(&world)?.is_empty());
    Ok(())
}

/// A worker that is alive and does nothing is killed after the deadline; its reader gets its bytes from
/// the next one. The kernel's queue has the event until a worker reads it, and of each worker a sign of life
/// is expected there; with the supervisor's, those that nobody misses are left alone.
#[test]
#[ignore = "needs root"]
fn root_silent_worker_is_replaced() -> Result<()> {
    let configuration = "deadline_secs = 8\n[workers]\npatience_secs = 2\n";
    let world = World::with("silent", Setting { configuration, ..Setting::default() })?;
    let (_, files) = world.lonely_tree(1, 100_000)?;
    let (file, truth) = &files[0];
    let workers = world.daemon.workers()?;
    for worker in &workers {
        kill(*worker, Signal::SIGSTOP)?;
    }
    let begun = Instant::now();
    let reader = start(Kind::Read, file, truth)?;
    let brokered = world.daemon.status()?.queue == "brokered";
    let with = if brokered { Some(with_a_worker_after(&world, &[])?.1) } else { None };
    if let Some(with) = with {
        ensure!(
            workers.contains(&Pid::from_raw(with)),
            "it is with {with}, not one of {workers:?}"
        );
    }
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?} after {:?}", begun.elapsed());
    if with.is_some() {
        ensure!(begun.elapsed() > Duration::from_secs(8), "{:?}", begun.elapsed());
        ensure!(deaths(&world)? == 1);
    }
    ensure!((1..=workers.len() as u64).contains(&deaths(&world)?));
    ensure!(failed(&world)?.is_empty(), "one death is no reason for a record");
    for worker in workers.iter().filter(|worker| Some(worker.as_raw()) != with) {
        // it may have been replaced
        let _ = kill(*worker, Signal::SIGCONT);
    }
    Ok(())
}

/// Workers of one shard that crash again and again: it backs off, the other shard's readers notice
/// nothing, and when it is over its own readers are served.
#[test]
#[ignore = "needs root"]
fn root_crash_loop_starves_nobody() -> Result<()> {
    let setting = Setting { configuration: "shards = 2\n", ..Setting::default() };
    let world = World::with("crash-loop", setting)?;
    let repository = lonely(60, 50_000)?;
    let mut trees = Vec::new();
    for name in ["a", "b"] {
        world.serve(&repository, name)?;
        trees.push(world.clone_lazy(name, name, &["--history=none"])?);
    }
    let bad = world.daemon.mount_of(&trees[0])?.shard;
    let good = world.daemon.mount_of(&trees[1])?.shard;
    ensure!(bad != good, "two pools on one shard");
    let of_bad = world.lonely_files(&repository, &trees[0], 0..60)?;
    let of_good = world.lonely_files(&repository, &trees[1], 0..60)?;
    let worker = |shard: u16| -> Result<Option<i32>> {
        let shards = world.daemon.status()?.shards;
        Ok(shards.iter().find(|found| found.shard == shard).and_then(|found| found.worker_pid))
    };
    let begun = Instant::now();
    let mut last = None;
    // crashes the worker that comes next, and gives what is there in its place
    let mut crash = || -> Result<Option<i32>> {
        let pid = until("there is a worker to crash", PATIENCE, || {
            worker(bad).ok().flatten().filter(|pid| Some(*pid) != last)
        })?;
        kill(Pid::from_raw(pid), Signal::SIGABRT)?;
        last = Some(pid);
        until("it has ended", PATIENCE, || worker(bad).ok().filter(|worker| *worker != last))
    };
    let mut crowd = None;
    // The pauses between the workers grow: sooner or later another shard's readers are served within one.
    let mut within_a_pause = false;
    let mut parts = of_good.chunks(12);
    for part in parts.by_ref().take(4) {
        crash()?;
        let next = crash()?;
        Crowd::start(Kind::Read, part)?.expect_right()?;
        within_a_pause |= next.is_none() && worker(bad)?.is_none();
        if crowd.is_none() {
            crowd = Some(Crowd::start(Kind::Read, &of_good[..1])?);
        }
    }
    for (file, truth) in parts.flatten() {
        if within_a_pause {
            break;
        }
        let next = crash()?;
        expect_right(Kind::Read, file, truth)?;
        within_a_pause = next.is_none() && worker(bad)?.is_none();
    }
    ensure!(within_a_pause, "no pause is as long as a read\n{}", world.daemon.log_tail(60));
    let took = begun.elapsed();
    let shards = world.daemon.status()?.shards;
    let of = |shard| shards.iter().find(|found| found.shard == shard).context("no such shard");
    ensure!(of(good)?.worker_deaths == 0, "{shards:?}");
    ensure!(of(bad)?.worker_deaths >= 5, "{took:?}: {shards:?}");
    crowd.context("no crowd")?.expect_right()?;
    Crowd::start(Kind::Pread, &of_bad)?.expect_right()
}

fn libc_eio() -> i32 {
    nix::errno::Errno::EIO as i32
}
