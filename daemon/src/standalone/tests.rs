//! A parent in a process of its own, whose supervisor is this test program as well.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{kill, raise};
use nix::unistd::Pid;

use super::*;
use crate::sys::fdstore;
use crate::sys::spawn::inherited;
use crate::sys::test_support::in_single_thread;

const KEEPER: &str = "keeper";
const DIRECTORY: &str = "HYDRANT_TEST_STANDALONE";
const LIMIT: Duration = Duration::from_secs(20);

/// Runs the test `name` again in another process, as the parent; where it was started by that parent,
/// runs `supervisor` with the number of supervisors before it, or is the keeper.
fn scene(
    name: &str,
    supervisor: impl FnOnce(usize, &Path),
) -> Option<(std::process::Child, tempfile::TempDir)> {
    let arguments = ["--exact".to_owned(), format!("standalone::tests::{name}")];
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        let directory = tempfile::tempdir().unwrap();
        let parent = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .env(DIRECTORY, directory.path())
            .env_remove("NOTIFY_SOCKET")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        return Some((parent, directory));
    };
    let mut kept = Vec::new();
    if std::env::args().any(|argument| argument == KEEPER) {
        let [lifeline] = inherited().unwrap();
        kept = keeper::run(&lifeline).unwrap();
        if kept.is_empty() {
            std::process::exit(0);
        }
    } else if std::env::var_os("NOTIFY_SOCKET").is_some() {
        let lives = directory.join("lives");
        let before = std::fs::read(&lives).map_or(0, |lives| lives.len());
        std::fs::write(&lives, vec![b'x'; before + 1]).unwrap();
        std::fs::write(directory.join("supervisor"), std::process::id().to_string()).unwrap();
        supervisor(before, &directory);
        std::process::exit(0);
    }
    // a test has threads around it that would get the signals
    in_single_thread(|| {
        std::fs::write(directory.join("parent"), std::process::id().to_string()).unwrap();
        let program = std::env::current_exe().unwrap();
        let programs = Programs { installed: &program, own: &program };
        let arguments = arguments.map(OsString::from);
        let keeper: Vec<_> = arguments.iter().cloned().chain([KEEPER.into()]).collect();
        run(programs, &arguments, Some(&keeper), kept).unwrap().into()
    })
}

/// What has written its process id into the file.
fn pid(directory: &Path, who: &str) -> Pid {
    Pid::from_raw(std::fs::read_to_string(directory.join(who)).unwrap().parse().unwrap())
}

fn signal_parent(directory: &Path, signal: Signal) {
    kill(pid(directory, "parent"), signal).unwrap();
}

fn until<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "too late");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn end(parent: &mut std::process::Child) -> Option<i32> {
    until(|| parent.try_wait().unwrap()).code()
}

/// Says that it is ready, and waits for SIGTERM.
fn serve_until_told_to_stop() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        let mut terminate = tokio::signal::unix::signal(kind).unwrap();
        fdstore::notify("READY=1").unwrap();
        tokio::time::timeout(LIMIT, terminate.recv()).await.expect("no SIGTERM");
    });
}

fn text_of(fd: &OwnedFd) -> String {
    let mut text = String::new();
    let mut file = File::from(fd.try_clone().unwrap());
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn fds_outlive_their_supervisors() {
    let scene = scene("fds_outlive_their_supervisors", |before, directory| {
        let kept = fdstore::take().unwrap();
        let names: Vec<_> = kept.iter().map(|(name, _)| name.as_str()).collect();
        assert!(kept.iter().all(|(_, fd)| fd.as_raw_fd() >= 512), "out of the way");
        let [names @ .., keeper::LIFELINE, keeper::TURN] = &names[..] else { panic!("{names:?}") };
        match before {
            0 => {
                assert!(names.is_empty());
                for name in ["a", "b", "bad name"] {
                    let mut file = tempfile::tempfile().unwrap();
                    write!(file, "this is {name}").unwrap();
                    fdstore::store(name, file.as_fd()).unwrap();
                }
                fdstore::notify("READY=1").unwrap();
                // no time for the parent to look: what was sent counts
                raise(Signal::SIGKILL).unwrap();
            }
            1 => {
                assert_eq!(names, ["a", "b"]);
                assert_eq!(text_of(&kept[0].1), "this is a");
                assert_eq!(text_of(&kept[1].1), "this is b");
                fdstore::remove("a").unwrap();
                std::process::exit(7);
            }
            2 => {
                assert_eq!(names, ["b"]);
                assert_eq!(text_of(&kept[0].1), "this is b");
                // told to stop before it is ready, it is not killed
                std::fs::write(directory.join("two"), "").unwrap();
                until(|| directory.join("stop").exists().then_some(()));
                serve_until_told_to_stop();
                fdstore::remove("b").unwrap();
                std::fs::write(directory.join("done"), "").unwrap();
            }
            _ => panic!("too many lives"),
        }
    });
    let (mut parent, directory) = scene.unwrap();
    until(|| directory.path().join("two").exists().then_some(()));
    signal_parent(directory.path(), Signal::SIGTERM);
    std::fs::write(directory.path().join("stop"), "").unwrap();
    assert_eq!(end(&mut parent), Some(0));
    assert!(directory.path().join("done").exists());
}

#[test]
fn one_that_keeps_nothing_ends_with_its_supervisor() {
    let scene = scene("one_that_keeps_nothing_ends_with_its_supervisor", |before, _| {
        assert_eq!(before, 0, "started again");
        fdstore::take().unwrap();
        fdstore::notify("READY=1").unwrap();
        std::process::exit(9);
    });
    let (mut parent, _directory) = scene.unwrap();
    assert_eq!(end(&mut parent), Some(9));
}

#[test]
fn a_supervisor_outlives_its_parent() {
    let scene = scene("a_supervisor_outlives_its_parent", |_, directory| {
        fdstore::take().unwrap();
        let file = tempfile::tempfile().unwrap();
        fdstore::store("a", file.as_fd()).unwrap();
        fdstore::notify("READY=1").unwrap();
        std::fs::write(directory.join("ready"), "").unwrap();
        until(|| directory.join("orphan").exists().then_some(()));
        // nobody listens any more
        assert!(fdstore::store("b", file.as_fd()).is_err());
        std::fs::write(directory.join("lived"), "").unwrap();
    });
    let (mut parent, directory) = scene.unwrap();
    until(|| directory.path().join("ready").exists().then_some(()));
    signal_parent(directory.path(), Signal::SIGKILL);
    parent.wait().unwrap();
    std::fs::write(directory.path().join("orphan"), "").unwrap();
    until(|| directory.path().join("lived").exists().then_some(()));
}

/// While the supervisor lives, it is not the keeper's turn. Nor does a supervisor that does not know its lifeline have one.
#[test]
fn a_keeper_takes_the_place_of_a_parent_that_dies_with_its_supervisor() {
    let name = "a_keeper_takes_the_place_of_a_parent_that_dies_with_its_supervisor";
    let scene = scene(name, |before, directory| {
        let kept = fdstore::take().unwrap();
        let names: Vec<_> = kept.iter().map(|(name, _)| name.as_str()).collect();
        match before {
            0 => {
                assert_eq!(names, [keeper::LIFELINE, keeper::TURN]);
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "for life").unwrap();
                fdstore::store("a", file.as_fd()).unwrap();
                fdstore::store("b", file.as_fd()).unwrap();
                fdstore::remove("b").unwrap();
                fdstore::notify(&format!("READY=1\n{}", keeper::KNOWN)).unwrap();
                // what was said counts
                raise(Signal::SIGKILL).unwrap();
            }
            1 | 2 => {
                assert_eq!(names, ["a", keeper::LIFELINE, keeper::TURN]);
                fdstore::notify(&format!("READY=1\n{}", keeper::KNOWN)).unwrap();
                std::fs::write(directory.join(format!("ready-{before}")), "").unwrap();
                std::thread::sleep(LIMIT);
            }
            3 => {
                assert_eq!(names, ["a", keeper::LIFELINE, keeper::TURN]);
                assert_eq!(text_of(&kept[0].1), "for life");
                fdstore::remove("a").unwrap();
                std::fs::write(directory.join("done"), "").unwrap();
            }
            _ => panic!("too many lives"),
        }
    });
    let (mut parent, directory) = scene.unwrap();
    let directory = directory.path();
    let exists = |name: &str| until(|| directory.join(name).exists().then_some(()));
    let supervisor = || kill(pid(directory, "supervisor"), Signal::SIGKILL).unwrap();
    exists("ready-1");
    // the parent first: its supervisor goes on
    signal_parent(directory, Signal::SIGKILL);
    parent.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(std::fs::read(directory.join("lives")).unwrap().len(), 2, "it is not dead");
    supervisor();
    exists("ready-2");
    // then the other way round, and at once: its parent is the one that was the keeper
    let second = pid(directory, "parent");
    assert_ne!(i64::from(parent.id()), i64::from(second.as_raw()));
    kill(second, Signal::SIGSTOP).unwrap();
    supervisor();
    kill(second, Signal::SIGKILL).unwrap();
    exists("done");
    let third = pid(directory, "parent");
    assert_ne!(third, second);
    // nothing is left: parent and keeper end
    until(|| kill(third, None).is_err().then_some(()));
}

/// Two keepers see the end of their lifelines: it is the turn of one of them.
#[test]
fn one_keeper_takes_the_place() {
    let turn = keeper::turn().unwrap();
    let kept = || vec![(keeper::TURN.to_owned(), turn.try_clone().unwrap())];
    assert!(keeper::is_our_turn(&mut kept()));
    assert!(!keeper::is_our_turn(&mut kept()));
    assert!(keeper::is_our_turn(&mut Vec::new()), "alone");
}

#[test]
fn crash_loops_are_slowed_down() {
    let mut delay = Duration::ZERO;
    let mut sum = Duration::ZERO;
    for _ in 0..20 {
        delay = longer(delay);
        sum += delay;
    }
    assert_eq!(delay, BACK_OFF.1);
    assert!(sum < Duration::from_secs(90));
}
