//! The readers, from the program's side: started, watched, and asked what they saw.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;

use super::board::{Access, Board, Done, Outcome};
use super::reader::{BUS_EXIT, Orders};
use super::{MS, now};
use crate::process::{Leashed, leash};

/// A cold access that took less did not wait for anybody.
const WAITED: u64 = MS / 2;

/// What was seen, all in all.
#[derive(Debug, Default)]
pub struct Harvest {
    pub reads: u64,
    /// Of files that nobody had asked for before.
    pub cold: u64,
    pub bytes: u64,
    /// Cold accesses that waited and were right: shard, begin, end.
    pub waits: Vec<(u64, u64, u64)>,
    /// What was not right.
    pub bad: Vec<Done>,
    pub hung: u64,
    /// Readers that ended in a way that they should not.
    pub deaths: Vec<String>,
    pub longest: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Crew {
    board: &'static Board,
    program: PathBuf,
    orders: Orders,
    readers: Vec<Option<Leashed>>,
    taken: Vec<u64>,
    pub harvest: Harvest,
}

impl Crew {
    /// Starts `count` readers. `program` has the subcommand `reader`.
    pub fn start(
        board: &'static Board,
        program: PathBuf,
        orders: Orders,
        count: usize,
    ) -> Result<Self> {
        let readers = (0..count).map(|_| None).collect();
        let taken = vec![0; count];
        let mut crew = Self { board, program, orders, readers, taken, harvest: Harvest::default() };
        (0..count).try_for_each(|slot| crew.send(slot, 0))?;
        Ok(crew)
    }

    fn send(&mut self, slot: usize, round: u64) -> Result<()> {
        let Orders { board, trees, seed, pause, limit, .. } = &self.orders;
        let seed = seed.wrapping_add(1 + slot as u64 + (round << 16));
        let mut command = Command::new(&self.program);
        command.arg("reader").arg("--board").arg(board).arg("--trees").arg(trees);
        command.args(["--slot", &slot.to_string(), "--seed", &seed.to_string()]);
        command.args(["--pause-us", &pause.as_micros().to_string()]);
        command.args(["--limit-secs", &limit.as_secs().to_string()]);
        if self.orders.quiet {
            command.arg("--quiet");
        }
        command.stdin(Stdio::null());
        let reader = leash(command)?;
        self.board.slots[slot]
            .pid
            .store(u64::from(reader.pid().as_raw().unsigned_abs()), Ordering::SeqCst);
        self.readers[slot] = Some(reader);
        Ok(())
    }

    /// Takes what they have written down, and looks after who has ended or hangs.
    pub fn look(&mut self) -> Result<()> {
        let over = self.board.is_over();
        for slot in 0..self.readers.len() {
            let Some(reader) = &mut self.readers[slot] else { continue };
            let ended = reader.ended();
            let state = &self.board.slots[slot];
            let limit = self.orders.limit.as_nanos() as u64;
            let began = state.announced().map(|announced| announced.began);
            let hangs = began.is_some_and(|began| now().saturating_sub(began) > limit);
            match ended {
                Some(status) if over && status.success() => self.readers[slot] = None,
                Some(status) => {
                    if status.code() != Some(BUS_EXIT) {
                        self.harvest.deaths.push(format!("reader {slot}: {status}"));
                        if state.is_busy() {
                            self.harvest.hung += 1;
                            state.finish(Outcome::Errno(libc::EINTR));
                        }
                    }
                    state.in_use.store(0, Ordering::SeqCst);
                    let round = state.done();
                    self.readers[slot] = None;
                    if !over {
                        self.send(slot, round)?;
                    }
                }
                // its own alarm may be blocked with it: it is said above how it ended
                None if hangs => reader.signal(Signal::SIGKILL),
                None => {}
            }
            self.take(slot);
        }
        Ok(())
    }

    fn take(&mut self, slot: usize) {
        let state = &self.board.slots[slot];
        let entries = state.since(self.taken[slot]);
        self.taken[slot] = state.done();
        for done in entries {
            self.harvest.add(done);
        }
    }

    /// Waits for all to end by themselves, after the board has said that it is over. How many did not.
    pub fn finish(&mut self, patience: Duration) -> Result<usize> {
        let begin = Instant::now();
        loop {
            self.look()?;
            let left = self.readers.iter().flatten().count();
            if left == 0 || begin.elapsed() > patience {
                return Ok(left);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sums that the readers keep themselves.
    pub fn sums(&mut self) {
        let sum = |of: fn(&super::board::Slot) -> u64| self.board.slots.iter().map(of).sum();
        self.harvest.reads = sum(|slot| slot.reads.load(Ordering::Relaxed));
        self.harvest.bytes = sum(|slot| slot.bytes.load(Ordering::Relaxed));
    }
}

impl Harvest {
    fn add(&mut self, done: Done) {
        let Done { access, began, ended, outcome } = done;
        let took = ended.saturating_sub(began);
        self.longest = self.longest.max(took);
        let Access { shard, .. } = access;
        if access.is_cold() {
            self.cold += 1;
            if took > WAITED && outcome == Outcome::Right {
                self.waits.push((shard, began, ended));
            }
        }
        if outcome != Outcome::Right {
            self.bad.push(done);
        }
    }
}
