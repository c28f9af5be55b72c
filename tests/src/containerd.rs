//! A real containerd (Debian's, or that in `HYDRANT_TEST_CONTAINERD`) with Hydrant as a snapshotter.
//!
//! It has namespaces of its own for processes and mounts, so that all that it starts and mounts ends with the test, and a
//! `/run` of its own. It sees mounts that are made in the state directory, as a containerd in the machine's
//! namespace does.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hydrant_daemon::queue::wire::image::Platform;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::{Leashed, Run, alive, last_lines, leash, require, until};
use crate::snapshots::{Mounted, Snapshots};

mod cri;

pub use cri::Pod;

/// A directory with other versions of the programs, if they are wanted.
const PROGRAMS: &str = "HYDRANT_TEST_CONTAINERD";
const PREFIX: &str = "hydrant-test-";
/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// A label: containerd does not remove what nothing refers to.
pub const KEEP: (&str, &str) = ("containerd.io/gc.root", "always");
/// The name of a view.
const VIEW: &str = "view";

/// Before a command: what a process says just before it ends may be lost (containerd's issue 5741), so its end comes later.
const ENDS_LATER: [&str; 5] =
    ["/bin/busybox", "sh", "-c", "\"$@\"; code=$?; /bin/busybox sleep 0.2; exit $code", "sh"];

/// containerd, started anew when it ends. With libraries of its own where the machine's are too old for its programs.
const INIT: &str = r#"
# trees of other tests, which run beside this one, would be in use as long as this is there
awk -v own="${1%/*}/" '$5 ~ "/hydrant-test-[^/]*/" && index($5, own) != 1 { print $5 }' /proc/self/mountinfo |
  tac | while read -r other; do umount -l "$other" 2>/dev/null || :; done
mount -t tmpfs -o mode=755 tmpfs /run
[ -z "$2" ] || runc --version >/dev/null 2>&1 || mount -t overlay -o "ro,lowerdir=$2:/usr/lib" libraries /usr/lib
while :; do
  containerd -c "$1/config.toml" >>"$1/log" 2>&1 </dev/null &
  wait $! || :
  sleep 0.1
done
"#;

/// A running containerd. It, its containers and its mounts are gone when this is dropped.
#[derive(Debug)]
pub struct Containerd {
    /// Its version: 1.7 is (1, 7).
    pub version: (u32, u32),
    /// It knows that owners are mapped for it.
    remaps: bool,
    directory: PathBuf,
    /// The first process of its namespaces.
    init: Pid,
    process: Leashed,
    cgroup: String,
    /// Where its programs are looked for.
    path: String,
}

/// Lets mounts below the state directory be seen in namespaces that are made later. To be called before the daemon is started.
pub fn share_mounts(state: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(state), state, none, MsFlags::MS_BIND, none).context("can't bind a directory")?;
    mount(none, state, none, MsFlags::MS_SHARED, none).context("can't share mounts")?;
    Ok(())
}

/// Programs of Debian's development release; without names those of containerd 2, for which every client says of which image a
/// layer is.
pub fn packages(names: &[&str]) -> Result<PathBuf> {
    let mut get = Command::new("bash");
    get.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/containerd/get")).arg("sid").args(names);
    Ok(Run::new(get).time_out(Duration::from_secs(600)).check()?.text().into())
}

impl Containerd {
    /// Starts containerd in `directory` with the snapshotter `hydrant` on that socket. `remaps`: it is told that for user
    /// namespaces it need not change any owners. `pause`: the image of what runs in every pod.
    pub fn start(
        directory: &Path,
        snapshotter: &Path,
        remaps: bool,
        pause: Option<&str>,
    ) -> Result<Self> {
        let programs = std::env::var_os(PROGRAMS).map(PathBuf::from);
        let snapshotters = [("hydrant", snapshotter)];
        Self::start_with(programs.as_deref(), directory, &snapshotters, remaps, pause)
    }

    /// The same with the programs in that directory, and any snapshotters, by their names and sockets.
    pub fn start_with(
        programs: Option<&Path>,
        directory: &Path,
        snapshotters: &[(&str, &Path)],
        remaps: bool,
        pause: Option<&str>,
    ) -> Result<Self> {
        require(&[("nsenter", "util-linux"), ("unshare", "util-linux"), ("runc", "runc")])?;
        if programs.is_none() {
            require(&[("containerd", "containerd"), ("ctr", "containerd")])?;
        }
        let networks = directory.join("cni");
        fs_err::create_dir_all(&networks)?;
        if pause.is_some() {
            cri::configure_network(&networks)?;
        }
        let path = path(programs);
        let version = version(&path)?;
        let configuration = configuration(version, directory, snapshotters, remaps, pause);
        fs_err::write(directory.join("config.toml"), configuration)?;
        sweep();
        let number = std::os::unix::fs::MetadataExt::ino(&fs_err::metadata(directory)?);
        let cgroup = format!("{PREFIX}{}-{number}", std::process::id());
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "slave"]);
        command.args(["--mount-proc", "sh", "-euc", INIT, "sh"]).arg(directory);
        command.arg(programs.and_then(libraries).unwrap_or_default());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.env("PATH", &path);
        let process = leash(command)?;
        let parent = process.pid();
        let children = format!("/proc/{parent}/task/{parent}/children");
        let init = until("its first process", Duration::from_secs(60), || {
            let children = fs_err::read_to_string(&children).ok()?;
            children.split_whitespace().next()?.parse().ok()
        })?;
        let init = Pid::from_raw(init);
        let directory = directory.to_owned();
        let containerd = Self { version, remaps, directory, init, process, cgroup, path };
        containerd.wait_until_it_answers()?;
        Ok(containerd)
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        let up = until("containerd answers", Duration::from_secs(60), || {
            let said = self.ctr("default", &["plugins", "ls"]).output().ok()?;
            said.text().contains("io.containerd.snapshotter.v1").then_some(())
        });
        up.with_context(|| self.log_tail())
    }

    /// Its socket.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.directory.join("c.sock")
    }

    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The name of the cgroup of all its containers.
    #[must_use]
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// `ctr ARGUMENTS` in a namespace of containerd's.
    #[must_use]
    pub fn ctr(&self, namespace: &str, arguments: &[&str]) -> Run {
        let address = self.address();
        let address = address.to_string_lossy();
        let ctr = ["ctr", "--address", &address, "--namespace", namespace];
        self.inside(&[&ctr, arguments].concat())
    }

    /// `ctr ARGUMENTS`, which has to do it; gives what it says.
    pub fn check(&self, namespace: &str, arguments: &[&str]) -> Result<String> {
        let done = self.ctr(namespace, arguments).check();
        Ok(done.with_context(|| self.log_tail())?.text())
    }

    /// Runs a command in a new container of an image that is there; gives its output.
    pub fn run(
        &self,
        namespace: &str,
        snapshotter: &str,
        image: &str,
        name: &str,
        command: &[&str],
    ) -> Result<String> {
        let cgroup = format!("/{}/{name}", self.cgroup);
        let run = ["run", "--rm", "--snapshotter", snapshotter, "--cgroup", &cgroup, image, name];
        self.check(namespace, &[&run, &ENDS_LATER[..], command].concat())
    }

    /// As [`run`](Self::run), as root of a namespace of users that is `outside` elsewhere.
    pub fn run_in_user_namespace(
        &self,
        namespace: &str,
        image: &str,
        name: &str,
        outside: u32,
        command: &[&str],
    ) -> Result<String> {
        let command = [&ENDS_LATER, command].concat();
        self.run_as("--rm", Some(outside), namespace, image, name, &command)
    }

    /// As [`run`](Self::run), and goes on in the background; as root of a namespace of users if that is `outside`.
    pub fn run_detached(
        &self,
        namespace: &str,
        outside: Option<u32>,
        image: &str,
        name: &str,
        command: &[&str],
    ) -> Result<()> {
        self.run_as("--detach", outside, namespace, image, name, command).map(drop)
    }

    fn run_as(
        &self,
        how: &str,
        outside: Option<u32>,
        namespace: &str,
        image: &str,
        name: &str,
        command: &[&str],
    ) -> Result<String> {
        let cgroup = format!("/{}/{name}", self.cgroup);
        let run = ["run", how, "--snapshotter", "hydrant", "--cgroup", &cgroup];
        // the images of tests have files of gid 3,000,000
        let map = format!("0:{}:4000000", outside.unwrap_or_default());
        let mut users = vec!["--uidmap", &map, "--gidmap", &map, "--remap-labels"];
        if !self.remaps && self.version < (2, 0) {
            users.pop(); // with that, nobody changes the owners
        }
        if outside.is_none() {
            users.clear();
        }
        self.check(namespace, &[&run[..], &users, &[image, name], command].concat())
    }

    /// Runs a command in a container that runs; gives its output.
    pub fn exec(&self, namespace: &str, name: &str, id: &str, command: &[&str]) -> Result<String> {
        let exec = ["task", "exec", "--exec-id", id, name];
        self.check(namespace, &[&exec, &ENDS_LATER[..], command].concat())
    }

    /// Ends and removes a container, and at once what only it had.
    pub fn end(&self, namespace: &str, name: &str) -> Result<()> {
        self.check(namespace, &["task", "rm", "--force", name])?;
        self.check(namespace, &["containers", "rm", name])?;
        self.collect_garbage(namespace)
    }

    /// By itself, containerd does it after a hundred changes.
    pub fn collect_garbage(&self, namespace: &str) -> Result<()> {
        self.check(namespace, &["leases", "create", "--id", "garbage"])?;
        self.check(namespace, &["leases", "delete", "--sync", "garbage"]).map(drop)
    }

    /// Removes all images by all their names, and at once what only they had.
    pub fn remove_images(&self, namespace: &str) -> Result<()> {
        let images = self.check(namespace, &["images", "ls", "--quiet"])?;
        let images: Vec<_> = images.lines().collect();
        if images.is_empty() {
            return Ok(());
        }
        self.check(namespace, &[&["images", "rm", "--sync"], &images[..]].concat()).map(drop)
    }

    /// A command in containerd's namespaces.
    #[must_use]
    pub fn inside(&self, command: &[&str]) -> Run {
        let init = self.init.to_string();
        let mut outer = Command::new("nsenter");
        outer.args(["--target", &init, "--mount", "--pid", "--wd=/", "--"]).args(command);
        outer.env("PATH", &self.path);
        Run::new(outer).time_out(PATIENCE)
    }

    /// The uppermost committed snapshots.
    pub fn tops(&self, namespace: &str, snapshotter: &str) -> Result<Vec<String>> {
        let listed = self.check(namespace, &["snapshots", "--snapshotter", snapshotter, "ls"])?;
        let mut tops = Vec::new();
        let mut parents = Vec::new();
        for line in listed.lines() {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [key, parent, "Committed"] => {
                    tops.push(key.to_owned());
                    parents.push(parent.to_owned());
                }
                [key, "Committed"] => tops.push(key.to_owned()),
                [_, parent, _] => parents.push(parent.to_owned()),
                _ => {}
            }
        }
        tops.retain(|key| !parents.contains(key));
        Ok(tops)
    }

    /// The snapshots of a namespace, as containerd has them.
    #[must_use]
    pub fn snapshots(&self, namespace: &str, snapshotter: &str) -> Snapshots {
        Snapshots::by(&self.address(), snapshotter, namespace)
    }

    /// The tree of the only image that a snapshotter has, as a view of it shows it.
    pub fn look(&self, namespace: &str, snapshotter: &str) -> Result<View> {
        let tops = self.tops(namespace, snapshotter)?;
        ensure!(tops.len() == 1, "not one image: {tops:?}");
        let snapshots = self.snapshots(namespace, snapshotter);
        let mounts = snapshots.view(VIEW, &tops[0], &[KEEP])?;
        let place = self.directory.join("view").join(namespace);
        let mounted = Mounted::new(&mounts, &place);
        if mounted.is_err() {
            snapshots.remove(VIEW)?;
        }
        Ok(View { mounted: Some(mounted?), snapshots })
    }

    /// Kills containerd, which is started again. Containers go on.
    pub fn kill(&self) -> Result<()> {
        let init = self.init;
        let children = fs_err::read_to_string(format!("/proc/{init}/task/{init}/children"))?;
        for child in children.split_whitespace() {
            let comm = fs_err::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if comm.trim() == "containerd" {
                let pid = Pid::from_raw(child.parse()?);
                kill(pid, Signal::SIGKILL)?;
                until("containerd ends", PATIENCE, || (!alive(pid)).then_some(()))?;
            }
        }
        self.wait_until_it_answers()
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        last_lines(&self.directory.join("log"), 30)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if thread::panicking() || std::env::var_os("HYDRANT_TEST_LOG").is_some() {
            eprintln!("{}", self.log_tail());
        }
        // and with it all others of its namespace
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = self.process.wait(Duration::from_secs(60));
        let end = Instant::now() + Duration::from_secs(20);
        while !remove_cgroup(&self.cgroup) && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// An image that is mounted to be looked at.
#[derive(Debug)]
pub struct View {
    mounted: Option<Mounted>,
    snapshots: Snapshots,
}

impl View {
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mounted.as_ref().map_or(Path::new("/nonexistent"), Mounted::path)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.mounted = None;
        if let Err(error) = self.snapshots.remove(VIEW) {
            eprintln!("{VIEW}: {error:#}");
        }
    }
}

fn path(programs: Option<&Path>) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{path}:/usr/sbin:/sbin");
    match programs.map(Path::display) {
        Some(directory) => format!("{directory}:{directory}/../sbin:{path}"),
        None => path,
    }
}

/// Where the C library that programs want lies beside them, if it does.
fn libraries(programs: &Path) -> Option<PathBuf> {
    let libraries = programs.parent()?.join("lib");
    let mut machines = fs_err::read_dir(&libraries).ok()?.flatten();
    machines.any(|machine| machine.path().join("libc.so.6").exists()).then_some(libraries)
}

fn version(path: &str) -> Result<(u32, u32)> {
    let said = Run::shell("containerd --version", &[]).env("PATH", path).check()?.text();
    let version = said.split_whitespace().nth(2).context("containerd has no version")?;
    let mut numbers = version.trim_start_matches('v').split('.');
    let mut next = || numbers.next().context("half a version")?.parse().context(said.clone());
    Ok((next()?, next()?))
}

/// The first of the snapshotters is that of the container runtime interface.
fn configuration(
    version: (u32, u32),
    directory: &Path,
    snapshotters: &[(&str, &Path)],
    remaps: bool,
    pause: Option<&str>,
) -> String {
    let directory = directory.display();
    let format = if version >= (2, 0) { 3 } else { 2 };
    let mut text = format!(
        r#"version = {format}
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.nri.v1.nri",
  "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{directory}/c.sock"
"#
    );
    for (name, socket) in snapshotters {
        let socket = socket.display();
        text += &format!(
            r#"[proxy_plugins.{name}]
  type = "snapshot"
  address = "{socket}"
"#
        );
        if remaps {
            text += "  capabilities = [\"remap-ids\"]\n";
        }
        if version >= (2, 0) {
            text += &format!(
                r#"[proxy_plugins.{name}.exports]
  enable_remote_snapshot_annotations = "true"
"#
            );
        }
    }
    let names = || snapshotters.iter().map(|(name, _)| *name).chain(["overlayfs"]);
    let cri = names().next().unwrap_or_default();
    text += &if version >= (2, 0) {
        format!(
            r#"[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{cri}"
  disable_snapshot_annotations = false
[plugins."io.containerd.cri.v1.runtime".cni]
  conf_dir = "{directory}/cni"
  bin_dirs = ["{directory}/cni"]
"#
        )
    } else {
        format!(
            r#"[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "{directory}/cni"
  bin_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{cri}"
  disable_snapshot_annotations = false
"#
        )
    };
    if let Some(image) = pause {
        // this root may have no right to have a pod's own process killed last
        text += &if version >= (2, 0) {
            format!(
                r#"[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{image}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
"#
            )
        } else {
            format!(
                r#"[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
"#
            )
        };
    }
    for name in names().filter(|_| version >= (2, 0)) {
        text += &format!(
            r#"[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/{}"
  snapshotter = "{name}"
  differ = "walking"
"#,
            Platform::ours().architecture
        );
    }
    text
}

/// Removes a cgroup in all hierarchies; false where it has processes yet.
fn remove_cgroup(name: &str) -> bool {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs_err::read_dir(root).into_iter().flatten().flatten();
    let places = hierarchies.map(|entry| entry.path()).chain([root.to_owned()]);
    places.map(|place| place.join(name)).filter(|place| place.is_dir()).all(|place| remove(&place))
}

fn remove(cgroup: &Path) -> bool {
    let Ok(entries) = fs_err::read_dir(cgroup) else { return true };
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        remove(&entry.path());
    }
    std::fs::remove_dir(cgroup).is_ok()
}

/// What dead tests have left: they and all their processes are gone.
fn sweep() {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs_err::read_dir(root).into_iter().flatten().flatten();
    let places = hierarchies.map(|entry| entry.path()).chain([root.to_owned()]);
    for entry in places.filter_map(|place| fs_err::read_dir(place).ok()).flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(pid).exists() {
            remove(&entry.path());
        }
    }
}
