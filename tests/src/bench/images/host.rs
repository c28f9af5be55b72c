//! A machine that has never had an image.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::site::{Network, Site};
use super::soci::{self, Soci};
use super::stargz::{self, Stargz};
use super::{NAMESPACE, PATIENCE, Snapshotter, System, drop_caches, warm};
use crate::containerd::{Containerd, share_mounts};
use crate::daemon::Daemon;
use crate::process::{Run, until};
use crate::scratch::Scratch;
use crate::snapshots::Snapshots;

/// Dropped in order.
#[derive(Debug)]
pub(super) struct Host {
    peer: Option<Peer>,
    containerd: Option<Containerd>,
    snapshotter: Snapshotter,
    daemon: Option<Daemon>,
    scratch: Scratch,
}

/// A snapshotter that is not Hydrant's, and has a client of its own.
#[derive(Debug)]
enum Peer {
    /// With the digest of the image's index.
    Soci(Soci, String),
    Stargz(Stargz),
}

impl Host {
    /// With the snapshotter of a system.
    pub(super) fn fresh(site: &Site, system: &System) -> Result<Self> {
        let mut host = Self::with(site, system.snapshotter, system.configuration)?;
        drop_caches()?;
        // the registry is another machine, which has the image at hand
        warm(&site.data())?;
        let directory = host.scratch.path().join("containerd");
        let socket = match system.snapshotter {
            Snapshotter::Overlayfs => None,
            Snapshotter::Hydrant => {
                Some(Snapshots::of(&host.daemon()?.directories().run).socket().to_owned())
            }
            Snapshotter::Soci => Some(soci::socket(&directory)),
            Snapshotter::Stargz => Some(stargz::socket(&directory)),
        };
        let sockets: Vec<_> =
            socket.iter().map(|socket| (system.snapshotter.name(), socket.as_path())).collect();
        let programs = site.programs.as_deref();
        let containerd = Containerd::start_with(programs, &directory, &sockets, false, None)?;
        host.peer = match system.snapshotter {
            Snapshotter::Overlayfs | Snapshotter::Hydrant => None,
            Snapshotter::Soci => {
                let (programs, index) = site.soci.as_ref().context("SOCI is not here")?;
                Some(Peer::Soci(Soci::start(programs, &containerd)?, index.clone()))
            }
            Snapshotter::Stargz => {
                let programs = site.stargz.as_ref().context("stargz is not here")?;
                Some(Peer::Stargz(Stargz::start(programs, &containerd)?))
            }
        };
        ensure!(containerd.version >= (2, 0), "this needs containerd 2");
        containerd.inside(&["runc", "--version"]).check()?;
        host.containerd = Some(containerd);
        Ok(host)
    }

    /// Only Hydrant.
    pub(super) fn daemon_only(site: &Site) -> Result<Self> {
        Self::with(site, Snapshotter::Hydrant, "")
    }

    fn with(site: &Site, snapshotter: Snapshotter, configuration: &str) -> Result<Self> {
        let scratch = Scratch::new("bench-image")?;
        let daemon = match snapshotter {
            Snapshotter::Hydrant => Some(daemon(site, &scratch, configuration)?),
            Snapshotter::Overlayfs | Snapshotter::Soci | Snapshotter::Stargz => None,
        };
        Ok(Self { peer: None, containerd: None, snapshotter, daemon, scratch })
    }

    /// `hydrant ARGUMENTS`
    pub(super) fn hydrant(&self, arguments: &[&str]) -> Result<String> {
        let daemon = self.daemon()?;
        let done = daemon.hydrant(arguments)?.time_out(PATIENCE).check();
        Ok(done.with_context(|| daemon.log_tail(40))?.text())
    }

    fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("Hydrant is not here")
    }

    pub(super) fn containerd(&self) -> Result<&Containerd> {
        self.containerd.as_ref().context("containerd is not here")
    }

    fn context<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| {
            let daemon = self.daemon.as_ref().map(|daemon| daemon.log_tail(40));
            let containerd = self.containerd.as_ref().map(Containerd::log_tail);
            format!("{}\n{}", containerd.unwrap_or_default(), daemon.unwrap_or_default())
        })
    }

    /// Makes and pushes an index of SOCI's; gives its digest.
    pub(super) fn make_soci_index(&self, image: &str) -> Result<String> {
        let Some(Peer::Soci(soci, _)) = &self.peer else { bail!("SOCI is not here") };
        soci.index(self.containerd()?, image)
    }

    /// As the snapshotter wants it: `ctr images pull`, or its own client.
    pub(super) fn pull(&self, image: &str) -> Result<()> {
        let containerd = self.containerd()?;
        match &self.peer {
            Some(Peer::Soci(soci, index)) => soci.pull(containerd, image, index),
            Some(Peer::Stargz(stargz)) => stargz.pull(containerd, image),
            None => {
                let snapshotter = self.snapshotter.name();
                let pull = ["images", "pull", "--plain-http", "--snapshotter", snapshotter, image];
                self.context(containerd.check(NAMESPACE, &pull)).map(drop)
            }
        }
    }

    /// A container of an image that is pulled.
    pub(super) fn container(&self, image: &str, name: &str, command: &[&str]) -> Result<Run> {
        let containerd = self.containerd()?;
        let cgroup = format!("/{}/{name}", containerd.cgroup());
        let snapshotter = self.snapshotter.name();
        let run = ["run", "--rm", "--snapshotter", snapshotter, "--cgroup", &cgroup, image, name];
        Ok(containerd.ctr(NAMESPACE, &[&run, command].concat()))
    }

    /// How long after `since` a container says something, which has to be `ok`. It has ended then.
    pub(super) fn first_output(
        &self,
        image: &str,
        name: &str,
        command: &[&str],
        since: Instant,
    ) -> Result<Duration> {
        let running = self.container(image, name, command)?.start()?;
        let first = running.first_output();
        let output = running.wait()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let first = self.context(first.context(said))?;
        ensure!(output.text() == "ok", "{}", output.text());
        Ok(first - since)
    }

    /// Until all of the image is here and proved, so that Hydrant has nothing to do with reads any more.
    pub(super) fn wait_until_complete(&self) -> Result<()> {
        let Ok(daemon) = self.daemon() else { return Ok(()) };
        let complete = until("all of it is here", PATIENCE, || {
            let images: Vec<hydrant_api::Image> = daemon.admin().get("/v1/images").ok()?;
            let image = images.first()?;
            (image.unproved == 0 && image.present_bytes == image.segment_bytes).then_some(())
        });
        self.context(complete)
    }

    /// Until it is known what was read of an image, all of it: the same twice in a row, as it is told every now and then.
    pub(super) fn wait_for_trace(&self, image: &str) -> Result<()> {
        let mut last = String::new();
        let known = until("a trace is there", PATIENCE, || {
            std::thread::sleep(Duration::from_secs(2));
            let listed = self.hydrant(&["image", "trace", "show", image, "--json"]).ok()?;
            let layers: Vec<hydrant_api::TracedLayer> = serde_json::from_str(&listed).ok()?;
            let traced = layers.iter().any(|layer| layer.bytes > 0);
            let same = listed == last;
            last = listed;
            (traced && same).then_some(())
        });
        self.context(known)
    }

    /// Ends all of it.
    pub(super) fn finish(mut self) -> Result<()> {
        self.peer = None;
        self.containerd = None;
        match &mut self.daemon {
            Some(daemon) => daemon.stop(),
            None => Ok(()),
        }
    }
}

fn daemon(site: &Site, scratch: &Scratch, configuration: &str) -> Result<Daemon> {
    let state = scratch.make("state")?;
    share_mounts(&state)?;
    let mut daemon = Daemon::stopped(scratch.path(), &state);
    daemon.set_env("HOME", &scratch.make("home")?.to_string_lossy());
    daemon.set_env("RUST_LOG", &std::env::var("RUST_LOG").unwrap_or("info".to_owned()));
    let lazy = Network::BOTH.map(|network| format!("'127.0.0.1:{}'", site.proxy(network).port()));
    daemon.configure(&format!(
        "[containerd]\nlazy = [{}]\n[images]\n{configuration}index_keys = ['''\n{}\n''']\n",
        lazy.join(", "),
        site.public_key
    ))?;
    daemon.start()?;
    Ok(daemon)
}
