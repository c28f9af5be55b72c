//! A crash is not an error: a reader whose event was in a worker that died gets its bytes from the next
//! worker, and nobody ever reads zeros.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::guest;
use hydrant_tests::process::until;
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{Crowd, End, end, expect_right, start};
use hydrant_tests::repository::lonely;
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};

fn world(name: &str, quality: Quality) -> Result<World> {
    World::with(name, Setting { proxy: Some(quality), ..Setting::default() })
}

fn kill_workers(world: &World) -> Result<usize> {
    let workers = world.daemon.workers()?;
    for worker in &workers {
        // It may have died a moment ago.
        let _ = kill(*worker, Signal::SIGKILL);
    }
    Ok(workers.len())
}

/// SIGKILL of the worker while it fetches: the reader, in `read` or in a page fault, gets the right bytes.
#[test]
#[ignore = "needs root"]
fn root_killed_worker_costs_nobody_an_error() -> Result<()> {
    let world = world("crash-worker", Quality::default())?;
    let repository = lonely(8, 3_000_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..8)?;
    let kinds = [Kind::Read, Kind::MmapShared, Kind::MmapExec, Kind::Splice, Kind::IoUring];
    for (kind, (file, truth)) in kinds.into_iter().zip(&files) {
        world.proxy()?.hold();
        let reader = start(kind, file, truth)?;
        until("its event is with a worker", Duration::from_secs(20), || {
            let queue = world.daemon.admin().queue().ok()?;
            queue.iter().any(|event| event.state == "in_flight").then_some(())
        })?;
        ensure!(kill_workers(&world)? > 0, "there are no workers");
        ensure!(reader.still_runs_after(Duration::from_millis(300)), "{kind:?} ended by itself");
        world.proxy()?.heal();
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{kind:?}: {got:?}");
    }
    let status = world.daemon.status()?;
    ensure!(status.shards.iter().map(|shard| shard.worker_deaths).sum::<u64>() >= 5, "{status:?}");
    ensure!(status.counters.requeued >= 5, "{:?}", status.counters);
    Ok(())
}

/// Workers killed again and again while many readers are served over a slow line.
#[test]
#[ignore = "needs root"]
fn root_killed_workers_under_load() -> Result<()> {
    let quality = Quality { delay: Duration::from_millis(10), bytes_per_second: Some(10 << 20) };
    let world = world("crash-load", quality)?;
    let repository = lonely(400, 60_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..guest::or(400, 80))?;
    let mut crowds: Vec<Crowd> = Vec::new();
    for (n, part) in files.chunks(files.len() / 8).enumerate() {
        let kind = [Kind::Read, Kind::MmapPrivate, Kind::Sendfile, Kind::Pread][n % 4];
        crowds.push(Crowd::start(kind, part)?);
        thread::sleep(Duration::from_millis(200));
        kill_workers(&world)?;
        // An event that kills three workers is given up: each has time to be served in between.
        thread::sleep(Duration::from_millis(600));
    }
    crowds.into_iter().try_for_each(Crowd::expect_right)
}

/// The whole daemon killed, as by a power cut but for the page cache: when it is started again everything
/// is mounted as before, what was fetched is not fetched again, and the rest comes as it should.
#[test]
#[ignore = "needs root"]
fn root_killed_daemon_comes_back() -> Result<()> {
    let mut world = world("crash-daemon", Quality::default())?;
    let repository = lonely(6, 500_000)?;
    let tree = world.quick(&repository)?;
    let files: Vec<(PathBuf, PathBuf)> = world.lonely_files(&repository, &tree, 0..6)?;
    for (file, truth) in &files[..3] {
        expect_right(Kind::Read, file, truth)?;
    }
    fs_err::write(tree.join("mine.txt"), "mine")?;
    world.daemon.kill();
    world.daemon.start()?;
    for (n, (file, truth)) in files.iter().enumerate() {
        expect_right(if n % 2 == 0 { Kind::MmapPrivate } else { Kind::Pread }, file, truth)?;
    }
    ensure!(fs_err::read(tree.join("mine.txt"))? == b"mine");
    let status = world.git(&tree, &["status", "--porcelain"]).check()?.text();
    ensure!(status == "?? mine.txt", "{status}");
    Ok(())
}
