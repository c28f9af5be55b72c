//! Readers as processes of their own, with a hard time-out: `hydrant-access` and what it said.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::access::Kind;
use crate::daemon::built;
use crate::process::{Output, Run, Running};

/// How a reader ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Right,
    /// Wrong or missing bytes, in its words. Never all right.
    Wrong(String),
    /// An error number.
    Errno(i32),
    /// A signal: SIGBUS where a page could not be had.
    Signal(i32),
}

/// Seconds a reader may take unless the test says otherwise. Longer than the daemon's deadline.
pub const PATIENCE: Duration = Duration::from_secs(100);

/// `hydrant-access` on `file`, below `prefix` (such as `unshare -m`), to be run.
pub fn reader(prefix: &[&str], kind: Kind, file: &Path, truth: &Path) -> Result<Run> {
    let program = built("hydrant-access")?;
    let mut command = match prefix.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
        None => Command::new(program),
    };
    let name = kind.to_possible_value().context("a kind without a name")?;
    command.arg(name.get_name()).arg(file).arg("--truth").arg(truth);
    command.args(["--time-out-secs", &PATIENCE.as_secs().to_string()]);
    Ok(Run::new(command).time_out(PATIENCE + Duration::from_secs(10)))
}

/// Runs it to its end.
pub fn access(kind: Kind, file: &Path, truth: &Path) -> Result<End> {
    end(&reader(&[], kind, file, truth)?.output()?)
}

/// Starts it.
pub fn start(kind: Kind, file: &Path, truth: &Path) -> Result<Running> {
    reader(&[], kind, file, truth)?.start()
}

/// What an ended reader's output means.
pub fn end(output: &Output) -> Result<End> {
    let text = output.text();
    Ok(match output.code() {
        0 => End::Right,
        1 => End::Wrong(text),
        2 => {
            let number = text.split(' ').nth(1).and_then(|number| number.parse().ok());
            End::Errno(number.with_context(|| text.clone())?)
        }
        code if code > 128 => End::Signal(code - 128),
        code => bail!("exit code {code}: {text}{}", String::from_utf8_lossy(&output.stderr)),
    })
}

/// That a reader got the right bytes.
pub fn expect_right(kind: Kind, file: &Path, truth: &Path) -> Result<()> {
    match access(kind, file, truth)? {
        End::Right => Ok(()),
        end => bail!("{kind:?} of {}: {end:?}", file.display()),
    }
}
