//! A daemon of the test's own: the built `hydrantd` with private directories.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hydrant_api::{Directories, Mount, RUN_DIR_ENV, STATE_DIR_ENV, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::admin::Admin;
use crate::process::{Leashed, Output, Run, alive, last_lines, leash, until};
use crate::scratch::unmount_below;

/// The directory of the build profile in which this program is, such as `target/debug`.
pub fn build_directory() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("what program is this?")?;
    let mut directory = executable.parent().context("a program in no directory")?;
    if directory.ends_with("deps") {
        directory = directory.parent().context("deps in no directory")?;
    }
    Ok(directory.to_owned())
}

/// A program of this workspace, built beside this one.
pub fn built(name: &str) -> Result<PathBuf> {
    let path = build_directory()?.join(name);
    if !path.exists() {
        bail!("{} is not built (cargo build --workspace)", path.display());
    }
    Ok(path)
}

/// A daemon, and the directories for it. Stopped when dropped, with all that it mounted and started.
#[derive(Debug)]
pub struct Daemon {
    directories: Directories,
    log: PathBuf,
    process: Option<Leashed>,
    /// The parent, where that is not the process any more.
    heir: AtomicI32,
    environment: Vec<(String, String)>,
    configuration: Option<PathBuf>,
    /// One of the test's own, that can be replaced.
    program: Option<PathBuf>,
}

/// The processes of a daemon that have its groups.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    pub parent: Pid,
    pub supervisor: Option<Pid>,
    /// Would take the parent's place.
    pub keeper: Option<Pid>,
}

impl Daemon {
    /// Directories and nothing running: `hydrant clone` starts the daemon, or
    /// [`start`](Self::start) does. `state` exists; the rest is made in `directory`.
    #[must_use]
    pub fn stopped(directory: &Path, state: &Path) -> Self {
        Self {
            directories: Directories { state: state.to_owned(), run: directory.join("run") },
            log: directory.join("hydrantd.log"),
            process: None,
            heir: AtomicI32::new(0),
            environment: Vec::new(),
            configuration: None,
            program: None,
        }
    }

    /// Puts a `hydrantd` where this daemon's is installed, as package managers do. What runs goes on.
    pub fn install(&mut self, hydrantd: &Path) -> Result<()> {
        let place = self.log.with_file_name("hydrantd");
        let new = place.with_extension("new");
        fs_err::copy(hydrantd, &new)?;
        fs_err::rename(&new, &place)?;
        self.program = Some(place);
        Ok(())
    }

    fn program(&self) -> Result<PathBuf> {
        self.program.clone().map_or_else(|| built("hydrantd"), Ok)
    }

    /// Lines of a configuration file for the daemon.
    pub fn configure(&mut self, lines: &str) -> Result<()> {
        let file = self.log.with_file_name("config.toml");
        fs_err::write(&file, lines)?;
        self.configuration = Some(file);
        Ok(())
    }

    /// A variable for the daemon's environment, and for that of the command line.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts `hydrantd --standalone` and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        let log = fs_err::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let log = log.into_parts().0;
        let mut command = Command::new(self.program()?);
        command.arg("--standalone");
        command.arg("--state-dir").arg(&self.directories.state);
        command.arg("--run-dir").arg(&self.directories.run);
        if let Some(file) = &self.configuration {
            command.arg("--config").arg(file);
        }
        command.envs(self.environment.iter().cloned());
        command.env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut process = leash(command)?;
        let admin = self.admin();
        let up = until("the daemon answers", Duration::from_secs(30), || {
            if let Some(status) = process.ended() {
                return Some(Err(status));
            }
            admin.status().is_ok().then_some(Ok(()))
        });
        self.process = Some(process);
        match up {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("hydrantd ended at once: {status}\n{}", self.log_tail(40)),
            Err(error) => Err(error.context(self.log_tail(40))),
        }
    }

    /// Asks it to stop (SIGTERM) and waits until it has.
    pub fn stop(&mut self) -> Result<()> {
        let pids = self.pids();
        let process = self.process.take();
        match process.and_then(|mut process| process.ended().is_none().then_some(process)) {
            Some(mut process) => {
                process.signal(Signal::SIGTERM);
                if process.wait(Duration::from_secs(30)).is_none() {
                    bail!("hydrantd does not stop\n{}", self.log_tail(40));
                }
            }
            None => {
                self.admin().post("/v1/stop", &serde_json::json!({}))?;
            }
        }
        until("all processes of the daemon have ended", Duration::from_secs(30), || {
            pids.iter().all(|pid| !alive(*pid)).then_some(())
        })
    }

    /// Mounts a tree again that was unmounted a moment ago: the mount namespace that another test makes just then has a copy of it for
    /// a while.
    pub fn mount_again(&self, tree: &Path) -> Result<()> {
        let mount = [OsStr::new("mount"), tree.as_os_str()];
        until("it is mounted again", Duration::from_secs(60), || self.check(&mount).ok().map(drop))
    }

    /// Kills every process of the daemon at once, as a power cut would.
    pub fn kill(&mut self) {
        // one that is left over starts the others again, so none may run while they are killed
        let mut known: BTreeSet<i32> = self.pids().into_iter().map(Pid::as_raw).collect();
        let mut stopped = BTreeSet::new();
        let mut quiet = 0;
        for _ in 0..6000 {
            known.retain(|pid| alive(Pid::from_raw(*pid)));
            let found = self.pids_with(known.clone()).into_iter().filter(|pid| alive(*pid));
            let new: Vec<Pid> = found.filter(|pid| stopped.insert(*pid)).collect();
            for pid in &new {
                let _ = kill(*pid, Signal::SIGSTOP);
                known.insert(pid.as_raw());
            }
            // one that is just being started is nobody's for a moment
            quiet = if new.is_empty() { quiet + 1 } else { 0 };
            if quiet == 3 {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for pid in &stopped {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        self.process = None;
        // who is killed takes a moment to let go of its files
        for _ in 0..6000 {
            if !stopped.iter().any(|pid| alive(*pid)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The supervisor's parent: the process that [`start`](Self::start) started, or what has taken its place.
    pub fn parent(&self) -> Result<Pid> {
        let started = self.process.as_ref().map(Leashed::pid);
        let heir = Pid::from_raw(self.heir.load(Ordering::SeqCst));
        if let Some(parent) = [started, Some(heir)].into_iter().flatten().find(|pid| alive(*pid)) {
            return Ok(parent);
        }
        let supervisor = self.status()?.pid;
        let parent_of = |pid| all_processes().into_iter().find(|(found, _)| *found == pid);
        let (_, parent) = parent_of(supervisor).context("the supervisor has just ended")?;
        // as long as it has none of ours, it has init
        let exe = |pid| std::fs::read_link(format!("/proc/{pid}/exe"));
        ensure!(exe(parent)? == exe(supervisor)?, "the supervisor has no parent");
        self.heir.store(parent, Ordering::SeqCst);
        Ok(Pid::from_raw(parent))
    }

    /// The supervisor's process, at whatever point of its life.
    pub fn supervisor(&self) -> Option<Pid> {
        self.family()?.supervisor
    }

    /// Those processes that guard what waits.
    pub fn family(&self) -> Option<Family> {
        let parent = self.parent().ok()?;
        let mut family = Family { parent, supervisor: None, keeper: None };
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        for pid in children.ok()?.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let place = match is_keeper(pid) {
                Some(true) => &mut family.keeper,
                Some(false) => &mut family.supervisor,
                None => continue,
            };
            *place = Some(Pid::from_raw(pid)).filter(|pid| alive(*pid)).or(*place);
        }
        Some(family)
    }

    /// Processes of this daemon that do not descend from the parent.
    #[must_use]
    pub fn strays(&self, parent: Pid) -> Vec<Pid> {
        let all = self.pids();
        let parents: BTreeMap<i32, i32> = all_processes().into_iter().collect();
        let is_stray = |pid: &Pid| {
            let of = parents.get(&pid.as_raw()).copied().map(Pid::from_raw);
            *pid != parent && alive(*pid) && of.is_none_or(|of| !all.contains(&of))
        };
        all.iter().copied().filter(is_stray).collect()
    }

    /// Kills the supervisor and nothing else. Gives the pid that it had.
    pub fn kill_supervisor(&self) -> Result<Pid> {
        let pid = until("there is a supervisor", Duration::from_secs(10), || self.supervisor())?;
        kill(pid, Signal::SIGKILL).context("can't kill the supervisor")?;
        Ok(pid)
    }

    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin::new(&self.directories.socket())
    }

    #[must_use]
    pub fn directories(&self) -> &Directories {
        &self.directories
    }

    pub fn status(&self) -> Result<Status> {
        self.admin().status()
    }

    /// The mount on `directory`, as the daemon has it.
    pub fn mount_of(&self, directory: &Path) -> Result<Mount> {
        let mounts = self.admin().mounts()?;
        let found = mounts.into_iter().find(|mount| Path::new(&mount.directory) == directory);
        found.with_context(|| format!("nothing of the daemon's on {}", directory.display()))
    }

    /// The workers' processes.
    pub fn workers(&self) -> Result<Vec<Pid>> {
        let shards = self.status()?.shards;
        Ok(shards.iter().filter_map(|shard| shard.worker_pid).map(Pid::from_raw).collect())
    }

    /// `hydrant ARGUMENTS` for this daemon, to be run.
    pub fn hydrant<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Run> {
        let mut command = Command::new(built("hydrant")?);
        // they come before what a test configures
        for name in ["GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "GIT_SSL_NO_VERIFY", "GIT_SSH_COMMAND"] {
            command.env_remove(name);
        }
        command.args(arguments).envs(self.environment.iter().cloned());
        command.env(STATE_DIR_ENV, &self.directories.state);
        command.env(RUN_DIR_ENV, &self.directories.run);
        Ok(Run::new(command))
    }

    /// Runs `hydrant ARGUMENTS`; failing is an error with the end of the daemon's log.
    pub fn check<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Output> {
        self.hydrant(arguments)?.check().with_context(|| self.log_tail(40))
    }

    /// The last lines of the daemon's log.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let mut tail = String::new();
        for log in [&self.log, &self.directories.log()] {
            if log.exists() {
                tail += &format!("--- {}\n{}\n", log.display(), last_lines(log, lines));
            }
        }
        tail
    }

    /// Every process of this daemon: `hydrantd` with our state directory in its arguments or our
    /// run directory's socket answered by it, and what descends from those.
    #[must_use]
    pub fn pids(&self) -> Vec<Pid> {
        self.pids_with(self.status().map(|status| status.pid).into_iter().collect())
    }

    /// The same, of which some are known, without asking one that may be stopped.
    fn pids_with(&self, mut ours: BTreeSet<i32>) -> Vec<Pid> {
        let Ok(hydrantd) = self.program() else { return Vec::new() };
        let state = self.directories.state.to_string_lossy().into_owned();
        ours.extend(self.process.iter().map(|process| process.pid().as_raw()));
        let processes: Vec<(i32, i32)> = all_processes()
            .into_iter()
            .filter(|(pid, _)| {
                // Never a look into the memory of other processes: a reader that waits in a page
                // fault holds its lock. `exe` needs none.
                let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
                exe.is_ok_and(|exe| exe == hydrantd || is_deleted(&exe, &hydrantd))
            })
            .collect();
        for (pid, _) in &processes {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let said = [arguments, environment].concat();
            if String::from_utf8_lossy(&said).contains(&state) {
                ours.insert(*pid);
            }
        }
        loop {
            let before = ours.len();
            let children = processes.iter().filter(|(_, parent)| ours.contains(parent));
            let children: Vec<i32> = children.map(|(pid, _)| *pid).collect();
            ours.extend(children);
            if ours.len() == before {
                return ours.into_iter().map(Pid::from_raw).collect();
            }
        }
    }
}

/// Whether a child of the parent is the keeper, by its arguments. `None`: it is just being started, or has ended.
fn is_keeper(pid: i32) -> Option<bool> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments = line.split(|byte| *byte == 0).skip(1);
    let first = arguments.next()?;
    // as long as it has those of the parent, it is nothing yet
    (first != b"--standalone" && arguments.all(|other| other != b"--standalone"))
        .then_some(first == b"keeper")
}

/// Built anew while it ran.
fn is_deleted(exe: &Path, hydrantd: &Path) -> bool {
    exe.to_string_lossy().strip_suffix(" (deleted)").is_some_and(|exe| Path::new(exe) == hydrantd)
}

/// All processes and their parents.
fn all_processes() -> Vec<(i32, i32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, parent))
    })
    .collect()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("HYDRANT_TEST_LOG").is_some() {
            eprintln!("{}", self.log_tail(100));
        }
        let pids = self.pids();
        if self.process.is_some() || !pids.is_empty() {
            if let Err(error) = self.stop() {
                eprintln!("the daemon did not stop by itself: {error:#}");
            }
            for pid in pids {
                if alive(pid) {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
        }
        if let Some(directory) = self.directories.run.parent()
            && let Err(error) = unmount_below(directory)
        {
            eprintln!("{error:#}");
        }
    }
}
