//! A broken origin: a reader gets the right bytes after a retry, or an error by the deadline, with the
//! reason in `hydrant queue` and the log; never wrong bytes.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::process::until;
use hydrant_tests::proxy::{Fault, Quality};
use hydrant_tests::reader::{End, access, end, expect_right, start};
use hydrant_tests::repository::{MAIN, Repository, lonely};
use hydrant_tests::world::{Setting, World};

const DEADLINE: Duration = Duration::from_secs(20);

fn world(name: &str) -> Result<(World, Repository, std::path::PathBuf)> {
    let configuration = "deadline_secs = 20\nstall_secs = 4\n"; // see DEADLINE
    let setting = Setting { proxy: Some(Quality::default()), configuration, ..Setting::default() };
    let world = World::with(name, setting)?;
    let repository = lonely(30, 300_000)?;
    let tree = world.quick(&repository)?;
    Ok((world, repository, tree))
}

fn file(
    world: &World,
    repository: &Repository,
    tree: &Path,
    n: usize,
) -> Result<(std::path::PathBuf, std::path::PathBuf)> {
    Ok(world.lonely_files(repository, tree, n..n + 1)?.remove(0))
}

/// Faults that pass: the reader gets right bytes and notices nothing but time.
#[test]
#[ignore = "needs root"]
fn root_faults_that_pass() -> Result<()> {
    let (world, repository, tree) = world("faults-pass")?;
    let retry_after = Fault::Status { code: 429, headers: vec!["Retry-After: 2".to_owned()] };
    let wrong = {
        // The server answers with another blob than the one that was asked for.
        let blobs = repository.blobs(MAIN)?;
        let id = |n: usize| blobs[n].0.clone().into_bytes();
        Fault::Rewrite { from: id(7), to: id(8) }
    };
    let faults = [
        (1, Fault::status(500)),
        (2, Fault::status(503)),
        (1, retry_after.clone()),
        (1, Fault::ResetAfter(0)),
        (2, Fault::ResetAfter(5_000)),
        (1, Fault::ResetAfter(299_000)),
        (1, Fault::StallAfter(40_000)),
        (1, wrong),
        (1, Fault::CutAfter(0)),
        (1, Fault::CutAfter(100)),
        (1, Fault::CutAfter(200_000)),
        (1, Fault::FlipAt(3)),
        (1, Fault::FlipAt(25)),
        (1, Fault::FlipAt(60)),
        (1, Fault::FlipAt(150_000)),
        (1, Fault::status(401)),
    ];
    for (n, (count, fault)) in faults.into_iter().enumerate() {
        let (file, truth) = file(&world, &repository, &tree, n)?;
        world.proxy()?.fail_next(count, fault.clone());
        let before = world.proxy()?.traffic().faults;
        let reader = start(if n % 2 == 0 { Kind::Pread } else { Kind::MmapShared }, &file, &truth)?;
        let output = reader.wait()?;
        let got = end(&output)?;
        ensure!(got == End::Right, "{fault:?}: {got:?}\n{}", world.daemon.log_tail(20));
        ensure!(world.proxy()?.traffic().faults > before, "{fault:?} hit nothing");
        if fault == retry_after {
            let waited = output.elapsed;
            ensure!(waited >= Duration::from_millis(1_900), "asked again after {waited:?}");
        }
        world.proxy()?.heal();
    }
    Ok(())
}

/// An origin that can't be reached for a while: readers wait, then get their bytes.
#[test]
#[ignore = "needs root"]
fn root_unreachable_for_a_while() -> Result<()> {
    let (world, repository, tree) = world("faults-while")?;
    let (file, truth) = file(&world, &repository, &tree, 0)?;
    world.proxy()?.refuse();
    let reader = start(Kind::MmapPrivate, &file, &truth)?;
    ensure!(reader.still_runs_after(Duration::from_secs(3)), "gave up at once");
    let reason = until("the queue says why", Duration::from_secs(10), || {
        world.daemon.admin().queue().ok()?.first()?.reason.clone()
    })?;
    println!("reason: {reason}");
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    Ok(())
}

/// A slow line is no fault: a file that takes longer than the deadline, and longer than the supervisor
/// lets a silent worker be, is read all the same, by its reader and by one that comes later.
#[test]
#[ignore = "needs root"]
fn root_a_slow_line() -> Result<()> {
    let quality = Quality { bytes_per_second: Some(40_000), ..Quality::default() };
    let configuration = "deadline_secs = 3\nstall_secs = 2\n";
    let setting = Setting { proxy: Some(quality), configuration, ..Setting::default() };
    let world = World::with("faults-slow", setting)?;
    let repository = lonely(2, 1_600_000)?;
    let tree = world.quick(&repository)?;
    let workers = world.daemon.workers()?;
    let (file, truth) = file(&world, &repository, &tree, 0)?;
    let first = start(Kind::Read, &file, &truth)?;
    ensure!(first.still_runs_after(Duration::from_secs(10)), "the line is not slow");
    let second = start(Kind::MmapShared, &file, &truth)?;
    let queue = world.daemon.admin().queue()?;
    let reason = queue.first().and_then(|event| event.reason.clone()).unwrap_or_default();
    ensure!(reason.contains("have come, for"), "the queue says {reason:?}");
    for reader in [first, second] {
        let output = reader.wait()?;
        let got = end(&output)?;
        ensure!(
            got == End::Right,
            "{got:?} after {:?}\n{}",
            output.elapsed,
            world.daemon.log_tail(20)
        );
        println!("read in {:?}", output.elapsed);
    }
    ensure!(world.daemon.workers()? == workers, "a worker was killed");
    let fetched = world.fetched_blobs(&repository, &[MAIN])?;
    ensure!(fetched.len() == 1, "{} fetches", fetched.len());
    let counters = world.daemon.status()?.counters;
    ensure!(counters.sent_bytes > 0 && counters.requests == 1, "{counters:?}");
    Ok(())
}

/// An origin that stays broken: an error by the deadline, the reason is told, and once it is well again the
/// same file reads right.
#[test]
#[ignore = "needs root"]
fn root_faults_that_stay() -> Result<()> {
    let (world, repository, tree) = world("faults-stay")?;
    let blobs = repository.blobs(MAIN)?;
    let wrong = Fault::Rewrite {
        from: blobs[1].0.clone().into_bytes(),
        to: blobs[2].0.clone().into_bytes(),
    };
    let faults = [Fault::FlipAt(100_000), wrong, Fault::status(404), Fault::status(500)];
    for (n, fault) in faults.into_iter().enumerate() {
        let (file, truth) = file(&world, &repository, &tree, n)?;
        world.proxy()?.fail_always(fault.clone());
        let got = access(Kind::Read, &file, &truth)?;
        ensure!(
            matches!(got, End::Errno(libc::EIO | libc::EAGAIN | libc::EPERM | libc::EBUSY)),
            "{fault:?}: {got:?}"
        );
        let log = world.daemon.log_tail(10);
        ensure!(log.contains("denied") && log.contains("reason="), "the log says nothing:\n{log}");
        world.proxy()?.heal();
        expect_right(Kind::Read, &file, &truth)?;
    }
    Ok(())
}

/// An origin that can't be reached at all: a page fault ends with SIGBUS, a read with an errno, both soon after
/// the deadline although the kernel asks again for each page that its read-ahead did not get, and neither
/// leaves zeros behind.
#[test]
#[ignore = "needs root"]
fn root_unreachable_for_good() -> Result<()> {
    let (world, repository, tree) = world("faults-gone")?;
    world.proxy()?.refuse();
    let mapped = file(&world, &repository, &tree, 0)?;
    let read = file(&world, &repository, &tree, 1)?;
    let readers =
        [start(Kind::MmapShared, &mapped.0, &mapped.1)?, start(Kind::Read, &read.0, &read.1)?];
    let [mapped_end, read_end] = readers.map(|reader| reader.wait());
    let (mapped_end, read_end) = (mapped_end?, read_end?);
    let (mapping, reading) = (end(&mapped_end)?, end(&read_end)?);
    ensure!(mapping == End::Signal(libc::SIGBUS), "{mapping:?}");
    ensure!(matches!(reading, End::Errno(_)), "{reading:?}");
    for elapsed in [mapped_end.elapsed, read_end.elapsed] {
        ensure!(elapsed < 2 * DEADLINE, "ended after {elapsed:?}");
    }
    world.proxy()?.heal();
    for (file, truth) in [mapped, read] {
        expect_right(Kind::MmapShared, &file, &truth)?;
    }
    Ok(())
}

/// A repository on this machine that is moved away: what git says is in the queue, in `status` and in the
/// log; once it is back, all is well.
#[test]
#[ignore = "needs root"]
fn root_a_local_origin_that_is_moved_away() -> Result<()> {
    let configuration = "deadline_secs = 20\nstall_secs = 4\n"; // see DEADLINE
    let world = World::with("faults-moved", Setting { configuration, ..Setting::default() })?;
    let repository = lonely(4, 10_000)?;
    let (origin, away) = (world.path("origin.git"), world.path("away.git"));
    repository.copy_to(&origin)?;
    let tree = world.path("tree");
    world.clone_url(&origin.to_string_lossy(), &tree, &["--history=none"])?;
    fs_err::rename(&origin, &away)?;

    let (gone, truth) = file(&world, &repository, &tree, 0)?;
    let reader = start(Kind::Read, &gone, &truth)?;
    let words = "does not appear to be a git repository";
    until("the queue says why", Duration::from_secs(60), || {
        let queue = world.daemon.admin().queue().ok()?;
        let reason = queue.first()?.reason.clone()?;
        reason.contains(words).then_some(())
    })?;
    let trouble = world.daemon.mount_of(&tree)?.trouble.unwrap_or_default();
    ensure!(trouble.contains(words), "status says {trouble:?}");
    let got = end(&reader.wait()?)?;
    ensure!(matches!(got, End::Errno(libc::EIO)), "{got:?}");
    let log = world.daemon.log_tail(20);
    let denied = log.lines().find(|line| line.contains("denied") && line.contains(words));
    ensure!(denied.is_some(), "the log does not say why:\n{log}");

    fs_err::rename(&away, &origin)?;
    expect_right(Kind::Read, &gone, &truth)
}
