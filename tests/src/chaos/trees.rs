//! Trees that come and go: what was read once is no test any more, so a tree of which every file has
//! been asked for is removed and cloned again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::board::Board;
use super::content::Content;
use super::killer::Register;
use super::reader::tree_path;
use super::weather::Almanac;
use super::{MS, now};
use crate::world::World;

/// How long readers may take to let go of a tree, or a clone or removal to be done in the end.
const PATIENCE: Duration = Duration::from_secs(150);

/// A supervisor that follows one that was killed serves after so long, even where the machine is busy.
const RESTART: u64 = 20_000 * MS;

/// What is known of the clone that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    pub content: Content,
    pub pool: u64,
    /// Of its opening. Goes up with each.
    pub generation: u64,
}

/// What the rotation has done.
#[derive(Debug, Default)]
pub struct Count {
    pub clones: u64,
    pub removals: u64,
    /// Commands that failed because the supervisor was killed or the origin was broken meanwhile.
    pub cut_short: BTreeMap<String, u64>,
    /// Commands that failed and should not have.
    pub failures: Vec<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Rotation<'a> {
    pub world: &'a World,
    pub board: &'static Board,
    pub directory: PathBuf,
    /// Of each tree: its content and its URL.
    pub sources: Vec<(Content, String)>,
    pub register: &'a Register,
    pub almanac: &'a Almanac,
    /// Spare the supervisor and the origin, so that a clone can be done.
    pub calm: &'a AtomicBool,
    pub open: Mutex<BTreeMap<u64, Open>>,
    pub count: Mutex<Count>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Rotation<'_> {
    /// The clone that is open in tree `number`.
    #[must_use]
    pub fn open(&self, number: u64) -> Option<Open> {
        lock(&self.open).get(&number).copied()
    }

    /// All that are open.
    #[must_use]
    pub fn opened(&self) -> BTreeMap<u64, Open> {
        lock(&self.open).clone()
    }

    #[must_use]
    pub fn path(&self, number: u64) -> PathBuf {
        tree_path(&self.directory, number)
    }

    /// Clones all.
    pub fn begin(&self) -> Result<()> {
        (0..self.sources.len()).try_for_each(|number| self.clone(number, &|| false))
    }

    /// Renews what has been read, until `over`.
    pub fn run(&self, over: impl Fn() -> bool) -> Result<()> {
        while !over() {
            let read = |number: &usize| self.board.trees[*number].is_read();
            match (0..self.sources.len()).find(read) {
                Some(number) => {
                    self.close(number)?;
                    self.remove(number, &over)?;
                    self.clone(number, &over)?;
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
        Ok(())
    }

    fn close(&self, number: usize) -> Result<()> {
        self.board.trees[number].turn();
        let begin = Instant::now();
        while self.board.is_used(number) {
            if begin.elapsed() > PATIENCE {
                bail!("readers don't let go of tree {number}");
            }
            thread::sleep(Duration::from_millis(2));
        }
        lock(&self.open).remove(&(number as u64));
        Ok(())
    }

    /// Does something again and again until it succeeds: the first time as it comes, then in peace.
    fn insist(
        &self,
        what: &str,
        over: &impl Fn() -> bool,
        attempt: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let begin = Instant::now();
        let mut result = Ok(());
        while begin.elapsed() < PATIENCE && !over() {
            let from = now();
            result = attempt();
            let Err(error) = &result else { break };
            // the next supervisor may not serve yet
            let excused = self.register.killed(from.saturating_sub(RESTART), now(), true)
                || self.almanac.was_bad(from, now());
            let text = format!("{error:#}");
            let root = error.root_cause().to_string();
            // the command's words come last, and are different each time in their paths
            let line = root.lines().last().unwrap_or_default().split(" at /").next();
            let line = line.unwrap_or_default();
            if excused {
                *lock(&self.count).cut_short.entry(format!("{what}: {line}")).or_default() += 1;
            } else {
                lock(&self.count).failures.push(format!("{what}: {text}"));
            }
            self.calm.store(true, Ordering::SeqCst);
            // the next supervisor is not there yet, or a fault is not over
            thread::sleep(Duration::from_millis(200));
        }
        self.calm.store(false, Ordering::SeqCst);
        if over() { Ok(()) } else { result }
    }

    fn clone(&self, number: usize, over: &impl Fn() -> bool) -> Result<()> {
        let path = self.path(number as u64);
        let (content, url) = &self.sources[number];
        self.insist("clone", over, || {
            self.clear(&path)?;
            self.world.clone_url(url, &path, &["--history=none"]).map(drop)
        })?;
        if over() {
            return Ok(());
        }
        let mount = crate::process::until("the tree is known", PATIENCE, || {
            self.world.daemon.mount_of(&path).ok()
        })?;
        let tree = &self.board.trees[number];
        let generation = tree.generation.load(Ordering::SeqCst) + 1;
        let open = Open { content: *content, pool: mount.pool, generation };
        lock(&self.open).insert(number as u64, open);
        tree.seed.store(content.seed, Ordering::SeqCst);
        tree.files.store(content.files, Ordering::SeqCst);
        tree.cursor.store(0, Ordering::SeqCst);
        tree.shard.store(u64::from(mount.shard), Ordering::SeqCst);
        tree.turn();
        lock(&self.count).clones += 1;
        Ok(())
    }

    fn remove(&self, number: usize, over: &impl Fn() -> bool) -> Result<()> {
        let path = self.path(number as u64);
        self.insist("rm", over, || self.clear(&path))?;
        lock(&self.count).removals += 1;
        Ok(())
    }

    /// Removes what is at `path`, if anything is.
    fn clear(&self, path: &Path) -> Result<()> {
        let mounts = self.world.daemon.admin().mounts()?;
        if mounts.iter().any(|mount| Path::new(&mount.directory) == path) {
            let arguments = [Path::new("rm"), Path::new("--discard"), path];
            self.world.daemon.hydrant(&arguments)?.time_out(PATIENCE).check()?;
        }
        Ok(())
    }
}
