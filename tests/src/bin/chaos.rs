//! Kills the daemon's processes all the time, under readers that check every byte. See
//! `hydrant_tests::chaos`. Needs root.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use hydrant_tests::chaos::content::Content;
use hydrant_tests::chaos::guard;
use hydrant_tests::chaos::peers::{self, Peer, PeerOrders};
use hydrant_tests::chaos::reader::{self, Orders};
use hydrant_tests::chaos::report::Report;
use hydrant_tests::chaos::run::{self, Options};

/// What they show, they show soon.
const PEER_KILLS: usize = 300;

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    run: Run,
}

#[derive(Args)]
struct Run {
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// SIGKILLs in all.
    #[arg(long, default_value_t = 500)]
    kills: usize,
    #[arg(long, default_value_t = 12.0)]
    kills_per_second: f64,
    /// The part of them that is for the supervisor.
    #[arg(long, default_value_t = 0.1)]
    supervisor_part: f64,
    #[arg(long, default_value_t = 64)]
    readers: usize,
    /// At most so long.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Trees that are there at a time, and the files of each.
    #[arg(long, default_value_t = 4)]
    trees: usize,
    #[arg(long, default_value_t = 3000)]
    files: u64,
    /// How long a reader pauses between two accesses, on average.
    #[arg(long, default_value_t = 60)]
    pause_ms: u64,
    /// To the origin and back.
    #[arg(long, default_value_t = 2)]
    round_trip_ms: u64,
    /// The origin has no faults.
    #[arg(long)]
    no_faults: bool,
    /// No worker is kept in reserve.
    #[arg(long)]
    no_spare: bool,
    /// `brokered` or `kernel`: fail if the daemon has the other one.
    #[arg(long)]
    queue: Option<String>,
    /// Also run the peers, each with at most 300 kills.
    #[arg(long)]
    peers: bool,
    /// Run nothing but this peer.
    #[arg(long)]
    only: Option<Peer>,
    /// JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Role {
    /// One of the readers; started by the program itself.
    #[command(hide = true)]
    Reader {
        #[arg(long)]
        board: PathBuf,
        #[arg(long)]
        trees: PathBuf,
        #[arg(long)]
        slot: usize,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        pause_us: u64,
        #[arg(long)]
        limit_secs: u64,
        #[arg(long)]
        quiet: bool,
    },
    /// Cleans up; started by the program itself.
    #[command(hide = true)]
    Guard { directory: PathBuf },
    /// The process of a peer; started by the program itself.
    #[command(hide = true)]
    Peer {
        peer: Peer,
        #[arg(long)]
        trees: PathBuf,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        files: u64,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        round_trip_us: u64,
    },
}

fn main() -> Result<ExitCode> {
    let Arguments { role, run } = Arguments::parse();
    match role {
        Some(Role::Reader { board, trees, slot, seed, pause_us, limit_secs, quiet }) => {
            let pause = Duration::from_micros(pause_us);
            let limit = Duration::from_secs(limit_secs);
            reader::run(&Orders { board, trees, slot, seed, pause, limit, quiet })?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Guard { directory }) => {
            guard::run(&directory)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Peer { peer, trees, seed, files, count, round_trip_us }) => {
            let contents = (0..count).map(|tree| Content { seed: seed + tree, files }).collect();
            let round_trip = Duration::from_micros(round_trip_us);
            peers::serve(&PeerOrders { peer, trees, contents, round_trip })?;
            Ok(ExitCode::SUCCESS)
        }
        None => chaos(run),
    }
}

fn chaos(run: Run) -> Result<ExitCode> {
    let options = Options {
        program: std::env::current_exe().context("what program is this?")?,
        seed: run.seed,
        kills: run.kills,
        per_second: run.kills_per_second,
        supervisors: run.supervisor_part,
        readers: run.readers,
        longest: Duration::from_secs_f64(run.minutes * 60.0),
        trees: run.trees,
        files: run.files,
        pause: Duration::from_millis(run.pause_ms),
        round_trip: Duration::from_millis(run.round_trip_ms),
        faults: !run.no_faults,
        listed_after: Duration::from_secs(1),
        spare: !run.no_spare,
        queue: run.queue,
    };
    let mut reports = match run.only {
        Some(peer) => vec![peers::run(&options, peer)?],
        None => vec![run::hydrant(&options)?],
    };
    if run.peers {
        let options = Options { kills: options.kills.min(PEER_KILLS), ..options };
        reports.push(peers::run(&options, Peer::Fanotify)?);
        reports.push(peers::run(&options, Peer::Fuse)?);
    }
    if run.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        print!("{}", Report::table(&reports));
        for report in &reports {
            report.violations.iter().for_each(|violation| println!("violation: {violation}"));
            for (what, count) in &report.commands_cut_short {
                println!("cut short {count} times: {what}");
            }
            for (what, count) in &report.other_processes {
                println!("also in the queue: {what}, {count} times");
            }
            println!("{:?}\n{:?}", report.after_worker_kill, report.after_supervisor_kill);
        }
    }
    let clean = reports.iter().all(|report| report.violations.is_empty());
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
