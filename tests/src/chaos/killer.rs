//! SIGKILL for workers, supervisors and those who guard what these have, and the record of it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::now;
use crate::daemon::Daemon;
use crate::process::alive;
use crate::repository::Random;

/// Which process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Supervisor,
    /// Of this shard.
    Worker(u64),
    /// The one that is ready to be the worker of this shard, or is about to be.
    Spare(u64),
    /// The supervisor's.
    Parent,
    /// Would take the parent's place.
    Keeper,
}

/// A process that was first seen at a time.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    pub role: Role,
    pub pid: i32,
    pub at: u64,
}

/// A SIGKILL.
#[derive(Debug, Clone, Copy)]
pub struct Kill {
    pub role: Role,
    pub at: u64,
}

/// The daemon's processes: those that run, and when each came.
#[derive(Debug, Default)]
pub struct Register {
    running: Mutex<Vec<Seen>>,
    births: Mutex<Vec<Seen>>,
    /// When each was missed first.
    deaths: Mutex<Vec<Seen>>,
    kills: Mutex<Vec<Kill>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Register {
    #[must_use]
    pub fn running(&self) -> Vec<Seen> {
        lock(&self.running).clone()
    }

    #[must_use]
    pub fn births(&self) -> Vec<Seen> {
        lock(&self.births).clone()
    }

    #[must_use]
    pub fn kills(&self) -> Vec<Kill> {
        lock(&self.kills).clone()
    }

    /// When the process with this number was seen first as worker, or spare one, of a shard, and when it was missed
    /// first. The latest of that number.
    #[must_use]
    pub fn life(&self, pid: i32, shard: u64) -> Option<(u64, Option<u64>)> {
        let of_shard = |seen: &&Seen| {
            seen.pid == pid && [Role::Worker(shard), Role::Spare(shard)].contains(&seen.role)
        };
        let born = lock(&self.births).iter().rev().find(of_shard)?.at;
        let died = lock(&self.deaths).iter().rev().find(of_shard).map(|seen| seen.at);
        Some((born, died.filter(|died| *died >= born)))
    }

    /// Whether there was a kill in this time, of the supervisor or of anything.
    #[must_use]
    pub fn killed(&self, from: u64, to: u64, supervisor_only: bool) -> bool {
        let kills = lock(&self.kills);
        let within = |kill: &&Kill| from <= kill.at && kill.at <= to;
        kills.iter().rev().filter(within).any(|k| !supervisor_only || k.role == Role::Supervisor)
    }

    /// Keeps itself up to date until `over`, every millisecond.
    pub fn watch(&self, daemon: &Daemon, over: impl Fn() -> bool) {
        let mut known: HashMap<i32, Role> = HashMap::new();
        while !over() {
            let mut running = Vec::new();
            if let Some(family) = daemon.family() {
                let guards = [(Some(family.parent), Role::Parent), (family.keeper, Role::Keeper)];
                let family = guards.into_iter().chain([(family.supervisor, Role::Supervisor)]);
                let mut pids = Vec::new();
                for (pid, role) in family.filter_map(|(pid, role)| Some((pid?.as_raw(), role))) {
                    pids.push((pid, Some(role)));
                    if role == Role::Supervisor {
                        pids.extend(children(pid).into_iter().map(|pid| (pid, None)));
                    }
                }
                for (pid, role) in pids {
                    let role = role.or_else(|| match known.get(&pid) {
                        Some(known @ Role::Worker(_)) => Some(*known),
                        Some(Role::Spare(shard)) => Some(worker_or_spare(pid, *shard)),
                        _ => worker(pid),
                    });
                    let Some(role) = role else { continue };
                    let at = now();
                    if known.insert(pid, role) != Some(role) {
                        lock(&self.births).push(Seen { role, pid, at });
                    }
                    running.push(Seen { role, pid, at });
                }
            }
            known.retain(|pid, role| {
                let runs = running.iter().any(|seen| seen.pid == *pid);
                if !runs {
                    lock(&self.deaths).push(Seen { role: *role, pid: *pid, at: now() });
                }
                runs
            });
            *lock(&self.running) = running;
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills a process if it lives.
    fn kill(&self, seen: Seen) -> bool {
        // it may have become the worker meanwhile
        let role = match seen.role {
            Role::Spare(shard) => worker_or_spare(seen.pid, shard),
            role => role,
        };
        let at = now();
        if !alive(Pid::from_raw(seen.pid))
            || kill(Pid::from_raw(seen.pid), Signal::SIGKILL).is_err()
        {
            return false;
        }
        lock(&self.kills).push(Kill { role, at });
        true
    }
}

/// The children of all threads of a process.
fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let all: Vec<String> = lists.collect();
    all.iter().flat_map(|list| list.split_whitespace()).filter_map(|pid| pid.parse().ok()).collect()
}

/// The role of a process that says in its arguments that it is a worker. (It maps nothing lazy, so
/// looking at its arguments waits for nobody.)
#[must_use]
pub fn worker(pid: i32) -> Option<Role> {
    role(pid, &arguments(pid))
}

/// Whether a process runs a program that is no worker. One that has ended, or is about to, has no arguments:
/// `proc_pid_cmdline(5)`. They are read once, as it may end between two looks.
#[must_use]
pub fn stranger(pid: i32) -> bool {
    let arguments = arguments(pid);
    !arguments.is_empty() && role(pid, &arguments).is_none()
}

fn arguments(pid: i32) -> Vec<u8> {
    fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default()
}

fn role(pid: i32, arguments: &[u8]) -> Option<Role> {
    let mut words = arguments.split(|byte| *byte == 0);
    if words.nth(1)? != b"worker" {
        return None;
    }
    let shard = words.find_map(|word| word.strip_prefix(b"--shard="))?;
    Some(worker_or_spare(pid, str::from_utf8(shard).ok()?.parse().ok()?))
}

/// Which of the two it is: its name says so.
fn worker_or_spare(pid: i32, shard: u64) -> Role {
    let name = fs::read(Path::new("/proc").join(pid.to_string()).join("comm"));
    match name.is_ok_and(|name| name == b"hydrantd-worker\n") {
        true => Role::Worker(shard),
        false => Role::Spare(shard),
    }
}

/// How to kill.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub kills: usize,
    pub per_second: f64,
    /// This part of the kills is for the supervisor.
    pub supervisors: f64,
}

/// Kills until there were so many, or it is `over`. Spares the supervisor while `calm`.
pub fn run(plan: Plan, register: &Register, over: impl Fn() -> bool, calm: impl Fn() -> bool) {
    let mut random = Random::new(plan.seed);
    let mut done = 0;
    while done < plan.kills && !over() {
        // as if there was a chance of a kill at any moment
        let gap = -(1.0 - random.unit()).ln() / plan.per_second;
        thread::sleep(Duration::from_secs_f64(gap.min(2.0)));
        let running = register.running();
        let only = |role| running.iter().find(|seen| seen.role == role).copied();
        let supervisor = only(Role::Supervisor);
        let guards = only(Role::Parent).zip(only(Role::Keeper));
        let (workers, spares): (Vec<Seen>, Vec<Seen>) = running
            .iter()
            .filter(|seen| matches!(seen.role, Role::Worker(_) | Role::Spare(_)))
            .partition(|seen| matches!(seen.role, Role::Worker(_)));
        let twist = random.below(20);
        if random.unit() < plan.supervisors && !calm() {
            let Some(supervisor) = supervisor else { continue };
            if let (17.., Some((parent, keeper))) = (twist, guards) {
                // never all three: readers would get zeros
                let chosen: &[Seen] = match twist {
                    17 if !alive(Pid::from_raw(parent.pid)) => &[],
                    17 => &[keeper],
                    18 => &[parent],
                    _ if random.below(2) == 0 => &[parent, supervisor],
                    _ => &[supervisor, parent],
                };
                done += chosen.iter().filter(|seen| register.kill(**seen)).count();
                continue;
            }
            if twist == 0 {
                // a worker with it
                done += workers.iter().take(1).filter(|worker| register.kill(**worker)).count();
            }
            done += usize::from(register.kill(supervisor));
            if twist < 4 {
                // and the next, perhaps before it serves
                done += usize::from(kill_next(supervisor, register, &mut random, 30, &over));
            }
        } else if twist == 0 {
            done += workers.iter().filter(|worker| register.kill(**worker)).count();
        } else if twist == 1 && !spares.is_empty() {
            // nobody misses it
            done += usize::from(register.kill(spares[random.below(spares.len())]));
        } else if !workers.is_empty() {
            let chosen = workers[random.below(workers.len())];
            done += usize::from(register.kill(chosen));
            if twist < 4 {
                // and the next, perhaps while it is set up
                done += usize::from(kill_next(chosen, register, &mut random, 15, &over));
            }
        }
    }
}

/// Waits for the process that comes after `killed`, and up to `milliseconds` more.
fn kill_next(
    killed: Seen,
    register: &Register,
    random: &mut Random,
    milliseconds: usize,
    over: &impl Fn() -> bool,
) -> bool {
    for _ in 0..2000 {
        let is_next = |seen: &Seen| seen.role == killed.role && seen.pid != killed.pid;
        if let Some(next) = register.running().into_iter().find(is_next) {
            thread::sleep(Duration::from_micros(random.below(1000 * milliseconds) as u64));
            return register.kill(next);
        }
        if over() {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

#[cfg(test)]
impl Register {
    /// Of processes that were born and died.
    pub(super) fn of(births: &[Seen], deaths: &[Seen]) -> Self {
        let (births, deaths) = (Mutex::new(births.to_vec()), Mutex::new(deaths.to_vec()));
        Self { births, deaths, ..Self::default() }
    }
}
