use std::io::{Read, Seek, Write};
use std::time::{Duration, Instant};

use super::*;
use crate::sys::test_support::runs;

fn shell(script: &str) -> Spawn {
    Spawn::program(Path::new("/bin/sh")).argument("-c").argument(script)
}

/// Runs a script and gives what it wrote to fd 3.
fn output(spawn: impl FnOnce(OwnedFd) -> Spawn) -> (String, i32) {
    let mut file = tempfile::tempfile().unwrap();
    let mut child = spawn(file.try_clone().unwrap().into()).start().unwrap();
    let status = child.wait_blocking().unwrap();
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    (text, status.code().unwrap_or(-1))
}

#[test]
fn a_child_has_its_fds_and_nothing_else() {
    // Without close-on-exec, as a careless library would leave it.
    let leak = std::fs::File::open("/dev/zero").unwrap();
    nix::fcntl::fcntl(&leak, nix::fcntl::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let mut given = tempfile::tempfile().unwrap();
    given.write_all(b"given").unwrap();
    given.rewind().unwrap();
    let script = "cat <&4 >&3; fd=0; while [ $fd -lt 200 ]; do \
        [ -e /proc/$$/fd/$fd ] && echo \" $fd\" >&3; fd=$((fd + 1)); done; echo error >&2";
    let (text, status) =
        output(|out| shell(script).inherit(&["PATH"]).fd(out).fd(given).stderr(writer));
    let fds = text.strip_prefix("given").map(|fds| fds.split_whitespace().collect::<Vec<_>>());
    assert_eq!((fds, status), (Some(vec!["0", "1", "2", "3", "4"]), 0));
    let mut error = String::new();
    reader.read_to_string(&mut error).unwrap();
    assert_eq!(error, "error\n");
}

#[test]
fn environment_limits_directory_and_session_are_as_documented() {
    let script = "exec >&3; /usr/bin/env | /usr/bin/sort; pwd; umask; ulimit -Sn; ulimit -Hn; echo $$; /bin/ps -o sid= -p $$";
    let (text, _) = output(|out| shell(script).variable("A", "b c").fd(out));
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    assert!(lines.contains(&"A=b c"), "{text}");
    assert!(!text.contains("HOME=") && !text.contains("PATH="), "{text}");
    assert!(text.contains("\n/\n0022\n"), "{text}");
    let [.., soft, hard, pid, session] = lines[..] else { panic!("{text}") };
    assert_eq!((soft, pid), (hard, session));
}

#[test]
fn fds_in_any_order_do_not_get_into_each_others_way() {
    // Numbers that are each other's targets, whatever they are at the start.
    let files: Vec<OwnedFd> = (0..6)
        .map(|index| {
            let mut file = tempfile::tempfile().unwrap();
            write!(file, "{index}").unwrap();
            file.rewind().unwrap();
            file.into()
        })
        .collect();
    let script = "for fd in 4 5 6 7 8 9; do cat <&$fd >&3; done";
    let (text, _) = output(|out| {
        files.into_iter().rev().fold(shell(script).inherit(&["PATH"]).fd(out), Spawn::fd)
    });
    assert_eq!(text, "543210");
}

#[test]
fn what_can_not_be_started_is_an_error() {
    let error = Spawn::program(Path::new("/no/such/program")).start().unwrap_err();
    assert_eq!(error.to_string(), "start /no/such/program: exec");
    assert_eq!(error.source.raw_os_error(), Some(libc::ENOENT));
    let error = Spawn::program(Path::new("a\0b")).start().unwrap_err();
    assert_eq!(error.step, "prepare");
}

#[tokio::test]
async fn a_child_is_waited_for_and_can_be_killed() {
    let mut child = shell("exit 7").start().unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(7));
    assert_eq!(child.wait().await.unwrap().code(), Some(7));
    child.kill().unwrap();

    let mut child = shell("exec sleep 60").inherit(&["PATH"]).start().unwrap();
    assert!(child.try_wait().unwrap().is_none());
    let waiting = tokio::time::timeout(Duration::from_millis(50), child.wait()).await;
    assert!(waiting.is_err());
    child.kill().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(child.wait().await.unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_dropped_child_is_killed_and_leaves_no_zombie() {
    let child = shell("exec sleep 60").inherit(&["PATH"]).start().unwrap();
    let path = format!("/proc/{}", child.id());
    assert!(Path::new(&path).exists());
    drop(child);
    let start = Instant::now();
    while Path::new(&path).exists() {
        assert!(start.elapsed() < Duration::from_secs(10), "it lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const PARENT: &str = "HYDRANT_TEST_SPAWN_PARENT";

#[test]
fn children_die_with_their_parent_but_not_with_a_thread_of_it() {
    if let Ok(file) = std::env::var(PARENT) {
        // The parent: starts the child in a thread that ends, tells its pid, and waits to be killed.
        let start = || shell("exec sleep 60").inherit(&["PATH"]).start().unwrap();
        let child = std::thread::spawn(start).join().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        fs_err::write(file, child.id().to_string()).unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pid");
    let mut parent = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "sys::spawn::tests::children_die_with_their_parent_but_not_with_a_thread_of_it",
        ])
        .env(PARENT, &file)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let in_time = || assert!(start.elapsed() < Duration::from_secs(20), "too late");
    let pid: i32 = loop {
        match std::fs::read_to_string(&file).ok().and_then(|text| text.parse().ok()) {
            Some(pid) => break pid,
            None => in_time(),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(runs(pid), "it died with the thread");
    parent.kill().unwrap();
    parent.wait().unwrap();
    while runs(pid) {
        in_time();
        std::thread::sleep(Duration::from_millis(5));
    }
}
