//! Directories of tests, with everything that gets mounted below them.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::thread;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

const PREFIX: &str = "hydrant-test-";
/// Not `/tmp`, which is often a tmpfs: segments need a file system with extents and pre-content events.
const PARENT: &str = "/var/tmp";

/// A directory below `/var/tmp` that is unmounted and removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    directory: Option<TempDir>,
}

impl Scratch {
    pub fn new(name: &str) -> Result<Self> {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let directory = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-{name}-", std::process::id()))
            .tempdir_in(PARENT)
            .context("can't make a directory in /var/tmp")?;
        // Workers and other users have to get through it.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs_err::set_permissions(directory.path(), mode)?;
        Ok(Self { directory: Some(directory) })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.as_ref().map_or(Path::new("/nonexistent"), TempDir::path)
    }

    /// A new directory in it.
    pub fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.path().join(name);
        fs_err::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(directory) = self.directory.take() else { return };
        let keep = std::env::var_os("HYDRANT_TEST_KEEP").is_some_and(|v| !v.is_empty());
        if keep {
            let path = directory.keep();
            eprintln!("kept: {}", path.display());
            return;
        }
        if let Err(error) = unmount_below(directory.path()) {
            // Never walk into a mount to remove what is in it.
            eprintln!("left alone: {error:#}");
            let _ = directory.keep();
        }
    }
}

/// What dead tests (killed, crashed) have left.
fn sweep() {
    let Ok(entries) = std::fs::read_dir(PARENT) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        let alive = Path::new("/proc").join(pid).exists();
        let keep = std::env::var_os("HYDRANT_TEST_KEEP").is_some();
        if !alive && !keep && unmount_below(&entry.path()).is_ok() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Mount points at or below `directory`, the last mounted first.
pub fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let table = fs_err::read("/proc/self/mountinfo")?;
    let mut found: Vec<PathBuf> = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(unescape)
        .filter(|path| path.starts_with(directory))
        .collect();
    found.reverse();
    Ok(found)
}

/// `\040` and the like, as the kernel writes them in `mountinfo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\' && tail.len() >= 3)
            .then(|| std::str::from_utf8(&tail[..3]).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Unmounts everything at or below `directory`, in use or not.
pub fn unmount_below(directory: &Path) -> Result<()> {
    for _ in 0..20 {
        let mounts = mounts_below(directory)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in &mounts {
            // Reported below if it stays.
            let _ = umount2(mount.as_os_str().as_bytes(), MntFlags::MNT_DETACH);
        }
        thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("still mounted: {:?}", mounts_below(directory)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_gone_when_dropped() {
        let scratch = Scratch::new("self").unwrap();
        let path = scratch.path().to_owned();
        fs_err::write(scratch.make("a/b").unwrap().join("c"), "c").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn mount_table_escapes() {
        assert_eq!(unescape(b"/a\\040b\\134\\012"), Path::new("/a b\\\n"));
        assert!(mounts_below(Path::new("/")).unwrap().contains(&PathBuf::from("/proc")));
    }
}
