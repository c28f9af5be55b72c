//! Mounting a tree: its EROFS image over the segments, and for a writable one overlayfs on top.
//!
//! The image is mounted *file-backed*, never through a loop device: a loop device reads its file in
//! ways that fanotify does not see. Everything is put together detached, as [`DetachedMount`]: until
//! [`DetachedMount::attach`], nobody sees anything, and a failure at any step leaves nothing behind.
//!
//! **Segments are marked before [`mount`]**: whether an open file raises events is settled when the
//! kernel opens it, which is then.

mod pages;
pub mod private;
mod table;
mod users;

use std::ffi::{CString, OsStr};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::sys::mount::{Attributes, FsContext, FsError, MAX_OPTION};
use crate::sys::{self, fd_path};

pub use table::{MountPoint, is_mounted_at, mounted_at, mounts};
pub use users::{Use, User};

/// What `mount` and `df` show as the source of our mounts.
pub const SOURCE: &str = "hydrant";

/// A tree to be mounted.
#[derive(Debug, Clone, Copy)]
pub struct TreeMount<'a> {
    /// The EROFS image.
    pub image: &'a Path,
    /// The segments, in the order of the image's device table. They are opened by these paths, as
    /// everybody would: not through the private mount of [`private`], through which they would raise
    /// no events.
    pub devices: &'a [PathBuf],
    /// One more with a git repository's existence pack, of which nothing is read ahead.
    pub pack: Option<&'a Image>,
    /// More images below it, the highest first: the layers of a container image.
    pub below: &'a [Image],
    /// The tree is mounted for the first time: its root directory is to be as in the image.
    pub fresh: bool,
    /// What makes the tree writable; without it (and with nothing below), it is the image that is mounted.
    pub layers: Option<Layers<'a>>,
    /// Nobody can write, though there be layers.
    pub read_only: bool,
    /// `nosuid,nodev`: a tree for somebody else than root.
    pub restricted: bool,
}

/// An EROFS image and its segments, as in [`TreeMount`].
#[derive(Debug, Clone)]
pub struct Image {
    pub image: PathBuf,
    pub devices: Vec<PathBuf>,
}

/// The directories of a writable tree. Both are on one file system, and `work` is empty or as overlayfs
/// has left it. They belong to one mount at a time.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// What the user has changed.
    pub upper: &'a Path,
    /// Overlayfs' own.
    pub work: &'a Path,
}

/// Why a tree could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("read the superblock of {}", path.display())]
    Superblock { path: PathBuf, source: io::Error },
    #[error("{} has {expected} segments, not {given}", image.display())]
    Devices { image: PathBuf, expected: usize, given: usize },
    #[error("mount the tree's image {}", image.display())]
    Image { image: PathBuf, source: FsError },
    #[error("mount overlayfs with {}", upper.display())]
    Overlay { upper: PathBuf, source: FsError },
    #[error("make {} as the root directory of the image", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("show {} with other owners", path.display())]
    Owners { path: PathBuf, source: FsError },
    #[error("{} is not a directory of uid {owner}", path.display())]
    NotTheirs { path: PathBuf, owner: u32 },
    #[error("look into the directory to mount on")]
    Target(#[source] io::Error),
    #[error("the directory to mount on is not empty")]
    NotEmpty,
    #[error(transparent)]
    Attach(FsError),
}

/// A mount that is attached nowhere yet; dropped, it is gone.
#[derive(Debug)]
pub struct DetachedMount {
    fd: OwnedFd,
}

/// Mounts a tree, detached.
///
/// Files of the image have the inode number `2^63 | nid` in a tree with layers (`xino=on`; on ext4 as
/// the upper file system), and keep it when their metadata is changed and across remounts of the same
/// image: overlayfs finds them by the image's UUID and nid. In a tree without layers it is the nid.
/// A pack does not change that, as long as it is above the tree: overlayfs numbers its file systems from 0 (`upper`),
/// and shifts the number by as many bits less than 64 as it takes: 1 of 2 to bit 63, as 2 of 3.
pub fn mount(tree: &TreeMount<'_>) -> Result<DetachedMount, MountError> {
    let restrict = |attributes| match tree.restricted {
        true => Attributes { nosuid: true, nodev: true, ..attributes },
        false => attributes,
    };
    let image_attributes = Attributes { read_only: true, ..Attributes::default() };
    let Some(layers) = tree.layers else {
        let fd = mount_image(tree.image, tree.devices, restrict(image_attributes))?;
        return Ok(DetachedMount { fd });
    };
    let mut lower = vec![mount_image(tree.image, tree.devices, image_attributes)?];
    for below in tree.below {
        lower.push(mount_image(&below.image, &below.devices, image_attributes)?);
    }
    let attributes = Attributes { read_only: tree.read_only, ..Attributes::default() };
    let upper = open_path(layers.upper)?;
    let work = open_path(layers.work)?;
    if tree.fresh {
        adopt_root(&lower, layers.upper)
            .map_err(|source| MountError::Root { path: layers.upper.to_owned(), source })?;
    }
    if let Some(Image { image, devices }) = tree.pack {
        let pack = pages::mount_by_pages(|| mount_image(image, devices, image_attributes))?;
        lower.insert(0, pack);
    }
    let fd = mount_overlay(&lower, upper.as_fd(), work.as_fd(), restrict(attributes))
        .map_err(|source| MountError::Overlay { upper: layers.upper.to_owned(), source })?;
    Ok(DetachedMount { fd })
}

/// The root directory that a mounted tree shows is `upper` itself.
fn adopt_root(lower: &[OwnedFd], upper: &Path) -> io::Result<()> {
    let Some(top) = lower.first() else { return Ok(()) };
    let mut stat = nix::sys::stat::fstat(top)?;
    // a layer need not say anything of the root
    for below in lower {
        if stat.st_mtime != 0 {
            break;
        }
        stat = nix::sys::stat::fstat(below)?;
    }
    std::os::unix::fs::chown(upper, Some(stat.st_uid), Some(stat.st_gid))?;
    let mode = std::fs::Permissions::from_mode(stat.st_mode & 0o7777);
    std::fs::set_permissions(upper, mode)?;
    let modified = nix::sys::time::TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    Ok(nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, upper, &modified, &modified, flags)?)
}

fn mount_image(
    path: &Path,
    segments: &[PathBuf],
    attributes: Attributes,
) -> Result<OwnedFd, MountError> {
    // Without any device the kernel would mount it as a "flat" image and take content from behind the
    // metadata: from nowhere.
    let (expected, given) = (device_count(path)?, segments.len());
    if expected != given {
        return Err(MountError::Devices { image: path.to_owned(), expected, given });
    }
    let image = open_path(path)?;
    let devices = segments.iter().map(|path| open_path(path)).collect::<Result<Vec<_>, _>>()?;
    let mount = || {
        let context = FsContext::open(c"erofs")?;
        // The path itself where the kernel takes one of that length: it is shown to the user.
        match CString::new(path.as_os_str().as_bytes()) {
            Ok(name) if path.is_absolute() && name.count_bytes() <= MAX_OPTION => {
                context.set_string(c"source", &name)?;
            }
            _ => context.set_string(c"source", &fd_path(&image))?,
        }
        for device in &devices {
            context.set_string(c"device", &fd_path(device))?;
        }
        context.create()?;
        context.mount(attributes)
    };
    mount().map_err(|source| MountError::Image { image: path.to_owned(), source })
}

/// `extra_devices` of the superblock (`fs/erofs/erofs_fs.h`), which begins at byte 1024.
fn device_count(image: &Path) -> Result<usize, MountError> {
    let mut count = [0; 2];
    fs_err::File::open(image)
        .and_then(|file| file.file().read_exact_at(&mut count, 1024 + 86))
        .map_err(|source| MountError::Superblock { path: image.to_owned(), source })?;
    Ok(u16::from_le_bytes(count).into())
}

fn mount_overlay(
    lower: &[OwnedFd],
    upper: BorrowedFd<'_>,
    work: BorrowedFd<'_>,
    attributes: Attributes,
) -> Result<OwnedFd, FsError> {
    let context = FsContext::open(c"overlay")?;
    // SOURCE, as a C string.
    context.set_string(c"source", c"hydrant")?;
    for layer in lower {
        context.set_fd(c"lowerdir+", layer.as_fd())?;
    }
    context.set_fd(c"upperdir", upper)?;
    context.set_fd(c"workdir", work)?;
    // Directories can be renamed; chmod, chown and rename of a file copy no content, so fetch none.
    context.set_string(c"redirect_dir", c"on")?;
    context.set_string(c"metacopy", c"on")?;
    // One st_dev for all, and inode numbers that stay.
    context.set_string(c"xino", c"on")?;
    // Would tie `upper` to this very mount of the image.
    context.set_string(c"index", c"off")?;
    context.create()?;
    context.mount(attributes)
}

/// Whether some overlay still writes to `upper`, also one that was unmounted lazily and is to be seen
/// nowhere. `work` is the directory that goes with it.
///
/// The kernel tells nobody, but with `index=on` it refuses a second overlay on the same `upper`
/// (`ovl_report_in_use` in `fs/overlayfs/super.c`). It does so before it looks at the work directory,
/// which is given here by way of another mount: so this overlay is never made, and nothing is written.
pub fn in_use(layers: Layers<'_>) -> Result<bool, MountError> {
    let failed = |source| MountError::Overlay { upper: layers.upper.to_owned(), source };
    let upper = open_path(layers.upper)?;
    let work = open_path(layers.work)?;
    let elsewhere = sys::mount::clone_directory(work.as_fd()).map_err(failed)?;
    let probe = || {
        let context = FsContext::open(c"overlay")?;
        context.set_fd(c"lowerdir+", work.as_fd())?;
        context.set_fd(c"upperdir", upper.as_fd())?;
        context.set_fd(c"workdir", elsewhere.as_fd())?;
        context.set_string(c"index", c"on")?;
        context.create()
    };
    match probe() {
        Err(error) if error.errno() == Some(libc::EBUSY) => Ok(true),
        Err(error) if error.errno() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(failed(error)),
        Ok(()) => Ok(false),
    }
}

/// Makes what is mounted at `path` read-only (mount_setattr(2)).
pub fn make_read_only(path: &Path) -> Result<(), MountError> {
    let mount = open_path(path)?;
    let attributes = Attributes { read_only: true, ..Attributes::default() };
    sys::mount::add_attributes(mount.as_fd(), attributes).map_err(MountError::Attach)
}

/// A directory, read-only and without what is mounted below it, whose files belong to others
/// ([`map_owners`](sys::mount::map_owners)).
pub fn with_owners(path: &Path, namespace: BorrowedFd<'_>) -> Result<DetachedMount, MountError> {
    let directory = open_path(path)?;
    let mapped = sys::mount::clone_directory(directory.as_fd()).and_then(|fd| {
        sys::mount::map_owners(fd.as_fd(), namespace)?;
        Ok(DetachedMount { fd })
    });
    mapped.map_err(|source| MountError::Owners { path: path.to_owned(), source })
}

/// Opens a file or directory for nothing but naming it. Not a symlink.
fn open_path(path: &Path) -> Result<OwnedFd, MountError> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = open(path, flags, Mode::empty());
    let error =
        |errno: nix::Error| MountError::Open { path: path.to_owned(), source: errno.into() };
    fd.map_err(error)
}

/// Opens the directory that a tree is to be attached to. With `owner`, it must be theirs: a user can't
/// hide what belongs to others.
pub fn open_target(path: &Path, owner: Option<u32>) -> Result<OwnedFd, MountError> {
    let target = open_path(path)?;
    let stat = nix::sys::stat::fstat(&target)
        .map_err(|errno| MountError::Open { path: path.to_owned(), source: errno.into() })?;
    let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    match owner {
        Some(owner) if !is_directory || stat.st_uid != owner => {
            Err(MountError::NotTheirs { path: path.to_owned(), owner })
        }
        _ => Ok(target),
    }
}

impl DetachedMount {
    /// Attaches it on top of `target`, an empty directory; otherwise it is gone.
    pub fn attach(self, target: BorrowedFd<'_>) -> Result<(), MountError> {
        if !is_empty(target).map_err(MountError::Target)? {
            return Err(MountError::NotEmpty);
        }
        sys::mount::attach(self.fd.as_fd(), target).map_err(MountError::Attach)
    }
}

impl AsFd for DetachedMount {
    /// The root directory, for `openat` and the like: the tree can be used before it is attached.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether a directory, which may be open with `O_PATH`, has no entries. `ENOTDIR` if it is none.
pub fn is_empty(directory: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = openat(directory, ".", flags, Mode::empty())?;
    let mut directory = nix::dir::Dir::from_fd(directory)?;
    for entry in directory.iter() {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Why a directory could not be unmounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    #[error("{} is not a mount of ours", path.display())]
    NotOurs { path: PathBuf, found: Option<Box<MountPoint>> },
    #[error("{} is in use{}", path.display(), by(users, below))]
    Busy {
        path: PathBuf,
        /// Processes, as far as they are found: what they have mapped is not looked at.
        users: Vec<User>,
        /// Other mounts below it.
        below: Vec<PathBuf>,
    },
    #[error("unmount {}", path.display())]
    Failed { path: PathBuf, source: io::Error },
}

fn by(users: &[User], below: &[PathBuf]) -> String {
    let processes = users.iter().map(|user| format!("{} (pid {})", user.comm, user.pid));
    let mounts = below.iter().map(|path| format!("the mount {}", path.display()));
    let all: Vec<_> = mounts.chain(processes).collect();
    if all.is_empty() { String::new() } else { format!(" by {}", all.join(", ")) }
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Only if nobody uses it.
    Idle,
    /// At once for new users; those that have files open go on. Until they are done the layers are in
    /// use: overlayfs does not keep anybody from mounting them a second time, and then goes wrong.
    Lazy,
}

/// Unmounts what is mounted at `path`, if that is a mount for which `ours` says so (see
/// [`MountPoint`]).
///
/// The path is the users': its directory is opened once, and what is found in it is unmounted, even if
/// the path leads somewhere else by then.
pub fn unmount(
    path: &Path,
    how: Unmount,
    ours: impl Fn(&MountPoint) -> bool,
) -> Result<(), UnmountError> {
    let failed = |source| UnmountError::Failed { path: path.to_owned(), source };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(UnmountError::NotOurs { path: path.to_owned(), found: None });
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = open(parent, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let entry = Path::new(OsStr::from_bytes(fd_path(&parent).as_bytes())).join(name);
    let found = mounted_at(&entry).map_err(failed)?;
    let Some(mount) = found.filter(|mount| ours(mount)) else {
        let found = mounted_at(&entry).ok().flatten().map(Box::new);
        return Err(UnmountError::NotOurs { path: path.to_owned(), found });
    };
    match sys::mount::unmount(&entry, how == Unmount::Lazy) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let below = mounts().map_err(failed)?;
            let below = below.into_iter().filter(|other| other.parent == mount.id);
            Err(UnmountError::Busy {
                path: path.to_owned(),
                users: users::find(mount.id),
                below: below.map(|mount| mount.path).collect(),
            })
        }
        Err(source) => Err(failed(source)),
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Directory => "directory",
            Self::Root => "root",
            Self::Program => "program",
            Self::OpenFile => "open file",
        })
    }
}

#[cfg(test)]
mod root_tests;
