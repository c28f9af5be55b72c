//! systemd as the first process of a container, with Hydrant's units installed.
//!
//! The container has namespaces of its own for processes, mounts, the host name, IPC and cgroups; users
//! and the network are the machine's. Its `/usr` is this machine's below an overlay, its `/etc` is the
//! test's. All of it ends with the test: SIGKILL for the first process is SIGKILL for all.
//!
//! `HYDRANT_TEST_SYSTEMD` names a directory with another systemd, and all that it needs, as `tests/systemd/get` makes it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fs_err as fs;
use nix::unistd::Pid;

use crate::admin::Admin;
use crate::daemon::built;
use crate::process::{Leashed, Output, Run, leash, require, until};
use crate::world::{GIT_ENVIRONMENT, World};

const BOOT: &str = include_str!("container/boot.sh");
const PREFIX: &str = "hydrant-test-";
const OTHER_SYSTEMD: &str = "HYDRANT_TEST_SYSTEMD";

/// What is not the container's business, or takes time.
const MASKED: [&str; 16] = [
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "kmod-static-nodes.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-ask-password-console.path",
    "systemd-binfmt.service",
    "systemd-modules-load.service",
    "systemd-random-seed.service",
    "systemd-sysctl.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
];

/// A booted container. Everything in it is killed when this is dropped.
#[derive(Debug)]
pub struct Container {
    init: Pid,
    directory: PathBuf,
    // dropped after the first field that needs it
    process: Leashed,
    cgroup: Cgroup,
}

impl Container {
    /// Boots in `world`'s directory. The state directory and the home directory are the world's, so its
    /// own daemon must not run. The units are enabled if `enable`, as `systemctl enable --now` does.
    pub fn boot(world: &World) -> Result<Self> {
        require(&[
            ("unshare", "util-linux"),
            ("nsenter", "util-linux"),
            ("systemctl", "systemd"),
            ("journalctl", "systemd"),
        ])?;
        let directory = world.path("container");
        for part in ["usr", "work", "etc/systemd/system", "root"] {
            fs::create_dir_all(directory.join(part))?;
        }
        for shared in ["state", "home"] {
            fs::os::unix::fs::symlink(world.path(shared), directory.join(shared))?;
        }
        install(&directory.join("usr"))?;
        configure(&directory.join("etc"))?;
        let cgroup = Cgroup::new(&directory)?;
        let boot = directory.join("boot.sh");
        fs::write(&boot, BOOT)?;
        let log = fs::File::create(directory.join("log"))?.into_parts().0;
        // who waits for it stays outside of the group: beside processes systemd could hand on no controllers
        let script = "echo 0 >\"$1/cgroup.procs\"; \
            exec unshare --mount --uts --ipc --cgroup sh \"$2\" \"$3\" \"$4\"";
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "sh", "-euc", script, "sh"]);
        command.arg(&cgroup.0).arg(&boot).arg(&directory);
        command.arg(std::env::var_os(OTHER_SYSTEMD).unwrap_or_default());
        command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = leash(command)?;
        let mut container = Self { init: process.pid(), directory, process, cgroup };
        container.wait_until_it_runs()?;
        Ok(container)
    }

    fn wait_until_it_runs(&mut self) -> Result<()> {
        let parent = self.process.pid();
        let children = format!("/proc/{parent}/task/{parent}/children");
        let log = self.directory.join("log");
        let booted = until("systemd runs", Duration::from_secs(60), || {
            if let Some(status) = self.process.ended() {
                return Some(Err(anyhow::anyhow!("it ended: {status}")));
            }
            let child = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
            self.init = Pid::from_raw(child);
            // before that it is the script, in the machine's root
            if fs::read_to_string(format!("/proc/{child}/comm")).ok()?.trim() != "systemd" {
                return None;
            }
            let state = self.run(&["systemctl", "is-system-running"]).output().ok()?.text();
            match state.as_str() {
                "running" => Some(Ok(())),
                "degraded" => Some(Err(anyhow::anyhow!("units failed"))),
                _ => None,
            }
        });
        booted.and_then(|booted| booted).with_context(|| {
            let log = fs::read_to_string(log).unwrap_or_default();
            format!("{log}\n{}\n{}", self.say(&["systemctl", "--failed"]), self.journal(60))
        })
    }

    /// A command in the container, as root.
    #[must_use]
    pub fn run(&self, command: &[&str]) -> Run {
        let init = self.init.to_string();
        let mut outer = Command::new("nsenter");
        outer.args(["--target", &init, "--mount", "--uts", "--ipc", "--pid", "--cgroup"]);
        outer.args(["--root", "--wd=/", "--"]).args(command).env_clear();
        outer.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/home");
        outer.env("SYSTEMD_PAGER", "").env("SYSTEMD_COLORS", "0").envs(GIT_ENVIRONMENT);
        Run::new(outer)
    }

    /// Runs a command; failing is an error with the end of the journal.
    pub fn check(&self, command: &[&str]) -> Result<Output> {
        self.run(command).check().with_context(|| self.journal(60))
    }

    /// `systemctl ARGUMENTS`.
    pub fn systemctl(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.check(&[&["systemctl"], arguments].concat())?.text())
    }

    /// The first number of its version.
    pub fn version(&self) -> Result<u32> {
        let said = self.systemctl(&["--version"])?;
        let number = said.split_whitespace().nth(1).context("a version without a number")?;
        number.parse().with_context(|| said.clone())
    }

    /// Lines that come after those of the unit.
    pub fn override_unit(&self, lines: &str) -> Result<()> {
        let directory = self.directory.join("etc/systemd/system/hydrantd.service.d");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("test.conf"), lines)?;
        self.systemctl(&["daemon-reload"]).map(drop)
    }

    /// A property of the service.
    pub fn property(&self, name: &str) -> Result<String> {
        self.systemctl(&["show", "--value", "--property", name, "hydrantd.service"])
    }

    /// The end of the journal.
    #[must_use]
    pub fn journal(&self, lines: usize) -> String {
        self.say(&[
            "journalctl",
            "--no-pager",
            "-o",
            "short-monotonic",
            "--no-hostname",
            "-n",
            &lines.to_string(),
        ])
    }

    fn say(&self, command: &[&str]) -> String {
        self.run(command).output().map_or_else(|error| format!("{error:#}"), |said| said.text())
    }

    /// Where a path of the container is to be found from outside.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// The daemon, where one runs or is started for who asks.
    #[must_use]
    pub fn admin(&self) -> Admin {
        Admin::new(&self.path("/run/hydrant/hydrantd.sock"))
    }

    /// The service's main process, as seen from outside.
    pub fn supervisor(&self) -> Result<Pid> {
        let inside = self.property("MainPID")?;
        ensure!(inside != "0", "the service has no process\n{}", self.journal(40));
        self.outside(&inside)
    }

    /// The number outside of a process that has the number `inside` in the container.
    pub fn outside(&self, inside: &str) -> Result<Pid> {
        for entry in fs::read_dir("/proc")?.flatten() {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let Some(line) = status.lines().find_map(|line| line.strip_prefix("NSpid:")) else {
                continue;
            };
            let numbers: Vec<_> = line.split_whitespace().collect();
            let ours = || {
                let own = fs::read_link(entry.path().join("ns/pid")).ok();
                own.is_some() && own == fs::read_link(format!("/proc/{}/ns/pid", self.init)).ok()
            };
            if numbers.len() == 2 && numbers[1] == inside && ours() {
                return Ok(Pid::from_raw(numbers[0].parse()?));
            }
        }
        bail!("there is no process {inside} in the container\n{}", self.journal(40))
    }

    /// Puts another file in the installed daemon's place, as package managers do: the built one, or this.
    pub fn upgrade(&self, content: Option<&[u8]>) -> Result<()> {
        let place = self.path("/usr/sbin/hydrantd");
        let new = place.with_extension("new");
        match content {
            Some(content) => fs::write(&new, content)?,
            None => drop(fs::copy(built("hydrantd")?, &new)?),
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&new, mode)?;
        Ok(fs::rename(new, place)?)
    }

    /// Kills a worker. Gives its number in the container.
    pub fn kill_worker(&self) -> Result<i32> {
        let shards = self.admin().status()?.shards;
        let worker = shards.iter().find_map(|shard| shard.worker_pid).context("no worker")?;
        let signal = nix::sys::signal::Signal::SIGKILL;
        nix::sys::signal::kill(self.outside(&worker.to_string())?, signal)?;
        Ok(worker)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if thread::panicking() || std::env::var_os("HYDRANT_TEST_LOG").is_some() {
            eprintln!("{}", self.journal(200));
        }
        // the first process, and with it all others of its namespace
        let _ = nix::sys::signal::kill(self.init, nix::sys::signal::Signal::SIGKILL);
        let _ = self.process.wait(Duration::from_secs(10));
        self.cgroup.empty();
    }
}

/// Installs as a package does.
fn install(usr: &Path) -> Result<()> {
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd");
    let files = [
        (built("hydrantd")?, "sbin/hydrantd"),
        (built("hydrant")?, "bin/hydrant"),
        (units.join("hydrantd.service"), "lib/systemd/system/hydrantd.service"),
        (units.join("hydrantd.socket"), "lib/systemd/system/hydrantd.socket"),
        (units.join("hydrant-containerd.socket"), "lib/systemd/system/hydrant-containerd.socket"),
        (units.join("sysusers.d/hydrant.conf"), "lib/sysusers.d/hydrant.conf"),
        (units.join("tmpfiles.d/hydrant.conf"), "lib/tmpfiles.d/hydrant.conf"),
    ];
    for (from, to) in files {
        let to = usr.join(to);
        fs::create_dir_all(to.parent().context("a file in no directory")?)?;
        fs::copy(from, to)?;
    }
    Ok(())
}

/// As little as systemd needs.
fn configure(etc: &Path) -> Result<()> {
    let system = etc.join("systemd/system");
    for unit in MASKED {
        fs::os::unix::fs::symlink("/dev/null", system.join(unit))?;
    }
    let target = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n";
    fs::write(system.join("hydrant-test.target"), target)?;
    // all of the log, at once and in memory
    fs::write(
        etc.join("systemd/journald.conf"),
        "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
    )?;
    fs::write(
        etc.join("passwd"),
        "root:x:0:0:root:/root:/bin/sh\n\
         messagebus:x:100:101::/nonexistent:/usr/sbin/nologin\n\
         nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
    )?;
    fs::write(etc.join("group"), "root:x:0:\nmessagebus:x:101:\nnogroup:x:65534:\n")?;
    fs::write(etc.join("nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files dns\n")?;
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    fs::write(etc.join("machine-id"), "0123456789abcdef0123456789abcdef\n")?;
    for empty in ["fstab", "os-release"] {
        fs::write(etc.join(empty), "")?;
    }
    for ours in ["ld.so.cache", "ld.so.conf"] {
        fs::copy(Path::new("/etc").join(ours), etc.join(ours))?;
    }
    let copy = r#"for name in ld.so.conf.d alternatives dbus-1 pam.d; do
        if [ -e "/etc/$name" ]; then cp -a "/etc/$name" "$1/"; fi; done"#;
    Run::shell(copy, &[etc]).check()?;
    Ok(())
}

/// A cgroup (version 2) in which the container is.
#[derive(Debug)]
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(directory: &Path) -> Result<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let mounted = table.lines().find_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            kind.starts_with("cgroup2 ").then(|| place.split(' ').nth(4))?
        });
        let root = match mounted {
            Some(root) => PathBuf::from(root),
            None => {
                let root = directory.join("cgroup");
                fs::create_dir_all(&root)?;
                Run::shell("mount -t cgroup2 cgroup2 \"$1\"", &[&root]).check()?;
                root
            }
        };
        sweep(&root);
        let name = format!("{PREFIX}{}-{}", std::process::id(), inode(directory)?);
        let path = root.join(name);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Removes it once its last process has ended.
    fn empty(&self) {
        let end = Instant::now() + Duration::from_secs(20);
        while !remove(&self.0) && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        if self.0.exists() {
            eprintln!("{} still has processes", self.0.display());
        }
    }
}

/// Two containers of one test program have different directories.
fn inode(directory: &Path) -> Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::ino(&fs::metadata(directory)?))
}

/// What dead tests have left: they and all their processes are gone.
fn sweep(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(pid).exists() {
            remove(&entry.path());
        }
    }
}

/// Removes a cgroup and those in it; false where that can't be.
fn remove(cgroup: &Path) -> bool {
    let Ok(entries) = fs::read_dir(cgroup) else { return true };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        remove(&entry.path());
    }
    fs::remove_dir(cgroup).is_ok()
}
