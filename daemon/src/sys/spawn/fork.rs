//! fork(2) and exec(2). Between the two only async-signal-safe calls are made (signal-safety(7)) and
//! nothing is allocated: all that the child needs is in the [`Plan`].

use std::convert::Infallible;
use std::ffi::{CString, c_char, c_int, c_uint};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;

use super::{Child, FIRST_FD, Failure};

/// What the child is to become.
#[derive(Debug)]
pub struct Plan {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    fds: Vec<OwnedFd>,
    stderr: Option<OwnedFd>,
    null: OwnedFd,
    cgroup: Option<OwnedFd>,
    /// What the child gets when the thread that forked it ends; 0 for nothing.
    death_signal: c_int,
}

/// The steps that can fail in the child, as reported through the pipe: the index, then the errno.
const STEPS: [&str; 6] = [
    "make a session",
    "die with the parent",
    "set up file descriptors",
    "set limits",
    "change directory",
    "exec",
];
/// In place of an index: it is not in its control group, and goes on.
const NOT_IN_CGROUP: u8 = u8::MAX;

impl Plan {
    pub fn new(
        program: CString,
        arguments: Vec<CString>,
        environment: Vec<CString>,
        fds: Vec<OwnedFd>,
        stderr: Option<OwnedFd>,
        death_signal: c_int,
    ) -> io::Result<Self> {
        let null = File::options().read(true).write(true).open("/dev/null")?.into();
        let cgroup = None;
        Ok(Self { program, arguments, environment, fds, stderr, null, cgroup, death_signal })
    }

    /// With the directory of the control group to start it in.
    pub fn cgroup(self, cgroup: Option<OwnedFd>) -> Self {
        Self { cgroup, ..self }
    }

    /// Forks, and waits until the child has exec'd or failed to.
    pub fn start(self) -> Result<Child, Failure> {
        let (reader, writer) = io::pipe().map_err(|error| ("make a pipe", error))?;
        let pointers = |texts: &[CString]| -> Vec<*const c_char> {
            texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
        };
        let arguments = pointers(&self.arguments);
        let environment = pointers(&self.environment);
        let raw: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut prepared = Prepared {
            plan: &self,
            arguments: &arguments,
            environment: &environment,
            fds: &raw,
            parent: std::process::id() as c_int,
            join: None,
        };
        let mut moved = vec![-1; raw.len()];

        // SAFETY: the child only runs `Prepared::run`, which keeps to async-signal-safe calls and never
        // returns.
        let mut pid = self.cgroup.as_ref().map_or(-1, |cgroup| unsafe { fork_into(cgroup) });
        if pid < 0 {
            prepared.join = self.cgroup.as_ref();
            // SAFETY: as above.
            pid = unsafe { libc::fork() };
        }
        match pid {
            -1 => return Err(("fork", io::Error::last_os_error())),
            0 => {
                // SAFETY: this is the child right after fork.
                unsafe { prepared.run(&mut moved, writer.as_raw_fd()) }
            }
            _ => {}
        }
        drop(writer);
        drop(self);
        // From here on the child is killed if it is not handed on.
        let child = Child::new(pid).map_err(|error| ("open a pidfd", error))?;
        let mut report = [0; 8];
        let mut reader = reader;
        loop {
            match reader.read_exact(&mut report) {
                // Closed by exec without a word.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(child),
                Err(error) => return Err(("hear from the child", error)),
                Ok(()) => {}
            }
            let [a, _, _, _, e, f, g, h] = report;
            let error = io::Error::from_raw_os_error(i32::from_ne_bytes([e, f, g, h]));
            if a != NOT_IN_CGROUP {
                let step = STEPS.get(usize::from(a)).copied().unwrap_or("start");
                return Err((step, error));
            }
            tracing::warn!(%error, "can't start a process in its cgroup: it runs without");
        }
    }
}

/// fork(2), but the child is in a control group from the start (clone3(2)). To move there later, as the child does where
/// this fails, has the kernel wait for all its processors. (systemd's `RestrictNamespaces=` makes it fail: a seccomp
/// filter can't see whether clone3 is to make namespaces.)
///
/// # Safety
///
/// As for fork(2) in a program with threads: the child keeps to async-signal-safe calls. Unlike after fork(2), the
/// C library knows nothing of it, and what it remembers of the thread is its parent's.
unsafe fn fork_into(cgroup: &OwnedFd) -> c_int {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    /// `struct clone_args` of `include/uapi/linux/sched.h`, its second version's end.
    #[repr(C)]
    #[derive(Default)]
    struct CloneArgs {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    let arguments = CloneArgs {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: the kernel reads as much of the arguments as their size says; without CLONE_VM the child has a copy of
    // all memory and of this stack, as after fork(2).
    unsafe {
        libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) as c_int
    }
}

/// All that the child needs, allocated before the fork.
struct Prepared<'a> {
    plan: &'a Plan,
    arguments: &'a [*const c_char],
    environment: &'a [*const c_char],
    fds: &'a [RawFd],
    parent: c_int,
    /// The control group that the child is to move to.
    join: Option<&'a OwnedFd>,
}

impl Prepared<'_> {
    /// The child's life before exec.
    ///
    /// # Safety
    ///
    /// Only in the child, right after fork. `moved` is as long as `fds`.
    unsafe fn run(&self, moved: &mut [RawFd], report: RawFd) -> ! {
        let mut report = report;
        // SAFETY: as for this function.
        let (step, errno) = match unsafe { self.try_run(moved, &mut report) } {
            Ok(never) => match never {},
            Err(step) => (step, nix::errno::Errno::last_raw()),
        };
        // SAFETY: as for this function; it ends this process without running anything of the parent's.
        unsafe {
            tell(report, step, errno);
            libc::_exit(127)
        }
    }

    /// # Safety
    ///
    /// As for [`Self::run`]. `Err` is an index into `STEPS`, with errno set.
    unsafe fn try_run(&self, moved: &mut [RawFd], report: &mut RawFd) -> Result<Infallible, u8> {
        // SAFETY: async-signal-safe system calls on plain numbers, and pointers into what the caller
        // has prepared and holds.
        unsafe {
            // Handlers of ours are gone with exec; masks and ignored signals are not.
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);

            check(libc::setsid(), 0)?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, self.plan.death_signal), 1)?;
            if self.plan.death_signal != 0 && libc::getppid() != self.parent {
                // It ended before it was asked to tell us.
                libc::_exit(127);
            }

            if let Some(cgroup) = self.join
                && !join(cgroup)
            {
                tell(*report, NOT_IN_CGROUP, nix::errno::Errno::last_raw());
            }

            // First out of the way of the numbers that are wanted, then onto them.
            let free = FIRST_FD + self.fds.len() as c_int;
            let away = |fd: RawFd| check(libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, free), 2);
            *report = away(*report)?;
            let null = away(self.plan.null.as_raw_fd())?;
            let stderr = self.plan.stderr.as_ref().map_or(2, AsRawFd::as_raw_fd);
            let stderr = away(stderr)?;
            for (moved, fd) in moved.iter_mut().zip(self.fds) {
                *moved = away(*fd)?;
            }
            check(libc::dup2(null, 0), 2)?;
            check(libc::dup2(null, 1), 2)?;
            check(libc::dup2(stderr, 2), 2)?;
            for (number, fd) in (FIRST_FD..).zip(moved.iter()) {
                check(libc::dup2(*fd, number), 2)?;
            }
            check(
                libc::syscall(
                    libc::SYS_close_range,
                    free as c_uint,
                    c_uint::MAX,
                    libc::CLOSE_RANGE_CLOEXEC,
                ) as c_int,
                2,
            )?;

            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 3)?;
            limit.rlim_cur = limit.rlim_max;
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 3)?;

            libc::umask(0o022);
            check(libc::chdir(c"/".as_ptr()), 4)?;
            libc::execve(
                self.plan.program.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
            );
        }
        Err(5)
    }
}

/// Moves this process to a control group. `false` with errno set: it is where it was.
///
/// # Safety
///
/// Makes async-signal-safe system calls alone.
unsafe fn join(cgroup: &OwnedFd) -> bool {
    // SAFETY: the name ends with a NUL byte, one byte is read of a live text, and the fd is our own.
    unsafe {
        let flags = libc::O_WRONLY | libc::O_CLOEXEC;
        let processes = libc::openat(cgroup.as_raw_fd(), c"cgroup.procs".as_ptr(), flags);
        // "0" is who writes it
        processes >= 0 && {
            let moved = libc::write(processes, c"0".as_ptr().cast(), 1) == 1;
            let errno = nix::errno::Errno::last();
            libc::close(processes);
            errno.set();
            moved
        }
    }
}

/// Writes to the parent's pipe.
///
/// # Safety
///
/// Makes async-signal-safe system calls alone.
unsafe fn tell(report: RawFd, step: u8, errno: c_int) {
    let mut message = [0; 8];
    message[0] = step;
    message[4..].copy_from_slice(&errno.to_ne_bytes());
    // SAFETY: writes 8 bytes of a live array.
    unsafe { libc::write(report, message.as_ptr().cast(), message.len()) };
}

fn check(result: c_int, step: u8) -> Result<c_int, u8> {
    if result < 0 { Err(step) } else { Ok(result) }
}
