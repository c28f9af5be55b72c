//! Running a program (git) as the user who asked.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::signal::SigSet;
use nix::unistd::{Gid, Uid};

/// A user as the system's user database has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// All groups, `gid` among them.
    pub groups: Vec<u32>,
    /// None for a uid that has no entry.
    pub name: Option<String>,
    pub home: PathBuf,
}

impl User {
    /// Looks a user up, as initgroups(3) would. A uid that is in no database has no groups but `gid`,
    /// and `/` for a home.
    pub fn lookup(uid: u32, gid: u32) -> io::Result<Self> {
        let Some(entry) = nix::unistd::User::from_uid(Uid::from_raw(uid))? else {
            return Ok(Self { uid, gid, groups: vec![gid], name: None, home: "/".into() });
        };
        let name = CString::new(entry.name.clone())?;
        let groups = nix::unistd::getgrouplist(&name, Gid::from_raw(gid))?;
        let groups = groups.into_iter().map(Gid::as_raw).collect();
        Ok(Self { uid, gid, groups, name: Some(entry.name), home: entry.dir })
    }
}

/// How many files a user's program may have open at once: what programs expect, some still use
/// select(2).
const OPEN_FILES: u64 = 1024;

/// A command that runs as `user`, in a session of its own (so that nothing asks on a terminal of ours),
/// with umask 022. Its environment is `HOME`, `USER`, `LOGNAME`, `PATH` and what is given, which has
/// the last word. `directory` is where it runs: it is entered before privileges are dropped, so the
/// user needs no access to the directories above it. Its streams are as tokio's `Command` has them.
///
/// Where we are not root, that is only possible for ourselves.
pub fn command(
    program: impl AsRef<OsStr>,
    user: &User,
    environment: &[(OsString, OsString)],
    directory: OwnedFd,
) -> io::Result<tokio::process::Command> {
    let root = Uid::effective().is_root();
    if !root && user.uid != Uid::effective().as_raw() {
        let message = format!("only root can run a program as uid {}", user.uid);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    let mut command = tokio::process::Command::new(program);
    command.env_clear();
    command.env("HOME", &user.home);
    if let Some(name) = &user.name {
        command.env("USER", name).env("LOGNAME", name);
    }
    command.env("PATH", "/usr/local/bin:/usr/bin:/bin");
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.kill_on_drop(true);

    let (uid, gid, groups) = (user.uid, user.gid, user.groups.clone());
    let hard = super::limits::open_files()?.hard;
    let files = libc::rlimit { rlim_cur: OPEN_FILES.min(hard), rlim_max: hard };
    let none = SigSet::empty();
    let none = *none.as_ref();
    let become_user = move || {
        // SAFETY: async-signal-safe system calls on plain numbers, and pointers into what the closure
        // owns; it allocates nothing.
        unsafe {
            check(libc::setsid())?;
            // the daemon takes its signals from a file descriptor; a program has to be told to end
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
            libc::umask(0o022);
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files))?;
            check(libc::fchdir(directory.as_raw_fd()))?;
            if root {
                // In this order: each needs what the next takes away.
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setresgid(gid, gid, gid))?;
                check(libc::setresuid(uid, uid, uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure keeps to what is allowed between fork and exec, as said there.
    unsafe { command.pre_exec(become_user) };
    Ok(command)
}

/// Has a [`command`] told to end (SIGTERM) with the thread that starts it (`PR_SET_PDEATHSIG`), which must be one
/// that lives as long as we do, as those of tokio that run tasks.
pub fn end_with_us(command: &mut tokio::process::Command) {
    let parent = nix::unistd::getpid().as_raw();
    let ask = move || {
        // SAFETY: async-signal-safe system calls on plain numbers.
        unsafe {
            // up to exec a handler of ours would take it, and to no end
            if libc::signal(libc::SIGTERM, libc::SIG_DFL) == libc::SIG_ERR {
                return Err(io::Error::last_os_error());
            }
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM))?;
            // it may have ended before it was asked to tell us
            if libc::getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
        }
    };
    // After the one of `command`: a change of user takes the setting back.
    // SAFETY: the closure makes async-signal-safe calls only.
    unsafe { command.pre_exec(ask) };
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    use tokio::signal::unix::SignalKind;

    use super::*;
    use crate::sys::test_support::runs;

    /// A user without an entry.
    const NOBODY_ELSE: u32 = 61_999;

    fn directory(path: &std::path::Path) -> OwnedFd {
        fs_err::File::open(path).unwrap().into_parts().0.into()
    }

    #[test]
    fn users_are_looked_up_with_their_groups() {
        let root = User::lookup(0, 0).unwrap();
        assert_eq!((root.name.as_deref(), root.home), (Some("root"), "/root".into()));
        assert!(root.groups.contains(&0));
        let other = User::lookup(NOBODY_ELSE, 7).unwrap();
        assert_eq!((other.name, other.groups), (None, vec![7]));
    }

    #[tokio::test]
    async fn a_program_runs_as_ourselves_without_root() {
        let me = User::lookup(Uid::effective().as_raw(), Gid::effective().as_raw()).unwrap();
        let environment = [("PATH".into(), "/bin:/usr/bin".into()), ("A".into(), "b".into())];
        let mut command = command("sh", &me, &environment, directory("/usr".as_ref())).unwrap();
        let script =
            "echo $A $HOME $(pwd) $(umask); sed -n 's/^SigBlk:[[:space:]]*//p' /proc/self/status";
        let mut blocked = SigSet::empty();
        blocked.add(nix::sys::signal::Signal::SIGTERM);
        blocked.thread_block().unwrap();
        let output = command.args(["-c", script]).output().await.unwrap();
        let expected = format!("b {} /usr 0022\n0000000000000000\n", me.home.display());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        if !Uid::effective().is_root() {
            let error = super::command("sh", &User { uid: 0, ..me }, &[], directory("/".as_ref()));
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    }

    const PARENT: &str = "HYDRANT_TEST_USER_PARENT";

    /// Starts a program that is to end with this process, but does not get as far as exec before this process has ended.
    async fn parent(asks_first: bool) {
        let me = User::lookup(Uid::effective().as_raw(), Gid::effective().as_raw()).unwrap();
        let mut command = command("sleep", &me, &[], directory("/".as_ref())).unwrap();
        // as the supervisor has it
        let _terminate = tokio::signal::unix::signal(SignalKind::terminate()).unwrap();
        let parent = nix::unistd::getpid();
        let wait = move || {
            while nix::unistd::getppid() == parent {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        if asks_first {
            end_with_us(&mut command);
        }
        // SAFETY: the closure makes async-signal-safe calls only.
        unsafe { command.pre_exec(wait) };
        if !asks_first {
            end_with_us(&mut command);
        }
        command.arg("60").status().await.unwrap();
    }

    #[tokio::test]
    async fn a_program_ends_with_us_even_before_it_runs() {
        if let Ok(first) = std::env::var(PARENT) {
            return parent(first == "true").await;
        }
        let this = "sys::user::tests::a_program_ends_with_us_even_before_it_runs";
        for asks_first in [false, true] {
            let mut parent = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", this])
                .env(PARENT, asks_first.to_string())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            let begin = Instant::now();
            let in_time = || {
                assert!(begin.elapsed() < Duration::from_secs(20), "too late, {asks_first}");
                std::thread::sleep(Duration::from_millis(5));
            };
            let tasks = format!("/proc/{}/task", parent.id());
            let child = loop {
                let tasks = std::fs::read_dir(&tasks).unwrap().flatten();
                let children = tasks
                    .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
                match children.collect::<String>().trim().parse::<i32>() {
                    Ok(pid) => break pid,
                    Err(_) => in_time(),
                }
            };
            if asks_first {
                // until it waits for the end of this one
                std::thread::sleep(Duration::from_millis(100));
            }
            parent.kill().unwrap();
            parent.wait().unwrap();
            while runs(child) {
                in_time();
            }
        }
    }

    #[tokio::test]
    #[ignore = "needs root"]
    async fn root_a_program_runs_as_the_user_below_a_directory_that_is_closed_to_them() {
        let closed = tempfile::tempdir().unwrap();
        fs_err::set_permissions(closed.path(), PermissionsExt::from_mode(0o700)).unwrap();
        let inside = closed.path().join("inside");
        fs_err::create_dir(&inside).unwrap();
        std::os::unix::fs::chown(&inside, Some(NOBODY_ELSE), Some(NOBODY_ELSE)).unwrap();
        let mut user = User::lookup(NOBODY_ELSE, NOBODY_ELSE).unwrap();
        user.groups.push(NOBODY_ELSE + 1);
        let mut command = command("sh", &user, &[], directory(&inside)).unwrap();
        let script = "touch file && id -u && id -g && id -G && ls / >/dev/null && ls .. 2>&1 || grep Cap /proc/self/status";
        let output = command.args(["-c", script]).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("61999\n61999\n61999 62000\n"), "{text}");
        assert!(text.contains("Permission denied"), "{text}");
        assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
        use std::os::unix::fs::MetadataExt;
        let file = fs_err::metadata(inside.join("file")).unwrap();
        assert_eq!(
            (file.uid(), file.gid(), file.mode() & 0o777),
            (NOBODY_ELSE, NOBODY_ELSE, 0o644)
        );
    }
}
