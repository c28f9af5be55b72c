//! What a supervisor leaves to the next, made to look like that of another version.
//!
//! Version 1 of it is version 2 without the lock of the state directory, and with that number in the tables
//! (`queue/inflight.rs`): so a running daemon's can be made that of the program before, or after.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use hydrant_daemon::sys::notify;
use nix::unistd::Pid;

/// Where a table has its version, in bytes, and how long that is.
const VERSION_AT: u64 = 8;

/// The in-flight tables of a supervisor. They are there as long as it is, or somebody keeps them.
#[derive(Debug)]
pub struct Tables(Vec<File>);

impl Tables {
    pub fn of(supervisor: Pid) -> Result<Self> {
        let mut tables = Vec::new();
        for entry in fs_err::read_dir(format!("/proc/{supervisor}/fd"))? {
            let path = entry?.path();
            let target = std::fs::read_link(&path).unwrap_or_default();
            if target.to_string_lossy().starts_with("/memfd:hydrant-in-flight") {
                let file = fs_err::OpenOptions::new().read(true).write(true).open(&path)?;
                tables.push(file.into_parts().0);
            }
        }
        ensure!(!tables.is_empty(), "{supervisor} has no tables");
        Ok(Self(tables))
    }

    /// The version of all of them.
    pub fn version(&self) -> Result<u64> {
        let mut versions = self.0.iter().map(|table| {
            let mut version = [0; 8];
            table.read_exact_at(&mut version, VERSION_AT)?;
            anyhow::Ok(u64::from_ne_bytes(version))
        });
        let first = versions.next().context("no table")??;
        for version in versions {
            ensure!(version? == first, "the tables are of different versions");
        }
        Ok(first)
    }

    pub fn set_version(&self, version: u64) -> Result<()> {
        let bytes = version.to_ne_bytes();
        Ok(self.0.iter().try_for_each(|table| table.write_all_at(&bytes, VERSION_AT))?)
    }
}

/// Takes the state directory's lock out of the service manager's keeping.
pub fn let_go_of_lock(supervisor: Pid) -> Result<()> {
    let environment = fs_err::read(format!("/proc/{supervisor}/environ"))?;
    let manager = environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(b"NOTIFY_SOCKET="))
        .context("it has no manager")?;
    let manager = OsString::from_vec(manager.to_vec());
    Ok(notify::send(&manager, "FDSTOREREMOVE=1\nFDNAME=lock", &[])?)
}

/// A process has the lock of a state directory open.
pub fn has_lock(process: Pid) -> Result<bool> {
    for entry in fs_err::read_dir(format!("/proc/{process}/fd"))? {
        if std::fs::read_link(entry?.path()).unwrap_or_default().ends_with("state.lock") {
            return Ok(true);
        }
    }
    Ok(false)
}
