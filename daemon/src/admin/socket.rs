//! The socket file and who may connect to it.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fs_err as fs;
use hydrant_api::Directories;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Gid, Group};
use thiserror::Error;
use tokio::net::UnixListener;

/// The group whose members may use the daemon without being root, if there is one of this name.
pub const DEFAULT_GROUP: &str = "hydrant";

/// The longest path of a socket in bytes (`sun_path` less its NUL, unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The socket, listening. A file that we made is removed when this is dropped.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    guard: Option<SocketFile>,
}

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum SocketError {
    #[error("the path of the socket, {}, has more than {MAX_SOCKET_PATH} bytes", .0.display())]
    TooLong(PathBuf),
    #[error("{} is in the way: not a socket", .0.display())]
    NotASocket(PathBuf),
    #[error("there is no group {0:?}")]
    NoGroup(String),
    #[error("the socket that the service manager passed is not the listening one at {}", .0.display())]
    NotOurs(PathBuf),
    #[error("can't listen on {}", .path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("can't put the admin socket in place")]
    Io(#[from] io::Error),
}

impl AdminSocket {
    /// Listens in the run directory, which the caller has [locked](super::InstanceLock): a socket
    /// that is there is a dead daemon's. Members of the group may connect (mode 0660): of `group`,
    /// which then must exist, else of [`DEFAULT_GROUP`]; where that is missing nobody but the
    /// daemon's own user may (0600). To be called inside a tokio runtime.
    pub fn bind(directories: &Directories, group: Option<&str>) -> Result<Self, SocketError> {
        let path = directories.socket();
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(SocketError::TooLong(path));
        }
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path));
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let group = find_group(group)?;
        // bind(2) makes the file with the mode that the umask leaves. So it is made where nobody
        // else comes, and takes its place when its mode and group are right.
        let private = directories.run.join(".new");
        let temporary = private.join("s");
        match fs::remove_dir_all(&private) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        fs::create_dir(&private)?;
        fs::set_permissions(&private, Permissions::from_mode(0o700))?;
        let listener = UnixListener::bind(&temporary)
            .map_err(|source| SocketError::Listen { path: path.clone(), source })?;
        let mode = match group {
            Some(gid) => {
                fs::os::unix::fs::chown(&temporary, None, Some(gid.as_raw()))?;
                0o660
            }
            None => 0o600,
        };
        fs::set_permissions(&temporary, Permissions::from_mode(mode))?;
        let inode = fs::symlink_metadata(&temporary)?.ino();
        fs::rename(&temporary, &path)?;
        fs::remove_dir(&private)?;
        Ok(Self { listener, path: path.clone(), guard: Some(SocketFile { path, inode }) })
    }

    /// A socket on which the service manager has listened for us: who may connect was its business.
    /// To be called inside a tokio runtime.
    pub fn passed(fd: OwnedFd, directories: &Directories) -> Result<Self, SocketError> {
        let path = directories.socket();
        let listens = getsockopt(&fd, sockopt::AcceptConn).map_err(io::Error::from)?;
        let listener = std::os::unix::net::UnixListener::from(fd);
        let address = listener.local_addr()?;
        // clients look for it there
        if !listens || address.as_pathname() != Some(&path) {
            return Err(SocketError::NotOurs(path));
        }
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, path, guard: None })
    }

    /// As [`passed`](Self::passed), for one that the program before us in this process has made: it is to
    /// be removed.
    pub fn inherited(fd: OwnedFd, directories: &Directories) -> Result<Self, SocketError> {
        let mut socket = Self::passed(fd, directories)?;
        let inode = fs::symlink_metadata(&socket.path)?.ino();
        socket.guard = Some(SocketFile { path: socket.path.clone(), inode });
        Ok(socket)
    }

    /// Another fd of the socket, to be passed on.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// What removes the socket's file when it is dropped, if that is our business.
    pub fn take_file(&mut self) -> Option<SocketFile> {
        self.guard.take()
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn into_parts(self) -> (UnixListener, Option<SocketFile>) {
        (self.listener, self.guard)
    }
}

/// Removes the socket's file when dropped, if it is still the same.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    /// Leaves the file where it is.
    pub fn keep(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            // What stays is taken for what it is, a dead daemon's.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn find_group(name: Option<&str>) -> Result<Option<Gid>, SocketError> {
    let found = Group::from_name(name.unwrap_or(DEFAULT_GROUP)).ok().flatten();
    match (name, found) {
        (Some(name), None) => Err(SocketError::NoGroup(name.to_owned())),
        (_, found) => Ok(found.map(|group| group.gid)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn directories(root: &Path) -> Directories {
        Directories { state: root.join("state"), run: root.to_owned() }
    }

    #[tokio::test]
    async fn takes_the_place_of_a_dead_socket() {
        let root = tempfile::tempdir().unwrap();
        let path = directories(root.path()).socket();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let socket = AdminSocket::bind(&directories(root.path()), None).unwrap();
        assert_eq!(socket.path(), path);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn only_the_group_may_connect() {
        let root = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        let own = Group::from_gid(Gid::current()).unwrap().unwrap();
        let socket = AdminSocket::bind(&directories(root.path()), Some(&own.name)).unwrap();
        assert_eq!(mode(socket.path()), 0o660);
        drop(socket);
        if Group::from_name(DEFAULT_GROUP).unwrap().is_none() {
            let socket = AdminSocket::bind(&directories(root.path()), None).unwrap();
            assert_eq!(mode(socket.path()), 0o600);
        }
        let missing = AdminSocket::bind(&directories(root.path()), Some("no such group"));
        assert!(matches!(missing, Err(SocketError::NoGroup(_))));
    }

    #[tokio::test]
    async fn leaves_what_is_not_a_socket() {
        let root = tempfile::tempdir().unwrap();
        let path = directories(root.path()).socket();
        fs::write(&path, "precious").unwrap();
        let error = AdminSocket::bind(&directories(root.path()), None).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_socket_that_was_passed() {
        let root = tempfile::tempdir().unwrap();
        let ours = directories(root.path());
        let listener = std::os::unix::net::UnixListener::bind(ours.socket()).unwrap();
        let other = Directories { run: root.path().join("other"), ..ours.clone() };
        let copy = listener.try_clone().unwrap();
        let error = AdminSocket::passed(copy.into(), &other).unwrap_err();
        assert!(matches!(error, SocketError::NotOurs(_)), "{error}");
        let socket = AdminSocket::passed(listener.into(), &ours).unwrap();
        UnixStream::connect(socket.path()).unwrap();
        drop(socket);
        assert!(ours.socket().exists(), "it is the service manager's");
        let stream = UnixStream::pair().unwrap().0;
        let error = AdminSocket::passed(stream.into(), &ours).unwrap_err();
        assert!(matches!(error, SocketError::NotOurs(_)), "{error}");
    }

    #[tokio::test]
    async fn a_path_that_is_too_long() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("d".repeat(100));
        let error = AdminSocket::bind(&directories(&deep), None).unwrap_err();
        assert!(matches!(error, SocketError::TooLong(_)));
    }
}
