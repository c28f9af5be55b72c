use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::time::Instant;

use super::*;
use crate::sys::spawn::Spawn;
use crate::watch::Watcher;
use crate::watch::cgroup::{CgroupEvent, CgroupWatch};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn numbers_after_their_keys() {
    let text = "low 0\nhigh 12\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n";
    assert_eq!([value(text, "oom"), value(text, "oom_kill"), value(text, "high")], [2, 1, 12]);
    assert_eq!([value(text, "kill"), value("", "oom"), value("oom x", "oom")], [0, 0, 0]);
}

#[test]
fn where_the_hierarchy_is() {
    let line = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
    assert_eq!(mount_point(line), Some((PathBuf::from("/sys/fs/cgroup"), Path::new("/"))));
    let line = "35 24 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
    assert_eq!(mount_point(line), None);
}

fn shell(script: &str) -> Spawn {
    Spawn::program(Path::new("/bin/sh")).argument("-c").argument(script).inherit(&["PATH"])
}

/// A place for groups in a hierarchy that the test has mounted itself, if need be.
struct Place {
    parent: Parent,
}

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("hydrant-test-{}-{name}", std::process::id());
        if matches!(Hierarchy::find(), Err(CgroupError::NotMounted)) {
            let directory = std::env::temp_dir().join("hydrant-test-cgroup");
            std::fs::create_dir_all(&directory).unwrap();
            let source = Some("cgroup2");
            nix::mount::mount(
                source,
                &directory,
                source,
                nix::mount::MsFlags::empty(),
                None::<&str>,
            )
            .unwrap();
        }
        Self { parent: Parent::find(Some(Path::new("/")), &name).unwrap() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.parent.close();
    }
}

fn gone(directory: &Path) {
    let begun = Instant::now();
    while directory.exists() {
        assert!(begun.elapsed() < LIMIT, "{} is still there", directory.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

async fn next(watch: &mut CgroupWatch) -> CgroupEvent {
    tokio::time::timeout(LIMIT, watch.next()).await.expect("nothing was told")
}

#[test]
#[ignore = "needs root"]
fn root_a_child_is_in_its_group_from_the_start() {
    let place = Place::new("start");
    let group = place.parent.make("worker", Limits::default()).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    let script = "grep ^0:: /proc/self/cgroup >&3";
    let spawn = shell(script).fd(file.try_clone().unwrap()).cgroup(group.open().unwrap());
    let mut child = spawn.start().unwrap();
    assert!(child.wait_blocking().unwrap().success());
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    let name = group.directory().file_name().unwrap().to_str().unwrap();
    assert!(text.trim_end().ends_with(name), "{text} {name}");
    let directory = group.directory().to_owned();
    drop(group);
    gone(&directory);
}

#[test]
#[ignore = "needs root"]
fn root_groups_are_removed_once_they_are_empty() {
    let place = Place::new("remove");
    let make = || place.parent.make("worker", Limits::default()).unwrap();
    let group = make();
    let child = shell("exec sleep 60").cgroup(group.open().unwrap()).start().unwrap();
    let directory = group.directory().to_owned();
    // not yet: somebody is in it
    drop(group);
    assert!(directory.exists());
    drop(child);
    gone(&directory);
    // a left-over of a daemon that was killed, with a process in it that lives on
    let group = make();
    let directory = group.directory().to_owned();
    let mut child = shell("exec sleep 60").cgroup(group.open().unwrap()).start().unwrap();
    std::mem::forget(group);
    let parent = Parent { directory: place.parent.directory.clone(), ours: true, next: 1.into() };
    parent.sweep();
    assert_eq!(child.wait_blocking().unwrap().signal(), Some(libc::SIGKILL));
    parent.sweep();
    gone(&directory);
    // better without a group than not at all
    let mut child = shell("exit 7").cgroup(std::fs::File::open("/").unwrap()).start().unwrap();
    assert_eq!(child.wait_blocking().unwrap().code(), Some(7));
}

#[tokio::test]
#[ignore = "needs root"]
async fn root_what_happens_in_a_group_is_told() {
    let place = Place::new("watch");
    let watcher = Watcher::new().unwrap();
    let group = place.parent.make("worker", Limits::default()).unwrap();
    let mut watch = CgroupWatch::new(&watcher, group.directory()).unwrap();
    assert_eq!(next(&mut watch).await, CgroupEvent::Populated(false));
    let child = shell("exec sleep 60").cgroup(group.open().unwrap()).start().unwrap();
    assert_eq!(next(&mut watch).await, CgroupEvent::Populated(true));
    drop(child);
    assert_eq!(next(&mut watch).await, CgroupEvent::Populated(false));
    // others that go are not our business
    drop(place.parent.make("importer", Limits::default()).unwrap());
    drop(group);
    for _ in 0..2 {
        assert_eq!(next(&mut watch).await, CgroupEvent::Gone);
    }
    drop(watch);
    assert_eq!(watcher.watches(), 0);
}

/// The end of a group on kernels whose kernfs tells it: of the file itself, without a look at the directory.
#[tokio::test]
#[ignore = "needs the guest kernel"]
async fn guest_the_end_of_a_file_of_a_group_is_told() {
    let place = Place::new("end");
    let watcher = Watcher::new().unwrap();
    let group = place.parent.make("worker", Limits::default()).unwrap();
    let files = ["memory.events", "cgroup.events", "cgroup.procs"];
    let mut watches = files.map(|file| watcher.file(&group.directory().join(file)).unwrap());
    drop(group);
    for watched in &mut watches {
        let change = tokio::time::timeout(LIMIT, watched.next()).await.expect("nothing was told");
        assert_eq!(change, crate::watch::Change::Gone);
    }
    assert_eq!(watcher.watches(), 0);
}

/// A process that takes more than its group may have is killed by the kernel, and the group says so.
#[tokio::test]
#[ignore = "needs the guest kernel"]
async fn guest_who_takes_too_much_memory_is_killed() {
    let place = Place::new("oom");
    assert!(place.parent.has("memory") && place.parent.has("pids"));
    let limits = Limits {
        memory_max: Some(32 << 20),
        memory_high: Some(1 << 30),
        pids_max: Some(10),
        cpu_weight: Some(50),
    };
    let watcher = Watcher::new().unwrap();
    let group = place.parent.make("worker", limits).unwrap();
    assert_eq!(group.memory_max(), Some(32 << 20));
    let read = |file: &str| fs::read_to_string(group.directory().join(file)).unwrap();
    assert_eq!([read("pids.max").trim(), read("cpu.weight").trim()], ["10", "50"]);
    assert_eq!(group.memory_events(), Some(MemoryEvents::default()));
    let mut watch = CgroupWatch::new(&watcher, group.directory()).unwrap();
    assert_eq!(next(&mut watch).await, CgroupEvent::Populated(false));
    let script = "exec dd if=/dev/zero of=/dev/null bs=200M count=1";
    let mut child = shell(script).cgroup(group.open().unwrap()).start().unwrap();
    let status = child.wait().await.unwrap();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}");
    // counted before the process was killed
    let events = group.memory_events().unwrap();
    assert!(events.oom >= 1 && events.oom_kill == 1, "{events:?}");
    let mut told = None;
    while told.is_none_or(|events: MemoryEvents| events.oom_kill == 0) {
        match next(&mut watch).await {
            CgroupEvent::Memory(events) => told = Some(events),
            CgroupEvent::Populated(_) => {}
            CgroupEvent::Gone => panic!("gone"),
        }
    }
}
