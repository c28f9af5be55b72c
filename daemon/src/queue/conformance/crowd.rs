//! Many readers in few processes: each is a thread that reads one block.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::line::{self, Line, Lines};
use super::{BLOCK_LEN, Block};
use crate::sys::spawn::Child;

pub(super) const ROLE: &str = "crowd";

/// Of one program, whose mappings (a few a thread) may be 65,530 (`vm.max_map_count`).
pub(super) const THREADS: u64 = 2500;

/// From the test.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    path: PathBuf,
    blocks: Range<Block>,
}

/// From the program, for each thread: what a read gave.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    block: Block,
    read: Result<u8, i32>,
}

/// Readers of a range of blocks. Killed when this goes out of scope.
#[derive(Debug)]
pub(super) struct Crowd {
    programs: Vec<(Child, Line)>,
}

impl Crowd {
    /// Starts one reader for each block.
    pub(super) fn start(directory: &Path, path: &Path, blocks: Range<Block>) -> Self {
        let lines = Lines::new(directory, "crowd");
        let starts = blocks.clone().step_by(THREADS as usize);
        let programs = starts.map(|start| {
            let (child, mut line) = lines.start(line::program(ROLE, lines.path()));
            let blocks = start..(start + THREADS).min(blocks.end);
            line.send(&Job { path: path.to_owned(), blocks });
            (child, line)
        });
        Self { programs: programs.collect() }
    }

    /// How the first `count` readers of each program ended: the byte that filled the block, or the
    /// errno.
    pub(super) fn outcomes(&mut self, count: usize) -> BTreeMap<Block, Result<u8, i32>> {
        let mut outcomes = BTreeMap::new();
        for (_, line) in &mut self.programs {
            for _ in 0..count {
                let Outcome { block, read } = line.recv().expect("the readers live");
                assert!(outcomes.insert(block, read).is_none());
            }
        }
        outcomes
    }

    pub(super) fn kill(self) {
        for (mut child, _) in self.programs {
            child.kill().unwrap();
            child.wait_blocking().unwrap();
        }
    }
}

/// The program.
pub(super) fn read() {
    let mut line = Line::connect();
    let Some(Job { path, blocks }) = line.recv() else { return };
    let file = Arc::new(File::open(path).unwrap());
    // nothing more is read from it, but its end is the test's
    let mut until_the_end = line.try_clone();
    std::thread::spawn(move || {
        let _: Option<()> = until_the_end.recv();
        std::process::exit(1);
    });
    let line = Arc::new(Mutex::new(line));
    let threads: Vec<_> = blocks
        .map(|block| {
            let (file, line) = (Arc::clone(&file), Arc::clone(&line));
            let thread = std::thread::Builder::new().stack_size(16 << 10);
            let thread = thread.spawn(move || {
                let mut bytes = [0; BLOCK_LEN as usize];
                let read = match file.read_at(&mut bytes, block * BLOCK_LEN) {
                    Ok(_) if bytes.iter().all(|byte| *byte == bytes[0]) => Ok(bytes[0]),
                    Ok(_) => Err(0),
                    Err(error) => Err(error.raw_os_error().unwrap_or(0)),
                };
                line.lock().unwrap().send(&Outcome { block, read });
            });
            thread.expect("as many threads as there are readers")
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
