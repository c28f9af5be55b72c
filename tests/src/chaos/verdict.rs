//! What of all that was seen should not have been.

use hydrant_daemon::supervisor::STRAY_ANSWERS;

use super::MS;
use super::board::{Done, Outcome};
use super::crew::Harvest;
use super::killer::{Register, Role};
use super::report::{Report, answers};
use super::weather::Almanac;

/// So many are told.
const MOST_VIOLATIONS: usize = 200;

/// An outcome in a report.
#[must_use]
pub fn name(outcome: Outcome) -> String {
    match outcome {
        Outcome::Errno(errno) => format!("{:?}", nix::errno::Errno::from_raw(errno)),
        other => format!("{other:?}").to_uppercase(),
    }
}

/// Sorts what was not right.
pub(super) fn judge(
    report: &mut Report,
    harvest: &Harvest,
    almanac: &Almanac,
    register: &Register,
) {
    report.reads = harvest.reads;
    report.cold_reads = harvest.cold;
    report.bytes_compared = harvest.bytes;
    report.longest_read_ms = harvest.longest as f64 / MS as f64;
    for done in &harvest.bad {
        let Done { began, ended, outcome, .. } = *done;
        // what the page cache makes of every answer that is no: TROUBLESHOOTING.md
        let is_denial = matches!(outcome, Outcome::Errno(libc::EIO | libc::EFAULT) | Outcome::Bus);
        let excuse = if is_denial { almanac.excuses(began, ended) } else { None };
        let caught: u64 = report.errors_in_no_table.values().sum();
        let place = match outcome {
            Outcome::Zeros => {
                report.zeros += 1;
                None
            }
            Outcome::Wrong | Outcome::Right => {
                report.wrong += 1;
                None
            }
            _ if excuse.is_some() => {
                let after = excuse.unwrap_or_default() as f64 / MS as f64;
                report.longest_excuse_ms = report.longest_excuse_ms.max(after);
                Some(&mut report.errors_of_the_origin)
            }
            // documented: the supervisor was killed between the kernel's read and its table
            _ if is_denial
                && caught < report.in_no_table
                && register.killed(began, ended, true) =>
            {
                Some(&mut report.errors_in_no_table)
            }
            _ => {
                *report.errors.entry(name(outcome)).or_default() += 1;
                None
            }
        };
        if let Some(excused) = place {
            *excused.entry(name(outcome)).or_default() += 1;
        } else if report.violations.len() < MOST_VIOLATIONS {
            let took = (ended - began) / MS;
            report.violation(format!("{outcome:?} after {took} ms: {:?}", done.access));
        }
    }
    if report.hung > 0 {
        report.violation(format!("{} readers hung", report.hung));
    }
    report.violations.extend(harvest.deaths.iter().cloned());
}

/// How long it took from kills to the next answers.
pub(super) fn time(report: &mut Report, register: &Register, harvest: &Harvest) {
    let (kills, births) = (register.kills(), register.births());
    let mut roles: Vec<Role> = kills.iter().map(|kill| kill.role).collect();
    roles.sort_unstable();
    roles.dedup();
    let records = |supervisor: bool| {
        let of_kind = move |role: &&Role| match role {
            Role::Supervisor => supervisor,
            Role::Worker(_) => !supervisor,
            // nobody waits for one
            Role::Spare(_) | Role::Parent | Role::Keeper => false,
        };
        let records = |role: &Role| (&kills[..], &births[..], &harvest.waits[..], *role);
        answers(roles.iter().filter(of_kind).map(records))
    };
    report.after_supervisor_kill = records(true);
    report.after_worker_kill = records(false);
}

/// Errors in the daemon's log, and readers that were caught between the kernel and the table.
pub(super) fn read_log(report: &mut Report, log: &str) {
    for line in log.lines() {
        if line.contains("that were in no table") {
            let found = line.split("found=").nth(1).and_then(|rest| rest.split_whitespace().next());
            report.in_no_table += found.and_then(|found| found.parse().ok()).unwrap_or(1);
        }
        let stray = line.contains(STRAY_ANSWERS);
        report.lost_or_twice += u64::from(stray);
        // a worker that was just starting when its supervisor was killed
        let orphan = line.contains("die with the parent: it has ended");
        // a command found nobody listening between two supervisors, and tried to start one
        let second = line.contains("ERROR hydrantd: another hydrantd");
        let excused = orphan || second;
        if line.contains("panicked") || line.contains("ERROR") && !excused || stray {
            report.violation(format!("log: {line}"));
        }
    }
    report.violations.truncate(MOST_VIOLATIONS);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::board::Access;

    const SECOND: u64 = 1000 * MS;

    fn done(began: u64, ended: u64, outcome: Outcome) -> Done {
        let access = Access { tree: 0, file: 1, offset: 0, length: 9, how: 0, shard: 0 };
        Done { access, began: began * SECOND, ended: ended * SECOND, outcome }
    }

    fn judged(bad: &[Done]) -> Report {
        let mut report = Report::default();
        let harvest = Harvest { bad: bad.to_vec(), ..Harvest::default() };
        let almanac = Almanac::of(&[(10 * SECOND, 12 * SECOND)]);
        judge(&mut report, &harvest, &almanac, &Register::default());
        report
    }

    #[test]
    fn errors_are_the_origins_only_while_it_is_broken() {
        let eio = Outcome::Errno(libc::EIO);
        let report = judged(&[done(9, 11, eio), done(11, 13, Outcome::Bus)]);
        assert!(report.violations.is_empty(), "{:?}", report.violations);
        assert_eq!(report.errors_of_the_origin.values().sum::<u64>(), 2);
        assert_eq!(report.longest_excuse_ms, 1000.0);
        // it is well again, whatever was before
        let report = judged(&[done(11, 16, eio), done(15, 16, eio), done(1, 2, Outcome::Bus)]);
        assert_eq!((report.violations.len(), report.errors.values().sum::<u64>()), (3, 3));
        // no origin is an excuse for these
        let others = [Outcome::Zeros, Outcome::Wrong, Outcome::Errno(libc::ENOENT)];
        let report = judged(&others.map(|outcome| done(11, 11, outcome)));
        assert_eq!((report.violations.len(), report.zeros, report.wrong), (3, 1, 1));
    }

    #[test]
    fn the_log_is_read() {
        let read = |log: &str| {
            let mut report = Report::default();
            read_log(&mut report, log);
            (report.violations.len(), report.lost_or_twice, report.in_no_table)
        };
        let stray = format!("2026-01-01T00:00:00Z DEBUG {STRAY_ANSWERS}: nobody waits for shard=0");
        assert_eq!(read(&stray), (1, 1, 0));
        assert_eq!(read("thread 'main' panicked at x.rs"), (1, 0, 0));
        assert_eq!(read("ERROR hydrant_daemon::worker: can't answer"), (1, 0, 0));
        assert_eq!(read("ERROR hydrantd: another hydrantd has it"), (0, 0, 0));
        assert_eq!(read("WARN a: readers that were in no table got EAGAIN found=3 x=1"), (0, 0, 3));
        assert_eq!(read("WARN hydrant_daemon::supervisor: worker ended"), (0, 0, 0));
    }
}
