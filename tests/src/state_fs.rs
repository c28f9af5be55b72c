//! The file system below a daemon's state directory.

use std::fmt;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::guest;
use crate::process::{Run, require};

/// The guest's first disk.
const DISK: &str = "/dev/ubda";

/// File systems that have pre-content events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateFs {
    /// Where `/var/tmp` is.
    Host,
    Ext4,
    Xfs,
    Btrfs,
}

impl StateFs {
    pub const LOOPS: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];
}

impl fmt::Display for StateFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        })
    }
}

/// Makes a file system of `bytes` in a sparse file beside `place` and mounts it there. The loop
/// device goes with the mount. With [`StateFs::Host`] `place` is just a directory.
///
/// In the guest it is made on the first disk, and not larger than that: loop devices can be mounted only
/// by a kernel that lets mounted devices be written to.
pub fn mount(kind: StateFs, place: &Path, bytes: u64) -> Result<()> {
    fs_err::create_dir_all(place)?;
    let (program, package) = match kind {
        StateFs::Host => return Ok(()),
        StateFs::Ext4 => ("mkfs.ext4", "e2fsprogs"),
        StateFs::Xfs => ("mkfs.xfs", "xfsprogs"),
        StateFs::Btrfs => ("mkfs.btrfs", "btrfs-progs"),
    };
    require(&[(program, package), ("mount", "mount")])?;
    if guest::inside() {
        let bytes = bytes.min(fs_err::File::open(DISK)?.seek(SeekFrom::End(0))?);
        let made = match kind {
            StateFs::Host | StateFs::Ext4 => format!("{DISK} {}K", bytes >> 10),
            StateFs::Xfs => format!("-d size={bytes} {DISK}"),
            StateFs::Btrfs => format!("-b {bytes} {DISK}"),
        };
        let script = format!(r#"wipefs -qa {DISK} && {program} -q {made} && mount {DISK} "$1""#);
        Run::shell(&script, &[place]).check()?;
        return Ok(());
    }
    let mut image = place.as_os_str().to_owned();
    image.push(".image");
    let image = PathBuf::from(image);
    fs_err::File::create(&image)?.set_len(bytes)?;
    let script = format!(r#"{program} -q "$1" && mount -o loop "$1" "$2""#);
    Run::shell(&script, &[&image, place]).check()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::{Scratch, mounts_below};

    #[test]
    #[ignore = "needs root"]
    fn root_file_systems_come_and_go() {
        let scratch = Scratch::new("state-fs").unwrap();
        for kind in StateFs::LOOPS {
            let place = scratch.path().join(kind.to_string());
            mount(kind, &place, 512 << 20).unwrap();
            fs_err::write(place.join("file"), "x").unwrap();
        }
        assert_eq!(mounts_below(scratch.path()).unwrap().len(), 3);
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(mounts_below(&path).unwrap().is_empty());
        let loops = Run::program("losetup", &["-a"]).check().unwrap().text();
        assert!(!loops.contains(path.to_str().unwrap()), "{loops}");
    }
}
