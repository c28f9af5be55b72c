//! The mechanism itself, in small: a marked sparse file is read by another process, which waits until
//! the bytes are written; first directly, then through EROFS, then through overlayfs above that.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use super::image::{BLOCK, image};
use super::room::{PATIENCE, Room, run};
use super::{Finding, Problem, chain};
use crate::fanotify::{Channel, DenyErrno, Event, Group, Read, Verdict, mark};
use crate::mount::{DetachedMount, Layers, TreeMount, mount};
use crate::range::ByteRange;

pub(super) const KERNEL: &str = "Use Linux 6.14 or later with CONFIG_FANOTIFY_ACCESS_PERMISSIONS.";
const FILE_SYSTEM: &str =
    "Put the state directory on ext4, xfs or btrfs (--state-dir), with Linux 6.14 or later.";
const EROFS: &str =
    "Use Linux 6.12 or later with CONFIG_EROFS_FS and CONFIG_EROFS_FS_BACKED_BY_FILE.";
const OVERLAYFS: &str = "Use a kernel with CONFIG_OVERLAY_FS, and a state directory that is not on overlayfs itself and takes trusted.* attributes.";

/// Marks a file of the state directory, and has a process read it.
pub fn fanotify(room: &Room) -> Finding {
    let lazy = Lazy::new(room, "plain.data")?;
    let file = fs_err::File::open(&lazy.path)
        .map_err(|e| Problem::step("open a file", &e, FILE_SYSTEM))?;
    let (output, ranges) = lazy.run(Command::new("cat").stdin(file.into_parts().0), FILE_SYSTEM)?;
    lazy.expect_content(&output, &ranges, FILE_SYSTEM)?;
    Ok(format!("a read in {} waited for its bytes and got them", room.parent().display()))
}

/// Reads a file of an EROFS image whose content is in a marked file.
pub fn erofs(room: &Room) -> Finding {
    let lazy = Lazy::new(room, "erofs.data")?;
    let mount = lazy.mount(room, None, EROFS)?;
    let (output, ranges) = lazy.read(&mount, "d/f", EROFS)?;
    lazy.expect_content(&output, &ranges, EROFS)?;
    Ok("a file-backed image was mounted, and a read through it waited for its bytes".to_owned())
}

/// Changes metadata and renames directories above it, for which nothing may be fetched.
pub fn overlayfs(room: &Room) -> Finding {
    let lazy = Lazy::new(room, "overlay.data")?;
    let directory =
        |name| room.directory(name).map_err(|e| Problem::step("make a directory", &e, OVERLAYFS));
    let (upper, work) = (directory("upper")?, directory("work")?);
    let layers = Layers { upper: &upper, work: &work };
    let mount = lazy.mount(room, Some(layers), OVERLAYFS)?;

    for (words, what) in [
        (&["chmod", "600", "d/f"][..], "changing a mode"),
        (&["mv", "d", "renamed"][..], "renaming a directory"),
    ] {
        let (output, ranges) = lazy.run(in_mount(&mount, words).stdin(Stdio::null()), OVERLAYFS)?;
        if !output.status.success() || !ranges.is_empty() {
            let detail =
                format!("{} {ranges:?}", String::from_utf8_lossy(&output.stderr).trim_end());
            let problem = format!("{what} fails, or reads the file's content");
            return Err(Problem { detail, ..Problem::new(problem, OVERLAYFS) });
        }
    }
    let (output, ranges) = lazy.read(&mount, "renamed/f", OVERLAYFS)?;
    lazy.expect_content(&output, &ranges, OVERLAYFS)?;
    Ok("modes and directory names were changed without fetching, then a read waited for its bytes"
        .to_owned())
}

/// A program that runs in the root of a mount that is attached nowhere.
fn in_mount(mount: &DetachedMount, words: &[&str]) -> Command {
    let (program, arguments) = words.split_first().unwrap_or((&"true", &[]));
    let mut command = Command::new(program);
    // The fd is closed by exec only.
    command.args(arguments).current_dir(format!("/proc/self/fd/{}", mount.as_fd().as_raw_fd()));
    command
}

/// A marked sparse file of one block, and who fills it.
struct Lazy {
    group: Group,
    channel: Channel,
    path: PathBuf,
}

impl Lazy {
    fn new(room: &Room, name: &str) -> Result<Self, Problem> {
        let file = room.file(name).and_then(|file| {
            file.set_len(BLOCK as u64)?;
            Ok(file)
        });
        let file = file.map_err(|e| Problem::step("make a sparse file", &e, FILE_SYSTEM))?;
        let group =
            Group::stock().map_err(|e| Problem::step("make a fanotify group", &e, KERNEL))?;
        mark::add(&group, file.as_fd())
            .map_err(|e| Problem::step("mark a file for pre-content events", &e, FILE_SYSTEM))?;
        let channel = group.channel();
        Ok(Self { group, channel, path: room.path(name) })
    }

    /// What is written where a reader waits.
    fn content() -> [u8; BLOCK] {
        std::array::from_fn(|index| (index % 251) as u8 + 1)
    }

    fn mount(
        &self,
        room: &Room,
        layers: Option<Layers<'_>>,
        remedy: &str,
    ) -> Result<DetachedMount, Problem> {
        let path = room.path("image").with_extension(self.path.file_stem().unwrap_or_default());
        fs_err::write(&path, image()).map_err(|e| Problem::step("write an image", &e, remedy))?;
        let devices = std::slice::from_ref(&self.path);
        let tree = TreeMount {
            image: &path,
            devices,
            pack: None,
            below: &[],
            fresh: false,
            layers,
            read_only: layers.is_none(),
            restricted: false,
        };
        mount(&tree).map_err(|e| Problem::step("mount a tree", &e, remedy))
    }

    fn read(
        &self,
        mount: &DetachedMount,
        path: &str,
        remedy: &str,
    ) -> Result<(Output, Vec<ByteRange>), Problem> {
        let file = openat(mount, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| Problem::step("open a file of the tree", &e, remedy))?;
        self.run(Command::new("cat").stdin(file), remedy)
    }

    /// Runs a program, and answers the events that it raises. The ranges are those of the events.
    fn run(
        &self,
        command: &mut Command,
        remedy: &str,
    ) -> Result<(Output, Vec<ByteRange>), Problem> {
        let mut ranges = Vec::new();
        let program = command.get_program().to_string_lossy().into_owned();
        let output = run(command, || self.serve(&mut ranges));
        match output {
            Ok(output) => Ok((output, ranges)),
            Err(Trouble::Io(error)) if error.kind() == io::ErrorKind::TimedOut => {
                let problem = format!("`{program}` was not done after {} s", PATIENCE.as_secs());
                let detail = format!("events: {ranges:?}");
                Err(Problem { detail, ..Problem::new(problem, remedy) })
            }
            Err(Trouble::Io(error)) => {
                Err(Problem::step(&format!("run `{program}`"), &error, remedy))
            }
            Err(Trouble::NoRange) => Err(Problem::new(
                "events do not say which range is read",
                "Use Linux 6.15 or later.",
            )),
        }
    }

    /// Waits a little for events, and answers them.
    fn serve(&self, ranges: &mut Vec<ByteRange>) -> Result<(), Trouble> {
        let mut fds = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(10_u8)).map_err(io::Error::from)? == 0 {
            return Ok(());
        }
        let Read::Events(events) = self.channel.read().map_err(other)? else { return Ok(()) };
        let mut trouble = None;
        for event in events {
            let Event::Permission(event) = event else { continue };
            let filled = match event.range() {
                None => Err(Trouble::NoRange),
                Some(range) => {
                    ranges.push(range);
                    fill(event.as_fd(), range).map_err(Trouble::Io)
                }
            };
            let verdict =
                if filled.is_ok() { Verdict::Allow } else { Verdict::Deny(DenyErrno::Eio) };
            trouble = trouble.or(filled.err());
            event.answer(verdict).map_err(other)?;
        }
        trouble.map_or(Ok(()), Err)
    }

    fn expect_content(
        &self,
        output: &Output,
        ranges: &[ByteRange],
        remedy: &str,
    ) -> Result<(), Problem> {
        let problem = if !output.status.success() {
            "a reader got an error"
        } else if ranges.is_empty() {
            "a reader was not made to wait for its bytes"
        } else if output.stdout != Self::content() {
            "a reader got other bytes than were written for it"
        } else {
            return Ok(());
        };
        let error = String::from_utf8_lossy(&output.stderr);
        let marks = self.group.info().map_or_else(|e| chain(&e), |info| format!("{info:?}"));
        let detail = format!("{} {} events: {ranges:?}, {marks}", output.status, error.trim_end());
        Err(Problem { detail, ..Problem::new(problem, remedy) })
    }
}

/// What can go wrong while events are answered.
#[derive(Debug)]
enum Trouble {
    Io(io::Error),
    NoRange,
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> Trouble {
    Trouble::Io(io::Error::other(error))
}

/// Writes the content of a range through an event's fd, which raises no event.
fn fill(fd: std::os::fd::BorrowedFd<'_>, range: ByteRange) -> io::Result<()> {
    let range = range.clamp(BLOCK as u64);
    let content = Lazy::content();
    let (start, end) = (range.offset() as usize, range.end() as usize);
    let file = std::fs::File::from(fd.try_clone_to_owned()?);
    file.write_all_at(content.get(start..end).unwrap_or_default(), range.offset())
}
