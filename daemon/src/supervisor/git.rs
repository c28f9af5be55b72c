//! git, run as the user whose tree it is.
//!
//! The user's own git does what needs the user's credentials, proxies and ssh set-up: it fetches
//! commits and trees, answers for credentials at fault time, and opens the pipe to a remote
//! `git upload-pack`. The supervisor reads none of what comes from the origin: such output goes to
//! files or straight on to an unprivileged process.

mod clone;
mod configuration;
mod credential;
mod remote;
mod revision;
mod run;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Stdio;

use thiserror::Error;
use tokio::process::Command;

pub use self::clone::{Extent, Head};
pub use self::configuration::Way;
pub use self::remote::Remote;
pub(super) use self::remote::for_display;
pub use self::revision::Revision;
pub(super) use self::run::{Fetched, last_of, run};
use crate::sys::user::{self, User};

/// What a partial clone in a lazily filled tree needs (git-config(1)):
/// - `trustctime`, `checkStat`: git takes a file for unchanged by its size and time alone; inode
///   numbers and change times are the file system's business;
/// - `gc.auto`, `maintenance.auto`: a repack in the background would read what nobody asked for;
/// - `packedGitWindowSize`: small windows, so that a look into the lazy pack fetches little.
pub(super) const CONFIG: [&str; 5] = [
    "core.trustctime=false",
    "core.checkStat=minimal",
    "core.packedGitWindowSize=64k",
    "gc.auto=0",
    "maintenance.auto=false",
];

/// How `git upload-pack` is run for a repository on this machine: whatever that repository's own
/// configuration, all that it has may be read by whoever can read its files.
pub const LOCAL_UPLOAD_PACK: &str = "git -c uploadpack.allowFilter=true \
    -c uploadpack.allowAnySHA1InWant=true -c transfer.advertiseObjectInfo=true upload-pack";

/// A git command that failed.
#[derive(Debug, Error)]
pub enum GitError {
    #[error("can't run git: {source}")]
    Start { source: io::Error },
    #[error("`git {command}` failed: {message}")]
    Failed { command: String, message: String },
    #[error("`git {command}` said something that makes no sense: {output:?}")]
    Output { command: String, output: String },
    #[error("{0}")]
    Origin(String),
}

/// git in one repository, as one user.
#[derive(Debug, Clone)]
pub struct Git {
    pub user: User,
    /// What the user's environment had that git and ssh look at.
    pub environment: Vec<(String, String)>,
    /// The directory in which `.git` is.
    pub directory: PathBuf,
}

/// A program to be run as the user in the user's tree.
fn program(git: &Git, name: &str) -> Result<Command, GitError> {
    let start = |source| GitError::Start { source };
    let directory = fs_err::File::open(&git.directory).map_err(start)?.into_parts().0;
    // The path may lead through directories of the user's. A process of theirs in what they could
    // not reach themselves would see what is below it.
    let owner = directory.metadata().map_err(start)?.uid();
    if git.user.uid != 0 && owner != git.user.uid {
        let message = format!("{} belongs to another user", git.directory.display());
        return Err(start(io::Error::new(io::ErrorKind::PermissionDenied, message)));
    }
    let environment: Vec<_> =
        git.environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
    user::command(name, &git.user, &environment, directory.into()).map_err(start)
}

impl Git {
    /// `git ARGS` in the repository; nothing on its standard input, the other streams are pipes.
    pub fn command(&self, args: &[&str]) -> Result<Command, GitError> {
        let mut command = program(self, "git")?;
        command
            .args(args)
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// Runs `git ARGS` to its end and gives what it printed.
    pub async fn output(&self, args: &[&str]) -> Result<Vec<u8>, GitError> {
        run(self.command(args)?, args, None).await
    }

    /// The same with something on its standard input.
    pub async fn output_of(&self, args: &[&str], input: &[u8]) -> Result<Vec<u8>, GitError> {
        run(self.command(args)?, args, Some(input)).await
    }

    async fn line(&self, args: &[&str]) -> Result<String, GitError> {
        let output = self.output(args).await?;
        Ok(String::from_utf8_lossy(&output).trim_end_matches('\n').to_owned())
    }
}
