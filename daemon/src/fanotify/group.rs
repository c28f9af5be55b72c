//! Groups: making them, taking them over, opening their queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use fanotify::low_level;
use nix::errno::Errno;

use super::fdinfo::GroupInfo;
use super::{Channel, Error, abi};

/// Which of the two queues a kernel, or a group, has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueKind {
    /// Restartable: the kernel keeps the events of a reader that dies.
    Kernel,
    /// Of a released kernel: who reads an event has to answer it.
    Stock,
}

impl QueueKind {
    /// What people call the queue that goes with it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Stock => "brokered",
        }
    }
}

/// What every group is made with.
const INIT_FLAGS: u32 = abi::FAN_CLASS_PRE_CONTENT
    | abi::FAN_CLOEXEC
    | abi::FAN_NONBLOCK
    | abi::FAN_UNLIMITED_QUEUE
    | abi::FAN_UNLIMITED_MARKS
    | abi::FAN_REPORT_FD_ERROR;

/// How the event fds are opened. `O_RDWR`: the content is written through them. `O_NONBLOCK`: a
/// lease on the file must not hold up the queue.
const EVENT_FLAGS: i32 =
    low_level::O_RDWR | low_level::O_LARGEFILE | low_level::O_CLOEXEC | low_level::O_NONBLOCK;

/// A fanotify group for pre-content events.
///
/// The last close of its fd, in whatever process, allows everything that waits: readers would get
/// zeros. A child that was forked but not exec'd has a copy.
#[derive(Debug)]
pub struct Group {
    fd: Channel,
    kind: QueueKind,
}

/// Which kind of group this kernel can make. Needs `CAP_SYS_ADMIN`, and a kernel with pre-content
/// events (6.14).
pub fn probe() -> Result<QueueKind, Error> {
    match Group::restartable() {
        Ok(_) => Ok(QueueKind::Kernel),
        Err(Error::Init { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
            Group::stock().map(|group| group.kind)
        }
        Err(error) => Err(error),
    }
}

impl Group {
    pub fn new(kind: QueueKind) -> Result<Self, Error> {
        match kind {
            QueueKind::Kernel => Self::restartable(),
            QueueKind::Stock => Self::stock(),
        }
    }

    /// A group of a released kernel, read through [`channel`](Self::channel).
    pub fn stock() -> Result<Self, Error> {
        Self::init(INIT_FLAGS, QueueKind::Stock)
    }

    /// A group whose events survive their reader. Its fd takes marks and
    /// [opens the queue](Self::open_queue), and is for nothing else: epoll refuses it.
    pub fn restartable() -> Result<Self, Error> {
        Self::init(INIT_FLAGS | abi::FAN_RESTARTABLE_EVENTS, QueueKind::Kernel)
    }

    fn init(flags: u32, kind: QueueKind) -> Result<Self, Error> {
        let fd = low_level::fanotify_init(flags, EVENT_FLAGS.cast_unsigned())
            .map_err(|source| Error::Init { flags, source })?;
        // SAFETY: fanotify_init has just opened it, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd: Channel::from_owned_fd(fd), kind })
    }

    /// Takes a group over from a service manager's store. Asks the kernel whether it is one, and
    /// of which kind.
    pub fn from_owned_fd(fd: OwnedFd) -> Result<Self, Error> {
        let flags = GroupInfo::of(fd.as_fd())?.flags;
        let kind = match flags & abi::FAN_RESTARTABLE_EVENTS {
            0 => QueueKind::Stock,
            _ => QueueKind::Kernel,
        };
        Ok(Self { fd: Channel::from_owned_fd(fd), kind })
    }

    #[must_use]
    pub fn kind(&self) -> QueueKind {
        self.kind
    }

    /// What the kernel says of it: its flags and marks. Takes a time proportional to the marks.
    pub fn info(&self) -> Result<GroupInfo, Error> {
        GroupInfo::of(self.as_fd())
    }

    /// Where the events of a stock group are read. (A restartable group's are read from the fd of
    /// [`open_queue`](Self::open_queue); reads of its own fd fail with `EINVAL`.)
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.fd.clone()
    }

    /// Opens the queue of a restartable group, for a worker. It must be the worker's alone: it is
    /// its last close that brings the worker's events back to the head of the queue.
    ///
    /// # Errors
    /// [`Error::QueueBusy`] as long as the one before is open anywhere.
    pub fn open_queue(&self) -> Result<OwnedFd, Error> {
        // SAFETY: the request has no argument, so the kernel touches none of our memory.
        match unsafe { open_queue_fd(self.as_raw_fd()) } {
            // SAFETY: the ioctl returns an fd that it has just opened, and nobody else knows it.
            Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            // the series says EEXIST, its reviewer wants EBUSY
            Err(Errno::EEXIST | Errno::EBUSY) => Err(Error::QueueBusy { fd: self.as_raw_fd() }),
            Err(errno) => {
                Err(Error::OpenQueue { fd: self.as_raw_fd(), source: io::Error::from(errno) })
            }
        }
    }
}

nix::ioctl_none!(open_queue_fd, abi::FAN_IOC_OPEN_QUEUE_FD.0, abi::FAN_IOC_OPEN_QUEUE_FD.1);

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Group {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
