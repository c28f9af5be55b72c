//! What `hydrant queue` says of an event besides what is read: since when, by whom, with which worker.

use std::collections::HashMap;

use hydrant_api::QueueEvent;

use crate::chaos::MS;
use crate::chaos::killer::{Register, Role, stranger, worker};

/// An event that is not listed for so long, in nanoseconds, is over.
const FORGOTTEN: u64 = 150_000 * MS;

/// When the queue was asked for, and when it had been told.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    pub from: u64,
    pub to: u64,
}

/// What all looks have said of an event.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// It arrived in this time.
    earliest: u64,
    latest: u64,
    attempts: u32,
    seen: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Columns<'a> {
    register: &'a Register,
    /// A worker that is dead for longer, in nanoseconds, has no event.
    dead_for: u64,
    known: HashMap<u64, Known>,
    /// Events of which a worker was named.
    pub with_worker: u64,
    /// Of these, their workers were gone before anybody had seen them.
    pub unknown: u64,
}

impl<'a> Columns<'a> {
    #[must_use]
    pub fn new(register: &'a Register, dead_for: u64) -> Self {
        Self { register, dead_for, known: HashMap::new(), with_worker: 0, unknown: 0 }
    }

    /// What is wrong with an event, if anything is.
    pub fn check(&mut self, event: &QueueEvent, look: Look) -> Vec<String> {
        let results = [self.age(event, look), self.worker(event, look)];
        results.into_iter().filter_map(Result::err).collect()
    }

    /// To be called after each look.
    pub fn forget(&mut self, look: Look) {
        self.known.retain(|_, known| known.seen + FORGOTTEN > look.to);
    }

    /// The latest time at which an event can have arrived: its age grows as time goes by, whoever lists it. Milliseconds
    /// are cut off.
    pub fn arrival(event: &QueueEvent, look: Look) -> u64 {
        look.to.saturating_sub(event.age_ms * MS)
    }

    fn age(&mut self, event: &QueueEvent, look: Look) -> Result<(), String> {
        let earliest = look.from.saturating_sub((event.age_ms + 1) * MS);
        let latest = Self::arrival(event, look);
        let attempts = event.attempts;
        let now = Known { earliest, latest, attempts, seen: look.to };
        let before = self.known.insert(event.id, now);
        let Some(before) = before else { return Ok(()) };
        let both = Known {
            earliest: earliest.max(before.earliest),
            latest: latest.min(before.latest),
            ..now
        };
        if both.earliest > both.latest {
            let off = (both.earliest - both.latest) / MS;
            return Err(format!("its age is {off} ms off what it was at another look"));
        }
        self.known.insert(event.id, both);
        if attempts < before.attempts {
            return Err(format!("it had {} attempts before", before.attempts));
        }
        Ok(())
    }

    fn worker(&mut self, event: &QueueEvent, look: Look) -> Result<(), String> {
        let agree = match event.state.as_str() {
            "in_flight" => event.worker_pid.is_some() && event.attempts > 0,
            "waiting" => event.worker_pid.is_none(),
            _ => false,
        };
        if !agree {
            return Err("state, worker and attempts do not agree".to_owned());
        }
        let Some(pid) = event.worker_pid else { return Ok(()) };
        self.with_worker += 1;
        let shard = u64::from(event.shard);
        match self.register.life(pid, shard) {
            Some((_, None)) => Ok(()),
            Some((_, Some(died))) if died + self.dead_for >= look.from => Ok(()),
            // another one has its number by now
            Some(_) if is_worker_of(pid, shard) => Ok(()),
            Some((_, Some(died))) => {
                Err(format!("its worker had been dead for {} ms", (look.from - died) / MS))
            }
            // the register comes round every millisecond, or later
            None if is_worker_of(pid, shard) => Ok(()),
            None => match (worker(pid), stranger(pid)) {
                // it has ended, or does so at this moment
                (None, false) => {
                    self.unknown += 1;
                    Ok(())
                }
                (other, _) => Err(format!("that is no worker of this shard: {other:?}")),
            },
        }
    }

    /// At the end: workers that nobody knows are no more than a few.
    pub fn verdict(&self) -> Result<(), String> {
        let Self { with_worker, unknown, .. } = self;
        if *unknown > 10 + with_worker / 20 {
            return Err(format!("{unknown} of {with_worker} workers in the queue were unknown"));
        }
        Ok(())
    }
}

/// Whether a process that does not change is what `/proc` says, if it is there still.
pub fn process(event: &QueueEvent) -> Result<(), String> {
    let listed = &event.process;
    let read = |name| std::fs::read_to_string(format!("/proc/{}/{name}", listed.pid)).ok();
    if let (Some(comm), Some(found)) = (&listed.comm, read("comm"))
        && comm != found.trim_end()
    {
        return Err(format!("the process is {found:?}"));
    }
    let uid = read("status").and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?.to_owned();
        line.split_whitespace().next()?.parse::<u32>().ok()
    });
    if let (Some(uid), Some(found)) = (listed.uid, uid)
        && uid != found
    {
        return Err(format!("the process is of user {found}"));
    }
    Ok(())
}

/// A process that runs, by what it says of itself.
fn is_worker_of(pid: i32, shard: u64) -> bool {
    matches!(worker(pid), Some(Role::Worker(of) | Role::Spare(of)) if of == shard)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::killer::Seen;

    const SECOND: u64 = 1000 * MS;

    fn event(age_ms: u64, worker_pid: Option<i32>) -> QueueEvent {
        QueueEvent {
            id: 65,
            state: if worker_pid.is_some() { "in_flight" } else { "waiting" }.into(),
            age_ms,
            directory: None,
            path: None,
            layer: None,
            images: Vec::new(),
            segment: 1,
            offset: 0,
            count: 4096,
            process: hydrant_api::Process { pid: i32::MAX, ..Default::default() },
            shard: 1,
            worker_pid,
            attempts: u32::from(worker_pid.is_some()),
            origin: None,
            reason: None,
        }
    }

    fn look(at: u64) -> Look {
        Look { from: at * MS, to: (at + 20) * MS }
    }

    #[test]
    fn an_age_grows_with_the_time() {
        let register = Register::default();
        let mut columns = Columns::new(&register, SECOND);
        assert!(columns.check(&event(100, None), look(1000)).is_empty());
        assert!(columns.check(&event(600, None), look(1500)).is_empty());
        assert!(columns.check(&event(10_590, None), look(11_490)).is_empty());
        // counted anew, as from a worker's death
        let mut again = Columns::new(&register, SECOND);
        assert!(again.check(&event(600, None), look(1500)).is_empty());
        assert_eq!(again.check(&event(20, None), look(1600)).len(), 1);
        // standing still
        let mut still = Columns::new(&register, SECOND);
        assert!(still.check(&event(600, None), look(1500)).is_empty());
        assert_eq!(still.check(&event(600, None), look(1600)).len(), 1);
    }

    #[test]
    fn attempts_are_not_taken_back() {
        let register = Register::default();
        let mut columns = Columns::new(&register, SECOND);
        let twice = QueueEvent { attempts: 2, ..event(100, None) };
        assert!(columns.check(&twice, look(1000)).is_empty());
        assert_eq!(columns.check(&event(100, None), look(1000)).len(), 1);
    }

    #[test]
    fn a_worker_is_one_that_lives() {
        let role = Role::Worker(1);
        // numbers that no process has
        let (old, lives, others, nobody) = (i32::MAX - 1, i32::MAX - 2, i32::MAX - 3, i32::MAX - 4);
        let births = [
            Seen { role, pid: old, at: SECOND },
            Seen { role: Role::Spare(1), pid: lives, at: SECOND },
            Seen { role: Role::Worker(0), pid: others, at: SECOND },
        ];
        let deaths = [Seen { role, pid: old, at: 2 * SECOND }];
        let register = Register::of(&births, &deaths);
        let mut columns = Columns::new(&register, SECOND);
        let mut wrong = |pid: Option<i32>, at: u64| {
            columns.known.clear();
            columns.check(&event(0, pid), look(at)).len()
        };
        assert_eq!((wrong(Some(old), 2900), wrong(Some(old), 3100)), (0, 1));
        assert_eq!((wrong(Some(lives), 9000), wrong(None, 9000)), (0, 0));
        assert_eq!(wrong(Some(1), 9000), 1, "the first process");
        assert_eq!((wrong(Some(others), 9000), wrong(Some(nobody), 9000)), (0, 0));
        assert_eq!((columns.with_worker, columns.unknown), (6, 2));
        assert!(columns.verdict().is_ok());
        columns.unknown = 12;
        assert!(columns.verdict().is_err());
    }

    #[test]
    fn a_process_has_its_name() {
        let pid = std::process::id().cast_signed();
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap().trim_end().to_owned();
        let own = hydrant_api::Process {
            pid,
            comm: Some(comm),
            uid: Some(nix::unistd::getuid().as_raw()),
            cgroup: None,
            container: None,
        };
        let of = |process| super::process(&QueueEvent { process, ..event(0, None) });
        assert!(of(own.clone()).is_ok());
        assert!(of(hydrant_api::Process { comm: Some("init".into()), ..own.clone() }).is_err());
        assert!(of(hydrant_api::Process { uid: Some(12_345), ..own }).is_err());
    }

    #[test]
    fn state_worker_and_attempts_agree() {
        let register = Register::default();
        let mut columns = Columns::new(&register, SECOND);
        let odd = [
            QueueEvent { state: "in_flight".into(), ..event(0, None) },
            QueueEvent { state: "waiting".into(), ..event(0, Some(1)) },
            QueueEvent { attempts: 0, ..event(0, Some(1)) },
        ];
        for event in odd {
            columns.known.clear();
            assert_eq!(columns.check(&event, look(1)).len(), 1, "{event:?}");
        }
    }
}
