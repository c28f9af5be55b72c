//! A supervisor that is killed costs nobody an error: readers wait for the next one and get their bytes.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hydrant_api::QueueEvent;
use hydrant_daemon::queue::inflight;
use hydrant_tests::access::Kind;
use hydrant_tests::daemon::{Family, built};
use hydrant_tests::estate::{self, Tables};
use hydrant_tests::guest;
use hydrant_tests::process::{alive, until};
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{End, Load, access, end, expect_right, start, start_each};
use hydrant_tests::repository::{Random, lonely};
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn world(name: &str, quality: Quality) -> Result<World> {
    World::with(name, Setting { proxy: Some(quality), ..Setting::default() })
}

/// The queue once `readers` processes wait, each for one thing or several, and all events are `wanted`.
fn queue(
    world: &World,
    readers: usize,
    wanted: impl Fn(&QueueEvent) -> bool,
) -> Result<Vec<QueueEvent>> {
    until("the queue is as it should be", Duration::from_secs(60), || {
        let queue = world.daemon.admin().queue().ok()?;
        let waiting: BTreeSet<i32> = queue.iter().map(|event| event.process.pid).collect();
        (waiting.len() == readers && queue.iter().all(&wanted)).then_some(queue)
    })
    .with_context(|| format!("{:#?}", world.daemon.admin().queue()))
}

/// The same events wait after a restart: `before`, of so many readers.
fn still_in_flight(world: &World, readers: usize, before: &[QueueEvent]) -> Result<()> {
    let after = queue(world, readers, |event| event.state == "in_flight")?;
    for event in before {
        ensure!(after.iter().any(|other| other.id == event.id), "{event:?} of {after:#?}");
    }
    Ok(())
}

/// How often to kill: `HYDRANT_TEST_KILLS`, or `default` times.
fn kills(default: usize) -> usize {
    let kills = std::env::var("HYDRANT_TEST_KILLS").ok().and_then(|kills| kills.parse().ok());
    kills.unwrap_or(default)
}

/// The next supervisor's pid, once it serves.
fn successor(world: &World, of: Pid) -> Result<Pid> {
    until("the next supervisor serves", Duration::from_secs(60), || {
        let pid = Pid::from_raw(world.daemon.status().ok()?.pid);
        (pid != of).then_some(pid)
    })
    .with_context(|| world.daemon.log_tail(40))
}

/// A reader, in `read` or in a page fault, waits for a stalled origin while the supervisor is killed, twice.
/// Others come after that, whose events must not be taken for those before. All get the right bytes.
#[test]
#[ignore = "needs root"]
fn root_killed_supervisor_costs_nobody_an_error() -> Result<()> {
    let world = world("restart-held", Quality::default())?;
    let (_, files) = world.lonely_tree(30, 200_000)?;
    let kinds = [Kind::Read, Kind::MmapShared, Kind::MmapExec, Kind::Splice, Kind::IoUring];
    let begin = |files: &[(PathBuf, PathBuf)]| -> Result<Vec<_>> {
        kinds
            .into_iter()
            .cycle()
            .zip(files)
            .map(|(kind, (file, truth))| start(kind, file, truth))
            .collect()
    };
    world.proxy()?.hold();
    let mut readers = begin(&files[..10])?;
    let before = queue(&world, 10, |event| event.state == "in_flight")?;
    for round in 0..2 {
        let killed = world.daemon.kill_supervisor()?;
        let at = Instant::now();
        successor(&world, killed)?;
        println!("serves again after {:?}", at.elapsed());
        let restored = queue(&world, readers.len(), |event| event.state == "in_flight")?;
        for event in &before {
            let again = restored.iter().find(|other| other.id == event.id);
            let again = again.with_context(|| format!("lost: {event:?} of {restored:?}"))?;
            ensure!(
                again.path == event.path && again.process.pid == event.process.pid,
                "{again:?}"
            );
            ensure!(again.attempts > event.attempts && again.age_ms > event.age_ms, "{again:?}");
        }
        let more = 10 * (round + 1);
        readers.extend(begin(&files[more..more + 10])?);
        queue(&world, readers.len(), |_| true)?;
    }
    world.proxy()?.heal();
    for (n, reader) in readers.into_iter().enumerate() {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "reader {n}: {got:?}\n{}", world.daemon.log_tail(60));
    }
    queue(&world, 0, |_| true)?;
    Ok(())
}

/// A reader that is killed just after the supervisor is in nobody's way afterwards.
#[test]
#[ignore = "needs root"]
fn root_killed_reader_and_supervisor() -> Result<()> {
    let world = world("restart-reader", Quality::default())?;
    let (_, files) = world.lonely_tree(4, 200_000)?;
    world.proxy()?.hold();
    let killed_reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    let reader = start(Kind::Pread, &files[1].0, &files[1].1)?;
    queue(&world, 2, |event| event.state == "in_flight")?;
    let supervisor = world.daemon.kill_supervisor()?;
    drop(killed_reader);
    successor(&world, supervisor)?;
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    // the dead reader's event is not in the way of others
    queue(&world, 0, |_| true)?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))
}

/// Supervisors killed again and again, some before they serve, under readers that compare every byte.
#[test]
#[ignore = "needs root"]
fn root_killed_supervisors_under_load() -> Result<()> {
    const READERS: usize = 8;
    let kills = kills(20);
    let quality = Quality {
        delay: Duration::from_millis(5),
        bytes_per_second: Some(40 << 20),
        ..Quality::default()
    };
    let world = world("restart-load", quality)?;
    let repository = lonely(4000, 20_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..guest::or(4000, 400))?;
    let (over, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let kinds = [Kind::Read, Kind::MmapPrivate, Kind::Sendfile, Kind::Pread];
    let read_on = |mine: &[(PathBuf, PathBuf)]| -> Result<()> {
        // once all is fetched again, from the beginning
        for (n, (file, truth)) in mine.iter().enumerate().cycle() {
            if over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let kind = kinds[n % kinds.len()];
            let got = access(kind, file, truth)?;
            ensure!(got == End::Right, "{kind:?} of {}: {got:?}", file.display());
            reads.fetch_add(1, Ordering::Relaxed);
        }
        bail!("no files")
    };
    let mut random = Random::new(7);
    let mut restarts = Vec::new();
    let result = thread::scope(|scope| {
        let readers: Vec<_> =
            files.chunks(files.len() / READERS).map(|mine| scope.spawn(|| read_on(mine))).collect();
        let killing = (0..kills).try_for_each(|n| {
            thread::sleep(Duration::from_millis(50 + random.below(200) as u64));
            let mut killed = world.daemon.kill_supervisor()?;
            if n % 4 == 3 {
                // and the next before it has taken over
                until("there is another", Duration::from_secs(10), || {
                    world.daemon.supervisor().filter(|pid| *pid != killed)
                })?;
                thread::sleep(Duration::from_millis(random.below(20) as u64));
                killed = world.daemon.kill_supervisor()?;
            }
            let at = Instant::now();
            successor(&world, killed)?;
            restarts.push(at.elapsed());
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let all =
            readers.into_iter().map(|reader| reader.join().unwrap_or_else(|_| bail!("panic")));
        killing.and(all.collect::<Result<Vec<()>>>().map(drop))
    });
    result.with_context(|| world.daemon.log_tail(100))?;
    restarts.sort_unstable();
    let (middle, last) = (restarts[kills / 2], restarts[kills - 1]);
    let reads = reads.into_inner();
    println!("{reads} reads during {kills} restarts: median {middle:?}, longest {last:?}");
    Ok(())
}

/// From the kill to the next reader's bytes: of a file that is there, and of one that has to be fetched.
#[test]
#[ignore = "needs root"]
fn root_restarts_are_short() -> Result<()> {
    let world = world("restart-time", Quality::default())?;
    let (_, files) = world.lonely_tree(60, 20_000)?;
    let mut times = Vec::new();
    for (file, truth) in &files[..20] {
        thread::sleep(Duration::from_millis(250));
        let killed = world.daemon.kill_supervisor()?;
        let at = Instant::now();
        expect_right(Kind::Read, file, truth)?;
        times.push(at.elapsed());
        successor(&world, killed)?;
    }
    times.sort_unstable();
    println!("from kill to bytes: median {:?}, longest {:?}", times[10], times[19]);
    Ok(())
}

/// Between two supervisors no other daemon can have the state directory, not even one that `hydrant` would start.
#[test]
#[ignore = "needs root"]
fn root_no_other_daemon_in_between() -> Result<()> {
    let world = world("restart-between", Quality::default())?;
    let (_, files) = world.lonely_tree(4, 200_000)?;
    let parent = world.daemon.parent()?;
    kill(parent, Signal::SIGSTOP)?;
    let killed = world.daemon.kill_supervisor()?;
    let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    let url = world.serve(&lonely(1, 1000)?, "other")?;
    let directory = world.path("other");
    let cloning = world.daemon.hydrant(&["clone", &url, &directory.to_string_lossy()])?.start()?;
    until("it can't start a daemon", Duration::from_secs(60), || {
        let log = std::fs::read_to_string(world.path("run/hydrantd.log")).ok()?;
        log.contains("another hydrantd").then_some(())
    })?;
    kill(parent, Signal::SIGCONT)?;
    let successor = successor(&world, killed)?;
    ensure!(world.daemon.supervisor() == Some(successor), "{successor} is not {parent}'s child");
    drop(cloning);
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))
}

/// The parent alone is killed: no reader notices, another one takes its place, and supervisors can be killed as before.
#[test]
#[ignore = "needs root"]
fn root_killed_parent_does_no_harm() -> Result<()> {
    let mut world = world("restart-parent", Quality::default())?;
    let (_, files) = world.lonely_tree(6, 200_000)?;
    world.proxy()?.hold();
    let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    queue(&world, 1, |event| event.state == "in_flight")?;
    let supervisor = Pid::from_raw(world.daemon.status()?.pid);
    kill(world.daemon.parent()?, Signal::SIGKILL)?;
    ensure!(reader.still_runs_after(Duration::from_millis(300)), "it ended by itself");
    let next = successor(&world, supervisor)?;
    ensure!(alive(supervisor), "it is the parent of the next");
    kill(next, Signal::SIGKILL)?;
    successor(&world, next)?;
    ensure!(reader.still_runs_after(Duration::from_millis(300)), "it ended by itself");
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))?;
    world.daemon.stop()?;
    until("the parent has ended", Duration::from_secs(60), || (!alive(supervisor)).then_some(()))
}

/// Parent and supervisor are killed at the same moment, again and again: the keeper takes the parent's place, and no reader
/// notices. So it is with a keeper that is killed, of which there is another at once.
#[test]
#[ignore = "needs root"]
fn root_killed_parent_and_supervisor_cost_nobody_an_error() -> Result<()> {
    let mut world = world("restart-keeper", Quality::default())?;
    let (tree, files) = world.lonely_tree(6, 200_000)?;
    let keeper = |world: &World, but: Pid| {
        until("there is a keeper", Duration::from_secs(60), || {
            world.daemon.family()?.keeper.filter(|keeper| *keeper != but)
        })
    };
    world.proxy()?.hold();
    let kinds = [Kind::Read, Kind::MmapShared, Kind::Splice];
    let readers = start_each(&kinds, &files)?;
    let before = queue(&world, kinds.len(), |event| event.state == "in_flight")?;
    for round in 0..4 {
        let (parent, supervisor) =
            (world.daemon.parent()?, Pid::from_raw(world.daemon.status()?.pid));
        let first = keeper(&world, supervisor)?;
        kill(first, Signal::SIGKILL)?;
        let next = keeper(&world, first)?;
        let order = if round % 2 == 0 { [parent, supervisor] } else { [supervisor, parent] };
        // the second one does nothing about the end of the first, however long it takes us to get to it
        kill(order[1], Signal::SIGSTOP)?;
        order.into_iter().try_for_each(|pid| kill(pid, Signal::SIGKILL))?;
        successor(&world, supervisor)?;
        until(&format!("{next} is the parent"), Duration::from_secs(60), || {
            (world.daemon.parent().ok()? == next).then_some(())
        })?;
        still_in_flight(&world, kinds.len(), &before)?;
    }
    world.proxy()?.heal();
    for reader in readers {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
    }
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))?;
    let log = world.daemon.log_tail(10_000);
    ensure!(!log.contains("nothing guarded this tree"), "{log}");
    world.daemon.stop()?;
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "still mounted");
    Ok(())
}

/// The supervisor is killed a moment after its parent, whatever it has come to by then in taking the parent's place, and what it
/// has started with it: readers wait for whoever comes next, and nothing is left over of those before.
#[test]
#[ignore = "needs root"]
fn root_killed_supervisor_after_its_parent() -> Result<()> {
    let mut world = world("restart-after", Quality::default())?;
    let (tree, files) = world.lonely_tree(6, 200_000)?;
    world.proxy()?.hold();
    let kinds = [Kind::Read, Kind::MmapShared, Kind::Splice];
    let readers = start_each(&kinds, &files)?;
    let before = queue(&world, kinds.len(), |event| event.state == "in_flight")?;
    for round in 0..kills(12) {
        let Family { parent, supervisor, keeper } = settled(&world)?;
        kill(parent, Signal::SIGKILL)?;
        thread::sleep(Duration::from_millis(round as u64 % 12 * 5));
        supervisor.into_iter().try_for_each(|pid| kill(pid, Signal::SIGKILL))?;
        still_in_flight(&world, kinds.len(), &before)
            .with_context(|| format!("round {round}, {parent} {supervisor:?} {keeper:?}"))?;
    }
    settled(&world)?;
    world.proxy()?.heal();
    for reader in readers {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
    }
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))?;
    // waits until nothing of it is left
    world.daemon.stop()?;
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "still mounted");
    Ok(())
}

/// The daemon's family once there is a parent, a supervisor that serves and a keeper, and nobody else.
fn settled(world: &World) -> Result<Family> {
    let mut seen = None;
    let settled = until("there is one family", Duration::from_secs(60), || {
        let family = world.daemon.family()?;
        let strays = world.daemon.strays(family.parent);
        let serves = world.daemon.status().ok().map(|status| Pid::from_raw(status.pid));
        let whole = family.keeper.is_some() && serves.is_some() && family.supervisor == serves;
        let found = (whole && strays.is_empty()).then_some(family);
        seen = Some((family, serves, strays));
        found
    });
    settled.with_context(|| format!("{seen:?}\n{}", world.daemon.log_tail(100)))
}

/// A clean stop after a restart: all is unmounted, nothing is left running, and the next start is a plain one.
#[test]
#[ignore = "needs root"]
fn root_stop_after_a_restart() -> Result<()> {
    let mut world = world("restart-stop", Quality::default())?;
    let (tree, files) = world.lonely_tree(4, 200_000)?;
    let killed = world.daemon.kill_supervisor()?;
    successor(&world, killed)?;
    expect_right(Kind::Read, &files[0].0, &files[0].1)?;
    world.daemon.stop()?;
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "still mounted");
    world.daemon.start()?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Pread, file, truth))
}

/// Who waits for an origin that says nothing does not keep a stop waiting: all get an error, and never zeros.
#[test]
#[ignore = "needs root"]
fn root_stop_denies_who_waits() -> Result<()> {
    let mut world = world("restart-denied", Quality::default())?;
    let (tree, files) = world.lonely_tree(5, 200_000)?;
    world.proxy()?.hold();
    let kinds = [Kind::Read, Kind::Pread, Kind::MmapShared, Kind::MmapExec, Kind::Splice];
    let readers = start_each(&kinds, &files)?;
    queue(&world, kinds.len(), |event| event.state == "in_flight")?;
    let daemon = [world.daemon.parent()?, Pid::from_raw(world.daemon.status()?.pid)];
    let begun = Instant::now();
    // it gives up after a minute
    world.daemon.check(&["stop"])?;
    println!("stopped after {:?}", begun.elapsed());
    until("all of the daemon has ended", Duration::from_secs(60), || {
        daemon.iter().all(|pid| !alive(*pid)).then_some(())
    })?;
    for (kind, reader) in kinds.into_iter().zip(readers) {
        let got = end(&reader.wait()?)?;
        println!("{kind:?}: {got:?}");
        let denied = matches!(got, End::Errno(_)) || got == End::Signal(Signal::SIGBUS as i32);
        ensure!(denied, "{kind:?}: {got:?}\n{}", world.daemon.log_tail(60));
    }
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "still mounted");
    // nothing of it is left behind
    world.proxy()?.heal();
    world.daemon.start()?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))
}

/// `hydrant reload` without systemd: another supervisor in the same process, which nobody who reads notices,
/// and which the parent guards as well as the one before.
#[test]
#[ignore = "needs root"]
fn root_reload() -> Result<()> {
    let mut world = world("restart-reload", Quality::default())?;
    let repository = lonely(300, 20_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..guest::or(300, 100))?;
    let supervisor = world.daemon.status()?.pid;
    let load = Load::start(3, &[Kind::Read, Kind::MmapPrivate], &files);
    for _ in 0..3 {
        let before = world.daemon.status()?.instance;
        world.daemon.check(&["reload"])?;
        let after = world.daemon.status()?;
        ensure!(after.instance != before && after.pid == supervisor, "{after:?}");
        thread::sleep(Duration::from_millis(200));
    }
    let killed = world.daemon.kill_supervisor()?;
    successor(&world, killed)?;
    let reads = load.finish().with_context(|| world.daemon.log_tail(100))?;
    println!("{reads} reads");
    // who waits now waits on
    let later = lonely(2, 200_000)?;
    let url = world.serve(&later, "later")?;
    let place = world.path("later");
    world.clone_url(&url, &place, &["--history=none"])?;
    let files = world.lonely_files(&later, &place, 0..2)?;
    world.proxy()?.hold();
    let reader = start(Kind::MmapShared, &files[0].0, &files[0].1)?;
    queue(&world, 1, |event| event.state == "in_flight")?;
    world.daemon.check(&["reload"])?;
    queue(&world, 1, |event| event.state == "in_flight")?;
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
    world.daemon.stop()?;
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "still mounted");
    ensure!(!world.daemon.directories().socket().exists(), "the socket is still there");
    Ok(())
}

/// What a program of the version before has left is taken over, by a supervisor that comes after a kill and by one
/// in the same process. Who waits gets the right bytes, and what is left from then on is of the version now.
/// `HYDRANT_TEST_BEFORE` names such a program; without it, what the daemon of now has left is made what that
/// would have left.
#[test]
#[ignore = "needs root"]
fn root_upgrade_from_the_version_before() -> Result<()> {
    let setting = Setting { proxy: Some(Quality::default()), start: false, ..Setting::default() };
    let mut world = World::with("restart-before", setting)?;
    let real = std::env::var_os("HYDRANT_TEST_BEFORE").map(PathBuf::from);
    world.daemon.install(real.as_ref().unwrap_or(&built("hydrantd")?))?;
    world.daemon.start()?;
    let (_, files) = world.lonely_tree(6, 200_000)?;
    let parent = world.daemon.parent()?;
    world.proxy()?.hold();
    let kinds = [Kind::Read, Kind::MmapShared, Kind::Splice, Kind::Pread];
    let readers = start_each(&kinds, &files)?;
    let before = queue(&world, readers.len(), |event| event.state == "in_flight")?;
    world.daemon.install(&built("hydrantd")?)?;
    let supervisor = Pid::from_raw(world.daemon.status()?.pid);
    let (tables, own) = (Tables::of(supervisor)?, inflight::VERSION);
    let is_lock_kept = |wanted| {
        until("the lock is kept, or not", Duration::from_secs(60), || {
            (estate::has_lock(parent).ok()? == wanted).then_some(())
        })
    };
    let same_readers = || -> Result<()> {
        let after = queue(&world, readers.len(), |event| event.state == "in_flight")?;
        let ids = |queue: &[QueueEvent]| -> BTreeSet<_> { queue.iter().map(|e| e.id).collect() };
        ensure!(ids(&after) == ids(&before), "{after:#?}");
        ensure!(tables.version()? == own, "the tables are not its own");
        is_lock_kept(true)
    };
    if real.is_none() {
        tables.set_version(own - 1)?;
        estate::let_go_of_lock(supervisor)?;
        is_lock_kept(false)?;
    }
    kill(supervisor, Signal::SIGKILL)?;
    successor(&world, supervisor)?;
    same_readers()?;
    tables.set_version(own - 1)?;
    world.daemon.check(&["reload"])?;
    same_readers()?;
    world.proxy()?.heal();
    for reader in readers {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
    }
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))
}

/// A program that can't read what was left, as after a downgrade, says so and touches nothing: readers wait until
/// one is there that can.
#[test]
#[ignore = "needs root"]
fn root_downgrade_lets_readers_wait() -> Result<()> {
    let world = world("restart-downgrade", Quality::default())?;
    let (_, files) = world.lonely_tree(3, 200_000)?;
    world.proxy()?.hold();
    let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    let before = queue(&world, 1, |event| event.state == "in_flight")?;
    let killed = Pid::from_raw(world.daemon.status()?.pid);
    let tables = Tables::of(killed)?;
    tables.set_version(inflight::VERSION + 1)?;
    kill(killed, Signal::SIGKILL)?;
    let said = format!("is of version {}, and this hydrantd knows", inflight::VERSION + 1);
    until("several have said what is the matter", Duration::from_secs(60), || {
        (world.daemon.log_tail(1000).matches(&said).count() >= 3).then_some(())
    })
    .with_context(|| world.daemon.log_tail(60))?;
    ensure!(tables.version()? == inflight::VERSION + 1);
    tables.set_version(inflight::VERSION)?;
    successor(&world, killed)?;
    let after = queue(&world, 1, |event| event.state == "in_flight")?;
    ensure!(after[0].id == before[0].id, "{after:#?}");
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))
}

/// Another `queue` in the configuration is for the next start. Until then readers stay where they wait, also
/// with the next supervisor.
#[test]
#[ignore = "needs the guest kernel"]
fn guest_another_queue_after_a_stop() -> Result<()> {
    let configuration = "queue = \"brokered\"\n";
    let proxy = Some(Quality::default());
    let mut world =
        World::with("restart-queue", Setting { proxy, configuration, ..Setting::default() })?;
    let (_, files) = world.lonely_tree(4, 200_000)?;
    let is = |world: &World, queue: &str| -> Result<()> {
        let found = world.daemon.status()?.queue;
        ensure!(found == queue, "the queue is {found}, not {queue}\n{}", world.daemon.log_tail(20));
        Ok(())
    };
    for (files, [before, after]) in
        files.chunks(2).zip([["brokered", "kernel"], ["kernel", "brokered"]])
    {
        is(&world, before)?;
        let lines = format!("{}queue = \"{after}\"\n", guest::configuration());
        world.daemon.configure(&lines)?;
        world.proxy()?.hold();
        let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
        queue(&world, 1, |event| event.state == "in_flight")?;
        let killed = world.daemon.kill_supervisor()?;
        successor(&world, killed)?;
        is(&world, before)?;
        world.daemon.check(&["reload"])?;
        is(&world, before)?;
        queue(&world, 1, |event| event.state == "in_flight")?;
        world.proxy()?.heal();
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{got:?}\n{}", world.daemon.log_tail(60));
        world.daemon.stop()?;
        world.daemon.start()?;
        is(&world, after)?;
        expect_right(Kind::Read, &files[1].0, &files[1].1)?;
    }
    Ok(())
}
