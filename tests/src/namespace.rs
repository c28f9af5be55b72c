//! Idmapped mounts, which the `mount` of older distributions can't make (mount_setattr(2)).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::process::leash;

/// Mounts what is at `source` on `target` once more, with the ids from 0 shown as ids from `first`.
/// `EINVAL` where the file system does not take that.
pub fn mount_idmapped(source: &Path, target: &Path, first: u32) -> io::Result<()> {
    let from = CString::new(source.as_os_str().as_bytes())?;
    let to = CString::new(target.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a string that ends in zero, and numbers.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags) };
    let tree = owned(tree)?;
    let names = user_namespace(first)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: names.as_raw_fd() as u64,
    };
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the structure is of the size
    // that is given and lives during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: strings that end in zero, descriptors and numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: a descriptor that the kernel has just made, and that nobody else has.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A user namespace that maps the ids from 0 to those from `first`.
fn user_namespace(first: u32) -> io::Result<File> {
    // The namespace belongs to a process; once it is open it needs none.
    let mut command = Command::new("unshare");
    command.args(["-U", "sleep", "60"]).stdin(Stdio::null());
    let holder = leash(command).map_err(io::Error::other)?;
    let own = std::fs::read_link("/proc/self/ns/user")?;
    let directory = format!("/proc/{}", holder.pid());
    for _ in 0..200 {
        if std::fs::read_link(format!("{directory}/ns/user")).is_ok_and(|ns| ns != own) {
            for map in ["uid_map", "gid_map"] {
                fs_err::write(format!("{directory}/{map}"), format!("0 {first} 65536"))?;
            }
            return File::open(format!("{directory}/ns/user"));
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(io::Error::other("unshare makes no user namespace"))
}
