//! What is mounted where: `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::sys::mount::{MountStat, stat_mount};

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Unique among the mounts there are now.
    pub id: u64,
    /// The mount that it is in.
    pub parent: u64,
    /// Of the file system: major and minor, as in `st_dev` of a directory.
    pub device: (u32, u32),
    /// Where, as seen from our root.
    pub path: PathBuf,
    /// Such as `overlay`.
    pub kind: String,
    /// [`super::SOURCE`] for our writable trees, the image's path for read-only ones.
    pub source: OsString,
    /// The `upperdir` of an overlay: which of our trees it is, and of which daemon.
    pub upper: Option<PathBuf>,
}

impl MountPoint {
    /// A writable tree of ours, or of another daemon like us.
    #[must_use]
    pub fn is_hydrant(&self) -> bool {
        self.kind == "overlay" && self.source == super::SOURCE
    }
}

/// All mounts of our namespace, in the kernel's order.
pub fn mounts() -> io::Result<Vec<MountPoint>> {
    let table = fs_err::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount whose root is at `path`, the topmost. None: there is a file or directory of another mount,
/// or nothing at all. A symlink is not followed.
pub fn mounted_at(path: &Path) -> io::Result<Option<MountPoint>> {
    let Some(stat) = stat_root(path)? else { return Ok(None) };
    // Between the two looks it may have gone.
    Ok(mounts()?.into_iter().find(|mount| mount.id == stat.mount_id))
}

/// Whether there is such a mount.
pub fn is_mounted_at(path: &Path) -> io::Result<bool> {
    Ok(stat_root(path)?.is_some())
}

fn stat_root(path: &Path) -> io::Result<Option<MountStat>> {
    let root = fs_err::File::open("/")?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    match stat_mount(root.as_fd(), &name) {
        Ok(stat) => Ok(Some(stat).filter(|stat| stat.is_root)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// One line: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse(line: &[u8]) -> Option<MountPoint> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let id = text()?.parse().ok()?;
    let parent = text()?.parse().ok()?;
    let (major, minor) = text()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let path = PathBuf::from(unescape(fields.nth(1)?));
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next()?);
    let options = rest.next().unwrap_or_default().split(|byte| *byte == b',');
    let upper = options.into_iter().find_map(|option| option.strip_prefix(b"upperdir="));
    let upper = upper.map(|path| PathBuf::from(unescape(path)));
    Some(MountPoint { id, parent, device, path, kind, source, upper })
}

/// Undoes the kernel's `\ooo` for blanks and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let value = octal.and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        bytes.push(value.unwrap_or(*first));
        rest = if value.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_understood() {
        let line = b"66 43 0:40 / /mnt/a\\040b\\134\xff rw,relatime shared:3 master:1 - overlay hydrant rw,lowerdir+=/,upperdir=/s/a\\054b,workdir=/w";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (66, 43, (0, 40)));
        assert_eq!(mount.path.as_os_str().as_bytes(), b"/mnt/a b\\\xff");
        assert_eq!((mount.kind.as_str(), mount.source.to_str()), ("overlay", Some("hydrant")));
        assert!(mount.is_hydrant());
        assert_eq!(mount.upper.as_deref(), Some(Path::new("/s/a,b")));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"1 2 0:x / /"), None);
        assert_eq!(unescape(b"a\\"), "a\\");
        assert_eq!(unescape(b"\\04"), "\\04");
    }

    #[test]
    fn mounts_are_found_at_their_roots_only() {
        let proc = mounted_at("/proc".as_ref()).unwrap().unwrap();
        assert_eq!((proc.kind.as_str(), proc.path.to_str()), ("proc", Some("/proc")));
        assert!(is_mounted_at("/proc".as_ref()).unwrap());
        assert_eq!(mounted_at("/proc/self/fd".as_ref()).unwrap(), None);
        assert_eq!(mounted_at("/no/such/file".as_ref()).unwrap(), None);
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/proc", directory.path().join("link")).unwrap();
        assert_eq!(mounted_at(&directory.path().join("link")).unwrap(), None);
    }
}
