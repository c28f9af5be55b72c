//! The daemon's processes are killed again and again under readers that check every byte: a short
//! `hydrant-chaos`.

use std::time::Duration;

use anyhow::{Result, ensure};
use hydrant_tests::chaos::peers::{self, Peer};
use hydrant_tests::chaos::report::Report;
use hydrant_tests::chaos::run::{Options, hydrant};
use hydrant_tests::daemon::built;
use hydrant_tests::guest;

fn options() -> Result<Options> {
    Ok(Options {
        program: built("hydrant-chaos")?,
        seed: 7,
        kills: guest::or(120, 40),
        per_second: guest::or(6.0, 2.0),
        supervisors: 0.15,
        readers: guest::or(16, 8),
        longest: Duration::from_secs(60),
        trees: 2,
        files: 600,
        pause: Duration::from_millis(60),
        round_trip: Duration::from_millis(2),
        faults: true,
        // other tests keep the machine busy
        listed_after: guest::patience(Duration::from_secs(15)),
        spare: true,
        queue: None,
    })
}

/// No zeros, no wrong bytes, no errors but the broken origin's, nobody hangs, no event is lost or answered
/// twice, and the queue shows who waits for what.
#[test]
#[ignore = "needs root"]
fn root_chaos() -> Result<()> {
    let report = hydrant(&options()?)?;
    print!("{}", Report::table(std::slice::from_ref(&report)));
    ensure!(report.violations.is_empty(), "{:#?}", report.violations);
    ensure!(report.worker_kills + report.supervisor_kills > 10, "hardly any kills");
    ensure!(report.cold_reads > guest::or(50, 10), "hardly any reads");
    ensure!(report.queue_events_compared > 0, "the queue was never seen");
    ensure!(report.queue_events_with_worker > 0, "no event was ever with a worker");
    Ok(())
}

/// What the readers would say if it were otherwise: designs with a single process give zeros and errors.
#[test]
#[ignore = "needs root"]
fn root_peers_give_zeros_and_errors() -> Result<()> {
    let options = Options { kills: 20, ..options()? };
    let fanotify = peers::run(&options, Peer::Fanotify)?;
    ensure!(fanotify.worker_kills > 0 && fanotify.zeros > 0, "{fanotify:?}");
    let fuse = peers::run(&options, Peer::Fuse)?;
    ensure!(fuse.errors.contains_key("ENOTCONN"), "{fuse:?}");
    Ok(())
}
