//! `SOCK_SEQPACKET` sockets between our processes: whole messages, in order, with file descriptors
//! (unix(7), `SCM_RIGHTS`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The most fds that go with one message.
pub const MAX_FDS: usize = 3;

/// What a sender may put into one message at most (`SCM_MAX_FD` in `include/net/scm.h`): room for that
/// many is kept, so that what comes in too great a number is seen and closed.
const KERNEL_MAX_FDS: usize = 253;

/// Bytes of socket buffer asked for, so that a burst of events does not have to wait.
const BUFFER: usize = 1 << 20;

/// A control message buffer in words, so that it is aligned as `cmsghdr` must be.
const CONTROL_WORDS: usize = control_words(KERNEL_MAX_FDS);

const fn control_words(fds: usize) -> usize {
    // SAFETY: CMSG_SPACE only computes.
    let bytes = unsafe { libc::CMSG_SPACE((fds * size_of::<RawFd>()) as u32) } as usize;
    bytes.div_ceil(size_of::<u64>())
}

/// A message that has come.
#[derive(Debug)]
pub struct Received {
    /// Of the buffer that was given; at least 1.
    pub length: usize,
    /// At most [`MAX_FDS`], close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// A connected socket, for use in a tokio runtime. Sending and receiving can be cancelled at any await:
/// a message is then either gone whole or not at all.
#[derive(Debug)]
pub struct Seqpacket {
    fd: AsyncFd<OwnedFd>,
}

/// Two sockets that are connected to each other, close-on-exec: one for here, one to be given away.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (a, b) = nix::sys::socket::socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )?;
    for socket in [&a, &b] {
        // Beyond net.core.wmem_max where we may; the default will do otherwise.
        if setsockopt(socket, sockopt::SndBufForce, &BUFFER).is_err() {
            setsockopt(socket, sockopt::SndBuf, &BUFFER)?;
        }
    }
    Ok((a, b))
}

impl Seqpacket {
    /// Takes a socket, such as one that was inherited. Must be called in a tokio runtime.
    ///
    /// Fails with `InvalidInput` if it is something else than a `SOCK_SEQPACKET` socket.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if getsockopt(&fd, sockopt::SockType)? != SockType::SeqPacket {
            let message = "not a socket of type SOCK_SEQPACKET";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::F_GETFL)?;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::F_SETFL(flags))?;
        // SAFETY: the fd is owned by the AsyncFd, which never gives it away.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { fd })
    }

    /// Sends one message, with up to [`MAX_FDS`] fds, when there is room for it. `EPIPE` and
    /// `ECONNRESET`: the peer is gone; there is no signal.
    pub async fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.fd.async_io(Interest::WRITABLE, |fd| send(fd.as_fd(), message, fds)).await
    }

    /// Like [`Self::send`], but fails with `WouldBlock` where that would wait.
    pub fn try_send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        // Not AsyncFd::try_io, which says WouldBlock as long as the readiness is not known yet.
        send(self.fd.get_ref().as_fd(), message, fds)
    }

    /// Waits until there is room for a message. Does not say that a message of any size fits.
    pub async fn writable(&self) -> io::Result<()> {
        // try_send goes past tokio's knowledge of the socket, so ask the kernel
        let room = |fd: &OwnedFd| {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut fds, PollTimeout::ZERO)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        };
        self.fd.async_io(Interest::WRITABLE, room).await
    }

    /// Waits for a message. `None`: the peer has closed its end.
    ///
    /// A message that does not fit into `buffer`, or that has more than [`MAX_FDS`] fds or something
    /// else than fds with it, is an `InvalidData` error; its fds are closed.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        self.fd.async_io(Interest::READABLE, |fd| receive(fd.as_fd(), buffer)).await
    }

    /// Like [`Self::recv`], but fails with `WouldBlock` where there is no message.
    pub fn try_recv(&self, buffer: &mut [u8]) -> io::Result<Option<Received>> {
        receive(self.fd.get_ref().as_fd(), buffer)
    }
}

impl AsFd for Seqpacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

/// sendmsg(2), once; for the blocking side too. An empty message is refused: the receiver could not
/// tell it from the end.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if message.is_empty() || fds.len() > MAX_FDS {
        let message = "an empty message, or too many file descriptors";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut part =
        libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
    let mut control = [0u64; control_words(MAX_FDS)];
    // SAFETY: all zeros is a value of msghdr: no address, no parts, no control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !fds.is_empty() {
        let payload = size_of_val(fds) as u32;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute. `control` has room for MAX_FDS fds, is aligned
        // for cmsghdr, and so CMSG_FIRSTHDR is a header in it and CMSG_DATA room for the fds after it.
        // A BorrowedFd has the layout of a RawFd.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(payload) as _;
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(payload) as _;
            let target = libc::CMSG_DATA(first);
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), target, payload as usize);
        }
    }
    loop {
        // SAFETY: the header points to the message and the control data, which outlive the call.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// recvmsg(2), once; for the blocking side too. See [`Seqpacket::recv`].
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<Received>> {
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = [0u64; CONTROL_WORDS];
    // SAFETY: all zeros is a value of msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    let mut seen_end = false;
    let length = loop {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        // SAFETY: the header points to the buffer and the control data, which outlive the call.
        let received =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(received) {
            // The kernel looks for a message and then whether this is the end, so what was sent between the
            // two, the last one, is still there (`net/unix/af_unix.c:__unix_dgram_recvmsg`).
            Ok(0) if !seen_end => {
                seen_end = true;
                continue;
            }
            Ok(length) => break length,
            Err(_) => {}
        }
        let error = io::Error::last_os_error();
        // The peer was closed before it had read all that we sent. The kernel says so once, and
        // before what it has sent us (`net/unix/af_unix.c:unix_release_sock`): that comes now, then the end.
        let reset = error.kind() == io::ErrorKind::ConnectionReset;
        if error.kind() != io::ErrorKind::Interrupted && !reset {
            return Err(error);
        }
    };
    // Before anything can go wrong: from here on the fds are owned and are closed on every way out.
    let (fds, foreign) = take_fds(&header);
    let problem = if header.msg_flags & libc::MSG_CTRUNC != 0 {
        Some("file descriptors were lost, too many are open")
    } else if header.msg_flags & libc::MSG_TRUNC != 0 {
        Some("a message is too long")
    } else if foreign {
        Some("control data other than file descriptors")
    } else if fds.len() > MAX_FDS {
        Some("too many file descriptors")
    } else {
        None
    };
    match problem {
        Some(problem) => Err(io::Error::new(io::ErrorKind::InvalidData, problem)),
        None if length == 0 => Ok(None),
        None => Ok(Some(Received { length, fds })),
    }
}

/// The fds in the control data of a message that recvmsg(2) has just filled in; `true` if there was
/// anything else.
fn take_fds(header: &libc::msghdr) -> (Vec<OwnedFd>, bool) {
    let mut fds = Vec::new();
    let mut foreign = false;
    // SAFETY: `header` describes control data that the kernel wrote into an aligned buffer, so the
    // CMSG macros give headers within it, and cmsg_len counts the bytes of each.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: not null, so a header within the buffer, as said above.
        let message = unsafe { next.read() };
        if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: only computes; then a pointer to the data that follows this header.
            let (offset, data) = unsafe { (libc::CMSG_LEN(0) as usize, libc::CMSG_DATA(next)) };
            let count = (message.cmsg_len as usize).saturating_sub(offset) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: within the data of this header, which holds `count` fds that the kernel has
                // just opened for us alone.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(data.cast::<RawFd>().add(index).read_unaligned())
                });
            }
        } else {
            foreign = true;
        }
        // SAFETY: as for the first.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    (fds, foreign)
}

#[cfg(test)]
mod tests;
