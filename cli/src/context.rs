//! What every command needs: which daemon, and how to come by it.

use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;
use hydrant_api::{CONFIG_FILE, ConfiguredDirectories, Directories, STATE_DIR_ENV};
use serde::Deserialize;

use crate::args::Global;
use crate::client::{Client, Unreachable};
use crate::failure::Failure;
use crate::start;

/// The daemon that a command is for.
#[derive(Debug, Clone)]
pub struct Context {
    pub directories: Directories,
    /// The caller names the state directory.
    is_state_asked: bool,
}

/// What this program reads of the configuration file; the rest is the daemon's.
#[derive(Debug, Default, Deserialize)]
struct Config {
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

impl Context {
    pub fn new(global: Global) -> Result<Self, Failure> {
        let configured = configured(Path::new(CONFIG_FILE))?;
        let variable = std::env::var_os(STATE_DIR_ENV).is_some_and(|value| !value.is_empty());
        let is_state_asked = global.state_dir.is_some() || variable;
        let directories = Directories::resolve_with(global.state_dir, global.run_dir, configured);
        let absolute = |path: PathBuf| {
            std::path::absolute(&path)
                .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
        };
        let directories =
            Directories { state: absolute(directories.state)?, run: absolute(directories.run)? };
        Ok(Self { directories, is_state_asked })
    }

    /// The daemon that runs.
    pub fn client(&self) -> Result<Client, Failure> {
        Client::connect(&self.directories).map(|client| self.meant(client)).map_err(|error| {
            match error {
                Unreachable::NotRunning => Failure::new(format!(
                    "no daemon runs: nobody listens at {}",
                    self.directories.socket().display()
                ))
                .hint("`hydrant clone` and `hydrant mount` start one"),
                error => self.unreachable(error),
            }
        })
    }

    /// The daemon that runs, or one that is started now.
    pub async fn client_or_start(&self) -> Result<Client, Failure> {
        match Client::connect(&self.directories) {
            Ok(client) => Ok(self.meant(client)),
            Err(Unreachable::NotRunning) => {
                start::daemon(&self.directories).await.map(|client| self.meant(client))
            }
            Err(error) => Err(self.unreachable(error)),
        }
    }

    fn meant(&self, client: Client) -> Client {
        if self.is_state_asked { client.only_for_state_dir() } else { client }
    }

    fn unreachable(&self, error: Unreachable) -> Failure {
        let socket = self.directories.socket();
        let socket = socket.display();
        match error {
            Unreachable::NotAllowed => {
                Failure::unreachable(format!("not allowed to talk to the daemon at {socket}"))
                    .hint("use sudo, or have an administrator put you in the group `hydrant`")
            }
            Unreachable::Other(source) => {
                Failure::unreachable(format!("can't talk to the daemon at {socket}: {source}"))
            }
            Unreachable::NotRunning => Failure::unreachable(format!("no daemon at {socket}")),
        }
    }
}

fn configured(path: &Path) -> Result<ConfiguredDirectories, Failure> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(ConfiguredDirectories::default());
        }
        text => {
            text.map_err(|error| Failure::new(format!("can't read the configuration: {error}")))?
        }
    };
    let config: Config = toml::from_str(&text)
        .map_err(|error| Failure::new(format!("in {}: {error}", path.display())))?;
    Ok(ConfiguredDirectories { state: config.state_dir, run: config.run_dir })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_directories() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("config.toml");
        assert_eq!(configured(&path).unwrap(), ConfiguredDirectories::default());
        fs::write(&path, "shards = 2\nstate_dir = \"/srv/h\"\n").unwrap();
        let expected = ConfiguredDirectories { state: Some("/srv/h".into()), run: None };
        assert_eq!(configured(&path).unwrap(), expected);
        fs::write(&path, "state_dir = 3").unwrap();
        assert!(configured(&path).unwrap_err().message.contains("config.toml"));
    }
}
