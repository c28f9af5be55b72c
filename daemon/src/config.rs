//! The configuration file, `/etc/hydrant/config.toml`. It need not exist, and nothing need be in it.

mod names;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err as fs;
use hydrant_api::{ConfiguredDirectories, Directories};
use serde::de::{Error as _, IntoDeserializer};
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::fanotify::{self, QueueKind};
use crate::queue::wire::Limits;
use crate::source::oci::keys::PublicKey;
use crate::sys::cgroup;
pub use names::Names;

/// More shards than any machine has use for.
const MAX_SHARDS: u16 = 64;

/// The variable that goes before [`Config::queue`].
const QUEUE_ENV: &str = "HYDRANT_QUEUE";

/// What the file says; `None` where it says nothing. A key that is not listed here is an error.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where segments, images and changes are kept. Default: `/var/lib/hydrant`.
    pub state_dir: Option<PathBuf>,
    /// Where the admin socket is. Default: `/run/hydrant`.
    pub run_dir: Option<PathBuf>,
    /// The group whose members may use the daemon. Default: `hydrant`, if there is such a group.
    pub socket_group: Option<String>,
    /// Default: one for each core, at most four.
    pub shards: Option<u16>,
    /// The user that workers run as. Default: an unused number.
    pub worker_user: Option<String>,
    /// A reader gets its bytes or an error after so long.
    pub deadline_secs: Option<u64>,
    /// A response of which nothing comes for so long is given up, and the request tried again.
    pub stall_secs: Option<u64>,
    /// Requests to one origin at the same time.
    pub connections: Option<u32>,
    /// Fetch what is likely to be read next.
    pub read_ahead: Option<bool>,
    /// Work on a kernel that has no Landlock too. Default: no.
    pub without_landlock: Option<bool>,
    /// Where readers wait. Default: in the kernel, if it can.
    pub queue: Option<QueueChoice>,
    #[serde(default)]
    pub workers: Workers,
    #[serde(default)]
    pub images: Images,
    #[serde(default)]
    pub containerd: Containerd,
}

/// `[containerd]`: its snapshotter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Containerd {
    /// Images that say themselves what is in their layers, and are believed until these are here and proved: meanwhile
    /// containerd has such a layer for any image that names the same one. Default: none.
    #[serde(default)]
    pub lazy: Names,
}

/// `[images]`: container images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// Registries (`host:port`) that are spoken to without encryption, besides those on this machine.
    #[serde(default)]
    pub insecure_registries: Vec<String>,
    /// Where containerd's `hosts.toml` files are: mirrors of registries, and how each is reached. Default:
    /// `/etc/containerd/certs.d`.
    pub hosts_dir: Option<PathBuf>,
    /// Whether layers that were pulled by an index are filled as soon as they are mounted, whatever is read.
    /// Default: yes.
    pub background_fill: Option<bool>,
    /// Whether what the readers of a layer want in the first two minutes of a mount is remembered, and fetched before they ask
    /// the next time. Default: yes.
    pub trace: Option<bool>,
    /// Who may say what is in the layers of an image, by an index that they have signed and put beside it: Ed25519, PEM or
    /// base64. Default: nobody.
    #[serde(default, deserialize_with = "keys")]
    pub index_keys: Vec<PublicKey>,
    /// Whether SOCI indexes of version 1 are used. Nothing pins them: whoever can push to an image's repository says then what is in its
    /// layers, until all of them are here. Default: no.
    #[serde(default)]
    pub soci_v1: bool,
}

fn keys<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PublicKey>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let key = |text: &String| {
        PublicKey::parse(text)
            .ok_or_else(|| D::Error::custom(format!("{text:?} is no public key for Ed25519")))
    };
    texts.iter().map(key).collect()
}

/// `[workers]`: what the processes that fetch may use, and how long they may be silent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workers {
    /// A worker that still says nothing of a reader so long after the deadline is stuck, and killed.
    pub patience_secs: Option<u64>,
    /// Whether each shard has another one ready for when its worker ends. Default: yes.
    pub spare: Option<bool>,
    /// Whether each has a control group of its own. Default: where the system has them.
    pub cgroups: Option<bool>,
    /// The control group in which those are made, from the root of the hierarchy. Default: what the service
    /// manager delegates.
    pub cgroup_parent: Option<PathBuf>,
    /// Default: half of the machine's memory. 0: no limit.
    pub memory_max: Option<Size>,
    pub memory_high: Option<Size>,
    /// Threads. Default: 256.
    pub pids_max: Option<u64>,
    /// Default: 100, as all have.
    pub cpu_weight: Option<u64>,
}

/// A number of bytes: as such, or a text that ends with `K`, `M`, `G` or `T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SizeText")]
pub struct Size(pub u64);

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum SizeText {
    Number(u64),
    Text(String),
}

impl TryFrom<SizeText> for Size {
    type Error = String;

    fn try_from(size: SizeText) -> Result<Self, String> {
        let text = match size {
            SizeText::Number(bytes) => return Ok(Self(bytes)),
            SizeText::Text(text) => text,
        };
        let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
        let unit = units.iter().find_map(|(name, bits)| Some((text.strip_suffix(name)?, *bits)));
        let (number, bits) = unit.unwrap_or((&text, 0));
        let bytes = number.trim().parse().ok().and_then(|n: u64| n.checked_mul(1 << bits));
        bytes.map(Self).ok_or_else(|| format!("{text:?} is not a size such as 512M or 2G"))
    }
}

/// Where readers are to wait. `HYDRANT_QUEUE` in the environment goes before the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueChoice {
    /// As the kernel can.
    #[default]
    Auto,
    /// In the kernel's queue, or there is no daemon.
    Kernel,
    /// With the supervisor.
    Brokered,
}

impl QueueChoice {
    /// What it comes to on this kernel.
    pub fn kind(self) -> Result<QueueKind, QueueChoiceError> {
        match (self, fanotify::probe()?) {
            (Self::Kernel, QueueKind::Stock) => Err(QueueChoiceError::NotThere),
            (Self::Brokered, _) => Ok(QueueKind::Stock),
            (_, kind) => Ok(kind),
        }
    }
}

/// Readers can't wait where they are to.
#[derive(Debug, Error)]
pub enum QueueChoiceError {
    #[error("can't watch files: `hydrant doctor` checks what this machine can do")]
    Probe(#[from] fanotify::Error),
    #[error(
        "the queue is configured to be the kernel's, but this kernel has no restartable permission \
         events (fanotify_init: EINVAL for FAN_RESTARTABLE_EVENTS); configure \"auto\" or \"brokered\""
    )]
    NotThere,
}

/// A configuration file that can't be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("can't read the configuration")]
    Read(#[from] io::Error),
    #[error("in {}: {source}", .path.display())]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("in {}: {key} {what}", .path.display())]
    Value { path: PathBuf, key: &'static str, what: &'static str },
    #[error("in the environment: {QUEUE_ENV}: {source}")]
    Environment { source: serde::de::value::Error },
}

impl Config {
    /// Reads the file. One that does not exist says nothing.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text?,
        };
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        match config.fault() {
            Some((key, what)) => Err(ConfigError::Value { path: path.to_owned(), key, what }),
            None => Ok(config),
        }
    }

    /// The first value that can't be, and what is wrong with it.
    fn fault(&self) -> Option<(&'static str, &'static str)> {
        let workers = &self.workers;
        let relative = |path: &Option<PathBuf>| path.as_ref().is_some_and(|p| !p.is_absolute());
        let faults = [
            (relative(&self.state_dir), "state_dir", "is not an absolute path"),
            (relative(&self.run_dir), "run_dir", "is not an absolute path"),
            (relative(&self.images.hosts_dir), "hosts_dir", "is not an absolute path"),
            (self.shards == Some(0), "shards", "is 0: there must be one"),
            (self.shards > Some(MAX_SHARDS), "shards", "is more than 64"),
            (self.deadline_secs == Some(0), "deadline_secs", "is 0: no reader would get its bytes"),
            (self.stall_secs == Some(0), "stall_secs", "is 0: no request would be answered"),
            (relative(&workers.cgroup_parent), "cgroup_parent", "does not begin with /"),
            (workers.pids_max.is_some_and(|pids| pids < 16), "pids_max", "is less than 16"),
            (
                workers.cpu_weight.is_some_and(|weight| !(1..=10_000).contains(&weight)),
                "cpu_weight",
                "is not from 1 to 10000",
            ),
            (workers.patience_secs == Some(0), "patience_secs", "is 0: no worker would live"),
            (self.connections == Some(0), "connections", "is 0: nothing would be fetched"),
        ];
        faults.into_iter().find(|(wrong, ..)| *wrong).map(|(_, key, what)| (key, what))
    }

    /// From the command line, else the environment, else this file, else the defaults.
    #[must_use]
    pub fn directories(&self, state: Option<PathBuf>, run: Option<PathBuf>) -> Directories {
        let configured =
            ConfiguredDirectories { state: self.state_dir.clone(), run: self.run_dir.clone() };
        Directories::resolve_with(state, run, configured)
    }

    /// The limits for every pool.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let default = Limits::default();
        Limits {
            deadline_secs: self.deadline_secs.unwrap_or(default.deadline_secs),
            stall_secs: self.stall_secs.unwrap_or(default.stall_secs),
            connections: self.connections.unwrap_or(default.connections),
            read_ahead: self.read_ahead.unwrap_or(default.read_ahead),
        }
    }

    /// Where readers are to wait.
    pub fn queue(&self) -> Result<QueueChoice, ConfigError> {
        match std::env::var(QUEUE_ENV) {
            Ok(value) => QueueChoice::deserialize(value.as_str().into_deserializer())
                .map_err(|source: serde::de::value::Error| ConfigError::Environment { source }),
            Err(_) => Ok(self.queue.unwrap_or_default()),
        }
    }

    /// How long after a reader's deadline a silent worker is given up.
    #[must_use]
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.workers.patience_secs.unwrap_or(30))
    }

    /// Whether a worker is kept in reserve for each shard.
    #[must_use]
    pub fn spare(&self) -> bool {
        self.workers.spare.unwrap_or(true)
    }

    /// What a worker may use.
    #[must_use]
    pub fn worker_limits(&self) -> cgroup::Limits {
        let workers = &self.workers;
        let memory_max = workers.memory_max.map(|size| size.0);
        cgroup::Limits {
            memory_max: memory_max.or_else(half_of_memory).filter(|bytes| *bytes > 0),
            memory_high: workers.memory_high.map(|size| size.0).filter(|bytes| *bytes > 0),
            pids_max: Some(workers.pids_max.unwrap_or(256)),
            cpu_weight: workers.cpu_weight,
        }
    }

    /// How many shards there are: as configured, else one for each core, at most four.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.shards.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            cores.min(4) as u16
        })
    }
}

/// Half of the machine's memory, in bytes.
fn half_of_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("config.toml");
        fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn no_file_is_no_configuration() {
        let config = Config::load(Path::new("/nonexistent/config.toml")).unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.limits(), Limits::default());
        assert!((1..=4).contains(&config.shards()));
        let limits = config.worker_limits();
        assert!(limits.memory_max.is_some_and(|bytes| bytes > 1 << 20), "{limits:?}");
        let unlimited = load("[workers]\nmemory_max = 0").unwrap();
        assert_eq!(unlimited.worker_limits().memory_max, None);
        assert_eq!(load("").unwrap(), config);
    }

    #[test]
    fn every_key() {
        let config = load(
            r#"
            state_dir = "/srv/hydrant"
            run_dir = "/run/h"
            socket_group = "dev"
            shards = 2
            worker_user = "hydrant-worker"
            deadline_secs = 10
            stall_secs = 5
            connections = 3
            read_ahead = false
            queue = "brokered"
            without_landlock = true
            [workers]
            patience_secs = 7
            spare = false
            cgroups = true
            cgroup_parent = "/hydrant.slice"
            memory_max = "512M"
            memory_high = 1048576
            pids_max = 64
            cpu_weight = 50
            [containerd]
            lazy = ["r.example.org", "docker.io/library/*"]
            "#,
        )
        .unwrap();
        assert_eq!(config.shards(), 2);
        let limits = Limits { deadline_secs: 10, stall_secs: 5, connections: 3, read_ahead: false };
        assert_eq!(config.limits(), limits);
        assert_eq!(config.patience(), Duration::from_secs(7));
        assert!(!config.spare() && Config::default().spare());
        let limits = cgroup::Limits {
            memory_max: Some(512 << 20),
            memory_high: Some(1 << 20),
            pids_max: Some(64),
            cpu_weight: Some(50),
        };
        assert_eq!(config.worker_limits(), limits);
        assert_eq!(config.workers.cgroup_parent.as_deref(), Some(Path::new("/hydrant.slice")));
        let directories = config.directories(None, Some("/elsewhere".into()));
        assert_eq!(directories.run, Path::new("/elsewhere"));
        assert_eq!(config.socket_group.as_deref(), Some("dev"));
        assert_eq!(config.queue, Some(QueueChoice::Brokered));
        assert_eq!(config.without_landlock, Some(true));
        let image = |name| crate::source::oci::reference::Reference::parse(name).unwrap();
        let lazy = &config.containerd.lazy;
        assert!(lazy.contain(&image("busybox")) && !lazy.contain(&image("a/b")));
        assert!(load("[containerd]\nlazy = \"all\"").unwrap().containerd.lazy == Names::All);
    }

    #[test]
    fn errors_name_the_key() {
        for (text, key) in [
            ("dead_line = 1", "dead_line"),
            ("deadline_secs = \"1\"", "deadline_secs"),
            ("deadline_secs = -1", "deadline_secs"),
            ("shards = 0", "shards"),
            ("shards = 65", "shards"),
            ("connections = 0", "connections"),
            ("state_dir = \"var\"", "state_dir"),
            ("[images]\nhosts_dir = \"certs.d\"", "hosts_dir"),
            ("[images]\nindex_keys = [\"AAAA\"]", "AAAA"),
            ("queue = \"best\"", "queue"),
            ("[workers]\npatience_secs = 0", "patience_secs"),
            ("[workers]\nwages = 1", "wages"),
            ("[containerd]\nlazy = true", "lazy"),
            ("[containerd]\nlazy = [\"team/*\"]", "team/*"),
            ("[workers]\nmemory_max = \"much\"", "memory_max"),
            ("[workers]\nmemory_max = \"99999999999T\"", "memory_max"),
            ("[workers]\npids_max = 1", "pids_max"),
            ("[workers]\ncpu_weight = 0", "cpu_weight"),
            ("[workers]\ncgroup_parent = \"a\"", "cgroup_parent"),
        ] {
            let message = load(text).unwrap_err().to_string();
            assert!(message.contains(key) && message.contains("config.toml"), "{message}");
        }
    }
}
