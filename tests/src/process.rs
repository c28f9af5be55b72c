//! Children with a hard time-out, and children that don't outlive the test.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::guest;

/// How long a child may take when the test says nothing else.
pub const TIME_OUT: Duration = Duration::from_secs(120);

/// What a child left behind.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text, without the last line break.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }

    /// The exit code, or 128 and the signal's number as a shell has it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

/// A command with a time-out. It runs in a process group of its own, which is killed as a whole.
pub struct Run {
    command: Command,
    time_out: Duration,
    input: Vec<u8>,
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.command.fmt(f)
    }
}

impl Run {
    #[must_use]
    pub fn new(mut command: Command) -> Self {
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, time_out: TIME_OUT, input: Vec::new() }
    }

    /// `program` with `arguments`.
    #[must_use]
    pub fn program(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments);
        Self::new(command)
    }

    /// A script for `sh -euc`, with `arguments` as `$1` and so on.
    #[must_use]
    pub fn shell(script: &str, arguments: &[&Path]) -> Self {
        let mut command = Command::new("sh");
        command.args(["-euc", script, "sh"]).args(arguments);
        Self::new(command)
    }

    #[must_use]
    pub fn time_out(mut self, time_out: Duration) -> Self {
        self.time_out = time_out;
        self
    }

    /// Bytes for standard input, which is empty otherwise.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    #[must_use]
    pub fn current_dir(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it; see [`Running`].
    pub fn start(mut self) -> Result<Running> {
        let stdin = if self.input.is_empty() { Stdio::null() } else { Stdio::piped() };
        let shown = format!("{:?}", self.command);
        let started = Instant::now();
        let mut child =
            self.command.stdin(stdin).spawn().with_context(|| format!("can't start {shown}"))?;
        let group = Pid::from_raw(child.id().cast_signed());
        let (first_output, stdout) = gather(child.stdout.take());
        let (_, stderr) = gather(child.stderr.take());
        if let Some(mut pipe) = child.stdin.take() {
            let input = self.input;
            // A child that doesn't read its input closes the pipe: not an error here.
            thread::spawn(move || pipe.write_all(&input));
        }
        let (send, exit) = mpsc::channel();
        thread::spawn(move || send.send(child.wait()));
        let time_out = guest::patience(self.time_out);
        Ok(Running { shown, group, exit, first_output, stdout, stderr, started, time_out })
    }

    /// Runs it to its end, or kills its group at the time-out, which is an error.
    pub fn output(self) -> Result<Output> {
        self.start()?.wait()
    }

    /// Runs it; an exit code other than 0 is an error with what it wrote to standard error.
    pub fn check(self) -> Result<Output> {
        let shown = format!("{self:?}");
        let output = self.output()?;
        if !output.status.success() {
            bail!(
                "{shown}: {}\n{}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(output)
    }
}

type Gathered = mpsc::Receiver<Vec<u8>>;

/// When the first of it came, and all of it.
fn gather(pipe: Option<impl Read + Send + 'static>) -> (mpsc::Receiver<Instant>, Gathered) {
    let (send, receive) = mpsc::channel();
    let (send_first, first) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = vec![0; 4096];
        if let Some(mut pipe) = pipe {
            let count = pipe.read(&mut bytes).unwrap_or(0);
            bytes.truncate(count);
            if count > 0 {
                let _ = send_first.send(Instant::now());
                // What came before an error is what there is.
                let _ = pipe.read_to_end(&mut bytes);
            }
        } else {
            bytes.clear();
        }
        send.send(bytes)
    });
    (first, receive)
}

/// A child that runs. Dropped, it is killed with its group.
pub struct Running {
    shown: String,
    group: Pid,
    exit: mpsc::Receiver<io::Result<ExitStatus>>,
    first_output: mpsc::Receiver<Instant>,
    stdout: Gathered,
    stderr: Gathered,
    started: Instant,
    time_out: Duration,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("command", &self.shown).field("pid", &self.group).finish()
    }
}

impl Running {
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.group
    }

    /// Waits until it writes something to standard output; gives when that was. To be asked once.
    pub fn first_output(&self) -> Result<Instant> {
        let left = self.time_out.saturating_sub(self.started.elapsed());
        let first = self.first_output.recv_timeout(left);
        first.with_context(|| format!("{} says nothing", self.shown))
    }

    /// Waits for its end. The time-out counts from its start.
    pub fn wait(self) -> Result<Output> {
        let left = self.time_out.saturating_sub(self.started.elapsed());
        let Ok(status) = self.exit.recv_timeout(left) else {
            let _ = killpg(self.group, Signal::SIGKILL);
            let stderr = self.stderr.recv_timeout(Duration::from_secs(2)).unwrap_or_default();
            bail!(
                "{}: not done after {:?}, killed\n{}",
                self.shown,
                self.time_out,
                String::from_utf8_lossy(&stderr)
            );
        };
        let elapsed = self.started.elapsed();
        // A grandchild may still hold the pipes: what it writes is not waited for.
        let patience = Duration::from_secs(5);
        Ok(Output {
            status: status.with_context(|| format!("can't wait for {}", self.shown))?,
            stdout: self.stdout.recv_timeout(patience).unwrap_or_default(),
            stderr: self.stderr.recv_timeout(patience).unwrap_or_default(),
            elapsed,
        })
    }

    /// Whether it has not ended within `time`. A child that has ended can still be waited for.
    #[must_use]
    pub fn still_runs_after(&self, time: Duration) -> bool {
        thread::sleep(time);
        alive(self.group)
    }
}

/// Whether the process is there and no zombie. Its first thread may be one before the others have ended.
#[must_use]
pub fn alive(pid: Pid) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.flatten().any(|thread| {
        std::fs::read_to_string(thread.path().join("stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
    })
}

/// The last lines of a log, or none where there is no log.
#[must_use]
pub fn last_lines(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

impl Drop for Running {
    fn drop(&mut self) {
        // Not yet waited for: the thread that waits has the child, so the number is still its own.
        if matches!(self.exit.try_recv(), Err(mpsc::TryRecvError::Empty)) {
            let _ = killpg(self.group, Signal::SIGKILL);
        }
    }
}

/// A server process of a test: killed with its group when dropped, and when the test dies.
#[derive(Debug)]
pub struct Leashed(Child);

impl Leashed {
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }

    /// The exit status if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }

    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    /// Waits for its end, at most so long.
    pub fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let patience = guest::patience(patience);
        let deadline = Instant::now() + patience;
        loop {
            let ended = self.ended();
            if ended.is_some() || Instant::now() > deadline {
                return ended;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Leashed {
    fn drop(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

type SpawnRequest = (Command, Sender<io::Result<Child>>);

/// Starts a server. Should the test program die, the server gets SIGKILL.
pub fn leash(mut command: Command) -> Result<Leashed> {
    static SPAWNER: OnceLock<Mutex<Sender<SpawnRequest>>> = OnceLock::new();
    // The kernel sends the signal when the *thread* that forked ends: tests' threads end with the
    // test, so the fork is made by one that never does.
    let spawner = SPAWNER.get_or_init(|| {
        let (send, receive) = mpsc::channel::<SpawnRequest>();
        thread::spawn(move || {
            for (mut command, answer) in receive {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(send)
    });
    let shown = format!("{command:?}");
    command.process_group(0);
    // SAFETY: the closure runs between fork and exec and makes a single system call.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(Some(Signal::SIGKILL)).map_err(io::Error::from)
        });
    }
    let (send, receive) = mpsc::channel();
    let sent = spawner.lock().map(|spawner| spawner.send((command, send)).is_ok());
    if !matches!(sent, Ok(true)) {
        bail!("the thread that starts servers is gone");
    }
    let child = receive.recv().context("the thread that starts servers is gone")?;
    Ok(Leashed(child.with_context(|| format!("can't start {shown}"))?))
}

/// The programs among `programs` that are not installed, as an error that names their packages.
pub fn require(programs: &[(&str, &str)]) -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = || path.split(':').chain(["/usr/sbin", "/sbin", "/usr/local/sbin"]);
    for (program, package) in programs {
        if !places().any(|place| Path::new(place).join(program).exists()) {
            bail!("{program} is not installed (Debian: apt-get install {package})");
        }
    }
    Ok(())
}

/// Does `probe` every 20 ms until it gives something.
pub fn until<T>(what: &str, patience: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let patience = guest::patience(patience);
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {patience:?} in vain: {what}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_code() {
        let output = Run::shell("cat; echo e >&2; exit 3", &[]).input("in").output().unwrap();
        assert_eq!((output.text().as_str(), output.code()), ("in", 3));
        assert_eq!(output.stderr, b"e\n");
        assert!(Run::program("false", &[]).check().is_err());
    }

    #[test]
    fn the_first_output() {
        let run = Run::shell("echo a; echo c; exit 3", &[]).start().unwrap();
        assert!(run.first_output().unwrap() <= Instant::now());
        assert_eq!(run.wait().unwrap().text(), "a\nc");
        let run = Run::shell("echo none >&2", &[]).start().unwrap();
        assert!(run.first_output().is_err());
        assert_eq!(run.wait().unwrap().stdout, b"");
    }

    #[test]
    fn the_whole_group_is_killed() {
        let started = Instant::now();
        let run = Run::shell("sleep 60 & sleep 60", &[]).time_out(Duration::from_millis(200));
        let error = run.output().unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_server_is_gone_with_its_handle() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let server = leash(command).unwrap();
        let pid = server.pid();
        drop(server);
        assert!(kill(pid, None).is_err());
    }
}
