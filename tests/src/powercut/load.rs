//! Work, until the power is cut: clones and removals, readers who compare what they read, users who write.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;

use anyhow::Result;

use super::book::{Report, Tree, UserFile};
use super::check::content;
use super::guest::Guest;
use super::origins::{ORIGINS, REVISIONS, branch, is_converted, may_be_edited, origin, truth};
use crate::repository::Random;

const READERS: u64 = 3;
/// At most so many trees at a time.
const TREES: usize = 4;
/// Trees below this are known to be whole.
const READS: u64 = 50;

/// A tree that is in use. Held for reading by who reads and writes in it.
#[derive(Debug)]
struct Live {
    name: String,
    place: PathBuf,
    truth: PathBuf,
    whole: bool,
    /// The paths of all regular files, in the truth.
    files: Vec<PathBuf>,
    written: Mutex<Vec<PathBuf>>,
    gone: RwLock<bool>,
}

type Trees = Mutex<Vec<Arc<Live>>>;

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does not return unless something is out of order.
pub(super) fn load(guest: &Guest) -> Result<()> {
    let trees: Trees = Mutex::default();
    let present = guest.daemon.admin().mounts()?;
    for tree in &guest.plan.trees {
        let directory = guest.tree(&tree.name);
        if present.iter().any(|mount| directory == std::path::Path::new(&mount.directory)) {
            locked(&trees).push(Arc::new(Live::new(guest, tree)?));
        }
    }
    let seed = guest.plan.seed;
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for reader in 0..READERS {
            let trees = &trees;
            workers.push(scope.spawn(move || read(guest, trees, Random::new(seed ^ reader << 40))));
        }
        workers.push(scope.spawn(|| write(guest, &trees, Random::new(seed ^ 1 << 50))));
        workers.push(scope.spawn(|| clone(guest, &trees, Random::new(seed ^ 1 << 51))));
        for worker in workers {
            match worker.join() {
                Ok(result) => result?,
                Err(_) => anyhow::bail!("a worker of the load has panicked"),
            }
        }
        Ok(())
    })
}

impl Live {
    fn new(guest: &Guest, tree: &Tree) -> Result<Self> {
        let truth = truth(&guest.plan.origins, tree.origin, tree.revision);
        let entries = crate::tree::entries(&truth)?.into_iter();
        let files = entries.filter(|(_, entry)| entry.kind == "file").map(|(path, _)| path);
        Ok(Self {
            name: tree.name.clone(),
            place: guest.tree(&tree.name),
            truth,
            whole: tree.whole,
            files: files.collect(),
            written: Mutex::new(tree.files.iter().map(|file| file.path.clone()).collect()),
            gone: RwLock::new(false),
        })
    }
}

fn any(trees: &Trees, random: &mut Random) -> Option<Arc<Live>> {
    let trees = locked(trees);
    trees.get(random.below(trees.len())).cloned()
}

/// Some files of a tree, then of another.
fn read(guest: &Guest, trees: &Trees, mut random: Random) -> Result<()> {
    let mut read = 0;
    loop {
        let Some(tree) = any(trees, &mut random) else {
            thread::sleep(std::time::Duration::from_millis(50));
            continue;
        };
        for _ in 0..1 + random.below(20) {
            let gone = tree.gone.read().unwrap_or_else(PoisonError::into_inner);
            if *gone {
                break;
            }
            let path = &tree.files[random.below(tree.files.len())];
            if may_be_edited(path) || (is_converted(path) && !tree.whole) {
                continue;
            }
            let right = fs_err::read(tree.truth.join(path))?;
            let name = format!("{}: {}", tree.name, path.display());
            match fs_err::read(tree.place.join(path)) {
                Ok(found) if found == right => read += 1,
                Ok(_) => guest.wrong_bytes(format!("{name}: wrong bytes under load"))?,
                Err(error) => guest.finding(format!("{name}: {error}"))?,
            }
            if read == READS {
                guest.tell(&Report::Read(read))?;
                read = 0;
            }
        }
    }
}

/// New files, and tracked ones written anew, each once: synced, then reported.
fn write(guest: &Guest, trees: &Trees, mut random: Random) -> Result<()> {
    loop {
        thread::sleep(std::time::Duration::from_millis(random.below(40) as u64));
        let Some(tree) = any(trees, &mut random) else { continue };
        let gone = tree.gone.read().unwrap_or_else(PoisonError::into_inner);
        if *gone {
            continue;
        }
        let path = if random.below(2) == 0 {
            PathBuf::from(format!("user/{:08x}", random.below(1 << 31)))
        } else {
            tree.files[random.below(tree.files.len())].clone()
        };
        let new = path.starts_with("user");
        if !new && !may_be_edited(&path) || locked(&tree.written).contains(&path) {
            continue;
        }
        let file = UserFile { path, seed: random.number(), len: random.below(60_000) };
        let place = tree.place.join(&file.path);
        let directory = place.parent().map(PathBuf::from).unwrap_or_default();
        let made = || -> std::io::Result<()> {
            fs_err::create_dir_all(&directory)?;
            fs_err::write(&place, content(&file))?;
            fs_err::File::open(&place)?.sync_all()?;
            fs_err::File::open(&directory)?.sync_all()?;
            fs_err::File::open(&tree.place)?.sync_all()
        };
        match made() {
            Ok(()) => {
                locked(&tree.written).push(file.path.clone());
                guest.tell(&Report::Wrote { name: tree.name.clone(), file })?;
            }
            Err(error) => guest.finding(format!("{}: can't write: {error}", tree.name))?,
        }
    }
}

/// Clones, fetches all of some trees, removes others.
fn clone(guest: &Guest, trees: &Trees, mut random: Random) -> Result<()> {
    for number in 0.. {
        let count = locked(trees).len();
        if count == TREES || (count > 1 && random.below(4) == 0) {
            let tree = {
                let mut trees = locked(trees);
                trees.swap_remove(random.below(count))
            };
            guest.tell(&Report::Removing { name: tree.name.clone() })?;
            *tree.gone.write().unwrap_or_else(PoisonError::into_inner) = true;
            guest.hydrant(&["rm", "--discard", &tree.place.to_string_lossy()])?;
            guest.tell(&Report::Removed { name: tree.name.clone() })?;
            continue;
        }
        let (from, revision) = (random.below(ORIGINS), random.below(REVISIONS));
        let name = format!("t-{:x}-{number}", guest.plan.seed);
        guest.tell(&Report::Cloning { name: name.clone(), origin: from, revision })?;
        let url = origin(&guest.plan.origins, from);
        let place = guest.tree(&name);
        let history = ["none", "background", "full"][random.below(3)];
        guest.hydrant(&[
            "clone",
            &format!("--history={history}"),
            &format!("--rev={}", branch(revision)),
            &url.to_string_lossy(),
            &place.to_string_lossy(),
        ])?;
        guest.tell(&Report::Cloned { name: name.clone() })?;
        let tree = Tree {
            name,
            origin: from,
            revision,
            there: super::book::There::Surely,
            whole: true,
            files: Vec::new(),
        };
        let live = Live::new(guest, &tree)?;
        locked(trees).push(Arc::new(live));
        if random.below(3) == 0 {
            // all of it: segments that get complete
            guest.hydrant(&["prefetch", &place.to_string_lossy()])?;
            let mounts = guest.daemon.admin().mounts()?;
            let complete = mounts.iter().map(|mount| mount.complete_segments).sum();
            guest.tell(&Report::Complete(complete))?;
        }
    }
    Ok(())
}
