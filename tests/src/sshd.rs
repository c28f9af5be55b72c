//! A real sshd, private to a test: its own keys and configuration, on a free port of 127.0.0.1. Who logs in is
//! who runs the test.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Leashed, Run, leash, require, until};
use crate::server::free_port;

/// What the host is called in the user's configuration.
pub const HOST: &str = "lake";

/// The server. Killed when dropped.
#[derive(Debug)]
pub struct Sshd {
    directory: PathBuf,
    port: u16,
    _process: Leashed,
}

impl Sshd {
    /// Keeps everything in `directory`. `configuration`: more lines for the server.
    pub fn start(directory: &Path, configuration: &str) -> Result<Self> {
        require(&[("sshd", "openssh-server"), ("ssh", "openssh-client")])?;
        for key in ["host", "other-host", "user"] {
            let script = r#"ssh-keygen -q -t ed25519 -N '' -C test -f "$1""#;
            Run::shell(script, &[&directory.join(key)]).check()?;
        }
        // what the package's service makes when it starts
        fs_err::create_dir_all("/run/sshd")?;
        let path = ["/usr/sbin/sshd", "/usr/local/sbin/sshd"];
        let program = path.into_iter().find(|path| Path::new(path).exists()).context("no sshd")?;
        // Somebody else may take the port between our look and its start.
        for _ in 0..5 {
            let port = free_port()?;
            let file = directory.join("sshd_config");
            fs_err::write(&file, server_configuration(directory, port)? + configuration)?;
            let log = fs_err::File::create(directory.join("log"))?.into_parts().0;
            let mut command = Command::new(program);
            command.args(["-D", "-e", "-f"]).arg(&file).stdin(Stdio::null());
            command.stdout(log.try_clone()?).stderr(log);
            let mut process = leash(command)?;
            let up = until("sshd's port", Duration::from_secs(60), || {
                let ended = process.ended().is_some();
                let up = TcpStream::connect(("127.0.0.1", port)).is_ok();
                (up || ended).then_some(!ended)
            })?;
            if up {
                let sshd = Self { directory: directory.to_owned(), port, _process: process };
                fs_err::write(sshd.directory.join("config"), sshd.client_configuration())?;
                sshd.let_in(true)?;
                sshd.known_as_itself(true)?;
                return Ok(sshd);
            }
        }
        bail!("{}", fs_err::read_to_string(directory.join("log")).unwrap_or_default())
    }

    /// The user's `ssh`, as `core.sshCommand` has it.
    #[must_use]
    pub fn command(&self) -> String {
        format!("ssh -F {}", self.directory.join("config").display())
    }

    /// Whether the user's key is one that the server takes.
    pub fn let_in(&self, is_in: bool) -> Result<()> {
        let key = if is_in { self.key("user")? } else { String::new() };
        self.exchange("authorized_keys", &key)
    }

    /// Whether the user knows the host by its own key, or by another one.
    pub fn known_as_itself(&self, itself: bool) -> Result<()> {
        let key = self.key(if itself { "host" } else { "other-host" })?;
        self.exchange("known_hosts", &format!("[127.0.0.1]:{} {key}", self.port))
    }

    fn key(&self, name: &str) -> Result<String> {
        Ok(fs_err::read_to_string(self.directory.join(name).with_extension("pub"))?)
    }

    /// Nobody sees half of it.
    fn exchange(&self, name: &str, content: &str) -> Result<()> {
        let new = self.directory.join("new");
        fs_err::write(&new, content)?;
        Ok(fs_err::rename(new, self.directory.join(name))?)
    }

    fn client_configuration(&self) -> String {
        let directory = self.directory.display();
        format!(
            "Host {HOST}\nHostName 127.0.0.1\nPort {}\nUser root\n\
             IdentityFile {directory}/user\nIdentitiesOnly yes\nIdentityAgent none\n\
             UserKnownHostsFile {directory}/known_hosts\nGlobalKnownHostsFile none\n\
             StrictHostKeyChecking yes\n",
            self.port
        )
    }
}

fn server_configuration(directory: &Path, port: u16) -> Result<String> {
    // Without PAM sshd lets nobody in whose password is locked, which says nothing of keys.
    let shadow = fs_err::read_to_string("/etc/shadow")?;
    let is_locked = shadow.lines().any(|line| line.starts_with("root:!"));
    let pam = if is_locked { "yes" } else { "no" };
    let path = std::env::var("PATH").unwrap_or_default();
    let directory = directory.display();
    Ok(format!(
        "ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nPidFile none\n\
         AuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\nUsePAM {pam}\n\
         PermitRootLogin prohibit-password\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no\nPermitUserRC no\nSetEnv PATH={path}\n"
    ))
}
