//! The new mount interface: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2),
//! mount_setattr(2), and umount2(2). Numbers are those of `include/uapi/linux/mount.h`.
//!
//! A file system is set up in an [`FsContext`], which has a log of its own: what the kernel says about
//! a mistake is part of the error. What comes out is a mount that is attached nowhere and goes away
//! with its fd, so a failure in the middle leaves nothing behind.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::mount::MntFlags;

const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const OPEN_TREE_CLONE: c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// The longest string that fsconfig(2) takes (`strndup_user(value, 256)`), without its NUL.
pub const MAX_OPTION: usize = 255;

/// An error of one of these calls, with what the kernel has to say about it.
#[derive(Debug)]
pub struct FsError {
    pub operation: &'static str,
    pub operand: String,
    /// The messages of the file system context, without their level.
    pub log: Vec<String>,
    pub source: io::Error,
}

impl FsError {
    fn last(operation: &'static str, operand: impl Into<String>) -> Self {
        let source = io::Error::last_os_error();
        Self { operation, operand: operand.into(), log: Vec::new(), source }
    }

    /// The errno.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation, self.operand)?;
        if !self.log.is_empty() {
            write!(f, " ({})", self.log.join("; "))?;
        }
        Ok(())
    }
}

impl std::error::Error for FsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The attributes of a mount (`MOUNT_ATTR_*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub read_only: bool,
    pub nosuid: bool,
    pub nodev: bool,
    pub noexec: bool,
}

impl Attributes {
    fn bits(self) -> u64 {
        u64::from(self.read_only)
            | u64::from(self.nosuid) << 1
            | u64::from(self.nodev) << 2
            | u64::from(self.noexec) << 3
    }
}

/// A file system that is being set up.
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    kind: String,
}

/// The commands of fsconfig(2) that are used here.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Command {
    SetFlag = 0,
    SetString = 1,
    SetFd = 5,
    Create = 6,
}

impl FsContext {
    /// fsopen(2): `kind` is a name of `/proc/filesystems`.
    pub fn open(kind: &CStr) -> Result<Self, FsError> {
        // SAFETY: the name is a C string that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) };
        let kind = kind.to_string_lossy().into_owned();
        match owned(fd) {
            Some(fd) => Ok(Self { fd, kind }),
            None => Err(FsError::last("fsopen", kind)),
        }
    }

    /// An option without a value.
    pub fn set_flag(&self, key: &CStr) -> Result<(), FsError> {
        self.configure(Command::SetFlag, Some(key), None, 0)
    }

    /// An option with a value of at most [`MAX_OPTION`] bytes.
    pub fn set_string(&self, key: &CStr, value: &CStr) -> Result<(), FsError> {
        self.configure(Command::SetString, Some(key), Some(value), 0)
    }

    /// An option whose value is an open file or directory.
    pub fn set_fd(&self, key: &CStr, fd: BorrowedFd<'_>) -> Result<(), FsError> {
        self.configure(Command::SetFd, Some(key), None, fd.as_raw_fd())
    }

    /// Makes the superblock.
    pub fn create(&self) -> Result<(), FsError> {
        self.configure(Command::Create, None, None, 0)
    }

    /// fsmount(2): a mount of it that is attached nowhere.
    pub fn mount(&self, attributes: Attributes) -> Result<OwnedFd, FsError> {
        // SAFETY: plain numbers; the fd is open.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.fd.as_raw_fd(),
                FSMOUNT_CLOEXEC,
                attributes.bits() as c_uint,
            )
        };
        owned(fd).ok_or_else(|| self.error("fsmount", self.kind.clone()))
    }

    fn configure(
        &self,
        command: Command,
        key: Option<&CStr>,
        value: Option<&CStr>,
        aux: c_int,
    ) -> Result<(), FsError> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: key and value are C strings, or null where the command has none; both outlive the
        // call, and the fd is open.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.fd.as_raw_fd(),
                command as c_uint,
                pointer(key),
                pointer(value),
                aux,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let mut operand = self.kind.clone();
        for (separator, text) in [(' ', key), ('=', value)] {
            if let Some(text) = text {
                operand.push(separator);
                operand.push_str(&text.to_string_lossy());
            }
        }
        let operation = if key.is_none() { "create file system" } else { "set mount option" };
        Err(self.error(operation, operand))
    }

    fn error(&self, operation: &'static str, operand: String) -> FsError {
        let mut error = FsError::last(operation, operand);
        error.log = self.messages();
        error
    }

    /// Reads the context's log: one message a read, `e text`, `w text` or `i text`; `ENODATA` is the
    /// end.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0u8; 1024];
        // The kernel keeps 8 messages.
        while messages.len() < 16 {
            match nix::unistd::read(&self.fd, &mut buffer) {
                Ok(length) if length > 0 => {
                    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                    let text = text.trim_end();
                    let text =
                        text.get(2..).filter(|_| text.get(1..2) == Some(" ")).unwrap_or(text);
                    messages.push(text.to_owned());
                }
                _ => break,
            }
        }
        messages
    }
}

/// open_tree(2) with `OPEN_TREE_CLONE`: a mount of `directory` of our own, attached nowhere.
pub fn clone_directory(directory: BorrowedFd<'_>) -> Result<OwnedFd, FsError> {
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as c_uint | libc::AT_EMPTY_PATH as c_uint;
    // SAFETY: the fd is open, the path an empty C string.
    let fd =
        unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), c"".as_ptr(), flags) };
    owned(fd).ok_or_else(|| FsError::last("clone the mount of", describe(directory)))
}

/// move_mount(2): attaches a detached mount on top of the directory that `target` is open on.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), FsError> {
    // SAFETY: both fds are open, both paths are empty C strings.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    if result == 0 { Ok(()) } else { Err(FsError::last("attach a mount to", describe(target))) }
}

/// `struct mount_attr`.
#[derive(Default)]
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// mount_setattr(2): what is mounted or unmounted elsewhere does not show up below `mount`, and the
/// other way round.
pub fn make_private(mount: BorrowedFd<'_>) -> Result<(), FsError> {
    set_attributes(mount, MountAttr { propagation: libc::MS_PRIVATE, ..MountAttr::default() })
}

/// mount_setattr(2): adds attributes to a mount.
pub fn add_attributes(mount: BorrowedFd<'_>, attributes: Attributes) -> Result<(), FsError> {
    set_attributes(mount, MountAttr { set: attributes.bits(), ..MountAttr::default() })
}

/// mount_setattr(2): a mount from [`clone_directory`] shows files as those of others: an owner is taken for an ID in the
/// user namespace, and is who that is outside. It is read-only and private.
pub fn map_owners(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> Result<(), FsError> {
    let userns_fd = namespace.as_raw_fd() as u64;
    let read_only = Attributes { read_only: true, ..Attributes::default() };
    let set = MOUNT_ATTR_IDMAP | read_only.bits();
    set_attributes(mount, MountAttr { set, clear: 0, propagation: libc::MS_PRIVATE, userns_fd })
}

fn set_attributes(mount: BorrowedFd<'_>, change: MountAttr) -> Result<(), FsError> {
    // SAFETY: the structure outlives the call and its size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            (&raw const change).cast::<c_void>(),
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(FsError::last("set attributes of", describe(mount))) }
}

/// umount2(2) with `UMOUNT_NOFOLLOW`. `lazy` (`MNT_DETACH`): it vanishes from the tree now and ends
/// with its last user.
pub fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    nix::mount::umount2(path, flags | MntFlags::UMOUNT_NOFOLLOW)?;
    Ok(())
}

/// What statx(2) tells of the mount that a file is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountStat {
    /// As in `/proc/self/mountinfo` and in `/proc/PID/fdinfo/FD`.
    pub mount_id: u64,
    /// The file is the root of the mount.
    pub is_root: bool,
}

/// statx(2) of `path`, relative to `directory` if it is relative; of `directory` itself if it is empty.
/// A symlink is not followed, nothing is mounted by looking.
pub fn stat_mount(directory: BorrowedFd<'_>, path: &CStr) -> io::Result<MountStat> {
    // SAFETY: all zeros is a value of this structure of numbers.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path is a C string and `stat` is a statx structure; both outlive the call.
    let result = unsafe {
        libc::statx(
            directory.as_raw_fd(),
            path.as_ptr().cast::<c_char>(),
            flags,
            libc::STATX_MNT_ID,
            &raw mut stat,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let is_root = stat.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0;
    Ok(MountStat { mount_id: stat.stx_mnt_id, is_root })
}

fn owned(result: c_long) -> Option<OwnedFd> {
    let fd = c_int::try_from(result).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made this fd for us; nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The path of an open file, for messages.
fn describe(fd: BorrowedFd<'_>) -> String {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    match std::fs::read_link(&link) {
        Ok(path) => path.display().to_string(),
        Err(_) => link,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_root_is_known_as_one() {
        let root = fs_err::File::open("/").unwrap();
        let proc = stat_mount(root.as_fd(), c"/proc").unwrap();
        let self_ = stat_mount(root.as_fd(), c"/proc/self").unwrap();
        assert!(proc.is_root);
        assert!(!self_.is_root);
        assert_eq!(proc.mount_id, self_.mount_id);
        assert_ne!(proc.mount_id, stat_mount(root.as_fd(), c"").unwrap().mount_id);
    }

    #[test]
    #[ignore = "needs root"]
    fn root_an_unknown_file_system_and_a_bad_option_are_explained() {
        let error = FsContext::open(c"no-such-file-system").unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENODEV));
        assert_eq!(error.to_string(), "fsopen no-such-file-system");

        let context = FsContext::open(c"overlay").unwrap();
        let error = context.set_string(c"metacopy", c"perhaps").unwrap_err();
        assert_eq!(error.errno(), Some(libc::EINVAL));
        assert!(!error.log.is_empty(), "{error}");
        assert!(error.to_string().contains("metacopy"), "{error}");
    }

    #[test]
    #[ignore = "needs root"]
    fn root_a_detached_mount_goes_away_with_its_fd() {
        let context = FsContext::open(c"tmpfs").unwrap();
        context.set_string(c"source", c"hydrant-mount-that-goes").unwrap();
        context.create().unwrap();
        let attributes = Attributes { nosuid: true, nodev: true, ..Attributes::default() };
        let mount = context.mount(attributes).unwrap();
        assert!(stat_mount(mount.as_fd(), c"").unwrap().is_root);
        drop(mount);
        let mounts = fs_err::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains("hydrant-mount-that-goes"));
    }
}
