//! Starting a daemon where none runs.

use std::env;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fs_err::{self as fs, File, OpenOptions};
use hydrant_api::{Directories, EXIT_ALREADY_RUNNING};
use nix::unistd::geteuid;

use crate::client::{Client, Unreachable};
use crate::failure::Failure;

/// How long a daemon may take until it listens.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often to look whether it does.
const LOOK: Duration = Duration::from_millis(20);
/// How long to wait before another one is started where the lock was taken.
const AGAIN: Duration = Duration::from_millis(250);
/// As much of the log as is shown.
const TAIL_LINES: usize = 10;
const TAIL_BYTES: u64 = 8 << 10;

/// Starts `hydrantd --standalone`, detached from this process and its terminal, and waits until it
/// answers. Several may do so at the same time: one daemon gets the lock, and all use that one.
pub async fn daemon(directories: &Directories) -> Result<Client, Failure> {
    if !geteuid().is_root() {
        return Err(Failure::unreachable("no daemon runs, and only root can start one")
            .hint("use sudo, or have an administrator start it: systemctl start hydrantd"));
    }
    let program = program("hydrantd")?;
    let failed = |error: std::io::Error| {
        Failure::unreachable(format!("can't start {}: {error}", program.display()))
    };
    fs::create_dir_all(&directories.run).map_err(failed)?;
    let mut log = OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .open(directories.log())
        .map_err(failed)?;
    let log_start = log.seek(SeekFrom::End(0)).map_err(failed)?;
    match wait(directories, || spawn(&program, directories, &log)).await {
        Ok(client) => Ok(client),
        Err(reason) => {
            let tail = tail(&mut log, log_start).unwrap_or_default();
            let log = directories.log();
            let message = match tail.last().and_then(|line| last_words(line)) {
                Some(words) => format!("the daemon did not start: {words}"),
                None => [format!("the daemon did not start: {reason}")]
                    .into_iter()
                    .chain(tail)
                    .collect::<Vec<_>>()
                    .join("\n  "),
            };
            let hint =
                format!("`hydrant doctor` tells what it needs; its whole log is {}", log.display());
            Err(Failure::unreachable(message).hint(hint))
        }
    }
}

/// Through `hydrant daemonize`, which makes a session of its own first.
fn spawn(program: &Path, directories: &Directories, log: &File) -> std::io::Result<Child> {
    let output = || log.file().try_clone().map(Stdio::from);
    Command::new(env::current_exe()?)
        .arg("daemonize")
        .arg(program)
        .arg("--standalone")
        .arg("--state-dir")
        .arg(&directories.state)
        .arg("--run-dir")
        .arg(&directories.run)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output()?)
        .stderr(output()?)
        .spawn()
}

/// Starts a daemon and waits until one answers. Where another one has the lock, that one is starting,
/// and will answer, or stopping, and then one can be started.
async fn wait(
    directories: &Directories,
    spawn: impl Fn() -> std::io::Result<Child>,
) -> Result<Client, String> {
    let start = Instant::now();
    let mut child = spawn().map_err(|error| error.to_string())?;
    loop {
        // Looked at before the socket: a daemon that listened before this one ended is found.
        let ended = child.try_wait().map_err(|error| error.to_string())?;
        match Client::connect(directories) {
            Ok(client) => return Ok(client),
            Err(Unreachable::NotRunning) => {}
            Err(error) => return Err(error.to_string()),
        }
        let locked = ended.is_some_and(|end| end.code() == Some(EXIT_ALREADY_RUNNING.into()));
        match ended {
            Some(status) if !locked => return Err(format!("it ended ({status})")),
            _ if start.elapsed() > PATIENCE => {
                return Err(match locked {
                    true => "another one has the lock, but does not answer".to_owned(),
                    false => format!("it did not answer within {} seconds", PATIENCE.as_secs()),
                });
            }
            Some(_) => {
                tokio::time::sleep(AGAIN).await;
                child = spawn().map_err(|error| error.to_string())?;
            }
            None => tokio::time::sleep(LOOK).await,
        }
    }
}

/// A program of ours: beside this one, else where `PATH` says.
pub fn program(name: &str) -> Result<PathBuf, Failure> {
    let beside = env::current_exe().ok().map(|own| own.with_file_name(name));
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).filter(|d| d.is_absolute()).map(|dir| dir.join(name));
    beside.into_iter().chain(in_path).find(|candidate| candidate.is_file()).ok_or_else(|| {
        Failure::unreachable(format!("there is no {name} beside this program or in PATH"))
            .hint("build both: cargo build --release")
    })
}

/// What a daemon says when it can't start, without the time and the place.
fn last_words(line: &str) -> Option<&str> {
    line.split_once(" ERROR hydrantd: ").map(|(_, words)| words)
}

/// The last lines that were written to the log since `start`.
fn tail(log: &mut File, start: u64) -> std::io::Result<Vec<String>> {
    let end = log.seek(SeekFrom::End(0))?;
    log.seek(SeekFrom::Start(start.max(end.saturating_sub(TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    log.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let skip = lines.len().saturating_sub(TAIL_LINES);
    Ok(lines.into_iter().skip(skip).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_logs_end_is_what_was_written_since() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("log");
        fs::write(&path, "old\n").unwrap();
        let mut log = OpenOptions::new().append(true).read(true).open(&path).unwrap();
        let start = log.seek(SeekFrom::End(0)).unwrap();
        for number in 0..15 {
            writeln!(log, "line {number}").unwrap();
        }
        let lines = tail(&mut log, start).unwrap();
        assert_eq!((lines.len(), lines[0].as_str()), (10, "line 5"));
        let lines = tail(&mut log, start + 100).unwrap();
        assert!(lines.iter().all(|line| line != "old"));
    }

    #[test]
    fn the_last_words() {
        let line = "2026-01-01T00:00:00.000000Z ERROR hydrantd: /x is on tmpfs";
        assert_eq!(last_words(line), Some("/x is on tmpfs"));
        assert_eq!(last_words("2026-01-01T00:00:00.000000Z  INFO hydrantd: hello"), None);
        assert_eq!(last_words("thread 'main' panicked at x.rs:1:1:"), None);
    }

    #[test]
    fn a_program_that_is_not_there() {
        let failure = program("no such hydrant program").unwrap_err();
        assert_eq!(failure.kind, crate::failure::Kind::Unreachable);
    }
}
