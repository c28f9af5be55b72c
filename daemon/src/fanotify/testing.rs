//! What tests with a real kernel share: marked files, readers in processes of their own, time-outs.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tempfile::TempDir;

use super::{Channel, Event, PermissionEvent, Read};
use crate::range::ByteRange;

/// Nothing that is tested takes that long, whatever else the machine does; what does has hung.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A directory on a filesystem that takes pre-content marks. (The end-to-end tests remove those
/// whose process is gone.)
pub(crate) fn directory() -> TempDir {
    TempDir::with_prefix_in(format!("hydrant-test-{}-", std::process::id()), "/var/tmp").unwrap()
}

/// A file of holes.
pub(crate) fn sparse(directory: &Path, name: &str, size: u64) -> PathBuf {
    let path = directory.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

pub(crate) fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len)
}

/// A process that reads a file. Killed when this goes out of scope.
#[derive(Debug)]
pub(crate) struct Reader {
    child: Child,
    started: Instant,
}

/// How a reader ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) bytes: Vec<u8>,
    pub(crate) message: String,
}

impl Reader {
    /// Reads `range`, whose bounds are in whole blocks, in one read(2).
    pub(crate) fn start(path: &Path, range: ByteRange) -> Self {
        let mut command = Command::new("/bin/dd");
        command
            .arg(format!("if={}", path.display()))
            .arg(format!("bs={}", range.len()))
            .arg(format!("skip={}", range.offset()))
            .args(["iflag=skip_bytes", "count=1", "status=none"]);
        Self::spawn(&mut command)
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        let child = command
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, started: Instant::now() }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Still there after a while in which an answer would have come through.
    pub(crate) fn is_blocked(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        self.child.try_wait().unwrap().is_none()
    }

    /// Its end, which must come by itself. (What it writes must fit in a pipe: 64 KiB.)
    pub(crate) fn finish(mut self) -> Outcome {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(self.started.elapsed() < LIMIT, "the reader hangs");
            std::thread::sleep(Duration::from_millis(2));
        };
        let (mut bytes, mut message) = (Vec::new(), String::new());
        self.child.stdout.take().unwrap().read_to_end(&mut bytes).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
        Outcome { status, bytes, message }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until there is something to read, or `limit` is over.
pub(crate) fn readable(channel: impl AsFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(limit).unwrap();
    nix::poll::poll(&mut fds, timeout).unwrap() == 1
}

/// The events that come until there are `count`.
pub(crate) fn events(channel: &Channel, count: usize) -> Vec<PermissionEvent> {
    let mut events = Vec::new();
    while events.len() < count {
        assert!(readable(channel, LIMIT), "{} of {count} events came", events.len());
        match channel.read().unwrap() {
            Read::Events(new) => events.extend(new.into_iter().map(|event| match event {
                Event::Permission(event) => event,
                other => panic!("{other:?}"),
            })),
            Read::Empty => {}
            Read::Gone => panic!("the group is gone"),
        }
    }
    assert_eq!(events.len(), count);
    events
}

/// The next event, which must be alone.
pub(crate) fn event(channel: &Channel) -> PermissionEvent {
    events(channel, 1).remove(0)
}

/// No event comes in a time in which one would have.
pub(crate) fn is_quiet(channel: &Channel) -> bool {
    !readable(channel, Duration::from_millis(50))
}

/// A private copy of the mount that `directory` lies in, as an `O_PATH` fd of `directory`.
pub(crate) fn detached_mount(directory: &Path) -> OwnedFd {
    let path = std::ffi::CString::new(directory.to_str().unwrap()).unwrap();
    // include/uapi/linux/mount.h
    let open_tree_clone = 1;
    let flags = open_tree_clone | libc::O_CLOEXEC;
    // SAFETY: the path is a C string that lives through the call; the kernel keeps no pointer to it.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    assert!(fd >= 0, "open_tree: {}", std::io::Error::last_os_error());
    // SAFETY: open_tree has just opened it, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) }
}

/// `name` in the directory `dirfd`, for reading and writing.
pub(crate) fn open_at(dirfd: impl AsFd, name: &str) -> File {
    let flags = nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_CLOEXEC;
    let fd = nix::fcntl::openat(dirfd, name, flags, nix::sys::stat::Mode::empty()).unwrap();
    File::from(fd)
}

/// A fresh ext4 on the guest kernel's disk, which tests use one after the other. (The guest's
/// own root takes no marks, nor does it mount loop devices.)
#[derive(Debug)]
pub(crate) struct Disk {
    mount_point: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Disk {
    const DEVICE: &str = "/dev/ubda";

    pub(crate) fn mount() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mount_point = TempDir::with_prefix("hydrant-disk-").unwrap();
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{command:?}: {output:?}");
        };
        run(Command::new("mkfs.ext4").args(["-q", "-F", Self::DEVICE]));
        run(Command::new("mount").arg(Self::DEVICE).arg(mount_point.path()));
        Self { mount_point, _turn: turn }
    }

    pub(crate) fn path(&self) -> &Path {
        self.mount_point.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}
