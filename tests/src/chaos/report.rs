//! What a run has shown, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::MS;
use super::killer::{Kill, Role, Seen};
use crate::bench::table::Table;

/// A run of one system. All but the last fields are counts.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub system: String,
    pub seed: u64,
    pub seconds: f64,
    pub readers: usize,
    pub worker_kills: usize,
    pub supervisor_kills: usize,
    /// Of the parent and the keeper.
    pub guard_kills: usize,
    pub reads: u64,
    /// Of files that nobody had asked for before.
    pub cold_reads: u64,
    pub bytes_compared: u64,
    /// Reads with bytes that are zero and should not be.
    pub zeros: u64,
    /// Reads with other bytes than there should be, or fewer.
    pub wrong: u64,
    /// Reads that failed while the origin was well, by errno.
    pub errors: BTreeMap<String, u64>,
    /// Reads that failed while the origin was broken, or for what was asked for then, and how long after it the
    /// last of these failed.
    pub errors_of_the_origin: BTreeMap<String, u64>,
    pub longest_excuse_ms: f64,
    /// Reads that failed because the supervisor was killed between reading their event and writing it
    /// down.
    pub errors_in_no_table: BTreeMap<String, u64>,
    pub hung: u64,
    /// Events that were lost or answered twice, and answers that nobody waited for.
    pub lost_or_twice: u64,
    /// From a kill to the next answer, in milliseconds.
    pub after_worker_kill: Times,
    pub after_supervisor_kill: Times,
    pub longest_read_ms: f64,
    pub fault_stretches: usize,
    pub fault_seconds: f64,
    pub clones: u64,
    pub commands_cut_short: BTreeMap<String, u64>,
    pub queue_samples: u64,
    pub queue_events_compared: u64,
    /// Of these, with a worker.
    pub queue_events_with_worker: u64,
    /// Of all of them, not as they should be, but their trees were being replaced at that moment.
    pub queue_passed_over: u64,
    pub queue_blocked_readers_found: u64,
    pub queue_longest: usize,
    pub requeued: u64,
    /// Events that the next supervisor answered with EAGAIN because they were in no table.
    pub in_no_table: u64,
    pub other_processes: BTreeMap<String, u64>,
    /// What should not have happened. Empty, or the run has failed.
    pub violations: Vec<String>,
}

/// Times in milliseconds.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Times {
    pub count: usize,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub longest: f64,
    /// Kills after which another one came before the next answer.
    pub overtaken: usize,
    /// From the kill to the next process.
    pub process_p50: f64,
    pub process_p99: f64,
}

fn part(sorted: &[u64], part: f64) -> f64 {
    let place = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(place).map_or(0.0, |nanos| *nanos as f64 / MS as f64)
}

/// Kills, the processes that came, and waits (shard, begin, end), of one role.
pub type Records<'a> = (&'a [Kill], &'a [Seen], &'a [(u64, u64, u64)], Role);

/// From each kill to the first answer that cannot have been the dead process': it came after the next
/// process had. Counted from when somebody waited.
#[must_use]
pub fn answers<'a>(records: impl IntoIterator<Item = Records<'a>>) -> Times {
    let mut samples = Samples::default();
    records.into_iter().for_each(|records| samples.add(records));
    let Samples { mut times, mut processes, overtaken } = samples;
    times.sort_unstable();
    processes.sort_unstable();
    Times {
        count: times.len(),
        p50: part(&times, 0.5),
        p90: part(&times, 0.9),
        p99: part(&times, 0.99),
        longest: part(&times, 1.0),
        overtaken,
        process_p50: part(&processes, 0.5),
        process_p99: part(&processes, 0.99),
    }
}

#[derive(Default)]
struct Samples {
    times: Vec<u64>,
    processes: Vec<u64>,
    overtaken: usize,
}

impl Samples {
    fn add(&mut self, (kills, births, waits, role): Records<'_>) {
        let of_shard = |shard: u64| match role {
            Role::Supervisor | Role::Parent | Role::Keeper => true,
            Role::Worker(own) | Role::Spare(own) => shard == own,
        };
        let mut ends: Vec<(u64, u64)> =
            waits.iter().filter(|w| of_shard(w.0)).map(|(_, begin, end)| (*end, *begin)).collect();
        ends.sort_unstable();
        // the earliest begin of all that end here or later
        let mut earliest: Vec<u64> = ends.iter().map(|(_, begin)| *begin).collect();
        for place in (0..earliest.len().saturating_sub(1)).rev() {
            earliest[place] = earliest[place].min(earliest[place + 1]);
        }
        let births: Vec<u64> = births.iter().filter(|b| b.role == role).map(|b| b.at).collect();
        let spare = match role {
            Role::Worker(shard) => Role::Spare(shard),
            other => other,
        };
        let disturbs = |other: &&Kill| [role, spare, Role::Supervisor].contains(&other.role);
        let kills_here: Vec<&Kill> = kills.iter().filter(disturbs).collect();
        for (place, kill) in kills_here.iter().enumerate().filter(|(_, kill)| kill.role == role) {
            let next = births.partition_point(|at| *at <= kill.at);
            let Some(birth) = births.get(next) else { continue };
            let first = ends.partition_point(|(end, _)| end < birth);
            let Some((end, _)) = ends.get(first) else { continue };
            if kills_here.get(place + 1).is_some_and(|other| other.at < *end) {
                self.overtaken += 1;
                continue;
            }
            self.processes.push(birth - kill.at);
            let after = ends.partition_point(|(end, _)| *end < kill.at);
            let waited_from = earliest.get(after).copied().unwrap_or(0).max(kill.at);
            self.times.push(end.saturating_sub(waited_from));
        }
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.count == 0 {
            return f.write_str("-");
        }
        let Self { p50, p99, longest, .. } = self;
        write!(f, "{p50:.1} / {p99:.1} / {longest:.1} ms")
    }
}

fn list(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "0".to_owned();
    }
    let each: Vec<String> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    each.join(", ")
}

impl Report {
    /// A failed run has at least one of these.
    pub fn violation(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    /// How the runs compare: a column each.
    #[must_use]
    pub fn table(reports: &[Self]) -> Table {
        let mut heads = vec!["chaos"];
        heads.extend(reports.iter().map(|report| report.system.as_str()));
        let first = reports.first();
        let title =
            first.map_or(String::new(), |r| format!("{} readers, seed {}", r.readers, r.seed));
        let mut table = Table::new(title, &heads);
        type Cell = fn(&Report) -> String;
        let rows: [(&str, Cell); 24] = [
            ("seconds", |r| format!("{:.0}", r.seconds)),
            ("SIGKILLs: workers (or the only process)", |r| r.worker_kills.to_string()),
            ("SIGKILLs: supervisor", |r| r.supervisor_kills.to_string()),
            ("SIGKILLs: its parent, the keeper", |r| r.guard_kills.to_string()),
            ("reads", |r| r.reads.to_string()),
            ("of these, cold", |r| r.cold_reads.to_string()),
            ("bytes compared", |r| crate::bench::table::bytes(r.bytes_compared)),
            ("reads with zeros", |r| r.zeros.to_string()),
            ("reads with other wrong bytes", |r| r.wrong.to_string()),
            ("errors while the origin was well", |r| list(&r.errors)),
            ("errors of what was asked for while it was broken", |r| match r.longest_excuse_ms {
                0.0 => list(&r.errors_of_the_origin),
                after => format!("{} (up to {after:.0} ms later)", list(&r.errors_of_the_origin)),
            }),
            ("hung", |r| r.hung.to_string()),
            ("answers lost or twice", |r| r.lost_or_twice.to_string()),
            ("kill of a worker to the next answer, p50 / p99 / longest", |r| {
                r.after_worker_kill.to_string()
            }),
            ("kill of the supervisor to the next answer", |r| r.after_supervisor_kill.to_string()),
            ("longest read", |r| format!("{:.0} ms", r.longest_read_ms)),
            ("stretches of a broken origin", |r| {
                format!("{} ({:.0} s)", r.fault_stretches, r.fault_seconds)
            }),
            ("events given to another worker", |r| r.requeued.to_string()),
            ("clones", |r| r.clones.to_string()),
            ("commands cut short by a kill or a fault", |r| {
                r.commands_cut_short.values().sum::<u64>().to_string()
            }),
            ("looks at the queue, blocked readers found", |r| {
                format!("{}, {}", r.queue_samples, r.queue_blocked_readers_found)
            }),
            ("events compared; of these with a worker, of a tree that was just replaced", |r| {
                let (with_worker, passed) = (r.queue_events_with_worker, r.queue_passed_over);
                format!("{}; {with_worker}, {passed}", r.queue_events_compared)
            }),
            ("events caught in no table, and reads that failed for that", |r| {
                format!("{}, {}", r.in_no_table, list(&r.errors_in_no_table))
            }),
            ("violations", |r| r.violations.len().to_string()),
        ];
        for (name, cell) in rows {
            let cells = std::iter::once(name.to_owned()).chain(reports.iter().map(cell));
            table.row(cells);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_of_the_next_process_count() {
        let worker = Role::Worker(0);
        let kills = [Kill { role: worker, at: 100 * MS }, Kill { role: worker, at: 300 * MS }];
        let births = [110, 305].map(|at| Seen { role: worker, pid: at as i32, at: at * MS });
        // the second one of shard 0 was answered by the dead worker, just before
        let waits =
            [(1, 90, 111), (0, 95, 101), (0, 99, 120), (0, 99, 125), (0, 304, 310), (0, 302, 312)]
                .map(|(shard, begin, end)| (shard, begin * MS, end * MS));
        let times = answers([(&kills[..], &births[..], &waits[..], worker)]);
        assert_eq!((times.count, times.overtaken), (2, 0));
        assert_eq!((times.p50, times.longest), (20.0, 20.0));
        assert_eq!(times.process_p99, 10.0);
        // a supervisor's death in between
        let kills = [kills[0], Kill { role: Role::Supervisor, at: 115 * MS }, kills[1]];
        let times = answers([(&kills[..], &births[..], &waits[..], worker)]);
        assert_eq!((times.count, times.overtaken, times.longest), (1, 1, 8.0));
    }
}
