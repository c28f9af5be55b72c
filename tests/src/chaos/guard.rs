//! A process that cleans up should the chaos program die: the daemon's supervisor outlives its parent, and
//! mounts outlive everything.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::daemon::Daemon;
use crate::scratch::{mounts_below, unmount_below};

/// The guard; it ends with this, and has something to do only if what it guards is still there.
#[derive(Debug)]
pub struct Guard(Child);

impl Guard {
    /// Guards a directory of a run. `program` has the subcommand `guard`.
    pub fn start(program: &Path, directory: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        // a group of its own: what ends the program by the keyboard must not end this
        command.arg("guard").arg(directory).stdin(Stdio::piped()).process_group(0);
        Ok(Self(command.spawn().context("can't start the guard")?))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Waits until the program has gone, then stops the daemon of `directory`, unmounts and removes.
pub fn run(directory: &Path) -> Result<()> {
    // nothing comes: the end of it is the program's end
    io::stdin().read_to_end(&mut Vec::new())?;
    if !directory.exists() {
        return Ok(());
    }
    eprintln!("the run was cut short: cleaning up {}", directory.display());
    drop(Daemon::stopped(directory, &directory.join("state")));
    unmount_below(directory)?;
    if mounts_below(directory)?.is_empty() {
        fs_err::remove_dir_all(directory)?;
    }
    Ok(())
}
