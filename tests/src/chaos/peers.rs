//! What there is today, under the same readers and kills: designs with a single process that fetches and
//! answers. Both are ours and small, and make bytes as the origin does, after the same time.
//!
//! - `fanotify`: sparse files, each with a pre-content mark; one process reads the events, fills the
//!   file and answers. When it is killed the kernel lets everybody go.
//! - `fuse`: a FUSE file system. When its server is killed everything fails until the next has mounted
//!   it anew.

mod fanotify;
mod fuse;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use nix::sys::signal::Signal;

use super::board::{Board, Outcome};
use super::content::Content;
use super::crew::Crew;
use super::guard::Guard;
use super::killer::{Kill, Role, Seen};
use super::reader::{Orders, tree_path};
use super::report::{Report, answers};
use super::run::Options;
use super::verdict::name;
use super::{MS, now};
use crate::process::leash;
use crate::repository::Random;
use crate::scratch::{Scratch, unmount_below};

/// A reader that is at one access for so long hangs. (A `MAP_POPULATE` of a FUSE file whose server was
/// killed goes round in the kernel until its process is killed.)
const PEER_LIMIT: Duration = Duration::from_secs(20);

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    Fanotify,
    Fuse,
}

/// What a peer's process is told.
#[derive(Debug, Clone)]
pub struct PeerOrders {
    pub peer: Peer,
    pub trees: PathBuf,
    pub contents: Vec<Content>,
    /// A fetch takes so long.
    pub round_trip: Duration,
}

/// Serves until it is killed.
pub fn serve(orders: &PeerOrders) -> Result<()> {
    match orders.peer {
        Peer::Fanotify => fanotify::serve(orders),
        Peer::Fuse => fuse::serve(orders),
    }
}

fn contents(options: &Options) -> Vec<Content> {
    let content = |tree| Content { seed: options.seed + tree as u64, files: options.files };
    (0..options.trees).map(content).collect()
}

/// Sparse files for all trees.
fn placeholders(trees: &Path, contents: &[Content]) -> Result<()> {
    for (tree, content) in contents.iter().enumerate() {
        for file in 0..content.files {
            let path = tree_path(trees, tree as u64).join(content.path(file));
            if let Some(directory) = path.parent() {
                fs_err::create_dir_all(directory)?;
            }
            fs_err::File::create(path)?.set_len(content.size(file))?;
        }
    }
    Ok(())
}

/// Runs a peer. It is killed, and started again at once, until there were so many kills or everything
/// was read once.
pub fn run(options: &Options, peer: Peer) -> Result<Report> {
    let scratch = Scratch::new("chaos-peer")?;
    let guard = Guard::start(&options.program, scratch.path())?;
    let trees = scratch.make("trees")?;
    let contents = contents(options);
    if peer == Peer::Fanotify {
        placeholders(&trees, &contents)?;
    }
    let board_file = scratch.path().join("board");
    let board = Board::create(&board_file)?;
    let start = || {
        let mut command = Command::new(&options.program);
        let name = peer.to_possible_value().map(|value| value.get_name().to_owned());
        command.arg("peer").arg(name.unwrap_or_default()).arg("--trees").arg(&trees);
        command.args(["--seed", &options.seed.to_string(), "--files", &options.files.to_string()]);
        command.args(["--count", &options.trees.to_string()]);
        command.args(["--round-trip-us", &options.round_trip.as_micros().to_string()]);
        command.stdin(Stdio::null());
        leash(command)
    };
    let mut process = start()?;
    // its first start is not what is tested
    thread::sleep(Duration::from_millis(1500));
    for (tree, content) in board.trees.iter().zip(&contents) {
        tree.seed.store(content.seed, Ordering::SeqCst);
        tree.files.store(content.files, Ordering::SeqCst);
        tree.turn();
    }
    let orders = Orders {
        board: board_file,
        trees: trees.clone(),
        slot: 0,
        seed: options.seed,
        pause: options.pause,
        limit: PEER_LIMIT,
        quiet: true,
    };
    let mut crew = Crew::start(board, options.program.clone(), orders, options.readers)?;
    let mut random = Random::new(options.seed);
    let (mut kills, mut births) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    let mut is_read = false;
    while kills.len() < options.kills && begin.elapsed() < options.longest && !is_read {
        let gap = -(1.0 - random.unit()).ln() / options.per_second;
        let until = Instant::now() + Duration::from_secs_f64(gap.min(2.0));
        loop {
            crew.look()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(Duration::from_millis(20)));
        }
        kills.push(Kill { role: Role::Worker(0), at: now() });
        process.signal(Signal::SIGKILL);
        drop(process);
        process = start()?;
        births.push(Seen { role: Role::Worker(0), pid: process.pid().as_raw(), at: now() });
        is_read = board.trees.iter().filter(|tree| tree.is_open()).all(|tree| tree.is_read());
    }
    let seconds = begin.elapsed().as_secs_f64();
    board.over.store(1, Ordering::SeqCst);
    let left = crew.finish(PEER_LIMIT + Duration::from_secs(20))?;
    crew.sums();
    drop(process);
    unmount_below(scratch.path())?;
    let mut report = Report {
        system: match peer {
            Peer::Fanotify => "fanotify, one process".to_owned(),
            Peer::Fuse => "FUSE, one process".to_owned(),
        },
        seed: options.seed,
        readers: options.readers,
        seconds,
        worker_kills: kills.len(),
        reads: crew.harvest.reads,
        cold_reads: crew.harvest.cold,
        bytes_compared: crew.harvest.bytes,
        hung: crew.harvest.hung + left as u64,
        longest_read_ms: crew.harvest.longest as f64 / MS as f64,
        after_worker_kill: answers([(
            &kills[..],
            &births[..],
            &crew.harvest.waits[..],
            Role::Worker(0),
        )]),
        ..Report::default()
    };
    for done in &crew.harvest.bad {
        match done.outcome {
            Outcome::Zeros => report.zeros += 1,
            Outcome::Wrong | Outcome::Right => report.wrong += 1,
            outcome => *report.errors.entry(name(outcome)).or_default() += 1,
        }
    }
    drop(scratch);
    drop(guard);
    Ok(report)
}
