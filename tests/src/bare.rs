//! The EROFS image of a tree, mounted without an overlay, as the kernel sees it.

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags};

/// A mount of a test's own, which goes with this: a daemon that stops waits for all mounts of its trees.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// What is mounted at `place`.
    #[must_use]
    pub fn at(place: &Path) -> Self {
        Self(place.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("can't unmount {}: {error}", self.0.display());
        }
    }
}

/// Mounts the only tree of a state directory at `place`, file-backed, with its segments as devices:
/// in the order of their numbers, which is that of the image's device table. Those of the pack come last, and not
/// in this image.
pub fn mount(state: &Path, place: &Path) -> Result<Mounted> {
    let mut images = with_extension(&state.join("trees"), "erofs")?;
    // that of the existence pack
    images.retain(|image| !image.to_string_lossy().ends_with(".pack.erofs"));
    let pools: Vec<_> = fs_err::read_dir(state.join("pools"))?.collect::<Result<_, _>>()?;
    ensure!(images.len() == 1 && pools.len() == 1, "{images:?} and {pools:?}: not one tree");
    let mut segments = with_extension(&pools[0].path(), "data")?;
    let number = |path: &PathBuf| {
        path.file_stem().and_then(OsStr::to_str).and_then(|name| name.parse::<u64>().ok())
    };
    ensure!(segments.iter().all(|path| number(path).is_some()), "{segments:?}");
    segments.sort_by_key(number);
    segments.truncate(device_count(&images[0])?);
    let devices: Vec<_> =
        segments.iter().map(|path| format!("device={}", path.display())).collect();
    let flags = MsFlags::MS_RDONLY;
    // mount(2) itself: mount(8) would put a loop device in between, which raises no events.
    nix::mount::mount(Some(&images[0]), place, Some("erofs"), flags, Some(&*devices.join(",")))
        .with_context(|| format!("mount {} with {devices:?}", images[0].display()))?;
    Ok(Mounted::at(place))
}

/// `extra_devices` of the superblock (`fs/erofs/erofs_fs.h`), which begins at byte 1024.
fn device_count(image: &Path) -> Result<usize> {
    let mut count = [0; 2];
    fs_err::File::open(image)?.file().read_exact_at(&mut count, 1024 + 86)?;
    Ok(u16::from_le_bytes(count).into())
}

fn with_extension(directory: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(directory)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new(extension)) {
            found.push(path);
        }
    }
    Ok(found)
}
