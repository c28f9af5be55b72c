//! The part that runs in the guest: the disk as the cut has left it is repaired, looked at, and used until
//! the next cut.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use super::book::{Finding, Plan, Report, Work};
use super::{check, load, reboot};
use crate::daemon::Daemon;
use crate::process::{Output, Run};

const DEVICE: &str = "/dev/loop0";
const PLACE: &str = "/mnt/disk";
/// Nothing in the guest may take longer, on a machine with much else to do.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The guest's side of a round.
#[derive(Debug)]
pub struct Guest {
    pub plan: Plan,
    pub daemon: Daemon,
    report: Mutex<fs_err::File>,
}

/// Does what the plan in this file says.
pub fn run(plan: &Path) -> Result<()> {
    let plan: Plan = serde_json::from_slice(&fs_err::read(plan)?)?;
    let report = fs_err::OpenOptions::new().append(true).open(&plan.report)?;
    let run = Path::new("/run/powercut");
    fs_err::create_dir_all(run)?;
    fs_err::create_dir_all(PLACE)?;
    let mut daemon = Daemon::stopped(run, &Path::new(PLACE).join("state"));
    daemon.configure(&crate::guest::configuration())?;
    let mut guest = Guest { plan, daemon, report: Mutex::new(report) };
    let done = guest.round();
    if let Err(error) = &done {
        let text = format!("{error:#}\n{}{}", guest.daemon.log_tail(60), what_waits());
        guest.tell(&Report::Failed(found(text, false)))?;
    }
    done
}

/// Who holds a lock on a file, and in what the processes of the daemon wait: `proc_locks(5)`, `proc_pid_stack(5)`.
fn what_waits() -> String {
    let script = "cat /proc/locks; for task in /proc/[0-9]*/task/*; do case $(cat $task/comm) in \
                  hydrantd*|catalog*|tokio*) echo \"$task $(cat $task/comm)\"; cat $task/stack;; esac; done";
    let output = Run::shell(script, &[]).time_out(PATIENCE).output();
    output.map(|output| output.text()).unwrap_or_default()
}

/// A finding. Whether the disk is on, a flush tells, which nothing in the guest answers in its place. (What was cached is
/// not lost any more then; but after a finding nobody looks at that.)
fn found(text: String, bytes: bool) -> Finding {
    let disk = std::fs::File::open(DEVICE).and_then(|device| device.sync_all()).is_ok();
    Finding { text, bytes, disk }
}

impl Guest {
    /// Writes a report, which has arrived when this returns.
    pub fn tell(&self, report: &Report) -> Result<()> {
        let line = serde_json::to_string(report)? + "\n";
        let mut file = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(line.as_bytes())?;
        file.sync_data()?;
        Ok(())
    }

    /// Something is wrong. The disk is asked after that: one that is still on has been on all the time.
    pub fn finding(&self, text: impl Into<String>) -> Result<()> {
        self.tell(&Report::Finding(found(text.into(), false)))
    }

    /// Bytes are wrong.
    pub fn wrong_bytes(&self, text: impl Into<String>) -> Result<()> {
        self.tell(&Report::Finding(found(text.into(), true)))
    }

    /// Where a tree is.
    #[must_use]
    pub fn tree(&self, name: &str) -> PathBuf {
        Path::new(PLACE).join("trees").join(name)
    }

    /// `hydrant ARGUMENTS`
    pub fn hydrant(&self, arguments: &[&str]) -> Result<Output> {
        self.daemon.hydrant(arguments)?.time_out(PATIENCE).check()
    }

    fn round(&mut self) -> Result<()> {
        // A loop device hands flushes on, as fsync(2) of the file; the guest kernel's own disks (ubd) drop them.
        // What it has in the page cache is lost at a cut like what the disk has in its own.
        let disk = self.plan.disk.to_string_lossy();
        Run::program("losetup", &[DEVICE, &disk]).time_out(PATIENCE).check()?;
        // the journal is replayed; what is then on the disk has to be sound
        self.mount().context("after the cut")?;
        Run::program("umount", &[PLACE]).time_out(PATIENCE).check()?;
        let check = self.plan.fs.check_command(DEVICE);
        let output = Run::shell(&check, &[]).time_out(PATIENCE).output()?;
        if !output.status.success() {
            let (out, err) = (&output.stdout, &output.stderr);
            let text = [String::from_utf8_lossy(out), String::from_utf8_lossy(err)].concat();
            self.finding(format!("{check}: {}\n{text}", output.status))?;
        }
        self.mount()?;
        for directory in ["state", "trees"] {
            fs_err::create_dir_all(Path::new(PLACE).join(directory))?;
        }
        self.daemon.start().context("after the cut")?;
        match self.plan.work {
            Work::Check => check::check(self)?,
            Work::CheckAndLoad => {
                check::check(self)?;
                return load::load(self);
            }
            Work::Clone => reboot::clone(self)?,
            Work::Status => {
                reboot::status(self)?;
                check::check(self)?;
            }
        }
        self.daemon.stop()?;
        Run::program("umount", &[PLACE]).time_out(PATIENCE).check()?;
        Run::program("losetup", &["--detach", DEVICE]).time_out(PATIENCE).check()?;
        Ok(())
    }

    fn mount(&self) -> Result<()> {
        let (kind, options) = self.plan.fs.mount_options();
        let mount = ["-t", kind, "-o", options, DEVICE, PLACE];
        Run::program("mount", &mount).time_out(PATIENCE).check()?;
        Ok(())
    }
}
