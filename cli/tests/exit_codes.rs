//! What the command returns and says, with no daemon and with one that can't be started.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The command, alone in a directory: no `hydrantd` is beside it, and none in `PATH`.
struct Alone {
    root: TempDir,
}

impl Alone {
    fn new() -> Self {
        // A copy could be open for writing in a child that another test is just starting, and then
        // can't be run.
        let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::hard_link(env!("CARGO_BIN_EXE_hydrant"), root.path().join("hydrant")).unwrap();
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("hydrant"));
        command
            .args(args)
            .env_clear()
            .env("PATH", "/nonexistent")
            .env("HYDRANT_RUN_DIR", self.path("run"))
            .env("HYDRANT_STATE_DIR", self.path("state"))
            .current_dir(self.root.path());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// A program named `hydrantd` beside the command.
    fn daemon(&self, script: &str) {
        let path = self.path("hydrantd");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn error(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn reading_needs_a_daemon_and_starts_none() {
    let alone = Alone::new();
    alone.daemon("echo started > started");
    for args in [&["status"][..], &["ls", "--json"], &["queue"], &["queue", "show", "1"], &["stop"]]
    {
        let output = alone.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(output.stdout.is_empty());
        let said = error(&output);
        let socket = alone.path("run/hydrantd.sock");
        let expected = format!("error: no daemon runs: nobody listens at {}\n", socket.display());
        assert!(said.starts_with(&expected) && said.contains("\nhint: "), "{said}");
    }
    assert!(!alone.path("run").exists());
}

#[test]
fn wrong_usage() {
    let alone = Alone::new();
    for args in [&[][..], &["frobnicate"], &["umount"], &["clone", ""], &["clone", "https://"]] {
        let output = alone.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", error(&output));
    }
}

#[test]
fn a_daemon_that_can_not_be_started() {
    let alone = Alone::new();
    for args in [&["clone", "https://example.org/a"][..], &["mount", "a"], &["prefetch", "a"]] {
        let output = alone.run(args);
        let said = error(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.starts_with("error: ") && said.contains("\nhint: "), "{said}");
    }
}

#[test]
fn a_repository_that_does_not_exist() {
    let alone = Alone::new();
    let output = alone.run(&["clone", "no/such"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).starts_with("error: the repository no/such does not exist\nhint: "));
}

#[test]
fn completions_and_help_need_nothing() {
    let alone = Alone::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = alone.run(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0));
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.contains("prefetch") && !script.contains("\u{1b}"), "{shell}");
    }
    let help = String::from_utf8(alone.run(&["--help"]).stdout).unwrap();
    assert!(help.contains("umount") && !help.contains("daemonize"), "{help}");
}

#[test]
fn doctor_asks_the_daemons_program() {
    let alone = Alone::new();
    let state = alone.path("state");
    let check = |result: &str| {
        format!(
            r#"[ "$*" = "doctor --json --state-dir {}" ] &&
               echo '[{{"name":"erofs","severity":"required","detail":"tried",{result}}}]'"#,
            state.display()
        )
    };
    alone.daemon(&check(r#""result":"ok""#));
    let output = alone.run(&["doctor"]);
    assert_eq!(output.status.code(), Some(0), "{}", error(&output));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "ok      erofs  tried\n");
    alone.daemon(&check(r#""result":"failed","problem":"none","remedy":"get it""#));
    let output = alone.run(&["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("Hint: get it"));
    let output = alone.run(&["doctor", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("[\n"));
    alone.daemon("echo nonsense");
    assert_eq!(alone.run(&["doctor"]).status.code(), Some(1));
}

#[test]
#[ignore = "needs root"]
fn root_the_log_tells_why_a_daemon_did_not_start() {
    let alone = Alone::new();
    alone.daemon("echo \"$@\"; echo the reason >&2; exit 1");
    for _ in 0..2 {
        let output = alone.run(&["clone", "https://example.org/a"]);
        let said = error(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        let (state, run) = (alone.path("state"), alone.path("run"));
        let expected = format!(
            "error: the daemon did not start: it ended (exit status: 1)\n  \
             --standalone --state-dir {} --run-dir {}\n  the reason\nhint: ",
            state.display(),
            run.display()
        );
        assert!(said.starts_with(&expected), "{said}");
    }
}

#[test]
#[ignore = "needs root"]
fn root_a_started_daemon_is_on_its_own_and_waited_for() {
    let alone = Alone::new();
    // As one that finds another's lock: whoever listens then is used.
    alone.daemon(
        "read -r stat < /proc/$$/stat; echo \"$stat\" > $5/new; /bin/mv $5/new $5/stat; exit 75",
    );
    let child = alone
        .command(&["mount", "/srv/a"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stat = wait_for(&alone.path("run/stat"));
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    // proc_pid_stat(5): pid (comm) state ppid pgrp session tty_nr
    let pid = stat.split(' ').next().unwrap();
    assert_eq!((fields[2], fields[3], fields[4]), (pid, pid, "0"), "{stat}");

    std::thread::sleep(Duration::from_millis(300));
    let listener = UnixListener::bind(alone.path("run/hydrantd.sock")).unwrap();
    drop(listener.accept().unwrap());
    let (mut stream, _) = listener.accept().unwrap();
    let mut request = [0; 4096];
    let n = stream.read(&mut request).unwrap();
    assert!(request[..n].starts_with(b"POST /v1/mount "));
    let body = r#"{"code":"not_found","message":"no such tree"}"#;
    write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    drop(stream);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), error(&output)), (Some(1), "error: no such tree\n".into()));
}

fn wait_for(path: &Path) -> String {
    let start = Instant::now();
    loop {
        match fs::read_to_string(path) {
            Ok(text) => return text,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(10), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
