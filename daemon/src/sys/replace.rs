//! Becoming another program, or a newer version of the same, in the same process (execve(2)).

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, execve};

use super::fdstore;

/// How long our children may take to end once they are killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where this program is installed: what is there may be a newer one by the time it is asked for. To be
/// called first as early as can be, as the kernel forgets a file that has been replaced.
pub fn installed_program() -> io::Result<&'static Path> {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let program = without_mark(std::env::current_exe()?);
    Ok(PROGRAM.get_or_init(|| program))
}

/// The kernel's mark of a file that has no name any more (`fs/d_path.c`).
fn without_mark(path: PathBuf) -> PathBuf {
    match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(path) => OsStr::from_bytes(path).into(),
        None => path,
    }
}

/// What tells a supervisor to end. Each is kept back from the very start until there is somebody who
/// takes it: any of them would just end the process before, and the service manager would take that for
/// what it asked for.
fn orders() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

/// Keeps orders back, in this thread and those that it starts.
pub fn hold_orders() -> io::Result<()> {
    Ok(orders().thread_block()?)
}

/// Lets this thread take what was kept back.
pub fn take_orders() -> io::Result<()> {
    Ok(orders().thread_unblock()?)
}

/// Becomes `program`, with our environment and what the service manager has given us; it gets `fds` from
/// [`fdstore::take`]. All our children are killed. Returns only if that fails.
pub fn replace(program: &Path, arguments: &[OsString], fds: Vec<(String, OwnedFd)>) -> io::Error {
    match try_replace(program, arguments, fds) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_replace(
    program: &Path,
    arguments: &[OsString],
    fds: Vec<(String, OwnedFd)>,
) -> io::Result<std::convert::Infallible> {
    hold_orders()?;
    end_children();
    let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
    let arguments =
        [program.as_os_str()].into_iter().chain(arguments.iter().map(OsString::as_os_str));
    let arguments = arguments.map(text).collect::<io::Result<Vec<_>>>()?;
    let mut environment = Vec::new();
    for (mut name, value) in std::env::vars_os().chain(fdstore::variables_for_successor(fds)?) {
        name.push("=");
        name.push(value);
        environment.push(CString::new(name.into_vec())?);
    }
    Ok(execve(&text(program.as_os_str())?, &arguments, &environment)?)
}

/// Who comes after us does not know them and would never wait for them.
fn end_children() {
    let end = Instant::now() + PATIENCE;
    loop {
        for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(task.path().join("children"));
            for pid in children.unwrap_or_default().split_whitespace() {
                if let Ok(pid) = pid.parse() {
                    // ours, and not waited for: nobody else can have the number
                    kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
                }
            }
        }
        let waited = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG));
        match waited {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(1)),
            Ok(_) => {}
            Err(_) => return,
        }
        if Instant::now() > end {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_program_that_was_replaced() {
        assert_eq!(without_mark("/usr/sbin/h (deleted)".into()), Path::new("/usr/sbin/h"));
        assert_eq!(without_mark("/usr/sbin/h".into()), Path::new("/usr/sbin/h"));
        let installed = installed_program().unwrap();
        assert_eq!(installed, without_mark(std::env::current_exe().unwrap()));
    }
}
