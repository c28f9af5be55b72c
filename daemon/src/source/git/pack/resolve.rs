//! Rebuilding objects that are stored as deltas.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::blob::{Blob, RawPack, Target};
use super::delta::Applying;
use super::header::ObjectType;
use super::inflate::Inflater;
use crate::object::{HashKind, Hasher, ObjectId};
use crate::source::git::wrong;
use crate::source::{FetchError, Sink};

/// Unpacked bases that stay in memory, in bytes.
const CACHE: u64 = 8 << 20;

/// What a spooled base counts for in the cache: an open file is not for nothing.
const SPOOLED_COST: u64 = 1 << 20;

/// A pack may unpack to so many bytes, and [`EXPANSION`] times its own length, but not more.
const UNPACKED: u64 = if cfg!(test) { 64 << 20 } else { 4 << 30 };

/// zlib does not expand more than 1032 times (zlib.net/zlib_tech.html); only deltas do.
const EXPANSION: u64 = 1100;

/// What each rebuilt base counts for besides its bytes: long chains of nothing are work, too.
const REBUILD_COST: u64 = 1 << 10;

/// An entry that has been read.
#[derive(Debug)]
pub struct Entry {
    /// Where it starts in the pack, where its compressed bytes start, and where they end.
    pub start: u64,
    pub data: u64,
    pub end: u64,
    /// Of the inflated bytes: the object, or the delta.
    pub size: u64,
    /// The entry that this one is a delta to, once it is known.
    pub base: Option<usize>,
    /// Known once the entry, or the base of its chain, has been unpacked.
    pub kind: Option<ObjectType>,
}

/// What is kept of a pack to rebuild its objects from.
#[derive(Debug)]
pub struct Shelf {
    pub hash: HashKind,
    pub entries: Vec<Entry>,
    pub raw: RawPack,
    pub inflater: Inflater,
    pub cache: Cache,
    /// Bytes of the pack so far, and bytes that were unpacked from them.
    pub length: u64,
    pub unpacked: u64,
    buffer: Vec<u8>,
}

impl Shelf {
    pub fn new(hash: HashKind) -> Self {
        Self {
            hash,
            entries: Vec::new(),
            raw: RawPack::default(),
            inflater: Inflater::default(),
            cache: Cache::default(),
            length: 0,
            unpacked: 0,
            buffer: Vec::new(),
        }
    }

    /// Counts unpacked bytes; an error when they are out of all proportion.
    pub fn unpack(&mut self, bytes: u64) -> Result<(), FetchError> {
        self.unpacked = self.unpacked.saturating_add(bytes);
        if self.unpacked > UNPACKED.saturating_add(self.length.saturating_mul(EXPANSION)) {
            return Err(wrong("a pack unpacks to far more than it should"));
        }
        Ok(())
    }

    pub fn hasher(&self, kind: ObjectType, size: u64) -> Hasher {
        let mut hasher = self.hash.hasher();
        hasher.update(format!("{} {size}\0", kind.name()).as_bytes());
        hasher
    }

    fn entry(&self, index: usize) -> Result<&Entry, FetchError> {
        self.entries.get(index).ok_or_else(|| wrong("a delta's base is not in the pack"))
    }
}

/// Rebuilds one entry, a piece at a time.
#[derive(Debug)]
pub struct Task {
    pub entry: usize,
    pub kind: ObjectType,
    /// The delta of `entry`, if it has just been read.
    delta: Option<Blob>,
    /// The entries to apply, the first one last.
    chain: Vec<usize>,
    base: Option<Arc<Blob>>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Next,
    Inflate { entry: usize, at: u64, target: Target },
    Apply { entry: usize, applying: Applying },
}

/// How far a task has come.
#[derive(Debug)]
pub enum Progress {
    /// Not done, and little was done.
    More,
    /// Not done, and the budget is used up.
    Busy,
    Done {
        blob: Blob,
        id: ObjectId,
    },
}

impl Task {
    /// To rebuild `entry`, whose bases have all been unpacked before.
    pub fn new(entry: usize, delta: Option<Blob>, shelf: &mut Shelf) -> Result<Self, FetchError> {
        let mut chain = Vec::new();
        let mut at = entry;
        let base = loop {
            if at != entry
                && let Some(blob) = shelf.cache.get(at)
            {
                break Some(blob);
            }
            chain.push(at);
            match shelf.entry(at)?.base {
                Some(base) => at = base,
                None => break None,
            }
        };
        let kind = shelf.entry(at)?.kind.ok_or_else(|| wrong("a delta without a base"))?;
        Ok(Self { entry, kind, delta, chain, base, stage: Stage::Next })
    }

    /// Goes on for a while.
    pub fn step(
        &mut self,
        budget: usize,
        shelf: &mut Shelf,
        sink: &mut dyn Sink,
    ) -> Result<Progress, FetchError> {
        match std::mem::replace(&mut self.stage, Stage::Next) {
            Stage::Next => {
                shelf.unpack(REBUILD_COST)?;
                let entry = self.chain.pop().ok_or_else(|| wrong("a delta without a base"))?;
                self.stage = match self.delta.take_if(|_| entry == self.entry) {
                    Some(delta) => self.apply(entry, delta, shelf, sink)?,
                    None => {
                        let Entry { data, size, .. } = *shelf.entry(entry)?;
                        shelf.inflater.reset();
                        Stage::Inflate { entry, at: data, target: Target::new(size, None, sink)? }
                    }
                };
            }
            Stage::Inflate { entry, mut at, mut target } => {
                let end = shelf.entry(entry)?.end;
                let most = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
                shelf.buffer.resize(most.min(64 << 10), 0);
                let n = shelf.raw.read_at(at, &mut shelf.buffer)?;
                let input = shelf.buffer.get(..n).unwrap_or_default();
                let inflated = shelf.inflater.inflate(input, &mut target)?;
                at += inflated.used as u64;
                shelf.unpack(inflated.written as u64)?;
                self.stage = if inflated.done {
                    let (blob, _) = target.finish()?;
                    if shelf.entry(entry)?.base.is_some() {
                        self.apply(entry, blob, shelf, sink)?
                    } else {
                        self.unpacked(entry, blob, shelf);
                        Stage::Next
                    }
                } else if inflated.used == 0 && inflated.written == 0 {
                    // it was complete when it was read the first time
                    return Err(wrong("an object of the pack is cut short"));
                } else {
                    Stage::Inflate { entry, at, target }
                };
            }
            Stage::Apply { entry, mut applying } => {
                let base = self.base.as_ref().ok_or_else(|| wrong("a delta without a base"))?;
                if !applying.step(base, budget)? {
                    self.stage = Stage::Apply { entry, applying };
                    return Ok(Progress::Busy);
                }
                let (blob, id) = applying.finish()?;
                match id {
                    Some(id) => return Ok(Progress::Done { blob, id }),
                    None => self.unpacked(entry, blob, shelf),
                }
            }
        }
        Ok(Progress::More)
    }

    fn apply(
        &self,
        entry: usize,
        delta: Blob,
        shelf: &mut Shelf,
        sink: &mut dyn Sink,
    ) -> Result<Stage, FetchError> {
        let base = self.base.as_ref().ok_or_else(|| wrong("a delta without a base"))?;
        let mut size = 0;
        // only the one that was asked for needs its id: its bases had theirs worked out before
        let hasher = (entry == self.entry).then(|| shelf.hash.hasher());
        let kind = self.kind;
        let applying = Applying::new(
            delta,
            base,
            |size| {
                let mut hasher = hasher?;
                hasher.update(format!("{} {size}\0", kind.name()).as_bytes());
                Some(hasher)
            },
            |n| {
                size = n;
                Ok(())
            },
            sink,
        )?;
        shelf.unpack(size)?;
        Ok(Stage::Apply { entry, applying })
    }

    fn unpacked(&mut self, entry: usize, blob: Blob, shelf: &mut Shelf) {
        let blob = Arc::new(blob);
        shelf.cache.put(entry, blob.clone());
        self.base = Some(blob);
    }
}

/// The unpacked bases that were used last.
#[derive(Debug, Default)]
pub struct Cache {
    blobs: HashMap<usize, (Arc<Blob>, u64)>,
    by_use: BTreeMap<u64, usize>,
    uses: u64,
    bytes: u64,
}

impl Cache {
    pub fn get(&mut self, entry: usize) -> Option<Arc<Blob>> {
        let (blob, last) = self.blobs.get_mut(&entry)?;
        self.by_use.remove(last);
        self.uses += 1;
        *last = self.uses;
        self.by_use.insert(self.uses, entry);
        Some(blob.clone())
    }

    pub fn put(&mut self, entry: usize, blob: Arc<Blob>) {
        if self.blobs.contains_key(&entry) {
            return;
        }
        self.bytes += cost(&blob);
        self.uses += 1;
        self.by_use.insert(self.uses, entry);
        self.blobs.insert(entry, (blob, self.uses));
        while self.bytes > CACHE {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some((blob, _)) = self.blobs.remove(&oldest) {
                self.bytes -= cost(&blob);
            }
        }
    }
}

/// What a blob counts for, with what the cache itself needs for it.
fn cost(blob: &Blob) -> u64 {
    match blob {
        Blob::Memory(bytes) => bytes.len() as u64 + 128,
        Blob::Spooled { .. } => SPOOLED_COST,
    }
}
