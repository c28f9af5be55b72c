//! What the service manager wants of us while we run: signs of life, and an end of one kind or the other.
//!
//! `systemctl restart` is a stop and a start for systemd, and both begin with the same SIGTERM. But its
//! descriptor store outlives a restart, and not a stop. So the two must end differently: before a
//! restart, what waits is left to the next supervisor and nothing is unmounted; before a stop, everything
//! is. Which of the two it is, is the type of the job that systemd works on.

use std::io;
use std::time::{Duration, Instant};

use tokio::process::Command as Process;
use tracing::{error, info, warn};

use super::shard::{Command, ShardHandle};
use crate::sys::readable::Readable;
use crate::sys::{fdstore, spawn};

/// How long systemd may take to say what it is doing.
const PATIENCE: Duration = Duration::from_secs(10);

/// A systemd that has not answered for so long is not there.
const SILENCE: Duration = Duration::from_secs(60);

/// Why we are to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nobody comes after us.
    Stop,
    /// Another supervisor does, and gets what the manager keeps.
    HandOver,
    /// This process becomes another supervisor.
    Replace,
    /// This process becomes the parent of another one, as its own is gone, which kept what a supervisor leaves.
    Parent,
}

/// When our own parent has ended, in whose keeping is what we leave: somebody else has to keep it then. Never, if the
/// manager is systemd, or if there is none.
pub async fn end_of_parent() {
    if fdstore::is_there() && !fdstore::is_systemd() {
        match wait_for_parent().await {
            Ok(()) => return,
            Err(error) => error!(%error, "can't watch the parent"),
        }
    }
    std::future::pending().await
}

async fn wait_for_parent() -> io::Result<()> {
    let parent = spawn::parent()?;
    // if it had ended before, that is another process
    if let Err(error) = fdstore::notify("STATUS=serving") {
        return if error.raw_os_error() == Some(libc::ECONNREFUSED) { Ok(()) } else { Err(error) };
    }
    Readable::new(parent)?.read(|| Ok(())).await
}

/// What SIGTERM means. In doubt, a stop: it leaves nothing unguarded.
pub async fn meaning_of_terminate() -> End {
    if !fdstore::is_systemd() {
        return End::Stop;
    }
    match is_restarting().await {
        Ok(true) => End::HandOver,
        Ok(false) => End::Stop,
        Err(error) => {
            warn!(%error, "can't ask systemd whether this is a restart: stopping");
            End::Stop
        }
    }
}

/// The service that this process belongs to.
pub fn own_unit() -> io::Result<String> {
    unit(&std::fs::read_to_string("/proc/self/cgroup")?)
        .ok_or_else(|| io::Error::other("this process is in no service"))
}

async fn is_restarting() -> io::Result<bool> {
    let unit = own_unit()?;
    let mut systemctl = Process::new("systemctl");
    systemctl.args(["list-jobs", "--no-legend", "--no-pager", "--plain", "--full"]);
    systemctl.env("LC_ALL", "C").stdin(std::process::Stdio::null()).kill_on_drop(true);
    let answer = tokio::time::timeout(PATIENCE, systemctl.output())
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if !answer.status.success() {
        let why = String::from_utf8_lossy(&answer.stderr).trim().to_owned();
        return Err(io::Error::other(format!("systemctl: {why}")));
    }
    Ok(has_restart(&String::from_utf8_lossy(&answer.stdout), &unit))
}

/// The service of a process by its `/proc/PID/cgroup`, which may be in a cgroup of its own below.
fn unit(cgroups: &str) -> Option<String> {
    // version 2, else systemd's own of version 1
    let line = |start| cgroups.lines().find_map(|line| line.strip_prefix(start));
    let in_service =
        |path: &str| path.split('/').find(|name| name.ends_with(".service")).map(str::to_owned);
    line("0::")
        .and_then(in_service)
        .or_else(|| in_service(cgroups.lines().find_map(|l| l.split_once(":name=systemd:"))?.1))
}

/// For a process that a supervisor leaves behind in a restart: asks whether there will be, or is, another
/// supervisor. Where systemd does not say for long, there will be none.
pub fn awaited() -> impl FnMut() -> bool {
    let unit = own_unit();
    let mut silent_since = None;
    move || {
        let Ok(unit) = &unit else { return false };
        let mut systemctl = std::process::Command::new("systemctl");
        systemctl.args(["show", "--property=ActiveState,Job", unit]);
        match systemctl.env("LC_ALL", "C").stdin(std::process::Stdio::null()).output() {
            Ok(output) if output.status.success() => {
                silent_since = None;
                goes_on(&String::from_utf8_lossy(&output.stdout))
            }
            answer => {
                error!(?answer, "can't ask systemd whether the service goes on");
                silent_since.get_or_insert_with(Instant::now).elapsed() < SILENCE
            }
        }
    }
}

/// What `systemctl show` says of a service: it is active in some way, or there is a job for it. Between the two halves
/// of a restart it is inactive, but the job is there all the time.
fn goes_on(properties: &str) -> bool {
    let mut job = properties.lines().filter_map(|line| line.strip_prefix("Job="));
    let mut state = properties.lines().filter_map(|line| line.strip_prefix("ActiveState="));
    job.any(|job| !["", "0"].contains(&job))
        || !state.any(|state| ["inactive", "failed"].contains(&state))
}

/// Lines of `systemctl list-jobs`: number, unit, type, state.
fn has_restart(jobs: &str, unit: &str) -> bool {
    jobs.lines().any(|line| {
        let mut columns = line.split_whitespace().skip(1);
        columns.next() == Some(unit) && columns.next().is_some_and(|kind| kind == "restart")
    })
}

/// Tells the manager again and again that the shards are not stuck, if it wants to know
/// (`WatchdogSec=`, sd_watchdog_enabled(3)).
pub async fn keep_watchdog_quiet(shards: Vec<ShardHandle>) {
    let Some(limit) = watchdog() else { return };
    info!(limit_secs = limit.as_secs_f32(), "the service manager watches");
    let mut tick = tokio::time::interval(limit / 4);
    loop {
        tick.tick().await;
        let mut stuck = None;
        for shard in &shards {
            // one that has ended, as in a stop, is not stuck
            let ping = shard.ask(|reply| Command::Ping { reply });
            if tokio::time::timeout(limit / 4, ping).await.is_err() {
                stuck = Some(shard.id);
            }
        }
        if let Some(shard) = stuck {
            error!(%shard, "a shard does not answer: the service manager will kill us");
            continue;
        }
        // it may have no room for more messages for a while
        let sent = tokio::task::spawn_blocking(|| fdstore::notify("WATCHDOG=1")).await;
        if let Ok(Err(error)) = sent {
            warn!(%error, "can't give the service manager a sign of life");
        }
    }
}

fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    let limit = number("WATCHDOG_USEC").filter(|limit| *limit > 0 && for_us)?;
    fdstore::is_there().then(|| Duration::from_micros(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_of_a_process() {
        let of = |text| unit(text);
        assert_eq!(of("0::/system.slice/hydrantd.service\n").unwrap(), "hydrantd.service");
        assert_eq!(of("0::/a.slice/h.service/supervisor\n").unwrap(), "h.service");
        let hybrid = "3:cpu:/\n1:name=systemd:/system.slice/hydrantd.service\n0::/\n";
        assert_eq!(of(hybrid).unwrap(), "hydrantd.service");
        assert_eq!(of("0::/user.slice/session-1.scope\n"), None);
        assert_eq!(of(""), None);
    }

    #[test]
    fn a_service_that_goes_on() {
        assert!(goes_on("ActiveState=activating\n"));
        assert!(goes_on("ActiveState=deactivating\nJob=17\n"));
        assert!(goes_on("ActiveState=inactive\nJob=17\n"));
        assert!(goes_on("Job=17\nActiveState=failed\n"));
        assert!(!goes_on("ActiveState=inactive\n"));
        assert!(!goes_on("Job=\nActiveState=failed\n"));
        assert!(!goes_on("Job=0\nActiveState=inactive\n"));
    }

    #[test]
    fn a_restart_among_the_jobs() {
        let jobs = "101 other.service    restart running\n102 hydrantd.service restart running\n";
        assert!(has_restart(jobs, "hydrantd.service"));
        assert!(!has_restart(jobs, "d.service"));
        assert!(!has_restart("7 hydrantd.service stop running\n", "hydrantd.service"));
        assert!(!has_restart("No jobs running.\n", "hydrantd.service"));
        assert!(!has_restart("", "hydrantd.service"));
    }
}
