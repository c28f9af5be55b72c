//! The registry with the images, and the ways to it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::System;
use super::host::Host;
use crate::process::{Run, require};
use crate::proxy::{Proxy, Quality};
use crate::registry::Registry;
use crate::scratch::Scratch;

/// The image as it is.
pub(super) const PLAIN: &str = "plain";
/// The same with a signed index beside it.
pub(super) const INDEXED: &str = "indexed";
/// The same in eStargz.
pub(super) const ESTARGZ: &str = "estargz";

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
    lan: Proxy,
    wan: Proxy,
    registry: Registry,
    /// Of containerd; the machine's if there is none.
    pub(super) programs: Option<PathBuf>,
    pub(super) public_key: String,
    pub(super) scratch: Scratch,
}

impl Site {
    /// Makes and pushes the images.
    pub(super) fn new() -> Result<Self> {
        require(&[("openssl", "openssl")])?;
        let scratch = Scratch::new("bench-images")?;
        let key = scratch.path().join("key.pem");
        Run::shell("openssl genpkey -algorithm ed25519 -out \"$1\"", &[&key]).check()?;
        let public_key = Run::shell("openssl pkey -in \"$1\" -pubout", &[&key]).check()?.text();
        let registry = Registry::start(&scratch.make("registry")?)?;
        let proxy = |network: Network| Proxy::start(registry.port(), network.quality());
        let (lan, wan) = (proxy(Network::Lan)?, proxy(Network::Wan)?);
        let programs = Some(containerd()?);
        let site = Self { lan, wan, registry, programs, public_key, scratch };
        for (repository, how) in [(PLAIN, "gzip"), (INDEXED, "gzip"), (ESTARGZ, "estargz")] {
            site.registry.push_debian(repository, TAG, "python", how)?;
        }
        let reference = format!("127.0.0.1:{}/{INDEXED}:{TAG}", site.registry.port());
        let host = Host::daemon_only(&site)?;
        host.hydrant(&["image", "pull", &reference])?;
        let key = key.to_str().context("a directory of a test is UTF-8")?;
        host.hydrant(&["image", "index", &reference, "--push", "--key", key])?;
        host.finish()?;
        Ok(site)
    }

    pub(super) fn proxy(&self, network: Network) -> &Proxy {
        match network {
            Network::Lan => &self.lan,
            Network::Wan => &self.wan,
        }
    }

    /// By what name a system gets its image.
    pub(super) fn reference(&self, network: Network, system: &System) -> String {
        format!("127.0.0.1:{}/{}:{TAG}", self.proxy(network).port(), system.repository)
    }

    /// Where the registry keeps its images.
    pub(super) fn data(&self) -> PathBuf {
        self.scratch.path().join("registry/data")
    }
}

/// containerd 2, for which every client says of which image a layer is.
fn containerd() -> Result<PathBuf> {
    let mut get = std::process::Command::new("bash");
    get.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/containerd/get")).arg("sid");
    Ok(Run::new(get).time_out(Duration::from_secs(600)).check()?.text().into())
}
