//! The service manager's notification protocol: datagrams of `NAME=value` lines, some with file
//! descriptors that the manager is to keep (sd_notify(3), `FDSTORE=1`). Both ends of it.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    UnixCredentials, bind, getsockname, recvmsg, sendmsg, setsockopt, socket, sockopt,
};

/// The longest message, in bytes: more than what we send, and than what sd_notify(3) sends for us.
const MAX_MESSAGE: usize = 4096;

/// As many fds as a message can have (`SCM_MAX_FD` in `include/net/scm.h`).
const MAX_FDS: usize = 253;

/// Sends one message. `address` is what `NOTIFY_SOCKET` has: a path, or `@` and an abstract name.
/// Waits for as long as the manager is busy with other messages.
pub fn send(address: &OsStr, message: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = address.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name)?,
        None => UnixAddr::new(bytes)?,
    };
    let socket = datagram_socket(SockFlag::empty())?;
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let message = [IoSlice::new(message.as_bytes())];
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg(socket.as_raw_fd(), &message, control, flags, Some(&address)) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn datagram_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::Datagram, flags, None)?)
}

/// The manager's end.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: OsString,
}

/// A message. Anybody may send one: who it is from is what counts.
#[derive(Debug)]
pub struct Notification {
    /// As the kernel knows the sender.
    pub pid: i32,
    pub uid: u32,
    pub text: String,
    pub fds: Vec<OwnedFd>,
}

impl Listener {
    /// At an abstract address that the kernel chooses: gone with the last process that has it, and
    /// in nobody's way.
    pub fn bind() -> io::Result<Self> {
        let socket = datagram_socket(SockFlag::SOCK_NONBLOCK)?;
        setsockopt(&socket, sockopt::PassCred, &true)?;
        bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
        let bound: UnixAddr = getsockname(socket.as_raw_fd())?;
        let name = bound.as_abstract().ok_or_else(|| io::Error::other("a socket has no name"))?;
        let address = OsString::from_vec([b"@", name].concat());
        Ok(Self { socket, address })
    }

    /// What `NOTIFY_SOCKET` has to be for those who are to find it.
    #[must_use]
    pub fn address(&self) -> &OsStr {
        &self.address
    }

    /// The next message, if there is one: doesn't wait.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        let mut text = [0; MAX_MESSAGE];
        let mut space = cmsg_space!([RawFd; MAX_FDS], UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut text)];
        let socket = self.socket.as_raw_fd();
        let received = loop {
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(socket, &mut parts, Some(&mut space), flags) {
                Ok(received) => break received,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut notification =
            Notification { pid: 0, uid: u32::MAX, text: String::new(), fds: Vec::new() };
        // There is room for all that the kernel lets anybody send.
        for message in received.cmsgs()? {
            match message {
                ControlMessageOwned::ScmRights(fds) => {
                    // SAFETY: the kernel has just opened them for us alone.
                    let fds = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                    notification.fds.extend(fds);
                }
                ControlMessageOwned::ScmCredentials(who) => {
                    notification.pid = who.pid();
                    notification.uid = who.uid();
                }
                _ => {}
            }
        }
        let length = received.bytes;
        if !received.flags.contains(MsgFlags::MSG_TRUNC) {
            let text = text.get(..length).unwrap_or_default();
            notification.text = String::from_utf8_lossy(text).into_owned();
        }
        Ok(Some(notification))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn messages_come_with_their_senders_and_fds() {
        let listener = Listener::bind().unwrap();
        assert!(listener.receive().unwrap().is_none());
        let (mut reader, writer) = io::pipe().unwrap();
        send(listener.address(), "A=1\nB=2", &[writer.as_fd(), writer.as_fd()]).unwrap();
        send(listener.address(), "C=3", &[]).unwrap();
        drop(writer);
        let first = listener.receive().unwrap().unwrap();
        assert_eq!(first.pid, std::process::id().cast_signed());
        assert_eq!(first.uid, nix::unistd::getuid().as_raw());
        assert_eq!((first.text.as_str(), first.fds.len()), ("A=1\nB=2", 2));
        std::fs::File::from(first.fds.into_iter().next().unwrap()).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x", "both copies are closed");
        let second = listener.receive().unwrap().unwrap();
        assert_eq!((second.text.as_str(), second.fds.len()), ("C=3", 0));
        assert!(listener.receive().unwrap().is_none());
    }

    #[test]
    fn too_long_a_message_says_nothing() {
        let listener = Listener::bind().unwrap();
        send(listener.address(), &"A".repeat(MAX_MESSAGE + 1), &[listener.as_fd()]).unwrap();
        assert_eq!(listener.receive().unwrap().unwrap().text, "");
    }

    #[test]
    fn paths_are_addresses_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1", &[]).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 7);
        assert!(send(OsStr::new("/no/such/socket"), "READY=1", &[]).is_err());
    }
}
