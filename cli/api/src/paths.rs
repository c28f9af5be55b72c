//! Where the daemon keeps its things.

use std::env;
use std::path::{Path, PathBuf};

/// Overrides the state directory.
pub const STATE_DIR_ENV: &str = "HYDRANT_STATE_DIR";
/// Overrides the run directory.
pub const RUN_DIR_ENV: &str = "HYDRANT_RUN_DIR";

/// The configuration file. It need not exist.
pub const CONFIG_FILE: &str = "/etc/hydrant/config.toml";

/// The name of the control group below which a daemon makes those of its workers, where nobody hands one to it.
/// Daemons with other state directories have other names.
#[must_use]
pub fn cgroup_name(state: &Path) -> String {
    // FNV-1a: the same in every version
    let bytes = state.as_os_str().as_encoded_bytes().iter();
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("hydrant-{hash:016x}")
}

/// The two directories of one daemon. Daemons with other directories don't disturb each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    /// Segments, images, upper directories, the catalog: kept for ever.
    pub state: PathBuf,
    /// The admin socket: gone at reboot.
    pub run: PathBuf,
}

/// What the configuration file says of the directories.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfiguredDirectories {
    pub state: Option<PathBuf>,
    pub run: Option<PathBuf>,
}

impl Directories {
    /// From the command line, else the environment, else the defaults.
    #[must_use]
    pub fn resolve(state: Option<PathBuf>, run: Option<PathBuf>) -> Self {
        Self::resolve_with(state, run, ConfiguredDirectories::default())
    }

    /// From the command line, else the environment, else the configuration, else the defaults.
    #[must_use]
    pub fn resolve_with(
        state: Option<PathBuf>,
        run: Option<PathBuf>,
        configured: ConfiguredDirectories,
    ) -> Self {
        let choose = |option: Option<PathBuf>, variable, configured, default: &str| {
            option
                .or_else(|| env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from))
                .or(configured)
                .unwrap_or_else(|| PathBuf::from(default))
        };
        Self {
            state: choose(state, STATE_DIR_ENV, configured.state, "/var/lib/hydrant"),
            run: choose(run, RUN_DIR_ENV, configured.run, "/run/hydrant"),
        }
    }

    /// The admin socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run.join("hydrantd.sock")
    }

    /// The log of a daemon that was started by the command line.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.run.join("hydrantd.log")
    }

    /// The same with other defaults, for what is looked up below the state directory.
    #[must_use]
    pub fn in_state(&self, path: impl AsRef<Path>) -> PathBuf {
        self.state.join(path)
    }
}
