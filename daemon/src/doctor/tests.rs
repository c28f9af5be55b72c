use std::io;

use hydrant_api::doctor::{is_usable, to_text};

use super::*;

fn failed(checks: &[Check]) -> Vec<&str> {
    let failed = checks.iter().filter(|check| check.result != CheckResult::Ok);
    failed.map(|check| check.name.as_str()).collect()
}

#[test]
fn without_root_the_reason_is_said_and_nothing_is_left_behind() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let checks = run(&directory.path().join("not/there/yet"));
    let text = to_text(&checks);
    if !nix::unistd::Uid::effective().is_root() {
        assert!(!is_usable(&checks));
        let failed = failed(&checks);
        for name in ["privileges", "fanotify", "erofs", "overlayfs"] {
            assert!(failed.contains(&name), "{text}");
        }
        assert!(!failed.contains(&"git") && !failed.contains(&"sparse-files"), "{text}");
    }
    assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
#[ignore = "needs root"]
fn root_this_machine_can_run_hydrant() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let checks = run(directory.path());
    let text = to_text(&checks);
    assert!(is_usable(&checks), "{text}");
    let recommended = ["open-files", "free-space"];
    assert!(failed(&checks).iter().all(|name| recommended.contains(name)), "{text}");
    assert_eq!(checks.len(), 14);
    assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 0);
    let mounts = fs_err::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(".hydrant-doctor"), "{mounts}");
}

/// A file system that has none of it.
#[test]
#[ignore = "needs root"]
fn root_a_file_system_without_pre_content_events_is_told_as_such() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let checks = run(directory.path());
    let text = to_text(&checks);
    assert!(!is_usable(&checks), "{text}");
    let fanotify = checks.iter().find(|check| check.name == "fanotify").unwrap();
    let CheckResult::Failed { problem, remedy } = &fanotify.result else { panic!("{text}") };
    assert_eq!(problem, "cannot mark a file for pre-content events");
    assert!(remedy.contains("ext4, xfs or btrfs"), "{text}");
    assert!(fanotify.detail.contains("Operation not supported"), "{text}");
    assert_eq!(fs_err::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_program_that_hangs_is_given_up() {
    let start = std::time::Instant::now();
    let mut calls = 0;
    let mut command = std::process::Command::new("sleep");
    let result = room::run(command.arg("60"), || {
        calls += 1;
        if calls == 3 { Err(io::Error::other("enough")) } else { Ok(()) }
    });
    assert_eq!(result.unwrap_err().to_string(), "enough");
    assert!(start.elapsed() < std::time::Duration::from_secs(5));
}
