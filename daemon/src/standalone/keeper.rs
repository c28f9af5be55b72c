//! The keeper: a process that has what the [parent](super) keeps as well, and does nothing else. When parent and
//! supervisor are both killed, even at the same moment, it becomes the parent of the next supervisor.
//!
//! It can't know of itself that both are gone: the process that is the supervisor becomes the parent when that is killed,
//! and there must never be two. So both hold the same end of a socket, the *lifeline*, and what the keeper sees at its
//! own end is the end of the last of them. Nobody else ever holds it.
//!
//! Where a supervisor becomes the parent, there are two keepers for a moment: its own new one, and the one that it then
//! dismisses. Should it be killed in between, it is the turn of one of them only: who takes the byte out of a pipe that
//! both have.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use tracing::{info, warn};

use super::{StandaloneError, child, take_signals, wait};
use crate::sys::seqpacket::{self, Received};
use crate::sys::spawn::Child;

/// The name of the lifeline among the fds that a supervisor gets, and leaves.
pub const LIFELINE: &str = "lifeline";

/// What a supervisor says of itself, with `READY=1`, that holds on to its lifeline. An older one does not: a keeper would
/// take its place while it lives.
pub const KNOWN: &str = "X_HYDRANT_LIFELINE=1";

/// The name of the pipe with one byte in it, for one of the keepers.
pub const TURN: &str = "turn";

/// No keeper is started sooner after the one before.
const PAUSE: Duration = Duration::from_secs(1);

/// Messages to the keeper: `keep NAME` with an fd, `forget NAME`, and this.
const DISMISSED: &[u8] = b"dismissed";

/// The longest message.
const MAX_MESSAGE: usize = 512;

/// The parent's side: sees to it that there always is a keeper, which has all that the parent has.
#[derive(Debug)]
pub(super) struct Keeper {
    program: PathBuf,
    arguments: Vec<OsString>,
    lifeline: OwnedFd,
    other_end: OwnedFd,
    turn: OwnedFd,
    process: Option<Child>,
    /// The supervisor that serves holds on to the lifeline.
    known: bool,
    not_before: Option<Instant>,
}

impl Keeper {
    /// `turn`: of a parent before this one.
    pub(super) fn new(
        program: &Path,
        arguments: &[OsString],
        turn: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let (lifeline, other_end) = seqpacket::pair()?;
        let turn = turn.map_or_else(self::turn, Ok)?;
        Ok(Self {
            program: program.to_owned(),
            arguments: arguments.to_vec(),
            lifeline,
            other_end,
            turn,
            process: None,
            known: true,
            not_before: None,
        })
    }

    /// What a supervisor is to hold for life, by name.
    pub(super) fn for_supervisor(&self) -> [(&str, BorrowedFd<'_>); 2] {
        [(LIFELINE, self.lifeline.as_fd()), (TURN, self.turn.as_fd())]
    }

    /// Its pidfd, if it runs.
    pub(super) fn process(&self) -> Option<BorrowedFd<'_>> {
        self.process.as_ref().map(AsFd::as_fd)
    }

    /// What the supervisor says when it is ready.
    pub(super) fn is_known(&mut self, known: bool) {
        self.known = known;
        if !known {
            self.end();
        }
    }

    /// Starts one where there is none. Gives the time after which to call this again.
    pub(super) fn tend(&mut self, kept: &[(String, OwnedFd)]) -> Option<Duration> {
        if let Some(process) = &mut self.process {
            match process.try_wait() {
                Ok(None) => return None,
                Ok(Some(status)) => info!(end = %status, "the keeper has ended"),
                Err(error) => warn!(%error, "can't wait for the keeper"),
            }
            self.process = None;
        }
        if !self.known {
            return None;
        }
        let now = Instant::now();
        if let Some(left) = self.not_before.and_then(|time| time.checked_duration_since(now)) {
            return Some(left);
        }
        self.not_before = Some(now + PAUSE);
        if let Err(error) = self.start(kept) {
            warn!(
                error = &error as &dyn std::error::Error,
                "there is no keeper: if this process and the \
                supervisor are killed at the same moment, readers get zeros"
            );
            return Some(PAUSE);
        }
        None
    }

    fn start(&mut self, kept: &[(String, OwnedFd)]) -> Result<(), StandaloneError> {
        let failed = |error| StandaloneError::Prepare("have a keeper", error);
        // what the one before has not read
        let mut buffer = [0; MAX_MESSAGE];
        while let Ok(Some(_)) = seqpacket::receive(self.other_end.as_fd(), &mut buffer) {}
        // from its first moment on it has everything
        self.send(&keep_message(TURN), &[self.turn.as_fd()]).map_err(failed)?;
        for (name, fd) in kept {
            self.send(&keep_message(name), &[fd.as_fd()]).map_err(failed)?;
        }
        let end = self.other_end.try_clone().map_err(failed)?;
        self.process = Some(child(&self.program, &self.arguments).fd(end).start()?);
        Ok(())
    }

    /// Has it keep a copy of an fd.
    pub(super) fn keep(&mut self, name: &str, fd: BorrowedFd<'_>) {
        self.tell(&keep_message(name), &[fd]);
    }

    /// Has it close what it keeps by a name.
    pub(super) fn forget(&mut self, name: &str) {
        self.tell(&format!("forget {name}"), &[]);
    }

    fn tell(&mut self, message: &str, fds: &[BorrowedFd<'_>]) {
        // one that is started gets everything
        if self.process.is_some()
            && let Err(error) = self.send(message, fds)
        {
            warn!(%error, "the keeper takes no messages: there will be another");
            self.end();
        }
    }

    fn send(&self, message: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        seqpacket::send(self.lifeline.as_fd(), message.as_bytes(), fds)
    }

    /// Kills it. Once it has ended, nobody takes the next one's messages.
    fn end(&self) {
        if let Some(Err(error)) = self.process.as_ref().map(Child::kill) {
            warn!(%error, "can't end the keeper");
        }
    }
}

fn keep_message(name: &str) -> String {
    format!("keep {name}")
}

/// A pipe with one byte in it.
pub(super) fn turn() -> io::Result<OwnedFd> {
    let (out, into) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    nix::unistd::write(&into, &[0])?;
    Ok(out)
}

/// Whether no other keeper has taken the parent's place. Who was given no pipe has nobody beside it.
pub(super) fn is_our_turn(kept: &mut Vec<(String, OwnedFd)>) -> bool {
    let turns: Vec<_> = kept.extract_if(.., |(name, _)| name == TURN).collect();
    turns.iter().all(|(_, turn)| matches!(nix::unistd::read(turn, &mut [0]), Ok(1)))
}

/// Tells a keeper that another one has taken its place.
pub(super) fn dismiss(lifeline: &OwnedFd) {
    if let Err(error) = seqpacket::send(lifeline.as_fd(), DISMISSED, &[])
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        warn!(%error, "can't dismiss the keeper of the parent before");
    }
}

/// The keeper's life. Gives what its parent is to keep from now on: nothing if it is not needed any more.
/// `socket`: the other end of the lifeline.
pub fn run(socket: &OwnedFd) -> Result<Vec<(String, OwnedFd)>, StandaloneError> {
    // a ^C is for the parent
    let signals = take_signals()?;
    let mut kept: Vec<(String, OwnedFd)> = Vec::new();
    let mut buffer = [0; MAX_MESSAGE];
    loop {
        match seqpacket::receive(socket.as_fd(), &mut buffer) {
            Ok(Some(Received { length, fds })) => {
                let message = buffer.get(..length).unwrap_or_default();
                if message == DISMISSED {
                    return Ok(Vec::new());
                }
                match String::from_utf8_lossy(message).split_once(' ') {
                    Some(("keep", name)) => {
                        kept.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
                    }
                    Some(("forget", name)) => kept.retain(|(kept, _)| kept != name),
                    _ => warn!("a message that no parent sends"),
                }
                continue;
            }
            Ok(None) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(StandaloneError::Wait(error)),
        }
        let mut fds =
            [socket.as_fd(), signals.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        wait(&mut fds, PollTimeout::NONE).map_err(StandaloneError::Wait)?;
        while let Ok(Some(_)) = signals.read_signal() {
            info!("a signal: the keeper ends with its parent");
        }
    }
    if !is_our_turn(&mut kept) {
        kept.clear();
    }
    if !kept.is_empty() {
        warn!("parent and supervisor have both been killed: this process takes the parent's place");
    }
    Ok(kept)
}
