//! A crash is not an error: a reader whose event was in a worker that died gets its bytes from the next
//! worker, and nobody ever reads zeros.

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
use nix::unistd::Pid;

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
    let (_, files) = world.lonely_tree(8, 3_000_000)?;
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
    let quality = Quality {
        delay: Duration::from_millis(10),
        bytes_per_second: Some(10 << 20),
        ..Quality::default()
    };
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

/// A worker that is killed before it has read all that it was sent: its socket says `ECONNRESET`, which is
/// not the worker's fault, however often that happens to the same events. In the kernel's queue, what was not
/// read waits for the next one, unseen.
#[test]
#[ignore = "needs root"]
fn root_killed_workers_with_unread_events() -> Result<()> {
    let world = world("crash-unread", Quality::default())?;
    let (_, files) = world.lonely_tree(10, 20_000)?;
    let brokered = world.daemon.status()?.queue == "brokered";
    world.proxy()?.hold();
    let (mut readers, mut killed) = (Vec::new(), Vec::new());
    for (n, (file, truth)) in files.iter().enumerate().take(6) {
        let workers = until("all workers are there", Duration::from_secs(30), || {
            let shards = world.daemon.status().ok()?.shards;
            let pids = shards.iter().map(|shard| shard.worker_pid.map(Pid::from_raw));
            let workers: Vec<Pid> = pids.collect::<Option<_>>()?;
            (!workers.iter().any(|worker| killed.contains(worker))).then_some(workers)
        })?;
        until("they have all that waits", Duration::from_secs(30), || {
            let queue = world.daemon.admin().queue().ok()?;
            (queue.len() >= n && queue.iter().all(|event| event.state == "in_flight")).then_some(())
        })?;
        for worker in &workers {
            kill(*worker, Signal::SIGSTOP)?;
        }
        readers.push(start(Kind::Read, file, truth)?);
        until("another event was sent", Duration::from_secs(30), || {
            let queue = world.daemon.admin().queue().ok()?;
            let sent = queue.len() > n && queue.iter().all(|event| event.state == "in_flight");
            (sent || !brokered).then_some(())
        })?;
        for worker in &workers {
            kill(*worker, Signal::SIGKILL)?;
        }
        killed.extend(workers);
    }
    world.proxy()?.heal();
    for (n, reader) in readers.into_iter().enumerate() {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "reader {n}: {got:?}\n{}", world.daemon.log_tail(30));
    }
    Ok(())
}

/// The whole daemon killed, as by a power cut but for the page cache: when it is started again everything
/// is mounted as before, what was fetched is not fetched again, and the rest comes as it should.
#[test]
#[ignore = "needs root"]
fn root_killed_daemon_comes_back() -> Result<()> {
    let mut world = world("crash-daemon", Quality::default())?;
    let (tree, files) = world.lonely_tree(6, 500_000)?;
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
