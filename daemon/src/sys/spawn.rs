//! Starting our own processes: with the file descriptors that they are to have at numbers that they
//! know, with nothing else of ours, and not outliving us.
//!
//! Not `std::process::Command`: it keeps a pipe of its own open in the child until exec, at a number
//! that could be one of those.

mod child;
mod fork;

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{OnceLock, mpsc};

pub use child::{Child, parent, signal};

/// The number of the first fd that a child is given; the others follow.
pub const FIRST_FD: i32 = 3;

/// What a process of ours does; its first argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Worker,
    Importer,
    Puller,
    Builder,
    UserNamespace,
    Doctor,
}

impl Role {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Importer => "importer",
            Self::Puller => "puller",
            Self::Builder => "builder",
            Self::UserNamespace => "user-namespace",
            Self::Doctor => "doctor",
        }
    }
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
#[error("start {program}: {step}")]
pub struct SpawnError {
    program: String,
    step: &'static str,
    #[source]
    source: io::Error,
}

impl SpawnError {
    /// For a caller that could not get as far as starting it.
    pub(crate) fn new(program: &Path, step: &'static str, source: io::Error) -> Self {
        Self { program: program.display().to_string(), step, source }
    }
}

/// A process to be started. Its environment is empty but for what is given, stdin and stdout are
/// `/dev/null`, its directory is `/`, its umask 022; it leads a session of its own (a ^C is for the
/// supervisor alone) and is killed with SIGKILL when we end (but see [`outlives_us`](Self::outlives_us)). Its soft limit of open files is the hard
/// one.
#[derive(Debug)]
pub struct Spawn {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    fds: Vec<OwnedFd>,
    stderr: Option<OwnedFd>,
    cgroup: Option<OwnedFd>,
    outlives_us: bool,
}

impl Spawn {
    /// Our own program, the very file that runs now even if it has been replaced, in a role.
    #[must_use]
    pub fn role(role: Role) -> Self {
        let own = Self::program(Path::new("/proc/self/exe"));
        #[cfg(test)]
        let own = STAND_IN.get().map_or_else(|| own, |stand_in| stand_in());
        own.argument(role.name())
    }

    /// Another program, by its path.
    #[must_use]
    pub fn program(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            fds: Vec::new(),
            stderr: None,
            cgroup: None,
            outlives_us: false,
        }
    }

    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    #[must_use]
    pub fn arguments(self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        arguments.into_iter().fold(self, Self::argument)
    }

    /// Sets one variable.
    #[must_use]
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Passes variables on that are set here.
    #[must_use]
    pub fn inherit(mut self, names: &[&str]) -> Self {
        for name in names {
            if let Some(value) = std::env::var_os(name) {
                self.environment.push(((*name).into(), value));
            }
        }
        self
    }

    /// The child's next fd: the first is 3, the next 4, and so on.
    #[must_use]
    pub fn fd(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.fds.push(fd.into());
        self
    }

    /// Where stderr goes, such as the writing end of a pipe; ours otherwise.
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(stderr.into());
        self
    }

    /// The control group that it is started in (its directory); ours otherwise, and where that can't be.
    #[must_use]
    pub fn cgroup(mut self, directory: impl Into<OwnedFd>) -> Self {
        self.cgroup = Some(directory.into());
        self
    }

    /// It goes on when we end, whatever ends us. (Dropping its [`Child`] still kills it.)
    #[must_use]
    pub fn outlives_us(mut self) -> Self {
        self.outlives_us = true;
        self
    }

    /// Starts it. When this returns, the program runs (exec has succeeded) and the fds that were given
    /// are closed here. Blocks for as long as that takes, about a millisecond.
    pub fn start(self) -> Result<Child, SpawnError> {
        let program = self.program.display().to_string();
        let failed = |step| {
            let program = program.clone();
            move |source| SpawnError { program, step, source }
        };
        let outlives_us = self.outlives_us;
        let plan = self.plan().map_err(failed("prepare"))?;
        if outlives_us {
            // it matters not which thread forks
            return plan.start().map_err(|(step, source)| failed(step)(source));
        }
        let (reply, answer) = mpsc::channel();
        let gone = |_| io::Error::other("the thread that starts processes is gone");
        spawner()
            .map_err(failed("start a thread"))?
            .send((plan, reply))
            .map_err(|_| gone(mpsc::RecvError))
            .and_then(|()| answer.recv().map_err(gone))
            .map_err(failed("start"))?
            .map_err(|(step, source)| failed(step)(source))
    }

    fn plan(self) -> io::Result<fork::Plan> {
        let text = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::from);
        let program = text(self.program.into())?;
        let mut arguments = vec![c"hydrantd".to_owned()];
        for argument in self.arguments {
            arguments.push(text(argument)?);
        }
        let mut environment = Vec::new();
        for (mut variable, value) in self.environment {
            variable.push("=");
            variable.push(value);
            environment.push(text(variable)?);
        }
        let signal = if self.outlives_us { 0 } else { libc::SIGKILL };
        let plan = fork::Plan::new(program, arguments, environment, self.fds, self.stderr, signal)?;
        Ok(plan.cgroup(self.cgroup))
    }
}

/// The fds that this process was started with, from [`FIRST_FD`] on. An error where one of them is not
/// open. To be called once, first thing: nothing else may hold these numbers by then.
pub fn inherited<const N: usize>() -> io::Result<[OwnedFd; N]> {
    let mut fds = Vec::with_capacity(N);
    for number in (FIRST_FD..).take(N) {
        // SAFETY: fcntl(2) on a number; where that is no open fd it says so.
        if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            let error = io::Error::last_os_error();
            return Err(io::Error::new(error.kind(), format!("file descriptor {number}: {error}")));
        }
        // SAFETY: it is open, and by this function's contract nobody else's.
        fds.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    <[OwnedFd; N]>::try_from(fds).map_err(|_| io::Error::other("file descriptors were lost"))
}

/// A program that stands in for ours, in a test program that has set it.
#[cfg(test)]
pub(crate) static STAND_IN: OnceLock<fn() -> Spawn> = OnceLock::new();

type Failure = (&'static str, io::Error);
type Job = (fork::Plan, mpsc::Sender<Result<Child, Failure>>);

/// The thread that starts all children. "Killed when the parent ends" means the parent *thread*
/// (`PR_SET_PDEATHSIG`), so that must be one that lives as long as the process; tokio's come and go.
fn spawner() -> io::Result<mpsc::Sender<Job>> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    if let Some(spawner) = SPAWNER.get() {
        return Ok(spawner.clone());
    }
    let (jobs, queue) = mpsc::channel::<Job>();
    std::thread::Builder::new().name("spawner".to_owned()).spawn(move || {
        for (plan, reply) in queue {
            // Nobody waits any more: the child is killed as it is dropped.
            let _ = reply.send(plan.start());
        }
    })?;
    // Two threads at once may come here; the one whose queue is not kept ends its thread by dropping it.
    Ok(SPAWNER.get_or_init(|| jobs).clone())
}

#[cfg(test)]
mod tests;
