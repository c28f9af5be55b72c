//! Readers as processes of their own, with a hard time-out: `hydrant-access` and what it said.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

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

/// How long a reader may take: longer than the daemon's deadline, which is 120 seconds.
pub const PATIENCE: Duration = Duration::from_secs(140);

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

/// Starts one for each kind of access, each on a file of its own.
pub fn start_each(kinds: &[Kind], files: &[(PathBuf, PathBuf)]) -> Result<Vec<Running>> {
    let pairs = kinds.iter().zip(files);
    pairs.map(|(kind, (file, truth))| start(*kind, file, truth)).collect()
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

/// Readers that go through files again and again and compare every byte, until they are told to finish.
#[derive(Debug)]
pub struct Load {
    over: Arc<AtomicBool>,
    readers: Vec<JoinHandle<Result<usize>>>,
}

impl Load {
    /// Splits the files among `readers`; each takes one kind of access after the other.
    #[must_use]
    pub fn start(readers: usize, kinds: &'static [Kind], files: &[(PathBuf, PathBuf)]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let share = files.len().div_ceil(readers.max(1)).max(1);
        let start = |files: &[(PathBuf, PathBuf)]| {
            let (over, files) = (Arc::clone(&over), files.to_vec());
            thread::spawn(move || read_on(&over, kinds, &files))
        };
        let readers = files.chunks(share).map(start).collect();
        Self { over, readers }
    }

    /// Ends them. The number of reads, or what the first of them got that was not right.
    pub fn finish(mut self) -> Result<usize> {
        self.over.store(true, Ordering::Relaxed);
        let ends = self
            .readers
            .drain(..)
            .map(|reader| reader.join().unwrap_or_else(|_| bail!("a reader's thread panicked")));
        ends.sum()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn read_on(over: &AtomicBool, kinds: &[Kind], files: &[(PathBuf, PathBuf)]) -> Result<usize> {
    for (reads, ((file, truth), kind)) in files.iter().cycle().zip(kinds.iter().cycle()).enumerate()
    {
        if over.load(Ordering::Relaxed) {
            return Ok(reads);
        }
        let got = access(*kind, file, truth)?;
        if got != End::Right {
            over.store(true, Ordering::Relaxed);
            bail!("{kind:?} of {} after {reads} reads: {got:?}", file.display());
        }
    }
    bail!("no files, or no kinds of access")
}

/// Many readers at once. Killed when dropped.
#[derive(Debug)]
pub struct Crowd {
    readers: Vec<Child>,
}

impl Crowd {
    /// Starts one reader for each file and its truth.
    pub fn start(kind: Kind, files: &[(PathBuf, PathBuf)]) -> Result<Self> {
        let program = built("hydrant-access")?;
        let name = kind.to_possible_value().context("a kind without a name")?;
        let mut crowd = Self { readers: Vec::with_capacity(files.len()) };
        for (file, truth) in files {
            let mut command = Command::new(&program);
            command.arg(name.get_name()).arg(file).arg("--truth").arg(truth);
            command.args(["--time-out-secs", &PATIENCE.as_secs().to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            crowd.readers.push(command.spawn().context("can't start a reader")?);
        }
        Ok(crowd)
    }

    /// How many have not ended.
    pub fn running(&mut self) -> usize {
        let running = |reader: &mut Child| matches!(reader.try_wait(), Ok(None));
        self.readers.iter_mut().map(running).filter(|running| *running).count()
    }

    /// Waits until all have ended; an error unless all were right.
    pub fn expect_right(mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE + Duration::from_secs(10);
        while self.running() > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let running = self.running();
        let mut ends = std::collections::BTreeMap::<String, usize>::new();
        for reader in &mut self.readers {
            let status = reader.try_wait()?.map_or("still runs".to_owned(), |s| s.to_string());
            *ends.entry(status).or_default() += 1;
        }
        if running > 0 || ends.keys().any(|status| status != "exit status: 0") {
            bail!("not all readers were right: {ends:?}");
        }
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for reader in &mut self.readers {
            let _ = reader.kill();
            let _ = reader.wait();
        }
    }
}
