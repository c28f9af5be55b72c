//! The control side is killed, again and again, and its fds are kept: readers wait for the next one.
//!
//! It also measures the window between the kernel's reading of an event and its entry in the in-flight
//! table. What a SIGKILL catches in there gets `EAGAIN` ([`kept`](crate::supervisor::Kept)). At
//! each kill as many events are caught as are in the window at a random moment, which is their rate
//! times the time that one is in there (Little's law). `HYDRANT_KILLS=2000` for a figure that
//! means something.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::brokered::{DIRECTORY, guard, prepare};
use super::holder::{Hello, introduce};
use super::line::{self, ARGUMENTS, Line, Lines};
use super::{BLOCK_LEN, Block};
use crate::fanotify::testing::{LIMIT, directory, readable};
use crate::fanotify::{DenyErrno, Verdict};
use crate::ids::ShardId;
use crate::queue::wire::{self, FromQueue, ToQueue};
use crate::standalone::{self, Programs};
use crate::supervisor::Kept;
use crate::sys::spawn::{Spawn, inherited};
use crate::sys::{fdstore, limits, seqpacket};

/// The supervisor's parent, and that supervisor.
pub(super) const PARENT: &str = "parent";
/// In the worker's place.
pub(super) const RESPONDER: &str = "responder";
pub(super) const READERS: &str = "readers";

const THREADS: u64 = 64;
/// Of each reader.
const BLOCKS: Block = 1000;

/// How many events the supervisor reads at once, at most.
const BATCH: u64 = 16;

/// Each block has its own answer, and never bytes: so whatever a reader is told is known to be right or
/// wrong, and there is always something to be asked for.
fn answer_for(block: Block) -> DenyErrno {
    let errnos = [DenyErrno::Ebusy, DenyErrno::Etxtbsy, DenyErrno::Enospc, DenyErrno::Edquot];
    errnos[(block % 4) as usize]
}

/// What readers saw.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Tally {
    answered: u64,
    /// `EAGAIN`
    retry: u64,
    /// Anything else: block and errno, 0 for bytes.
    wrong: Vec<(Block, i32)>,
}

#[test]
#[ignore = "needs root"]
fn root_readers_outlive_their_supervisors() {
    let kills: u64 = std::env::var("HYDRANT_KILLS").map_or(20, |kills| kills.parse().unwrap());
    let directory = directory();
    let segment = prepare(directory.path(), THREADS * BLOCKS);
    let supervisors = Lines::new(directory.path(), "supervisors");
    let parent = line::program(PARENT, supervisors.path()).variable(DIRECTORY, directory.path());
    let mut parent = parent.start().unwrap();
    let next = || {
        let mut line = supervisors.accept();
        let Hello { pid } = line.recv().unwrap();
        (line, Pid::from_raw(pid))
    };
    let (mut line, mut supervisor) = next();
    let reader_lines = Lines::new(directory.path(), "readers");
    let (_readers, mut readers) = reader_lines.start(line::program(READERS, reader_lines.path()));
    readers.send(&segment);
    let mut served = Duration::ZERO;
    for n in 0..kills {
        let start = Instant::now();
        // until the parent takes it for sound, and some more
        std::thread::sleep(Duration::from_micros(150_000 + n * 7919 % 100_000));
        kill(supervisor, Signal::SIGKILL).unwrap();
        served += start.elapsed();
        (line, supervisor) = next();
    }
    readers.send(&());
    let tally: Tally = readers.recv().expect("no reader hangs");
    parent.kill().unwrap();
    parent.wait_blocking().unwrap();
    drop(line);

    let rate = tally.answered as f64 / served.as_secs_f64();
    let caught = tally.retry as f64 / kills as f64;
    println!(
        "{kills} kills, {} reads answered ({rate:.0} a second), {} told to try again: {caught:.2} a kill, \
         so the window is {:.1} microseconds",
        tally.answered,
        tally.retry,
        caught / rate * 1e6
    );
    assert_eq!(tally.wrong, [], "answers of others, or zeros");
    assert!(tally.answered > kills, "{tally:?}");
    assert!(tally.retry <= kills * BATCH, "{tally:?}");
}

/// The program: parent or, if that has started it, supervisor.
pub(super) fn parent() {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        let program = std::env::current_exe().unwrap();
        let programs = Programs { installed: &program, own: &program };
        standalone::run(programs, &ARGUMENTS.map(Into::into), None, Vec::new()).unwrap();
        return;
    }
    let mut kept = Kept::take_back().unwrap();
    let _shard = guard(kept.take(ShardId(0)), Arc::default(), worker);
    fdstore::notify("READY=1").unwrap();
    let mut line = Line::connect();
    line.send(&Hello { pid: std::process::id().cast_signed() });
    let _: Option<()> = line.recv();
}

fn worker() -> Spawn {
    // it has nothing to say
    line::program(RESPONDER, &PathBuf::new())
}

/// The program: answers whatever comes.
pub(super) fn respond() {
    let [control, queue, _spool] = inherited().unwrap();
    introduce(&control);
    let mut buffer = [0; 1024];
    loop {
        readable(&queue, LIMIT);
        let received = match seqpacket::receive(queue.as_fd(), &mut buffer) {
            Ok(Some(received)) => received,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Ok(None) | Err(_) => return,
        };
        let message = wire::decode(&buffer[..received.length]).unwrap();
        let ToQueue::Event { event, range, .. } = message else { panic!("{message:?}") };
        let verdict = Verdict::Deny(answer_for(range.offset() / BLOCK_LEN));
        let bytes = wire::encode(&FromQueue::Answer { event, verdict, reason: None }).unwrap();
        // there are no more answers under way than there are readers, so there is room
        if seqpacket::send(queue.as_fd(), &bytes, &[]).is_err() {
            return;
        }
    }
}

/// The program: reads until it is told to stop.
pub(super) fn read() {
    limits::raise_open_files().unwrap();
    let mut line = Line::connect();
    let Some(segment) = line.recv::<PathBuf>() else { return };
    let file = Arc::new(File::open(segment).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..THREADS)
        .map(|n| {
            let (file, stop) = (Arc::clone(&file), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut tally = Tally::default();
                let mut blocks = (n * BLOCKS..(n + 1) * BLOCKS).cycle();
                while !stop.load(Ordering::Relaxed) {
                    let block = blocks.next().unwrap();
                    let read = file.read_at(&mut [0; BLOCK_LEN as usize], block * BLOCK_LEN);
                    let errno = read.err().and_then(|error| error.raw_os_error()).unwrap_or(0);
                    if errno == answer_for(block).number() {
                        tally.answered += 1;
                    } else if errno == libc::EAGAIN {
                        tally.retry += 1;
                    } else {
                        tally.wrong.push((block, errno));
                    }
                }
                tally
            })
        })
        .collect();
    let told: Option<()> = line.recv();
    stop.store(true, Ordering::Relaxed);
    if told.is_none() {
        return;
    }
    let mut sum = Tally::default();
    for thread in threads {
        let tally = thread.join().unwrap();
        sum.answered += tally.answered;
        sum.retry += tally.retry;
        sum.wrong.extend(tally.wrong);
    }
    sum.wrong.truncate(20);
    line.send(&sum);
}
