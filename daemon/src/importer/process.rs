//! How a process begins that imports: the one of git's trees, and the one of container images.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context;
use tokio::runtime::{Builder, Runtime};

use crate::source::git::load_system_roots;
use crate::worker::sandbox::{self, SandboxSpec};

/// Gives up privileges, for good. What the process fetches it may put into `spool`, a directory of its own.
pub fn begin(
    uid: u32,
    gid: u32,
    without_landlock: bool,
    spool: &OwnedFd,
) -> anyhow::Result<Runtime> {
    // the system's certificates, while they can be read wherever they are
    load_system_roots();
    let spec = SandboxSpec {
        uid,
        gid,
        spool_dir: Some(spool.as_fd()),
        readable: Vec::new(),
        event_files: None,
        without_landlock,
    };
    sandbox::enter(&spec).context("can't enter the sandbox")?;
    Ok(Builder::new_current_thread().enable_all().build()?)
}
