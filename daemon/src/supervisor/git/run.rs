//! Running a command to its end.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::GitError;
use crate::sys::user;

/// So many bytes of what a command says are kept.
const MESSAGES: usize = 8192;

/// How long a command may take to end, and what it has started once it has been killed.
const PATIENCE: Duration = Duration::from_secs(5);
const REAPED: Duration = Duration::from_millis(300);
/// How often to look whether all have.
const LOOK: Duration = Duration::from_millis(5);

/// How a fetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    All,
    /// It was told to.
    Stopped,
}

/// Runs a command whose output is of no interest until it ends or `stopped` resolves. Then it is told to end,
/// and nobody that it has started is left. It ends with us, too.
pub(super) async fn run_until(
    mut command: Command,
    args: &[&str],
    stopped: &mut oneshot::Receiver<()>,
) -> Result<Fetched, GitError> {
    let failed = |source| GitError::Start { source };
    command.stdout(Stdio::null());
    user::end_with_us(&mut command);
    let mut child = command.spawn().map_err(failed)?;
    // a session of its own: its pid is the number of its process group
    let group = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let errors = tokio::spawn(last_of(child.stderr.take()));
    let ended = tokio::select! {
        status = child.wait() => Some(status.map_err(failed)?),
        _ = stopped => None,
    };
    match (ended, group) {
        (Some(status), _) if status.success() => Ok(Fetched::All),
        (Some(status), _) => Err(failure(args, &errors.await.unwrap_or_default(), status)),
        (None, Some(group)) => {
            // git removes its locks and what it has half written, then its children do
            killpg(group, Signal::SIGTERM).ok();
            if timeout(PATIENCE, child.wait()).await.is_err() {
                killpg(group, Signal::SIGKILL).ok();
                child.wait().await.map_err(failed)?;
            }
            // Nobody's children by now: whoever reaps them may take its time.
            let begin = Instant::now();
            while killpg(group, Signal::SIGKILL).is_ok() && begin.elapsed() < REAPED {
                tokio::time::sleep(LOOK).await;
            }
            Ok(Fetched::Stopped)
        }
        (None, None) => Ok(Fetched::Stopped),
    }
}

/// Runs a command, with this on its standard input, and gives what it printed. `args` are for errors.
pub(in super::super) async fn run(
    mut command: Command,
    args: &[&str],
    input: Option<&[u8]>,
) -> Result<Vec<u8>, GitError> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|source| GitError::Start { source })?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let read = async {
        let mut output = Vec::new();
        if let Some(mut stdout) = stdout {
            stdout.read_to_end(&mut output).await?;
        }
        Ok(output)
    };
    let errors = last_of(child.stderr.take());
    let feed = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // a command that doesn't read it all says why by itself
            stdin.write_all(input).await.ok();
        }
    };
    let (output, errors, ()) = tokio::join!(read, errors, feed);
    let output = output.map_err(|source| GitError::Start { source })?;
    let status = child.wait().await.map_err(|source| GitError::Start { source })?;
    if status.success() { Ok(output) } else { Err(failure(args, &errors, status)) }
}

/// Reads a stream of messages to its end and keeps the last of them: origins have a say in how much
/// git and ssh print.
pub(in super::super) async fn last_of(stream: Option<impl AsyncRead + Unpin>) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    let Some(mut stream) = stream else { return String::new() };
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(buffer.get(..length).unwrap_or_default());
        let surplus = kept.len().saturating_sub(MESSAGES);
        kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Runs a command and passes on its lines of progress.
pub(super) async fn run_with_progress(
    mut command: Command,
    name: &str,
    progress: &mut impl FnMut(&str),
) -> Result<(), GitError> {
    command.stdout(Stdio::null());
    let mut child = command.spawn().map_err(|source| GitError::Start { source })?;
    let mut errors = String::new();
    if let Some(stderr) = child.stderr.take() {
        let mut stderr = BufReader::new(stderr);
        let mut line = Vec::new();
        while let Ok(chunk) = stderr.fill_buf().await {
            // progress is rewritten in place with carriage returns
            let end = chunk.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
            let (taken, last) = (end.map_or(chunk.len(), |end| end + 1), chunk.is_empty());
            let room = MESSAGES.saturating_sub(line.len());
            line.extend(chunk.iter().take(taken.min(room)));
            stderr.consume(taken);
            if end.is_none() && !last {
                continue;
            }
            let text = String::from_utf8_lossy(&line);
            let part = text.trim();
            if part.contains('%') || part.starts_with("remote: ") {
                progress(part);
            } else if !part.is_empty() && errors.len() < MESSAGES {
                errors.push_str(part);
                errors.push('\n');
            }
            if last {
                break;
            }
            line.clear();
        }
    }
    let status = child.wait().await.map_err(|source| GitError::Start { source })?;
    if status.success() { Ok(()) } else { Err(failure(&[name], &errors, status)) }
}

fn failure(args: &[&str], stderr: &str, status: std::process::ExitStatus) -> GitError {
    let stderr = stderr.trim();
    let message = if stderr.is_empty() { status.to_string() } else { stderr.to_owned() };
    let options = args.iter().position(|arg| *arg == "--").unwrap_or(args.len());
    let command = args[..options].iter().find(|arg| !arg.starts_with('-') && !arg.contains('='));
    GitError::Failed { command: command.unwrap_or(&"").to_string(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_have_a_bound() {
        let mut command = Command::new("sh");
        let script = "yes remote: x | head -c 1000000 >&2; echo 50% >&2; echo fatal: y >&2; exit 1";
        command.args(["-c", script]).stderr(Stdio::piped());
        let mut lines = 0;
        let error = run_with_progress(command, "clone", &mut |_| lines += 1).await.unwrap_err();
        assert!(lines > 1000, "{lines}");
        assert_eq!(error.to_string(), "`git clone` failed: fatal: y");
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; yes | head -c 1000000 >&2; echo fatal: z >&2; exit 1"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let error = run(command, &["x"], None).await.unwrap_err().to_string();
        assert!(error.ends_with("fatal: z") && error.len() < 2 * MESSAGES, "{}", error.len());
    }
}
