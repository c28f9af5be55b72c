//! A whole run.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hydrant_daemon::supervisor::STRAY_ANSWERS;

use super::board::{Board, MAX_READERS, MAX_TREES};
use super::content::Content;
use super::crew::Crew;
use super::guard::Guard;
use super::killer::{self, Plan, Register, Role};
use super::origin::Origin;
use super::reader::Orders;
use super::report::Report;
use super::trees::Rotation;
use super::verdict::{judge, read_log, time};
use super::weather::{self, Almanac};
use super::witness::Witness;
use crate::process::until;
use crate::proxy::{Proxy, Quality};
use crate::server::url_at;
use crate::world::{Setting, World};

/// What the daemon is configured with: short stalls, so that they are over soon.
const CONFIGURATION: &str = "deadline_secs = 30\nstall_secs = 2\n";
const WITHOUT_SPARE: &str = "deadline_secs = 30\nstall_secs = 2\n[workers]\nspare = false\n";
#[cfg(test)]
pub(super) const CONFIGURATIONS: [&str; 2] = [CONFIGURATION, WITHOUT_SPARE];

/// An access that takes longer than this is hung: longer than the deadline with all that comes on top.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// This program, with the subcommands `reader` and others.
    pub program: PathBuf,
    pub seed: u64,
    pub kills: usize,
    pub per_second: f64,
    /// This part of the kills is for the supervisor.
    pub supervisors: f64,
    pub readers: usize,
    /// At most so long, even if there were fewer kills.
    pub longest: Duration,
    pub trees: usize,
    pub files: u64,
    pub pause: Duration,
    pub round_trip: Duration,
    pub faults: bool,
    /// A reader that is blocked for longer has to be in the queue.
    pub listed_after: Duration,
    /// With spare workers.
    pub spare: bool,
    /// `brokered` or `kernel`; whichever the daemon takes otherwise.
    pub queue: Option<String>,
}

/// Ends the run should this be dropped early, by an error.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs Hydrant.
pub fn hydrant(options: &Options) -> Result<Report> {
    if options.readers > MAX_READERS || options.trees > MAX_TREES || options.trees == 0 {
        bail!("at most {MAX_READERS} readers and {MAX_TREES} trees");
    }
    let configuration = if options.spare { CONFIGURATION } else { WITHOUT_SPARE };
    let setting = Setting { configuration, ..Setting::default() };
    let mut world = World::with("chaos", Setting { start: false, ..setting })?;
    let guard = Guard::start(&options.program, world.scratch.path())?;
    // the one thing of which only the log tells, and which is nothing to people
    let log = std::env::var("RUST_LOG").unwrap_or("info".to_owned());
    world.daemon.set_env("RUST_LOG", &format!("{log},{STRAY_ANSWERS}=debug"));
    world.daemon.start()?;
    let queue = world.daemon.status()?.queue;
    if options.queue.as_ref().is_some_and(|wanted| *wanted != queue) {
        bail!("the daemon has the {queue} queue here");
    }
    let mut sources = Vec::new();
    for number in 0..options.trees {
        let content = Content { seed: options.seed + number as u64, files: options.files };
        sources.push((content, content.repository()?));
    }
    let origin = Origin::start(world.server.port(), &sources)?;
    let proxy = Proxy::start(origin.port(), Quality::round_trip(options.round_trip))?;
    let mut urls = Vec::new();
    for (number, (content, repository)) in sources.iter().enumerate() {
        let name = format!("r{number}");
        world.server.add(repository, &name, crate::server::Offers::default())?;
        urls.push((*content, url_at(proxy.port(), &name)));
    }
    let (register, almanac) = (Register::default(), Almanac::default());
    let (over, calm) = (AtomicBool::new(false), AtomicBool::new(false));
    let board_file = world.path("board");
    let board = Board::create(&board_file)?;
    let directory = world.scratch.make("trees")?;
    let rotation = Rotation {
        world: &world,
        board,
        directory: directory.clone(),
        sources: urls,
        register: &register,
        almanac: &almanac,
        calm: &calm,
        open: Mutex::default(),
        count: Mutex::default(),
    };
    rotation.begin()?;
    let orders = Orders {
        board: board_file,
        trees: directory,
        slot: 0,
        seed: options.seed,
        pause: options.pause,
        limit: LIMIT,
        quiet: false,
    };
    let mut crew = Crew::start(board, options.program.clone(), orders, options.readers)?;
    let begin = Instant::now();
    let mut report = Report {
        system: format!("Hydrant, {queue} queue"),
        seed: options.seed,
        readers: options.readers,
        ..Report::default()
    };
    let is_over = || over.load(Ordering::SeqCst);
    let is_calm = || calm.load(Ordering::SeqCst);
    let killed = AtomicBool::new(false);
    let witness = Witness::new(&rotation, options.listed_after);
    let seen = thread::scope(|scope| -> Result<_> {
        let _end = End(&over);
        scope.spawn(|| register.watch(&world.daemon, is_over));
        let renewing = scope.spawn(|| rotation.run(is_over));
        let witnessing = scope.spawn(|| witness.run(options.seed, is_over));
        if options.faults {
            scope.spawn(|| weather::run(&proxy, &origin, &almanac, options.seed, is_over, is_calm));
        }
        scope.spawn(|| {
            let Options { seed, kills, per_second, supervisors, .. } = *options;
            killer::run(Plan { seed, kills, per_second, supervisors }, &register, is_over, is_calm);
            killed.store(true, Ordering::SeqCst);
        });
        let mut said = Instant::now();
        while !killed.load(Ordering::SeqCst) && begin.elapsed() < options.longest {
            crew.look()?;
            if renewing.is_finished() {
                break;
            }
            if said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                let (kills, cold) = (register.kills().len(), crew.harvest.cold);
                let seconds = begin.elapsed().as_secs();
                eprintln!(
                    "{seconds} s: {kills} kills, {cold} cold reads, {} bad",
                    crew.harvest.bad.len()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
        over.store(true, Ordering::SeqCst);
        let renewed = renewing.join().unwrap_or_else(|_| bail!("the rotation of trees panicked"));
        if let Err(error) = renewed {
            report.violation(format!("trees can't be renewed: {error:#}"));
        }
        witnessing.join().ok().context("the witness panicked")
    })?;
    report.seconds = begin.elapsed().as_secs_f64();

    // no kills, no faults: all end soon
    proxy.heal();
    board.over.store(1, Ordering::SeqCst);
    let left = crew.finish(LIMIT + Duration::from_secs(5))?;
    crew.sums();
    report.hung = crew.harvest.hung + left as u64;
    if let Err(error) = until("nobody waits any more", Duration::from_secs(60), || {
        let queue = world.daemon.admin().queue().ok()?;
        queue.is_empty().then_some(())
    }) {
        report.violation(format!("{error:#}: {:?}", world.daemon.admin().queue()));
    }
    read_log(&mut report, &world.daemon.log_tail(usize::MAX));
    judge(&mut report, &crew.harvest, &almanac, &register);
    let kills = register.kills();
    let of = |roles: &[Role]| kills.iter().filter(|kill| roles.contains(&kill.role)).count();
    report.supervisor_kills = of(&[Role::Supervisor]);
    report.guard_kills = of(&[Role::Parent, Role::Keeper]);
    report.worker_kills = kills.len() - report.supervisor_kills - report.guard_kills;
    time(&mut report, &register, &crew.harvest);
    report.fault_stretches = almanac.count();
    report.fault_seconds = almanac.bad().as_secs_f64();
    report.queue_samples = seen.samples;
    report.queue_events_compared = seen.events;
    report.queue_events_with_worker = seen.with_worker;
    report.queue_passed_over = seen.passed_over;
    report.queue_blocked_readers_found = seen.blocked;
    report.queue_longest = seen.longest;
    report.requeued = seen.requeued;
    report.other_processes = seen.others;
    report.lost_or_twice +=
        seen.violations.iter().filter(|v| v.contains("by supervisor")).count() as u64;
    report.violations.extend(seen.violations);
    {
        let count = rotation.count.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        report.clones = count.clones;
        report.commands_cut_short = count.cut_short.clone();
        report.violations.extend(count.failures.iter().cloned());
    }
    drop(rotation);
    // all must go, and leave nothing mounted
    if let Err(error) = world.daemon.stop() {
        report.violation(format!("the daemon does not stop: {error:#}"));
    }
    let mounts = crate::scratch::mounts_below(world.scratch.path())?;
    if !mounts.is_empty() {
        report.violation(format!("still mounted: {mounts:?}"));
    }
    if !report.violations.is_empty() {
        eprintln!("{}", world.daemon.log_tail(60));
    }
    drop(world);
    drop(guard);
    Ok(report)
}
