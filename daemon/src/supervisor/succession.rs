//! The next supervisor: found fit, and left everything that waits.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command as Process;
use tracing::{info, warn};

use super::shard::Command;
use super::{Supervisor, kept, lock};
use crate::admin::ApiError;
use crate::queue::inflight;
use crate::sys::replace::installed_program;
use crate::sys::spawn::Spawn;

/// How long a program may take to say that it is fit.
const PATIENCE: Duration = Duration::from_secs(30);

impl Supervisor {
    /// Whether the program that is installed now can take over from this one.
    pub(super) async fn check_successor(&self) -> Result<(), ApiError> {
        let program = installed_program()
            .map_err(|error| refused(Path::new("hydrantd"), &error.to_string()))?;
        let mut check = Process::new(program);
        check.arg("check").arg(format!("--table-version={}", inflight::VERSION));
        check.args(std::env::args_os().skip(1));
        check.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        match tokio::time::timeout(PATIENCE, check.output()).await {
            Ok(Ok(output)) if output.status.success() => Ok(()),
            Ok(Ok(output)) => {
                let said = String::from_utf8_lossy(&output.stderr);
                Err(refused(program, said.trim()))
            }
            Ok(Err(error)) => Err(refused(program, &error.to_string())),
            Err(_) => Err(refused(program, "it does not answer")),
        }
    }

    /// Leaves mounts and readers to the next supervisor: no event is half read then, and no mount half
    /// made. What is given must stay open until it has them.
    pub(super) async fn hand_over(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        lock(&self.live).stopping = true;
        self.stop_histories().await;
        let mut estate = Vec::new();
        for shard in &self.shards {
            estate.extend(shard.estate()?);
        }
        for shard in &self.shards {
            // the reply is that the shard has ended
            shard.ask(|reply| Command::HandOver { reply }).await;
        }
        info!(up_secs = self.started.elapsed().as_secs(), "the next supervisor may take over");
        Ok(estate)
    }

    /// Should the next supervisor never come, as when systemd is told to stop while it restarts, systemd
    /// lets go of what it keeps. So a process that does nothing but wait has it as well.
    pub(super) fn leave_a_guard(&self, estate: Vec<(String, OwnedFd)>) {
        let (names, fds): (Vec<_>, Vec<_>) = estate.into_iter().unzip();
        let mut guard = Spawn::program(Path::new("/proc/self/exe"))
            .argument("guard")
            .arguments(std::env::args_os().skip(1))
            .outlives_us()
            .inherit(&["PATH", "RUST_LOG"])
            .variable("LISTEN_FDS", fds.len().to_string())
            .variable("LISTEN_FDNAMES", names.join(":"));
        for fd in fds {
            guard = guard.fd(fd);
        }
        match guard.start() {
            Ok(guard) => {
                kept::keep(kept::GUARD, std::os::fd::AsFd::as_fd(&guard));
                guard.let_go();
            }
            Err(error) => {
                warn!(%error, "nobody guards the readers until the next supervisor comes")
            }
        }
    }
}

fn refused(program: &Path, why: &str) -> ApiError {
    ApiError::conflict(format!("{} can't take over: {why}", program.display()))
        .with_hint("the daemon that runs goes on as before")
}
