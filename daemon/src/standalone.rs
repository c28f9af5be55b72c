//! `hydrantd --standalone`: the parent of a supervisor that no service manager has started.
//!
//! It is what a service manager is to the supervisor, and nothing else: it starts it, keeps the file
//! descriptors that it is given (sd_notify(3), `FDSTORE=1`) and, should the supervisor die, starts the
//! next one, which gets them back (sd_listen_fds(3)). So the fanotify groups live on, and readers
//! wait for the next supervisor instead of getting zeros. It is one thread, touches no tree and has
//! little that could go wrong. If it is killed all the same, the supervisor leaves everything to the next one, which is
//! started by the process that it is itself: that is the parent from then on. If both are killed at the same moment,
//! that is the [`keeper`].

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tracing::{error, info, warn};

use crate::sys::notify::{Listener, Notification};
use crate::sys::spawn::{Child, Spawn, SpawnError};
use keeper::Keeper;

pub mod keeper;

/// More than a supervisor with as many shards as there can be has to keep.
const MAX_KEPT: usize = 512;

/// A supervisor that served for so long was all right.
const SOUND: Duration = Duration::from_millis(100);
/// How long to wait after one that was not, at first and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(5));

/// How often a guard looks whether it is needed.
const LOOK: Duration = Duration::from_millis(500);

/// Why there can be no supervisor.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    #[error("can't prepare to {0}")]
    Prepare(&'static str, #[source] io::Error),
    #[error(transparent)]
    Start(#[from] SpawnError),
    #[error("can't wait for the supervisor")]
    Wait(#[source] io::Error),
}

/// Which programs can be the supervisor.
#[derive(Debug, Clone, Copy)]
pub struct Programs<'a> {
    /// The one that is installed, which may be newer than this one.
    pub installed: &'a Path,
    /// This very one. Its turn comes when the other ends before it serves.
    pub own: &'a Path,
}

/// Runs a program as the supervisor, again and again until it ends by itself, with our environment and
/// the variables of the protocol. `kept`: what one before us has left for it. `keeper`: the arguments of our own program
/// that make it a [`keeper`], if there is to be one. Gives the exit code to end with.
///
/// # Errors
/// Only as long as nothing is kept: after that it goes on trying.
pub fn run(
    programs: Programs<'_>,
    arguments: &[OsString],
    keeper: Option<&[OsString]>,
    mut kept: Vec<(String, OwnedFd)>,
) -> Result<u8, StandaloneError> {
    // of a parent before us
    let former = kept.extract_if(.., |(name, _)| name == keeper::LIFELINE);
    let former: Vec<_> = former.map(|(_, lifeline)| lifeline).collect();
    let mut turns = kept.extract_if(.., |(name, _)| name == keeper::TURN);
    let turn = turns.next().map(|(_, turn)| turn);
    drop(turns);
    let mut parent = Parent::new(kept, false)?;
    match keeper.map(|arguments| Keeper::new(programs.own, arguments, turn)).transpose() {
        Ok(keeper) => parent.keeper = keeper,
        // readers wait: there must be a parent all the same
        Err(error) => error!(%error, "there will be no keeper"),
    }
    if let Some(keeper) = &mut parent.keeper {
        keeper.tend(&parent.kept);
    }
    former.iter().for_each(keeper::dismiss);
    // not closed here, which would say to one that has not heard us that we are gone
    parent.former = former;
    parent.run(programs, arguments)
}

/// Guards what a supervisor left when systemd told it to restart, until the next one has it and kills us.
/// Should systemd have changed its mind, there is one more supervisor, of our own, which unmounts
/// everything. `is_awaited` asks whether another one is still to come.
pub fn guard(
    program: &Path,
    arguments: &[OsString],
    kept: Vec<(String, OwnedFd)>,
    mut is_awaited: impl FnMut() -> bool,
) -> Result<u8, StandaloneError> {
    while is_awaited() {
        std::thread::sleep(LOOK);
    }
    warn!("the service has stopped in the middle of a restart: unmounting what it left");
    let programs = Programs { installed: program, own: program };
    Parent::new(kept, true)?.run(programs, arguments)
}

/// The signals that tell to stop, from here on.
fn take_signals() -> Result<SignalFd, StandaloneError> {
    let stop_signals: SigSet =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    stop_signals
        .thread_block()
        .and_then(|()| {
            SignalFd::with_flags(&stop_signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        })
        .map_err(|errno| StandaloneError::Prepare("take signals", errno.into()))
}

fn longer(delay: Duration) -> Duration {
    (delay * 2).clamp(BACK_OFF.0, BACK_OFF.1)
}

/// As a shell has it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[derive(Debug)]
struct Parent {
    listener: Listener,
    signals: SignalFd,
    kept: Vec<(String, OwnedFd)>,
    keeper: Option<Keeper>,
    /// Lifelines of those that were dismissed.
    former: Vec<OwnedFd>,
    told_to_stop: bool,
}

impl Parent {
    fn new(kept: Vec<(String, OwnedFd)>, told_to_stop: bool) -> Result<Self, StandaloneError> {
        let signals = take_signals()?;
        let listener = Listener::bind()
            .map_err(|error| StandaloneError::Prepare("take notifications", error))?;
        Ok(Self { listener, signals, kept, keeper: None, former: Vec::new(), told_to_stop })
    }

    fn run(
        mut self,
        programs: Programs<'_>,
        arguments: &[OsString],
    ) -> Result<u8, StandaloneError> {
        let mut delay = Duration::ZERO;
        let (mut program, mut other) = (programs.installed, programs.own);
        loop {
            let mut supervisor = match self.start(program, arguments) {
                Ok(supervisor) => supervisor,
                Err(error) if self.kept.is_empty() => return Err(error.into()),
                Err(error) => {
                    error!(error = &error as &dyn std::error::Error, "can't start the supervisor");
                    delay = longer(delay);
                    std::mem::swap(&mut program, &mut other);
                    self.pause(delay);
                    continue;
                }
            };
            let (status, served) = self.attend(&mut supervisor)?;
            if status.success() || self.kept.is_empty() {
                return Ok(exit_code(status));
            }
            if served.is_none() {
                std::mem::swap(&mut program, &mut other);
            }
            delay = if served.is_some_and(|served| served >= SOUND) {
                Duration::ZERO
            } else {
                longer(delay)
            };
            warn!(pid = supervisor.id(), end = %status, delay_ms = delay.as_millis() as u64,
                "the supervisor ended: starting the next");
            self.pause(delay);
        }
    }

    fn start(&self, program: &Path, arguments: &[OsString]) -> Result<Child, SpawnError> {
        let kept = self.kept.iter().map(|(name, fd)| (name.as_str(), fd.as_fd()));
        let held = self.keeper.iter().flat_map(Keeper::for_supervisor);
        let fds: Vec<_> = kept.chain(held).collect();
        let mut spawn = child(program, arguments)
            .variable("NOTIFY_SOCKET", self.listener.address())
            .variable("LISTEN_FDS", fds.len().to_string());
        // `LISTEN_PID` is missing: it can't be known before the fork
        let names: Vec<_> = fds.iter().map(|(name, _)| *name).collect();
        spawn = spawn.variable("LISTEN_FDNAMES", names.join(":"));
        for (_, fd) in fds {
            match fd.try_clone_to_owned() {
                Ok(fd) => spawn = spawn.fd(fd),
                Err(source) => {
                    return Err(SpawnError::new(program, "pass file descriptors", source));
                }
            }
        }
        spawn.start()
    }

    /// Does what the supervisor says until it ends. Gives its end, and how long it served if it
    /// ever did.
    fn attend(
        &mut self,
        supervisor: &mut Child,
    ) -> Result<(ExitStatus, Option<Duration>), StandaloneError> {
        let mut ready: Option<Instant> = None;
        let mut told = false;
        loop {
            // its last words are in the socket when it has ended
            let ended = supervisor.try_wait().map_err(StandaloneError::Wait)?;
            self.take_signals();
            while let Some(notification) = self.notification() {
                self.notified(notification, supervisor.id(), &mut ready);
            }
            if let Some(status) = ended {
                return Ok((status, ready.map(|ready| ready.elapsed())));
            }
            // Before it serves, a signal would just kill it. If it has left nothing with us, let it.
            if self.told_to_stop && !told && (ready.is_some() || self.kept.is_empty()) {
                told = true;
                if let Err(error) = supervisor.signal(Signal::SIGTERM) {
                    error!(%error, "can't tell the supervisor to stop");
                }
            }
            let again = self.keeper.as_mut().and_then(|keeper| keeper.tend(&self.kept));
            let fds = [self.listener.as_fd(), self.signals.as_fd(), supervisor.as_fd()];
            let keeper = self.keeper.as_ref().and_then(Keeper::process);
            let fds = fds.into_iter().chain(keeper);
            let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            let timeout = again.map_or(PollTimeout::NONE, |after| {
                PollTimeout::try_from(after).unwrap_or(PollTimeout::MAX)
            });
            wait(&mut fds, timeout).map_err(StandaloneError::Wait)?;
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            info!(signal = signal.ssi_signo, "told to stop");
            self.told_to_stop = true;
        }
    }

    fn notification(&self) -> Option<Notification> {
        match self.listener.receive() {
            Ok(notification) => notification,
            Err(error) => {
                error!(%error, "can't take a notification");
                None
            }
        }
    }

    fn notified(&mut self, notification: Notification, child: i32, ready: &mut Option<Instant>) {
        let Notification { pid, uid, text, fds } = notification;
        if pid != child && uid != 0 {
            warn!(pid, uid, "a notification from somebody else");
            return;
        }
        let has = |line| text.lines().any(|other| other == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        if has("READY=1") {
            ready.get_or_insert_with(Instant::now);
            if let Some(keeper) = &mut self.keeper {
                keeper.is_known(has(keeper::KNOWN));
            }
        }
        if has("FDSTOREREMOVE=1") {
            self.kept.retain(|(kept, _)| kept != name);
            if let Some(keeper) = &mut self.keeper {
                keeper.forget(name);
            }
        } else if has("FDSTORE=1") {
            // names are joined by colons
            let is_name = !name.is_empty() && name.len() <= 255;
            if !is_name || name.contains(|c: char| c == ':' || !c.is_ascii_graphic()) {
                warn!(pid, name, "file descriptors with no proper name: not kept");
            } else if self.kept.len() + fds.len() > MAX_KEPT {
                warn!(pid, name, "too many file descriptors: not kept");
            } else {
                for fd in fds {
                    if let Some(keeper) = &mut self.keeper {
                        keeper.keep(name, fd.as_fd());
                    }
                    self.kept.push((name.to_owned(), fd));
                }
            }
        }
    }

    /// Waits, but not when told to stop: then the next supervisor is to see to that.
    fn pause(&mut self, delay: Duration) {
        let end = Instant::now() + delay;
        while !self.told_to_stop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            if let Err(error) = wait(&mut fds, timeout) {
                error!(%error, "can't wait");
                std::thread::sleep(left);
            }
            self.take_signals();
        }
        // a supervisor that does not get far must not be started in a tight loop
        std::thread::sleep(delay.min(BACK_OFF.0));
    }
}

/// A child of ours, with our environment but for what the service manager's protocol says.
fn child(program: &Path, arguments: &[OsString]) -> Spawn {
    let of_protocol = |name: &OsString| {
        let name = name.to_string_lossy();
        name == "NOTIFY_SOCKET" || name.starts_with("LISTEN_")
    };
    std::env::vars_os()
        .filter(|(name, _)| !of_protocol(name))
        .fold(Spawn::program(program).outlives_us().arguments(arguments), |spawn, (name, value)| {
            spawn.variable(name, value)
        })
}

fn wait(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<()> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests;
