//! Memory of the daemon's processes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::unistd::Pid;

use crate::daemon::Daemon;

/// Resident memory of a process in bytes, without pages that it shares with files
/// (`RssAnon` + `RssShmem` of proc(5)), and with them (`VmRSS`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    pub own_bytes: u64,
    pub all_bytes: u64,
}

/// Of one process; zero if it is gone.
#[must_use]
pub fn resident(pid: Pid) -> Resident {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        number.unwrap_or(0) * 1024
    };
    Resident { own_bytes: value("RssAnon:") + value("RssShmem:"), all_bytes: value("VmRSS:") }
}

/// What each process of the daemon is (`hydrantd`, `hydrantd worker`…), and its memory.
#[must_use]
pub fn of(daemon: &Daemon) -> Vec<(String, Resident)> {
    let name = |pid: &Pid| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = arguments.split(|b| *b == 0).map(String::from_utf8_lossy);
        let role = words.nth(1).unwrap_or_default().into_owned();
        if role.starts_with('-') { "supervisor".to_owned() } else { role }
    };
    daemon.pids().iter().map(|pid| (name(pid), resident(*pid))).collect()
}

/// Watches the daemon's processes, also those that come and go, until it is asked.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<String, Resident>>,
}

impl Watch {
    /// Looks every 20 ms at the processes that `daemon` has now and their descendants.
    #[must_use]
    pub fn start(daemon: &Daemon) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let roots = daemon.pids();
        let thread = thread::spawn(move || {
            let mut peaks = BTreeMap::<String, Resident>::new();
            while !stopped.load(Ordering::Relaxed) {
                for pid in descendants(&roots) {
                    let arguments =
                        std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    let mut words = arguments.split(|b| *b == 0).map(String::from_utf8_lossy);
                    let program = words.next().unwrap_or_default().into_owned();
                    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
                    let role = words.next().unwrap_or_default().into_owned();
                    let role = if role.starts_with('-') { String::new() } else { role };
                    let now = resident(pid);
                    let peak = peaks.entry(format!("{program} {role}")).or_default();
                    peak.own_bytes = peak.own_bytes.max(now.own_bytes);
                    peak.all_bytes = peak.all_bytes.max(now.all_bytes);
                }
                thread::sleep(Duration::from_millis(20));
            }
            peaks
        });
        Self { stop, thread }
    }

    /// The peak of each kind of process.
    #[must_use]
    pub fn peaks(self) -> BTreeMap<String, Resident> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

fn descendants(roots: &[Pid]) -> Vec<Pid> {
    let mut found = roots.to_vec();
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let children =
                std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
                let child = Pid::from_raw(child);
                if !found.contains(&child) {
                    found.push(child);
                }
            }
        }
    }
    found
}
