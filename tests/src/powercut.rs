//! Power cuts: a guest works on a [disk] that loses what was not flushed, its power is cut at a random
//! moment, and the next guest finds out what is left.
//!
//! A round is one boot: the guest lets the file system replay its journal, has it checked, starts the
//! daemon, compares every file of every tree with git's own checkout, asks git whether its repositories are
//! sound, looks for what users have written and synced; then it clones, removes, reads and writes, until the
//! disk is switched off at some write or flush. Some cuts come during the check, and so in the recovery from
//! the one before.
//!
//! [`book`]: what must be there. `check` and `load`: the guest's two halves.
//! Needs root (for FUSE) and the guest kernel (`tests/guest`).

pub mod book;
mod check;
pub mod disk;
mod guest;
mod load;
mod origins;
mod reboot;

use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::process::{Leashed, Run, leash, require};
use crate::repository::Random;
use crate::scratch::Scratch;
use book::{Book, Figures, Finding, Plan, Report, Work};
use disk::{Disk, Lost};

pub use guest::run as run_in_guest;
pub use reboot::reboot;

/// In bytes; sparse.
const DISK_SIZE: u64 = 640 << 20;
const CPUS: &str = "2";
/// How long one round may take, on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(400);

/// A file system below the state directory, as it is mounted in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fs {
    Ext4,
    Xfs,
    Btrfs,
    /// `data=writeback,nodelalloc`: after a cut, a file has blocks that were never written.
    Ext4Writeback,
}

impl Fs {
    /// Type, and options of the mount.
    #[must_use]
    pub fn mount_options(self) -> (&'static str, &'static str) {
        match self {
            Self::Ext4 => ("ext4", "defaults"),
            Self::Xfs => ("xfs", "defaults"),
            Self::Btrfs => ("btrfs", "defaults"),
            Self::Ext4Writeback => ("ext4", "data=writeback,nodelalloc,dioread_lock"),
        }
    }

    /// The program that finds damage, which changes nothing, for a shell.
    #[must_use]
    pub fn check_command(self, device: &str) -> String {
        match self {
            Self::Ext4 | Self::Ext4Writeback => format!("e2fsck -fn {device}"),
            Self::Xfs => format!("xfs_repair -n {device}"),
            Self::Btrfs => format!("btrfs check --readonly {device}"),
        }
    }

    fn make(self, image: &Path) -> Result<()> {
        fs_err::File::create(image)?.set_len(DISK_SIZE)?;
        let (program, package, options) = match self {
            Self::Ext4 | Self::Ext4Writeback => ("mkfs.ext4", "e2fsprogs", "-q -F"),
            Self::Xfs => ("mkfs.xfs", "xfsprogs", "-q"),
            Self::Btrfs => ("mkfs.btrfs", "btrfs-progs", "-q"),
        };
        require(&[(program, package)])?;
        Run::shell(&format!(r#"{program} {options} "$1""#), &[image]).check()?;
        Ok(())
    }
}

impl fmt::Display for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// A series of cuts.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub fs: Fs,
    pub cuts: u32,
    pub seed: u64,
    /// A cut comes at the latest when the load has gone on for so long.
    pub load: Duration,
}

/// What came of it. Nothing in it is wrong: that is an error.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    pub cuts: u32,
    /// Cuts during the check after another cut.
    pub early: u32,
    pub checks: u32,
    pub clones: u32,
    pub removals: u32,
    /// Writes of up to 4,096 bytes that were in the disk's cache at the cuts, and that got lost.
    pub cached: usize,
    pub lost: usize,
    /// Files that were read under load.
    pub read: u64,
    /// Errors that somebody had after the cut, of a disk that was off.
    pub after_the_cut: u64,
    pub checked: Figures,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { trees, files, bytes, user_files, complete_segments, .. } = self.checked;
        write!(
            f,
            "{} cuts ({} of them in a recovery), {} of {} cached writes lost; {} clones, {} removals, {} files \
             read under load; {} checks: {trees} trees, {files} files, {user_files} files of users, {bytes} bytes, \
             {complete_segments} complete segments: all right; {} errors without a disk",
            self.cuts,
            self.early,
            self.lost,
            self.cached,
            self.clones,
            self.removals,
            self.read,
            self.checks,
            self.after_the_cut,
        )
    }
}

impl Outcome {
    /// Takes a report in. What a guest has found is an error, whenever it is heard of.
    fn count(&mut self, report: &Report) -> Result<()> {
        match report {
            Report::Finding(found) | Report::Failed(found) if !found.counts() => {
                self.after_the_cut += 1;
            }
            Report::Finding(Finding { text, .. }) => bail!("{text}"),
            Report::Failed(Finding { text, .. }) => bail!("in the guest: {text}"),
            Report::Checked { figures, .. } => {
                self.checks += 1;
                self.checked += *figures;
            }
            Report::Cloned { .. } => self.clones += 1,
            Report::Removed { .. } => self.removals += 1,
            Report::Read(count) => self.read += count,
            Report::Cloning { .. }
            | Report::Removing { .. }
            | Report::Wrote { .. }
            | Report::Complete(_) => {}
        }
        Ok(())
    }
}

/// Everything on this side.
struct Rig {
    options: Options,
    random: Random,
    disk: Disk,
    book: Book,
    outcome: Outcome,
    /// How much of the report has been read.
    seen: u64,
    scratch: Scratch,
}

/// Cuts the power again and again. What is wrong is an error with the seed and the guest's words.
pub fn cut_power(options: Options, mut progress: impl FnMut(&str)) -> Result<Outcome> {
    let mut rig = Rig::new(options)?;
    for round in 0..=options.cuts {
        let begun = Instant::now();
        let what = rig
            .round(round)
            .with_context(|| format!("{}, seed {}, round {round}", options.fs, options.seed))?;
        progress(&format!(
            "{} round {round}: {what}, {:.1} s",
            options.fs,
            begun.elapsed().as_secs_f32()
        ));
    }
    Ok(rig.outcome)
}

/// A guest that runs.
struct Guest {
    process: Leashed,
    log: PathBuf,
}

impl Guest {
    /// Starts `hydrant-powercut ARGUMENTS` in the guest, which has these directories.
    fn boot(directories: [&Path; 2], arguments: &[&str]) -> Result<Self> {
        let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/run");
        let log = directories[0].join("guest.log");
        let output = fs_err::File::create(&log)?.into_parts().0;
        let mut command = Command::new(runner);
        command.args(["-t", "600", "-m", "1024", "-c", CPUS]);
        for directory in directories {
            command.arg("-w").arg(directory);
        }
        command.arg("--").arg(crate::daemon::built("hydrant-powercut")?).args(arguments);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Self { process: leash(command)?, log })
    }

    fn log(&self) -> String {
        let text = fs_err::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Ends it as a power cut does, once its disk is off.
    fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM);
        ensure!(
            self.process.wait(Duration::from_secs(60)).is_some(),
            "the guest is not to be killed"
        );
        Ok(())
    }

    /// Waits until it has turned itself off.
    fn wait(mut self) -> Result<()> {
        let status = self.process.wait(PATIENCE);
        ensure!(status.is_some_and(|status| status.success()), "guest: {status:?}\n{}", self.log());
        Ok(())
    }
}

impl Rig {
    fn new(options: Options) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "needs root, for FUSE");
        let scratch = Scratch::new("powercut")?;
        let image = scratch.path().join("image");
        options.fs.make(&image)?;
        let disk = Disk::new(&image, &scratch.make("disk")?)?;
        let origins = scratch.make("shared/origins")?;
        origins::make(&origins, options.seed)?;
        fs_err::File::create(scratch.path().join("shared/report"))?;
        Ok(Self {
            options,
            random: Random::new(options.seed),
            disk,
            book: Book::default(),
            outcome: Outcome::default(),
            seen: 0,
            scratch,
        })
    }

    /// Starts a guest with the disk.
    fn boot(&mut self, work: Work) -> Result<Guest> {
        let shared = self.scratch.path().join("shared");
        let plan = Plan {
            fs: self.options.fs,
            disk: self.disk.path().to_owned(),
            seed: self.random.number(),
            origins: shared.join("origins"),
            report: shared.join("report"),
            trees: self.book.trees.clone(),
            work,
        };
        let file = shared.join("plan");
        fs_err::write(&file, serde_json::to_vec(&plan)?)?;
        let arguments = ["guest", file.to_str().context("a directory of a test is UTF-8")?];
        let disk = self.scratch.path().join("disk");
        Guest::boot([&shared, &disk], &arguments)
    }

    /// Boots, and cuts the power, or not in the last one. Says what happened.
    fn round(&mut self, round: u32) -> Result<String> {
        let last = round == self.options.cuts;
        let guest = self.boot(if last { Work::Check } else { Work::CheckAndLoad })?;
        let early = round > 0 && !last && self.random.below(6) == 0;
        if early {
            self.cut_soon(7);
        }
        let from = self.disk.operations();
        let checks = self.outcome.checks;
        let checked = self.watch(guest, early, last)?;
        if last {
            return Ok("nothing but a check".into());
        }
        self.outcome.cuts += 1;
        let early = self.outcome.checks == checks;
        self.outcome.early += u32::from(early);
        let Lost { cached, lost } = self.disk.power_on(&mut self.random)?;
        self.outcome.cached += cached;
        self.outcome.lost += lost;
        let operations = self.disk.operations() - from;
        let when = if early { "in the recovery" } else { "under load" };
        let content = checked.present_bytes * 100 / checked.segment_bytes.max(1);
        Ok(format!(
            "{} trees, {} files, {content} % of their content still there; cut {when}, {operations} operations, {lost} of {cached} cached writes lost",
            checked.trees, checked.files
        ))
    }

    /// Cuts the power after some operations: a few as often as up to e^most of them.
    fn cut_soon(&mut self, most: u32) {
        let exponent = self.random.unit() * f64::from(most);
        self.disk.cut_after(exponent.exp() as u64 + 1);
    }

    /// Often soon, and as often when much has been done.
    fn cut_under_load(&mut self) {
        if self.random.below(2) == 0 {
            self.cut_soon(7);
        } else {
            let operations = 1 + self.random.below(4000);
            self.disk.cut_after(operations as u64);
        }
    }

    /// Reads reports until the power is cut, which it sees to. Gives what was checked.
    fn watch(&mut self, mut guest: Guest, early: bool, last: bool) -> Result<Figures> {
        let begun = Instant::now();
        // under load: once there is something to lose, as a rule
        let mut armed = false;
        let mut cut_at = None;
        let mut checked = Figures::default();
        loop {
            let ended = guest.process.ended();
            // before the reports: what has been reported by then comes now, or after its end
            let off = self.disk.is_off();
            for report in &self.reports()? {
                self.outcome.count(report).map_err(|found| anyhow!("{found}\n{}", guest.log()))?;
                match report {
                    Report::Checked { figures, .. } => {
                        checked = *figures;
                        armed |= !last && (checked.trees > 0 || self.random.below(4) == 0);
                    }
                    Report::Cloned { .. } => armed |= !last,
                    _ => {}
                }
                self.book.note(report);
            }
            if armed && cut_at.is_none() {
                cut_at = Some(Instant::now() + self.options.load);
                if !early {
                    self.cut_under_load();
                }
            }
            if off {
                let log = guest.log();
                guest.kill()?;
                // it has gone on for a moment
                for report in &self.reports()? {
                    self.outcome.count(report).map_err(|found| anyhow!("{found}\n{log}"))?;
                    if let Report::Checked { figures, .. } = report {
                        checked = *figures;
                    }
                    self.book.note(report);
                }
                return Ok(checked);
            }
            if ended.is_some() {
                if last {
                    guest.wait()?;
                    return Ok(checked);
                }
                bail!("the guest has ended by itself: {ended:?}\n{}", guest.log());
            }
            if !last && cut_at.is_some_and(|at| Instant::now() > at) {
                self.disk.cut();
            }
            ensure!(begun.elapsed() < PATIENCE, "the guest does not get on\n{}", guest.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// What was reported since the last time.
    fn reports(&mut self) -> Result<Vec<Report>> {
        let mut file = fs_err::File::open(self.scratch.path().join("shared/report"))?;
        file.seek(SeekFrom::Start(self.seen))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        // a line that is being written comes next time
        let end = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        self.seen += end as u64;
        let lines = text[..end].split(|b| *b == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                serde_json::from_slice(line)
                    .with_context(|| format!("report {:?}", String::from_utf8_lossy(line)))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_counts_unless_the_disk_was_off() {
        let found = |bytes, disk| Finding { text: "found".into(), bytes, disk };
        let mut outcome = Outcome::default();
        for report in [Report::Finding, Report::Failed] {
            assert!(outcome.count(&report(found(false, true))).is_err(), "read when it was off");
            assert!(outcome.count(&report(found(true, false))).is_err());
            assert!(outcome.count(&report(found(false, false))).is_ok());
        }
        assert_eq!(outcome.after_the_cut, 2);
    }
}
