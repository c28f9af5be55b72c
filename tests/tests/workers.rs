//! Workers that are replaced, and the cgroups that they are in.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_api::Worker;
use hydrant_tests::access::Kind;
use hydrant_tests::guest;
use hydrant_tests::process::{alive, until};
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{Crowd, End, end, expect_right, start};
use hydrant_tests::repository::lonely;
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(60);

fn workers(world: &World, arguments: &[&str]) -> Result<Vec<Worker>> {
    let output = world.daemon.check(&[&["workers"], arguments, &["--json"]].concat())?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A slow line, so that there is always something in flight.
fn slow() -> Setting {
    let bytes_per_second = Some(guest::or(4 << 20, 512 << 10));
    let quality =
        Quality { delay: Duration::from_millis(20), bytes_per_second, ..Quality::default() };
    Setting { proxy: Some(quality), ..Setting::default() }
}

/// Whether this machine has cgroups that tests can use; the hierarchy's root.
fn hierarchy() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let root = mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| PathBuf::from(place.split(' ').nth(4).unwrap_or("/")))
    })?;
    let probe = root.join(format!("hydrant-probe-{}", std::process::id()));
    std::fs::create_dir(&probe).ok()?;
    std::fs::remove_dir(&probe).ok()?;
    Some(root)
}

/// `hydrant workers restart` again and again under readers that check every byte: none notices.
#[test]
#[ignore = "needs root"]
fn root_workers_restart_is_noticed_by_nobody() -> Result<()> {
    let world = World::with("recycle", slow())?;
    let (tree, files) = world.lonely_tree(160, 60_000)?;
    let first = workers(&world, &[])?;
    ensure!(first.iter().all(|worker| worker.state == "running"), "{first:?}");
    let mut crowds = Vec::new();
    let mut before = first.clone();
    for (part, kind) in
        files.chunks(40).zip([Kind::Read, Kind::MmapPrivate, Kind::Pread, Kind::Splice])
    {
        let mut crowd = Crowd::start(kind, part)?;
        until("something is in flight, or all is over", PATIENCE, || {
            let queue = world.daemon.admin().queue().ok()?;
            let in_flight = queue.iter().any(|event| event.state == "in_flight");
            (in_flight || crowd.running() == 0).then_some(())
        })?;
        crowds.push(crowd);
        let after = workers(&world, &["restart"])?;
        ensure!(after.len() == before.len(), "{after:?}");
        for (old, new) in before.iter().zip(&after) {
            ensure!(old.pid != new.pid && new.pid.is_some(), "{old:?} {new:?}");
            ensure!(new.deaths == 0 && new.last_death.is_none(), "{new:?}");
        }
        before = after;
    }
    // one alone
    let shard = world.daemon.mount_of(&tree)?.shard;
    let one = workers(&world, &["restart", &shard.to_string()])?;
    ensure!(one.len() == 1 && one[0].shard == shard, "{one:?}");
    let others = workers(&world, &[])?.into_iter().filter(|worker| worker.shard != shard);
    let same = |worker: Worker| before.iter().any(|old| old.pid == worker.pid);
    ensure!(others.into_iter().all(same), "another shard's worker was replaced");
    crowds.into_iter().try_for_each(Crowd::expect_right)?;
    let output = world.daemon.hydrant(&["workers", "restart", "99"])?.output()?;
    ensure!(output.code() == 1, "{}", output.text());
    Ok(())
}

/// A worker that does not stop when it is told to is killed; its reader is none the worse for it.
#[test]
#[ignore = "needs root"]
fn root_a_stuck_worker_is_replaced_by_force() -> Result<()> {
    let world = World::new("recycle-stuck")?;
    let (tree, files) = world.lonely_tree(1, 100_000)?;
    let shard = world.daemon.mount_of(&tree)?.shard;
    let all = workers(&world, &[])?;
    let old = all.iter().find(|worker| worker.shard == shard).and_then(|worker| worker.pid);
    let old = old.context("no worker")?;
    kill(Pid::from_raw(old), Signal::SIGSTOP)?;
    let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    let new = workers(&world, &["restart", &shard.to_string()])?;
    ensure!(new[0].pid.is_some_and(|pid| pid != old), "{new:?}");
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    Ok(())
}

/// The worker of this shard and its spare, once there are both.
fn with_spare(world: &World, shard: u16) -> Result<(Worker, i32)> {
    until("there are a worker and a spare", PATIENCE, || {
        let all = workers(world, &[]).ok()?;
        let worker = all.into_iter().find(|worker| worker.shard == shard)?;
        let spare = worker.spare_pid?;
        (worker.state == "running").then_some((worker, spare))
    })
}

/// The worker of this shard, once it is `pid`.
fn takes_over(world: &World, shard: u16, pid: i32) -> Result<()> {
    until("the spare is the worker", PATIENCE, || {
        let all = workers(world, &[]).ok()?;
        let worker = all.into_iter().find(|worker| worker.shard == shard)?;
        (worker.pid == Some(pid)).then_some(())
    })
    .with_context(|| world.daemon.log_tail(30))
}

/// When a worker is killed, its shard's spare becomes the worker and serves who waits; then there is another
/// spare. A spare that dies is missed by nobody.
#[test]
#[ignore = "needs root"]
fn root_the_spare_takes_over() -> Result<()> {
    let world = World::with("spare", slow())?;
    let (tree, files) = world.lonely_tree(3, 60_000)?;
    let shard = world.daemon.mount_of(&tree)?.shard;

    let (worker, spare) = with_spare(&world, shard)?;
    world.proxy()?.hold();
    let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    until("its event is with the worker", PATIENCE, || {
        let queue = world.daemon.admin().queue().ok()?;
        queue.iter().any(|event| event.worker_pid == worker.pid).then_some(())
    })?;
    kill(Pid::from_raw(worker.pid.context("no worker")?), Signal::SIGKILL)?;
    takes_over(&world, shard, spare)?;
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");

    let (worker, spare) = with_spare(&world, shard)?;
    ensure!(worker.pid != Some(spare) && worker.deaths == 1, "{worker:?}");
    // asked for a restart, there are new ones of both
    let after = workers(&world, &["restart", &shard.to_string()])?;
    ensure!(![worker.pid, Some(spare)].contains(&after[0].pid), "{after:?}, not {spare}");
    until("the old spare has ended", PATIENCE, || (!alive(Pid::from_raw(spare))).then_some(()))?;
    expect_right(Kind::Pread, &files[1].0, &files[1].1)?;

    let (worker, spare) = with_spare(&world, shard)?;
    kill(Pid::from_raw(spare), Signal::SIGKILL)?;
    until("there is another spare", PATIENCE, || {
        let (_, other) = with_spare(&world, shard).ok()?;
        (other != spare).then_some(())
    })?;
    let (same, spare) = with_spare(&world, shard)?;
    ensure!(same.pid == worker.pid && same.deaths == 1, "{same:?}");
    let name = fs_err::read_to_string(format!("/proc/{spare}/comm"))?;
    ensure!(name.trim() == "hydrantd-spare", "{name}");
    expect_right(Kind::Read, &files[2].0, &files[2].1)
}

/// `[workers] spare = false`: there is none, and workers are followed by others all the same.
#[test]
#[ignore = "needs root"]
fn root_without_a_spare() -> Result<()> {
    let configuration = "[workers]\nspare = false\n";
    let world = World::with("no-spare", Setting { configuration, ..Setting::default() })?;
    let (_, files) = world.lonely_tree(1, 60_000)?;
    for worker in world.daemon.workers()? {
        kill(worker, Signal::SIGKILL)?;
    }
    expect_right(Kind::Read, &files[0].0, &files[0].1)?;
    let all = workers(&world, &[])?;
    ensure!(all.iter().all(|worker| worker.spare_pid.is_none()), "{all:?}");
    Ok(())
}

/// `hydrant prefetch` goes on with the next worker when its worker is killed.
#[test]
#[ignore = "needs root"]
fn root_prefetch_survives_its_worker() -> Result<()> {
    let world = World::with("prefetch-killed", slow())?;
    let repository = lonely(60, 60_000)?;
    let tree = world.quick(&repository)?;
    let prefetch = world.daemon.hydrant(&["prefetch", tree.to_str().context("UTF-8")?])?.start()?;
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(150));
        for worker in world.daemon.workers()? {
            let _ = kill(worker, Signal::SIGKILL);
        }
    }
    let output = prefetch.wait()?;
    ensure!(output.code() == 0, "{}", String::from_utf8_lossy(&output.stderr));
    let mount = world.daemon.mount_of(&tree)?;
    ensure!(mount.present_bytes >= 60 * 60_000, "{mount:?}");
    Ok(())
}

/// Each worker is in a cgroup of its own, which goes with it; a daemon that was killed leaves some, and the next
/// one removes them.
#[test]
#[ignore = "needs root"]
fn root_workers_have_cgroups_of_their_own() -> Result<()> {
    let configuration = "[workers]\ncgroup_parent = \"/\"\n";
    let mut world = World::with("cgroups", Setting { configuration, ..Setting::default() })?;
    let own = |world: &World| -> Result<Vec<PathBuf>> {
        let workers = workers(world, &[])?;
        let groups = workers.iter().filter_map(|worker| worker.cgroup.as_ref());
        Ok(groups.map(PathBuf::from).collect())
    };
    let Some(root) = hierarchy() else {
        ensure!(own(&world)?.is_empty(), "cgroups where there are none");
        ensure!(world.daemon.log_tail(100).contains("workers have no cgroups"), "not said");
        return Ok(());
    };
    let of_worker = |world: &World, worker: &Worker| -> Result<PathBuf> {
        let group = PathBuf::from(worker.cgroup.as_ref().context("no cgroup")?);
        let inside = fs_err::read_to_string(group.join("cgroup.procs"))?;
        let pid = worker.pid.context("no worker")?.to_string();
        ensure!(inside.lines().eq([pid.as_str()]), "{inside:?} in {}", group.display());
        ensure!(group.starts_with(&root), "{}", group.display());
        ensure!(own(world)?.contains(&group));
        Ok(group)
    };
    let all = workers(&world, &[])?;
    let groups: Vec<PathBuf> =
        all.iter().map(|worker| of_worker(&world, worker)).collect::<Result<_>>()?;
    // a file that is kept open would keep the kernel from telling of the end of its group
    let supervisor = world.daemon.supervisor().context("no supervisor")?;
    until("nobody has a file of a cgroup open", PATIENCE, || {
        let pids = all.iter().filter_map(|worker| worker.pid).chain([supervisor.as_raw()]);
        let opened = pids.flat_map(|pid| fs_err::read_dir(format!("/proc/{pid}/fd")));
        let mut files =
            opened.flatten().flatten().filter_map(|fd| fs_err::read_link(fd.path()).ok());
        (!files.any(|file| file.starts_with(&root))).then_some(())
    })?;
    let above = groups[0].parent().context("no parent")?.to_owned();
    kill(Pid::from_raw(all[0].pid.context("no pid")?), Signal::SIGKILL)?;
    until("its cgroup is removed", PATIENCE, || (!groups[0].exists()).then_some(()))?;
    until("the next one has another", PATIENCE, || {
        let next = own(&world).ok()?;
        next.iter().all(|group| *group != groups[0]).then_some(())
    })?;
    world.daemon.kill();
    ensure!(above.exists(), "nobody was there to remove it");
    world.daemon.start()?;
    let left = || -> Result<Vec<PathBuf>> {
        let entries = fs_err::read_dir(&above)?.filter_map(|entry| Some(entry.ok()?.path()));
        Ok(entries.filter(|path| path.is_dir()).collect())
    };
    until("only those of the new workers and their spares are left", PATIENCE, || {
        let (there, workers) = (left().ok()?, workers(&world, &[]).ok()?);
        let spares = workers.iter().filter(|worker| worker.spare_pid.is_some()).count();
        let wanted = own(&world).ok()?;
        (wanted.iter().all(|group| there.contains(group))
            && (wanted.len(), spares) == (all.len(), all.len())
            && there.len() == 2 * all.len())
        .then_some(())
    })?;
    world.daemon.stop()?;
    ensure!(!above.exists(), "{} is left", above.display());
    Ok(())
}

/// A worker that takes more memory than it may is killed by the kernel; that is said, and its reader gets its
/// bytes from the next one.
#[test]
#[ignore = "needs the guest kernel"]
fn guest_out_of_memory_is_said() -> Result<()> {
    let configuration = "[workers]\nmemory_max = \"300M\"\n";
    let setting = Setting { proxy: Some(Quality::default()), configuration, ..Setting::default() };
    let world = World::with("oom", setting)?;
    let (tree, files) = world.lonely_tree(1, 300_000)?;
    let shard = world.daemon.mount_of(&tree)?.shard;
    let worker = || -> Result<Worker> {
        let all = workers(&world, &[])?;
        all.into_iter().find(|worker| worker.shard == shard).context("no worker")
    };
    let first = worker()?;
    ensure!(first.memory_max_bytes == Some(300 << 20), "{first:?}");
    world.proxy()?.hold();
    let reader = start(Kind::Read, &files[0].0, &files[0].1)?;
    until("its event is with the worker", PATIENCE, || {
        let queue = world.daemon.admin().queue().ok()?;
        queue.iter().any(|event| event.state == "in_flight").then_some(())
    })?;
    // less than it has
    let group = first.cgroup.context("no cgroup")?;
    fs_err::write(Path::new(&group).join("memory.max"), "1048576")?;
    let death = until("the worker is killed", PATIENCE, || worker().ok()?.last_death)?;
    ensure!(Some(death.pid) == first.pid, "{death:?}");
    ensure!(death.end == "killed by the kernel: out of memory (limit 1 MiB)", "{death:?}");
    let status = world.daemon.check(&["status"])?.text();
    ensure!(status.contains("killed by the kernel: out of memory"), "{status}");
    world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    Ok(())
}
