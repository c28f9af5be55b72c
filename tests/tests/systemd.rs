//! Hydrant's units under a real systemd: the service starts and stops, and what kills it costs no reader an error.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_api::Worker;
use hydrant_daemon::queue::inflight;
use hydrant_daemon::snapshotter::REMAP;
use hydrant_tests::access::Kind;
use hydrant_tests::container::Container;
use hydrant_tests::estate::Tables;
use hydrant_tests::guest;
use hydrant_tests::process::{Run, until};
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{End, Load, end, expect_right, start, start_each};
use hydrant_tests::repository::lonely;
use hydrant_tests::snapshots::{Connecting, Snapshots};
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rusqlite::Connection;

const TREE: &str = "/home/tree";

/// A world whose daemon is a service of a container. Dropped in order: the container first.
struct Service {
    container: Container,
    world: World,
}

impl Service {
    fn boot(name: &str) -> Result<Self> {
        let quality = Quality::default();
        let setting = Setting { proxy: Some(quality), start: false, ..Setting::default() };
        let world = World::with(name, setting)?;
        let container = Container::boot(&world)?;
        let place = container.path("/etc/hydrant");
        fs_err::create_dir_all(&place)?;
        fs_err::write(place.join("config.toml"), guest::configuration())?;
        Ok(Self { container, world })
    }

    /// Starts the service and makes a lazy clone in the container. Gives its files as seen from outside,
    /// with their truth.
    fn start_with_tree(&self, files: usize, size: usize) -> Result<Vec<(PathBuf, PathBuf)>> {
        self.container.systemctl(&["start", "hydrantd"])?;
        let repository = lonely(files, size)?;
        let url = self.world.serve(&repository, "repo")?;
        self.container.check(&["hydrant", "clone", "--history=none", &url, TREE])?;
        self.world.lonely_files(&repository, &self.container.path(TREE), 0..files)
    }

    /// The number that the kernel has given to the tree's mount.
    fn mount_id(&self) -> Result<Option<String>> {
        let table = fs_err::read_to_string(self.container.path("/proc/1/mountinfo"))?;
        let found = table.lines().find(|line| line.split(' ').nth(4) == Some(TREE));
        Ok(found.and_then(|line| line.split(' ').next()).map(str::to_owned))
    }

    /// The main process once another one than `of` serves.
    fn successor(&self, of: Pid) -> Result<Pid> {
        until("the next supervisor serves", Duration::from_secs(60), || {
            let pid = self.container.supervisor().ok()?;
            (pid != of && self.container.admin().status().is_ok()).then_some(pid)
        })
        .with_context(|| self.container.journal(60))
    }

    fn waiting(&self, readers: usize) -> Result<()> {
        until("readers wait", Duration::from_secs(60), || {
            let queue = self.container.admin().queue().ok()?;
            (queue.len() == readers && queue.iter().all(|event| event.state == "in_flight"))
                .then_some(())
        })
        .with_context(|| self.container.journal(60))
    }
}

/// It says that it is ready, serves a tree, and unmounts it when it is stopped.
#[test]
#[ignore = "needs root"]
fn root_systemd_start_clone_stop() -> Result<()> {
    let service = Service::boot("systemd-start")?;
    let container = &service.container;
    let files = service.start_with_tree(4, 200_000)?;
    ensure!(container.property("SubState")? == "running");
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Read, file, truth))?;
    ensure!(container.property("NFileDescriptorStore")? != "0");
    container.systemctl(&["stop", "hydrantd"])?;
    ensure!(container.property("Result")? == "success");
    ensure!(container.path(TREE).read_dir()?.next().is_none(), "still mounted");
    container.systemctl(&["start", "hydrantd"])?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))
}

/// The supervisor is killed while readers wait: systemd starts the next one, with the groups that it kept.
#[test]
#[ignore = "needs root"]
fn root_systemd_killed_supervisor() -> Result<()> {
    let service = Service::boot("systemd-kill")?;
    let container = &service.container;
    let files = service.start_with_tree(6, 200_000)?;
    service.world.proxy()?.hold();
    let kinds = [Kind::Read, Kind::MmapShared, Kind::Splice];
    let readers = start_each(&kinds, &files)?;
    service.waiting(readers.len())?;
    let killed = container.supervisor()?;
    kill(killed, Signal::SIGKILL)?;
    service.successor(killed)?;
    service.waiting(readers.len())?;
    let workers = container.admin().status()?.shards;
    for worker in workers.iter().filter_map(|shard| shard.worker_pid) {
        kill(container.outside(&worker.to_string())?, Signal::SIGKILL)?;
    }
    service.world.proxy()?.heal();
    for reader in readers {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{got:?}\n{}", container.journal(100));
    }
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Pread, file, truth))
}

/// `systemctl restart`, again and again, under readers that compare every byte; the tree is never unmounted.
#[test]
#[ignore = "needs root"]
fn root_systemd_restart_is_not_noticed() -> Result<()> {
    let service = Service::boot("systemd-restart")?;
    let container = &service.container;
    let files = service.start_with_tree(600, 20_000)?;
    let mounted = service.mount_id()?;
    let load = Load::start(4, &[Kind::Read, Kind::MmapPrivate, Kind::Sendfile], &files);
    let mut pids = BTreeSet::new();
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(200));
        pids.insert(container.supervisor()?);
        container.systemctl(&["restart", "hydrantd"])?;
        // it is served by another process, and was mounted all the time
        ensure!(!pids.contains(&container.supervisor()?));
        ensure!(service.mount_id()? == mounted, "{}", container.journal(60));
    }
    let reads = load.finish().with_context(|| container.journal(200))?;
    println!("{reads} reads");
    // and with readers who wait for the origin all the time
    let later = lonely(4, 200_000)?;
    let url = service.world.serve(&later, "later")?;
    container.check(&["hydrant", "clone", "--history=none", &url, "/home/later"])?;
    let files = service.world.lonely_files(&later, &container.path("/home/later"), 0..4)?;
    service.world.proxy()?.hold();
    let readers: Vec<_> = files
        .iter()
        .map(|(file, truth)| start(Kind::MmapShared, file, truth))
        .collect::<Result<_>>()?;
    service.waiting(readers.len())?;
    container.systemctl(&["restart", "hydrantd"])?;
    service.waiting(readers.len())?;
    service.world.proxy()?.heal();
    for reader in readers {
        let got = end(&reader.wait()?)?;
        ensure!(got == End::Right, "{got:?}\n{}", container.journal(100));
    }
    container.systemctl(&["stop", "hydrantd"])?;
    ensure!(service.mount_id()?.is_none(), "still mounted");
    Ok(())
}

/// A supervisor that does nothing any more is killed and replaced.
#[test]
#[ignore = "needs root"]
fn root_systemd_watchdog() -> Result<()> {
    let service = Service::boot("systemd-watchdog")?;
    let container = &service.container;
    container.override_unit("[Service]\nWatchdogSec=5\n")?;
    let files = service.start_with_tree(3, 200_000)?;
    let (file, truth) = &files[0];
    // it gives signs of life
    let supervisor = container.supervisor()?;
    std::thread::sleep(Duration::from_secs(8));
    ensure!(container.supervisor()? == supervisor, "{}", container.journal(60));
    kill(supervisor, Signal::SIGSTOP)?;
    let reader = start(Kind::Read, file, truth)?;
    service.successor(supervisor)?;
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}\n{}", container.journal(100));
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Pread, file, truth))
}

/// A tree in use: a stop waits, and readers get their bytes meanwhile.
#[test]
#[ignore = "needs root"]
fn root_systemd_stop_waits_for_a_tree_in_use() -> Result<()> {
    let service = Service::boot("systemd-busy")?;
    let container = &service.container;
    let files = service.start_with_tree(3, 200_000)?;
    // not by a command in the container, which would be the stop's to end
    let user = Run::program("sleep", &["600"]).current_dir(&container.path(TREE)).start()?;
    container.systemctl(&["stop", "--no-block", "hydrantd"])?;
    until("it is told to stop", Duration::from_secs(30), || {
        (container.property("SubState").ok()? == "stop-sigterm").then_some(())
    })?;
    for (file, truth) in &files {
        expect_right(Kind::Read, file, truth)?;
    }
    ensure!(container.property("SubState")? == "stop-sigterm", "{}", container.journal(60));
    drop(user);
    until("it has stopped", Duration::from_secs(60), || {
        (container.property("ActiveState").ok()? == "inactive").then_some(())
    })
    .with_context(|| container.journal(60))?;
    ensure!(container.property("Result")? == "success");
    ensure!(service.mount_id()?.is_none(), "still mounted");
    Ok(())
}

/// The socket alone is enabled: the first command starts the daemon.
#[test]
#[ignore = "needs root"]
fn root_systemd_socket_starts_the_daemon() -> Result<()> {
    let service = Service::boot("systemd-socket")?;
    let container = &service.container;
    container.systemctl(&["start", "hydrantd.socket"])?;
    ensure!(container.property("ActiveState")? == "inactive");
    container.check(&["hydrant", "status"])?;
    ensure!(container.property("ActiveState")? == "active");
    // who is asked during a restart answers after it
    container.systemctl(&["restart", "--no-block", "hydrantd"])?;
    container.check(&["hydrant", "status"])?;
    let permissions =
        |path| -> Result<String> { Ok(container.check(&["stat", "-c", "%a %U %G", path])?.text()) };
    ensure!(permissions("/run/hydrant/hydrantd.sock")? == "660 root hydrant");
    ensure!(permissions("/run/hydrant")? == "755 root root");
    ensure!(permissions("/var/lib/hydrant")? == "711 root root");
    container.systemctl(&["stop", "hydrantd", "hydrantd.socket"])?;
    ensure!(!container.path("/run/hydrant/hydrantd.sock").exists());
    Ok(())
}

/// containerd's socket is systemd's: it starts the daemon, and is there until it is stopped.
#[test]
#[ignore = "needs root"]
fn root_systemd_socket_for_containerd() -> Result<()> {
    let service = Service::boot("systemd-containerd")?;
    let container = &service.container;
    let snapshots = Snapshots::of(&container.path("/run/hydrant"));
    container.systemctl(&["start", "hydrant-containerd.socket"])?;
    ensure!(container.property("ActiveState")? == "inactive");
    ensure!(snapshots.list(&[])?.is_empty());
    ensure!(container.property("ActiveState")? == "active");
    snapshots.prepare("active", "", &[])?;
    // what the service may do is enough for this
    snapshots.prepare("below-preparing", "", &[])?;
    snapshots.commit("below", "below-preparing", &[])?;
    let users = REMAP.map(|label| (label, "0:100000:65536"));
    snapshots.prepare("mapped", "below", &users).with_context(|| container.journal(60))?;
    let owner = container.check(&["sh", "-c", "stat -c %u /var/lib/hydrant/mapped/*/0"])?;
    ensure!(owner.text() == "100000", "{owner:?}");
    snapshots.remove("mapped")?;
    snapshots.remove("below")?;
    let connecting = Connecting::to(snapshots.socket());
    for round in 0..4 {
        let before = container.supervisor()?;
        match round {
            0 => drop(container.systemctl(&["restart", "hydrantd"])?),
            1 => drop(container.check(&["hydrant", "reload"])?),
            _ => {
                kill(before, Signal::SIGKILL)?;
                service.successor(before)?;
            }
        }
        let names = snapshots.names(&[]).with_context(|| container.journal(60))?;
        ensure!(names == ["active"], "after {round}: {names:?}");
    }
    let permissions = container.check(&["stat", "-c", "%a %U", "/run/hydrant/containerd.sock"])?;
    ensure!(permissions.text() == "600 root");
    connecting.finish().with_context(|| container.journal(60))?;
    container.systemctl(&["stop", "hydrantd", "hydrant-containerd.socket"])?;
    ensure!(!snapshots.socket().exists() && snapshots.list(&[]).is_err());
    ensure!(container.property("ActiveState")? == "inactive");
    container.systemctl(&["start", "hydrantd"])?;
    ensure!(snapshots.names(&[])? == ["active"]);
    Ok(())
}

/// As little as the service can do with. The unit's comments say what each of the rest is good for.
#[test]
#[ignore = "needs root"]
fn root_systemd_hardening() -> Result<()> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd/hydrantd.service");
    let analyze = ["security", "--offline=true", "--no-pager", "--threshold=56", unit];
    Run::program("systemd-analyze", &analyze).check()?;
    // nothing that gives the service mounts that nobody else sees
    let service = Service::boot("systemd-hardening")?;
    let container = &service.container;
    container.systemctl(&["start", "hydrantd"])?;
    let namespace = |pid: &str| -> Result<String> {
        Ok(container.check(&["readlink", &format!("/proc/{pid}/ns/mnt")])?.text())
    };
    ensure!(namespace(&container.property("MainPID")?)? == namespace("1")?);
    let log = container.journal(1000);
    // systemd before 254 does not know this one, and goes on without
    let knows_all = container.version()? >= 254;
    let complains = |line: &&str| {
        line.contains("hydrantd.service:") && (knows_all || !line.contains("DelegateSubgroup"))
    };
    let complaints: Vec<_> = log.lines().filter(complains).collect();
    ensure!(complaints.is_empty(), "{complaints:#?}");
    // from a local path: git runs as its other end
    let repository = lonely(2, 100_000)?;
    repository.copy_to(&service.world.path("home/origin.git"))?;
    for setting in ["transfer.advertiseObjectInfo", "uploadpack.allowFilter"] {
        container.check(&["git", "-C", "/home/origin.git", "config", setting, "true"])?;
    }
    container.check(&["hydrant", "clone", "/home/origin.git", "/home/local"])?;
    let files = service.world.lonely_files(&repository, &container.path("/home/local"), 0..2)?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Read, file, truth))?;
    container.check(&["git", "-C", "/home/local", "status"])?;
    container.check(&["hydrant", "rm", "--keep", "/home/local"])?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Read, file, truth))
}

/// Each worker has a cgroup of its own below the service's, with what limits there are controllers for; with systemd 254 and
/// later the supervisor has one beside them (`DelegateSubgroup=`), without which there could be no limits.
#[test]
#[ignore = "needs root"]
fn root_systemd_cgroups() -> Result<()> {
    let service = Service::boot("systemd-cgroups")?;
    let container = &service.container;
    container.systemctl(&["start", "hydrantd"])?;
    let subgroup = container.version()? >= 254;
    let own = PathBuf::from(container.property("ControlGroup")?);
    let of = |pid: &str| -> Result<PathBuf> {
        let groups = container.check(&["cat", &format!("/proc/{pid}/cgroup")])?.text();
        let unified = groups.lines().find_map(|line| line.strip_prefix("0::"));
        Ok(PathBuf::from(unified.with_context(|| groups.clone())?))
    };
    let supervisor = of(&container.property("MainPID")?)?;
    ensure!(supervisor == if subgroup { own.join("supervisor") } else { own.clone() });
    let workers: Vec<Worker> = container.admin().get("/v1/workers")?;
    ensure!(!workers.is_empty());
    let in_its_own = |worker: &Worker| -> Result<()> {
        let group = of(&worker.pid.context("no worker")?.to_string())?;
        let name = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let right = group.parent() == Some(&own) && name.starts_with("worker-");
        ensure!(right, "{group:?} in {own:?}\n{}", container.journal(40));
        Ok(())
    };
    let place = container.path("/sys/fs/cgroup").join(own.strip_prefix("/")?);
    let controllers = fs_err::read_to_string(place.join("cgroup.controllers"))?;
    let limited = subgroup && controllers.split_whitespace().any(|name| name == "memory");
    for worker in &workers {
        in_its_own(worker)?;
        ensure!(worker.memory_max_bytes.is_some() == limited, "{controllers}: {worker:?}");
    }
    // the next supervisor finds those of the dead
    let killed = container.supervisor()?;
    kill(killed, Signal::SIGKILL)?;
    service.successor(killed)?;
    let next: Vec<Worker> = container.admin().get("/v1/workers")?;
    next.iter().try_for_each(in_its_own)?;
    container.systemctl(&["stop", "hydrantd"])?;
    ensure!(container.property("Result")? == "success", "{}", container.journal(60));
    Ok(())
}

/// An upgrade of the files in their place, under readers: `reload` goes on in the same process, `restart`
/// in another, and a supervisor whose file is gone still starts workers. `HYDRANT_TEST_BEFORE`: see
/// `root_upgrade_from_the_version_before`.
#[test]
#[ignore = "needs root"]
fn root_systemd_upgrade() -> Result<()> {
    let service = Service::boot("systemd-upgrade")?;
    let container = &service.container;
    if let Some(before) = std::env::var_os("HYDRANT_TEST_BEFORE") {
        container.upgrade(Some(&fs_err::read(PathBuf::from(before))?))?;
    }
    let files = service.start_with_tree(600, 20_000)?;
    let mounted = service.mount_id()?;
    let instance = || anyhow::Ok(container.admin().status()?.instance);
    let load = Load::start(4, &[Kind::Read, Kind::MmapPrivate, Kind::Sendfile], &files);
    let (supervisor, first) = (container.supervisor()?, instance()?);

    // not a program: the old one goes on
    container.upgrade(Some(b"#!/bin/sh\necho no good >&2; exit 1\n"))?;
    let refused = container.run(&["systemctl", "reload", "hydrantd"]).output()?;
    ensure!(refused.code() != 0);
    ensure!(container.journal(20).contains("no good"), "{}", container.journal(60));
    ensure!((container.supervisor()?, instance()?) == (supervisor, first));
    // its workers are of its own version
    let killed = container.kill_worker()?;
    until("there is another worker", Duration::from_secs(60), || {
        let shards = container.admin().status().ok()?.shards;
        let workers: Vec<_> = shards.iter().filter_map(|shard| shard.worker_pid).collect();
        (workers.len() == shards.len() && !workers.contains(&killed)).then_some(())
    })
    .with_context(|| container.journal(60))?;
    ensure!(!container.journal(1000).contains("protocol"), "{}", container.journal(60));

    for _ in 0..3 {
        let before = instance()?;
        container.upgrade(None)?;
        // as one of the version before leaves it
        let tables = Tables::of(supervisor)?;
        tables.set_version(inflight::VERSION - 1)?;
        container.systemctl(&["reload", "hydrantd"])?;
        ensure!(tables.version()? == inflight::VERSION, "{}", container.journal(60));
        ensure!(instance()? != before && container.supervisor()? == supervisor);
        ensure!(fs_err::read_link(format!("/proc/{supervisor}/exe"))?.ends_with("hydrantd"));
        ensure!(service.mount_id()? == mounted, "{}", container.journal(60));
        std::thread::sleep(Duration::from_millis(200));
    }
    // nothing of the programs before is left in the process
    until("nothing is defunct", Duration::from_secs(60), || {
        let processes = container.check(&["ps", "-eo", "stat,args"]).ok()?.text();
        (!processes.contains("<defunct>")).then_some(())
    })?;
    container.upgrade(None)?;
    Tables::of(supervisor)?.set_version(inflight::VERSION - 1)?;
    container.systemctl(&["restart", "hydrantd"])?;
    let after = container.supervisor()?;
    ensure!(after != supervisor);
    // what it was left, systemd has as well
    kill(after, Signal::SIGKILL)?;
    service.successor(after)?;
    ensure!(service.mount_id()? == mounted, "{}", container.journal(60));
    let reads = load.finish().with_context(|| container.journal(200))?;
    println!("{reads} reads");
    container.systemctl(&["stop", "hydrantd"])?;
    ensure!(service.mount_id()?.is_none(), "still mounted");
    ensure!(container.property("NFileDescriptorStore")? == "0");
    Ok(())
}

/// The program that is installed can't take over, as after a downgrade. It says so again and again; who guards the
/// readers in the restart stays, and they get their bytes once the right program is there.
#[test]
#[ignore = "needs root"]
fn root_systemd_downgrade_is_guarded() -> Result<()> {
    let service = Service::boot("systemd-downgrade")?;
    let container = &service.container;
    let files = service.start_with_tree(3, 200_000)?;
    service.world.proxy()?.hold();
    let (file, truth) = &files[0];
    let reader = start(Kind::Read, file, truth)?;
    service.waiting(1)?;
    let before = container.supervisor()?;
    let catalog = Connection::open(service.world.path("state/catalog.sqlite"))?;
    let own: i64 = catalog.pragma_query_value(None, "user_version", |row| row.get(0))?;
    catalog.pragma_update(None, "user_version", own + 1)?;
    container.systemctl(&["restart", "--no-block", "hydrantd"])?;
    let said = format!("is of version {}, and this hydrantd knows", own + 1);
    until("several have said what is the matter", Duration::from_secs(60), || {
        (container.journal(1000).matches(&said).count() >= 3).then_some(())
    })
    .with_context(|| container.journal(100))?;
    let is_guarded = || -> Result<bool> {
        Ok(container.check(&["ps", "-eo", "args"])?.text().contains("hydrantd guard"))
    };
    ensure!(is_guarded()?, "{}", container.journal(60));
    catalog.pragma_update(None, "user_version", own)?;
    service.successor(before)?;
    service.waiting(1)?;
    until("the guard has gone", Duration::from_secs(60), || (!is_guarded().ok()?).then_some(()))?;
    service.world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}\n{}", container.journal(100));
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Pread, file, truth))
}

/// systemd is told to stop the service in the middle of a restart, and lets go of what it kept. What the
/// first supervisor left is unmounted all the same, and nobody gets zeros.
#[test]
#[ignore = "needs root"]
fn root_systemd_stop_in_a_restart() -> Result<()> {
    let service = Service::boot("systemd-between")?;
    let container = &service.container;
    let files = service.start_with_tree(3, 200_000)?;
    service.world.proxy()?.hold();
    let (file, truth) = &files[0];
    let reader = start(Kind::Read, file, truth)?;
    service.waiting(1)?;
    container.override_unit("[Service]\nExecStartPre=/bin/sleep 100\n")?;
    container.systemctl(&["restart", "--no-block", "hydrantd"])?;
    until("the next one is about to start", Duration::from_secs(60), || {
        (container.property("SubState").ok()? == "start-pre").then_some(())
    })?;
    ensure!(service.mount_id()?.is_some(), "it is guarded");
    container.systemctl(&["stop", "hydrantd"])?;
    // it waits for the reader, who is told
    service.world.proxy()?.heal();
    let got = end(&reader.wait()?)?;
    ensure!(!matches!(got, End::Wrong(_)), "{got:?}\n{}", container.journal(100));
    until("it is unmounted", Duration::from_secs(60), || {
        service.mount_id().ok()?.is_none().then_some(())
    })
    .with_context(|| container.journal(100))?;
    // nobody is left, and the next start is a plain one
    container.override_unit("[Service]\n")?;
    until("the directories are free", Duration::from_secs(60), || {
        container.systemctl(&["start", "hydrantd"]).ok()
    })
    .with_context(|| container.journal(100))?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Pread, file, truth))
}
