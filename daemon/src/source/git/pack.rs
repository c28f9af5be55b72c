//! Reading a pack as it arrives (gitformat-pack(5)).
//!
//! Each object is worked out, hashed and given to the sink as soon as its last byte is there, if it
//! is one that was asked for. Memory is bounded whatever the pack says: an object larger than
//! [`SPOOL_FROM`](crate::source::SPOOL_FROM) goes through a spool file, so does a pack whose raw bytes are needed and
//! don't fit, and bases of deltas are unpacked again when the cache has lost them. Work is done in
//! steps of about a mebibyte, so that a worker's other requests go on in between.

mod blob;
mod delta;
mod header;
mod inflate;
mod resolve;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Buf, Bytes};

use self::blob::{Blob, Target};
use self::header::{EntryHeader, EntryKind, ObjectType, PartialHeader};
use self::resolve::{Entry, Progress, Shelf, Task};
use super::wrong;
use crate::object::{HashKind, Hasher, ObjectId};
use crate::source::{Content, FetchError, Sink};

/// How many bytes are unpacked in one step, about.
const STEP: usize = 1 << 20;

/// A pack with more objects than asked for, by this factor and number, is not what was asked for.
const MAX_EXTRA: (usize, usize) = (16, 4096);

/// Whether there is more to do with the bytes at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Call [`Parser::step`] again.
    More,
    /// All bytes have been used: [`Parser::push`] more, or [`Parser::finish`].
    Hungry,
}

/// A pack being read.
#[derive(Debug)]
pub struct Parser {
    /// What was asked for, and whether it has been given.
    wanted: HashMap<ObjectId, bool>,
    input: Bytes,
    state: State,
    count: usize,
    hasher: Hasher,
    keep_raw: bool,
    shelf: Shelf,
    ids: HashMap<ObjectId, usize>,
    /// Deltas whose base has not been worked out yet.
    waiting: HashMap<Base, Vec<usize>>,
    /// Deltas whose base has.
    ready: VecDeque<usize>,
    task: Option<Task>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Base {
    Entry(usize),
    Id(ObjectId),
}

#[derive(Debug)]
enum State {
    PackHeader { bytes: [u8; 12], len: usize },
    EntryHeader { start: u64, partial: PartialHeader },
    Body { start: u64, data: u64, header: EntryHeader, target: Target },
    Trailer { bytes: [u8; 32], len: usize },
    Done,
}

impl Parser {
    /// For a pack that should have these blobs. With `keep_raw`, [`finish`](Self::finish) gives the
    /// pack itself.
    #[must_use]
    pub fn new(hash: HashKind, wanted: &[ObjectId], keep_raw: bool) -> Self {
        Self {
            wanted: wanted.iter().map(|&id| (id, false)).collect(),
            input: Bytes::new(),
            state: State::PackHeader { bytes: [0; 12], len: 0 },
            count: 0,
            hasher: hash.hasher(),
            keep_raw,
            shelf: Shelf::new(hash),
            ids: HashMap::new(),
            waiting: HashMap::new(),
            ready: VecDeque::new(),
            task: None,
        }
    }

    /// The next bytes of the pack. What was pushed before must have been used up.
    pub fn push(&mut self, bytes: Bytes) {
        debug_assert!(self.input.is_empty(), "bytes pushed before the last ones were used up");
        self.input = bytes;
    }

    /// Goes on for a bounded while.
    pub fn step(&mut self, sink: &mut dyn Sink) -> Result<Step, FetchError> {
        let before = self.shelf.unpacked + self.shelf.length;
        while self.shelf.unpacked + self.shelf.length < before + STEP as u64 {
            if let Some(mut task) = self.task.take() {
                match task.step(STEP, &mut self.shelf, sink)? {
                    Progress::Done { blob, id } => {
                        self.unpacked(task.entry, task.kind, id, blob, true, sink)?;
                    }
                    Progress::More => self.task = Some(task),
                    Progress::Busy => {
                        self.task = Some(task);
                        return Ok(Step::More);
                    }
                }
            } else if let Some(entry) = self.ready.pop_front() {
                self.task = Some(Task::new(entry, None, &mut self.shelf)?);
            } else if self.input.is_empty() {
                return Ok(Step::Hungry);
            } else {
                self.parse(sink)?;
            }
        }
        Ok(Step::More)
    }

    /// The end of the pack: an error unless all that was asked for has been given and the checksum
    /// was right. The pack's raw bytes, if they were to be kept.
    pub fn finish(self) -> Result<Option<Content>, FetchError> {
        if !matches!(self.state, State::Done) {
            return Err(FetchError::Retry {
                message: format!("the pack ends after {} bytes", self.shelf.length),
                after: None,
            });
        }
        if !self.waiting.is_empty() || self.task.is_some() || !self.ready.is_empty() {
            return Err(wrong("a delta's base is not in the pack"));
        }
        if let Some((id, _)) = self.wanted.iter().find(|(_, given)| !**given) {
            return Err(wrong(format!("the pack has no object {id}, which was asked for")));
        }
        self.keep_raw.then(|| self.shelf.raw.into_content()).transpose()
    }

    fn parse(&mut self, sink: &mut dyn Sink) -> Result<(), FetchError> {
        match &mut self.state {
            State::PackHeader { bytes, len } => {
                fill(&mut self.input, bytes, len, 12);
                if *len == 12 {
                    let bytes = *bytes;
                    self.used(&bytes, true, sink)?;
                    self.pack_header(&bytes)?;
                }
                Ok(())
            }
            State::EntryHeader { partial, .. } => {
                // one byte is left at least
                let byte = self.input.get_u8();
                let header = partial.byte(byte, self.shelf.hash)?;
                self.used(&[byte], false, sink)?;
                header.map_or(Ok(()), |header| self.entry_header(header, sink))
            }
            State::Body { target, .. } => {
                let inflated = self.shelf.inflater.inflate(&self.input, target)?;
                let bytes = self.input.split_to(inflated.used);
                self.used(&bytes, false, sink)?;
                self.shelf.unpack(inflated.written as u64)?;
                if inflated.done { self.body(sink) } else { Ok(()) }
            }
            State::Trailer { bytes, len } => {
                let id_len = self.shelf.hash.id_len();
                fill(&mut self.input, bytes, len, id_len);
                if *len == id_len {
                    let bytes = *bytes;
                    self.trailer(bytes.get(..id_len).unwrap_or_default(), sink)?;
                }
                Ok(())
            }
            State::Done => Err(wrong("there is more after the end of the pack")),
        }
    }

    /// Takes note of bytes that have been parsed.
    fn used(&mut self, bytes: &[u8], always: bool, sink: &mut dyn Sink) -> Result<(), FetchError> {
        self.hasher.update(bytes);
        self.shelf.length += bytes.len() as u64;
        // Nothing is rebuilt from the last entry, unless something that came before it waits for it.
        let last = self.shelf.entries.len() + 1 >= self.count;
        if always || self.keep_raw || !last || !self.waiting.is_empty() {
            self.shelf.raw.append(bytes, sink)?;
        }
        Ok(())
    }

    fn pack_header(&mut self, bytes: &[u8; 12]) -> Result<(), FetchError> {
        let [p, a, c, k, v0, v1, v2, v3, n0, n1, n2, n3] = *bytes;
        let version = u32::from_be_bytes([v0, v1, v2, v3]);
        if [p, a, c, k] != *b"PACK" || !(2..=3).contains(&version) {
            return Err(wrong("this is no pack of version 2 or 3"));
        }
        let count = u32::from_be_bytes([n0, n1, n2, n3]) as usize;
        if count > self.wanted.len().saturating_mul(MAX_EXTRA.0).saturating_add(MAX_EXTRA.1) {
            let wanted = self.wanted.len();
            return Err(wrong(format!(
                "a pack of {count} objects came where {wanted} were asked for"
            )));
        }
        self.count = count;
        self.next();
        Ok(())
    }

    fn next(&mut self) {
        self.state = if self.shelf.entries.len() < self.count {
            State::EntryHeader { start: self.shelf.length, partial: PartialHeader::default() }
        } else {
            State::Trailer { bytes: [0; 32], len: 0 }
        };
    }

    fn entry_header(&mut self, header: EntryHeader, sink: &mut dyn Sink) -> Result<(), FetchError> {
        let State::EntryHeader { start, .. } = self.state else { return Ok(()) };
        let hasher = match header.kind {
            EntryKind::Whole(kind) => Some(self.shelf.hasher(kind, header.size)),
            EntryKind::OfsDelta(_) | EntryKind::RefDelta(_) => None,
        };
        let target = Target::new(header.size, hasher, sink)?;
        self.shelf.inflater.reset();
        self.state = State::Body { start, data: self.shelf.length, header, target };
        Ok(())
    }

    /// An entry is complete.
    fn body(&mut self, sink: &mut dyn Sink) -> Result<(), FetchError> {
        let State::Body { start, data, header, target } =
            std::mem::replace(&mut self.state, State::Done)
        else {
            return Ok(());
        };
        let (blob, id) = target.finish()?;
        let end = self.shelf.length;
        let index = self.shelf.entries.len();
        let mut entry = Entry { start, data, end, size: header.size, base: None, kind: None };
        let waits_for = match header.kind {
            EntryKind::Whole(_) => None,
            EntryKind::OfsDelta(back) => {
                let base = self.base_at(start, back)?;
                entry.base = Some(base);
                let known = self.shelf.entries.get(base).is_some_and(|base| base.kind.is_some());
                (!known).then_some(Base::Entry(base))
            }
            EntryKind::RefDelta(id) => {
                entry.base = self.ids.get(&id).copied();
                entry.base.is_none().then_some(Base::Id(id))
            }
        };
        self.shelf.entries.push(entry);
        match (header.kind, id, waits_for) {
            (EntryKind::Whole(kind), Some(id), _) => {
                self.unpacked(index, kind, id, blob, false, sink)?;
            }
            (_, _, Some(base)) => self.waiting.entry(base).or_default().push(index),
            _ => self.task = Some(Task::new(index, Some(blob), &mut self.shelf)?),
        }
        self.next();
        Ok(())
    }

    /// The entry that starts `back` bytes before `start`.
    fn base_at(&self, start: u64, back: u64) -> Result<usize, FetchError> {
        start
            .checked_sub(back)
            .and_then(|at| self.shelf.entries.binary_search_by_key(&at, |e| e.start).ok())
            .ok_or_else(|| wrong("a delta's base is not in the pack"))
    }

    /// An object has been worked out.
    fn unpacked(
        &mut self,
        index: usize,
        kind: ObjectType,
        id: ObjectId,
        blob: Blob,
        delta: bool,
        sink: &mut dyn Sink,
    ) -> Result<(), FetchError> {
        if let Some(entry) = self.shelf.entries.get_mut(index) {
            entry.kind = Some(kind);
        }
        self.ids.entry(id).or_insert(index);
        for base in [Base::Entry(index), Base::Id(id)] {
            for waiting in self.waiting.remove(&base).unwrap_or_default() {
                if let Some(entry) = self.shelf.entries.get_mut(waiting) {
                    entry.base = Some(index);
                }
                self.ready.push_back(waiting);
            }
        }
        let give = match self.wanted.get_mut(&id) {
            Some(given) if !*given => {
                if kind != ObjectType::Blob {
                    return Err(wrong(format!("{id} is a {}, not a blob", kind.name())));
                }
                *given = true;
                true
            }
            _ => false,
        };
        // A delta's result is likely to be the base of the next one, a whole object is not.
        let keep = delta && self.shelf.entries.len() < self.count || !self.ready.is_empty();
        match (give, keep) {
            (true, true) => {
                self.shelf.cache.put(index, Arc::new(blob.duplicate()?));
                sink.object(id, blob.into()).map_err(FetchError::Sink)
            }
            (true, false) => sink.object(id, blob.into()).map_err(FetchError::Sink),
            (false, true) => {
                self.shelf.cache.put(index, Arc::new(blob));
                Ok(())
            }
            (false, false) => Ok(()),
        }
    }

    fn trailer(&mut self, bytes: &[u8], sink: &mut dyn Sink) -> Result<(), FetchError> {
        let hasher = std::mem::replace(&mut self.hasher, self.shelf.hash.hasher());
        if hasher.finish().as_bytes() != bytes {
            return Err(wrong("the pack's checksum is not right"));
        }
        self.shelf.length += bytes.len() as u64;
        if self.keep_raw {
            self.shelf.raw.append(bytes, sink)?;
        }
        self.state = State::Done;
        Ok(())
    }
}

/// Moves bytes from `input` into `bytes` until there are `want` of them.
fn fill(input: &mut Bytes, bytes: &mut [u8], len: &mut usize, want: usize) {
    let n = want.saturating_sub(*len).min(input.len());
    if let Some(to) = bytes.get_mut(*len..*len + n) {
        input.copy_to_slice(to);
        *len += n;
    }
}

#[cfg(test)]
mod tests;
