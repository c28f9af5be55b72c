//! The registry with the images, and the ways to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::host::Host;
use super::tls::{self, Tls};
use super::{
    A, B, FULL_PULL, SYSTEMS, Snapshotter, System, WITH_TRACE, WITH_TRACE_OF_BOTH, soci, stargz,
};
use crate::containerd::packages;
use crate::process::{Run, require};
use crate::proxy::{Proxy, Quality};
use crate::registry::Registry;
use crate::scratch::Scratch;

/// The image as it is.
pub(super) const PLAIN: &str = "plain";
/// The same with a signed index beside it.
pub(super) const INDEXED: &str = "indexed";
/// The same with a trace of what [`A`] reads, too.
pub(super) const TRACED: &str = "traced";
/// The same with a trace of what [`A`] and [`B`] read.
pub(super) const TRACED_BOTH: &str = "traced-both";
/// The same with SOCI's index beside it.
pub(super) const SOCI: &str = "soci";
/// The same in eStargz.
pub(super) const ESTARGZ: &str = "estargz";
/// The same in eStargz as its own tool makes it, with what [`A`] reads at the beginning.
pub(super) const STARGZ: &str = "stargz";

const TAG: &str = "v1";

/// How the registry is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Network {
    Lan,
    Wan,
}

impl Network {
    pub(super) const BOTH: [Self; 2] = [Self::Lan, Self::Wan];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lan => "LAN",
            Self::Wan => "25 ms round trip, 25 MB/s",
        }
    }

    fn quality(self) -> Quality {
        match self {
            Self::Lan => Quality::default(),
            Self::Wan => Quality {
                shared_bytes_per_second: Some(25_000_000),
                ..Quality::round_trip(Duration::from_millis(25))
            },
        }
    }
}

/// Dropped in order.
#[derive(Debug)]
pub(super) struct Site {
    /// Of names of systems that are to be measured.
    words: Vec<String>,
    lan: Proxy,
    wan: Proxy,
    tls: Option<Tls>,
    /// The index that it has to be told of.
    pub(super) soci: Option<(soci::Programs, String)>,
    pub(super) stargz: Option<stargz::Programs>,
    registry: Registry,
    /// Of containerd; the machine's if there is none.
    pub(super) programs: Option<PathBuf>,
    pub(super) public_key: String,
    pub(super) scratch: Scratch,
}

impl Site {
    /// Makes and pushes the images.
    pub(super) fn new(words: Vec<String>) -> Result<Self> {
        require(&[("openssl", "openssl")])?;
        let scratch = Scratch::new("bench-images")?;
        let key = scratch.path().join("key.pem");
        Run::shell("openssl genpkey -algorithm ed25519 -out \"$1\"", &[&key]).check()?;
        let public_key = Run::shell("openssl pkey -in \"$1\" -pubout", &[&key]).check()?.text();
        let registry = Registry::start(&scratch.make("registry")?)?;
        let proxy = |network: Network| Proxy::start(registry.port(), network.quality());
        let (lan, wan) = (proxy(Network::Lan)?, proxy(Network::Wan)?);
        let programs = Some(packages(&[])?);
        let site = Self {
            words,
            lan,
            wan,
            tls: None,
            soci: None,
            stargz: None,
            registry,
            programs,
            public_key,
            scratch,
        };
        let images = [
            (PLAIN, "gzip"),
            (INDEXED, "gzip"),
            (TRACED, "gzip"),
            (TRACED_BOTH, "gzip"),
            (ESTARGZ, "estargz"),
        ];
        for (repository, how) in images {
            site.registry.push_debian(repository, TAG, "python", how)?;
        }
        let key = key.to_str().context("a directory of a test is UTF-8")?;
        for repository in [INDEXED, TRACED, TRACED_BOTH] {
            let host = Host::daemon_only(&site)?;
            let reference = site.direct(repository);
            host.hydrant(&["image", "pull", &reference])?;
            host.hydrant(&["image", "index", &reference, "--push", "--key", key])?;
            host.finish()?;
        }
        site.trace(key, &WITH_TRACE, &[("a", A)])?;
        site.trace(key, &WITH_TRACE_OF_BOTH, &[("a", A), ("b", B)])?;
        Ok(site)
    }

    /// Records what some workloads read, and pushes that.
    fn trace(&self, key: &str, system: &System, workloads: &[(&str, &[&str])]) -> Result<()> {
        let system = System { configuration: "background_fill = false\n", ..*system };
        let host = Host::fresh(self, &system)?;
        let reference = self.reference(Network::Lan, &system);
        host.pull(&reference)?;
        for (name, command) in workloads {
            host.first_output(&reference, name, command, Instant::now())?;
        }
        host.wait_for_trace(&reference)?;
        host.hydrant(&["image", "trace", "push", &reference, "--key", key])?;
        host.finish()
    }

    pub(super) fn proxy(&self, network: Network) -> &Proxy {
        match network {
            Network::Lan => &self.lan,
            Network::Wan => &self.wan,
        }
    }

    /// The name of an image where nothing slows it down or counts its bytes.
    fn direct(&self, repository: &str) -> String {
        format!("127.0.0.1:{}/{repository}:{TAG}", self.registry.port())
    }

    /// By what name a system gets its image.
    pub(super) fn reference(&self, network: Network, system: &System) -> String {
        let tls = self.tls.as_ref().filter(|_| system.snapshotter == Snapshotter::Soci);
        let host = match tls.and_then(|tls| tls.ports.get(network as usize)) {
            Some(port) => format!("{}:{port}", tls::NAME),
            None => format!("127.0.0.1:{}", self.proxy(network).port()),
        };
        format!("{host}/{}:{TAG}", system.repository)
    }

    /// What can be measured.
    pub(super) fn systems(&self) -> impl Iterator<Item = &'static System> {
        SYSTEMS.iter().filter(|system| {
            let is_here = match system.repository {
                SOCI => self.soci.is_some(),
                STARGZ => self.stargz.is_some(),
                _ => true,
            };
            is_here && self.is_wanted(system)
        })
    }

    fn is_wanted(&self, system: &System) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| system.name.contains(word))
    }

    /// Whether an image is for anything that is to be measured.
    pub(super) fn wants(&self, repository: &str) -> bool {
        SYSTEMS.iter().any(|system| system.repository == repository && self.is_wanted(system))
    }

    /// Without it, SOCI is left out.
    pub(super) fn make_soci_index(&mut self) -> Result<()> {
        let soci = SYSTEMS.iter().find(|system| system.snapshotter == Snapshotter::Soci);
        let soci = soci.context("it is not measured")?;
        self.registry.push_debian(SOCI, TAG, "python", "gzip")?;
        let tls =
            Tls::start(&self.scratch.path().join("tls"), &[self.lan.port(), self.wan.port()])?;
        let programs = soci::Programs::get(&tls)?;
        self.tls = Some(tls);
        self.soci = Some((programs.clone(), String::new()));
        let made = Host::fresh(self, soci).and_then(|host| {
            let index = host.make_soci_index(&self.reference(Network::Lan, soci))?;
            host.finish().map(|()| index)
        });
        self.soci = None;
        self.soci = Some((programs, made?));
        Ok(())
    }

    /// Without it, what needs an image that stargz-snapshotter's client has made is left out.
    pub(super) fn make_stargz_image(&mut self) -> Result<()> {
        let programs = stargz::Programs::get()?;
        let host = Host::fresh(self, &FULL_PULL)?;
        let (from, to) = (self.direct(PLAIN), self.direct(STARGZ));
        programs.optimise(host.containerd()?, &from, &to, A)?;
        host.finish()?;
        self.stargz = Some(programs);
        Ok(())
    }

    /// Where the registry keeps its images.
    pub(super) fn data(&self) -> PathBuf {
        self.scratch.path().join("registry/data")
    }
}
