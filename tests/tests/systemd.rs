//! Hydrant's units under a real systemd: the service starts and stops, and what kills it costs no reader an error.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::container::Container;
use hydrant_tests::process::until;
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::{End, end, expect_right, start};
use hydrant_tests::repository::{Repository, lonely};
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

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
        Ok(Self { container, world })
    }

    /// A lazy clone in the container.
    fn clone(&self, repository: &Repository) -> Result<()> {
        let url = self.world.serve(repository, "repo")?;
        self.container.check(&["hydrant", "clone", "--history=none", &url, TREE])?;
        Ok(())
    }

    /// Files of the clone as seen from outside, with their truth.
    fn files(&self, repository: &Repository, count: usize) -> Result<Vec<(PathBuf, PathBuf)>> {
        self.world.lonely_files(repository, &self.container.path(TREE), 0..count)
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
    container.systemctl(&["start", "hydrantd"])?;
    ensure!(container.property("SubState")? == "running");
    let repository = lonely(4, 200_000)?;
    service.clone(&repository)?;
    let files = service.files(&repository, 4)?;
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
    container.systemctl(&["start", "hydrantd"])?;
    let repository = lonely(6, 200_000)?;
    service.clone(&repository)?;
    let files = service.files(&repository, 6)?;
    service.world.proxy()?.hold();
    let kinds = [Kind::Read, Kind::MmapShared, Kind::Splice];
    let readers: Vec<_> = kinds
        .iter()
        .zip(&files)
        .map(|(kind, (file, truth))| start(*kind, file, truth))
        .collect::<Result<_>>()?;
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
