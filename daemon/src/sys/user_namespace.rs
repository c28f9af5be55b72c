//! User namespaces (user_namespaces(7)) that nobody lives in: which IDs a mount shows for which
//! ([`map_owners`](super::mount::map_owners)).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use super::spawn::{Role, Spawn};

/// How long a process may take to make one.
const PATIENCE: Duration = Duration::from_secs(60);

/// A namespace with these IDs, as `/proc/PID/uid_map` and `gid_map` take them: lines of `inside outside count`.
///
/// Only a process without other threads can make one: a child does it, and is gone when this returns. Blocks for as long as
/// that takes, some milliseconds.
pub fn make(uids: &str, gids: &str) -> io::Result<OwnedFd> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let child = Spawn::role(Role::UserNamespace).fd(theirs).start().map_err(io::Error::other)?;
    ours.set_read_timeout(Some(PATIENCE))?;
    ours.read_exact(&mut [0])?;
    let process = PathBuf::from(format!("/proc/{}", child.id()));
    fs::write(process.join("uid_map"), uids)?;
    fs::write(process.join("gid_map"), gids)?;
    Ok(File::open(process.join("ns/user"))?.into())
}

/// The child: makes the namespace, says so, and stays until nobody listens.
pub fn main(mut parent: UnixStream) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    parent.write_all(&[0])?;
    parent.read_to_end(&mut Vec::new()).map(drop)
}
