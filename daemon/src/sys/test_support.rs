//! What tests elsewhere need of unsafe code and of processes.

use std::io;

/// Runs `action` in a fork of this process, which has one thread, and ends this process as that one
/// ends. For a process that was started for nothing else.
pub fn in_single_thread(action: impl FnOnce() -> i32) -> ! {
    // SAFETY: the other threads of a test program that was started for one test wait for it; glibc's
    // allocator works in the child of a process with threads.
    match unsafe { libc::fork() } {
        0 => std::process::exit(action()),
        pid => {
            assert!(pid > 0, "fork: {}", io::Error::last_os_error());
            let mut status = 0;
            // SAFETY: our child; `status` outlives the call.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            if libc::WIFSIGNALED(status) {
                let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                // SAFETY: plain numbers and a structure that outlives the call.
                unsafe {
                    libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
                    libc::signal(libc::WTERMSIG(status), libc::SIG_DFL);
                    libc::raise(libc::WTERMSIG(status));
                }
            }
            std::process::exit(libc::WEXITSTATUS(status))
        }
    }
}

/// A system call with zeros for arguments.
pub fn call(number: libc::c_long) -> io::Result<()> {
    // SAFETY: no call that is tried here does harm with null pointers and zeros.
    match unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// socket(2); it is closed again.
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    match unsafe { libc::socket(family, kind, protocol) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: just made here.
        fd => unsafe { libc::close(fd) }.eq(&0).then_some(()).ok_or_else(io::Error::last_os_error),
    }
}

/// Whether a process runs: one that has ended, and that nobody has waited for, does not.
pub fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|state| !state.starts_with('Z')))
}
