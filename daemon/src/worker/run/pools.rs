//! One pool in the main loop: its segments, its engine, its source and the requests that run.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::AbortHandle;

use super::layered::Layered;
use super::{chain, shortened};
use crate::fanotify::DenyErrno;
use crate::ids::{EventId, PoolId, SegmentId};
use crate::queue::wire::{Counters, FromWorker, Limits, Run};
use crate::range::{BLOCK, ByteRange};
use crate::segment::SegmentKind;
use crate::segment::extents::{Extents, Place};
use crate::source::Fetch;
use crate::source::oci::fetch::{CHUNK, chunks};
use crate::worker::ObjectNo;
use crate::worker::compose::Composition;
use crate::worker::control::Control;
use crate::worker::engine::{Effect, Engine};
use crate::worker::fill::{self, CacheDrop, Target};
use crate::worker::pool::{NameIndex, Pool, PoolError};
use crate::worker::readahead::Look;
use crate::worker::request::{self, News, Note, Plan};
use crate::worker::schedule::{Arrival, Lane, Now, Outcome, RequestId};
use crate::worker::trace::Trace;

/// So many bytes of an existence pack are made beyond those that are asked for, of the same object.
const COMPOSED_AHEAD: u64 = 1 << 20;

/// The records of a layer's segment that have a byte in a run of chunks.
fn records(extents: &Extents, run: Run) -> Range<u32> {
    let number = |record: usize| u32::try_from(record).unwrap_or(u32::MAX);
    let [first, count] = [run.first, run.count].map(|n| u64::from(n) * CHUNK);
    let place = ByteRange::new(first, count).clamp(extents.size());
    if place.is_empty() {
        return 0..0;
    }
    let records = extents.overlapping(place);
    number(records.start)..number(records.end)
}

/// What all pools use.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) spool: Arc<OwnedFd>,
    pub(super) notes: UnboundedSender<Note>,
    pub(super) slow: UnboundedSender<Slow>,
}

/// Slow work that is done.
#[derive(Debug)]
pub(super) enum Slow {
    Names { pool: PoolId, index: NameIndex, objects: u32 },
    Composed { event: EventId, result: Result<(), (DenyErrno, String)> },
}

/// What becomes of an event whose objects are there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ready {
    Allow,
    /// [`Slow::Composed`] follows.
    Composing,
    /// Something is a hole again.
    Surprise,
}

/// A denial with its reason.
type Denial = (DenyErrno, String);

#[derive(Debug)]
struct Running {
    task: AbortHandle,
    lane: Lane,
    objects: Vec<ObjectNo>,
    /// Bytes that have come.
    progress: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(super) struct PoolState<F> {
    id: PoolId,
    pub(super) pool: Pool,
    pub(super) engine: Engine,
    source: Arc<F>,
    /// Of a layer's segment: its extent index and its access index.
    access: Option<(Arc<File>, Arc<File>)>,
    /// Of a layer: what its readers want.
    trace: Option<Trace>,
    limits: Limits,
    running: HashMap<RequestId, Running>,
    /// Where the objects that are under way belong.
    targets: HashMap<ObjectNo, Arc<Target>>,
    counters: Counters,
    received: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    cache: CacheDrop,
    /// What was last said of the origin.
    trouble: String,
}

impl<F: Fetch> PoolState<F> {
    pub(super) fn new(id: PoolId, source: F, limits: Limits) -> Self {
        // Two workers that lost the same origin should not come back in step.
        let seed = id.0 ^ u64::from(std::process::id()) << 32;
        Self {
            id,
            pool: Pool::default(),
            engine: Engine::new(&limits, seed),
            source: Arc::new(source),
            access: None,
            trace: None,
            limits,
            running: HashMap::new(),
            targets: HashMap::new(),
            counters: Counters::default(),
            received: Arc::default(),
            sent: Arc::default(),
            cache: CacheDrop::default(),
            trouble: String::new(),
        }
    }

    /// Takes a segment: its data, its extent index and, of a layer, its access index.
    pub(super) fn attach(
        &mut self,
        now: Now,
        segment: SegmentId,
        data: OwnedFd,
        index: OwnedFd,
        access: Option<OwnedFd>,
    ) -> Result<(), PoolError> {
        self.pool.attach(segment, data, index)?;
        if let Some(access) = access {
            let files = (self.pool.segment(segment)?.index(), Arc::new(File::from(access)));
            self.source.attach(Arc::clone(&files.0), Arc::clone(&files.1));
            self.access = Some(files);
            self.trace = Some(Trace::begin(now, segment));
        }
        Ok(())
    }

    /// From now on requests go to the origin in this way. Those under way end as they began.
    pub(super) fn settings(&mut self, source: F, limits: Limits) {
        if let Some((extents, access)) = &self.access {
            source.attach(Arc::clone(extents), Arc::clone(access));
        }
        self.source = Arc::new(source);
        self.limits = limits;
    }

    /// The range and the rest of all objects that have a byte in it.
    pub(super) fn whole_objects(&mut self, segment: SegmentId, range: ByteRange) -> ByteRange {
        let Ok(extents) = self.pool.extents(segment) else { return range };
        let records = extents.overlapping(range);
        let first = extents.get(records.start).map_or(range.offset(), |e| e.range.offset());
        let last = records.end.checked_sub(1).and_then(|record| extents.get(record));
        let end = last.map_or(range.end(), |extent| extent.range.end());
        ByteRange::between(first.min(range.offset()), end.max(range.end()))
    }

    /// An event. `true`: all that it needs is there already.
    pub(super) fn event(
        &mut self,
        now: Now,
        event: EventId,
        segment: SegmentId,
        range: ByteRange,
    ) -> Result<bool, PoolError> {
        self.trace(now, segment, range)?;
        let holes = self.pool.holes(segment, range)?;
        if holes.is_empty() {
            return Ok(true);
        }
        let (absent, look) = match self.pool.segment(segment)?.kind {
            SegmentKind::Data => (self.absent(segment, &holes)?, Look::File),
            SegmentKind::Pack => (self.absent_of_pack(segment, &holes)?, Look::Pack),
        };
        if look == Look::Pack && absent.is_empty() {
            let entries = self.entries(segment, &holes)?;
            let objects: Vec<_> = entries.into_iter().map(|(_, no, _)| no).collect();
            self.engine.touched(now, &objects, look, &mut self.pool);
        }
        self.engine.event(now, event, &absent, look, &mut self.pool);
        Ok(false)
    }

    /// The objects of a data segment that have a block in `holes`.
    fn absent(
        &mut self,
        segment: SegmentId,
        holes: &[ByteRange],
    ) -> Result<Vec<(ObjectNo, u64)>, PoolError> {
        let extents = self.pool.extents(segment)?;
        let mut absent: Vec<(ObjectNo, u64)> = Vec::new();
        for hole in holes {
            for record in extents.overlapping(*hole) {
                let Some(extent) = extents.get(record) else { continue };
                let no = self.pool.number(segment, u32::try_from(record).unwrap_or(u32::MAX))?;
                if !extent.range.is_empty() && absent.last().is_none_or(|(last, _)| *last != no) {
                    // The hole map is right, whatever is believed here.
                    self.pool.vanished(no);
                    absent.push((no, extent.size));
                }
            }
        }
        Ok(absent)
    }

    /// The objects that entries with a byte in `holes` repeat, and that are not there.
    fn absent_of_pack(
        &mut self,
        segment: SegmentId,
        holes: &[ByteRange],
    ) -> Result<Vec<(ObjectNo, u64)>, PoolError> {
        let mut absent: Vec<(ObjectNo, u64)> = Vec::new();
        for (_, no, size) in self.entries(segment, holes)? {
            if size > 0
                && (!self.pool.is_present(no)? || self.has_hole(no)?)
                && !absent.iter().any(|(other, _)| *other == no)
            {
                self.pool.vanished(no);
                absent.push((no, size));
            }
        }
        Ok(absent)
    }

    fn has_hole(&mut self, no: ObjectNo) -> Result<bool, PoolError> {
        let Some(object) = self.pool.object(no)? else { return Ok(true) };
        let Some(home) = self.pool.segment_of(no) else { return Ok(true) };
        Ok(!self.pool.holes(home.id, object.range)?.is_empty())
    }

    /// The entries of a pack that have a byte in `holes`: record, object, size of the object.
    fn entries(
        &mut self,
        segment: SegmentId,
        holes: &[ByteRange],
    ) -> Result<Vec<(usize, ObjectNo, u64)>, PoolError> {
        let extents = self.pool.extents(segment)?;
        let mut entries: Vec<(usize, ObjectNo, u64)> = Vec::new();
        for hole in holes {
            for record in extents.overlapping(*hole) {
                let Some(extent) = extents.get(record) else { continue };
                let Place::Repeats { segment: home, record: at } = extent.place else { continue };
                if entries.last().is_none_or(|(last, ..)| *last < record) {
                    entries.push((record, self.pool.number(home, at)?, extent.size));
                }
            }
        }
        Ok(entries)
    }

    /// Takes down what a reader wants of a layer.
    fn trace(&mut self, now: Now, segment: SegmentId, range: ByteRange) -> Result<(), PoolError> {
        if let Some(trace) = self.trace.as_mut().filter(|trace| trace.wants(now, segment)) {
            trace.touched(chunks(range.clamp(self.pool.extents(segment)?.size())));
        }
        Ok(())
    }

    /// Tells what readers have wanted since the last time.
    pub(super) fn report_touched(&mut self, control: &Control) {
        if let Some((segment, records)) = self.trace.as_mut().and_then(Trace::take) {
            control.send(FromWorker::Touched { segment, records });
        }
    }

    /// A reader was given a range that was there.
    pub(super) fn touched(&mut self, now: Now, segment: SegmentId, range: ByteRange) {
        let _ = self.trace(now, segment, range);
        let Ok(extents) = self.pool.extents(segment) else { return };
        if extents.kind() != SegmentKind::Data {
            return;
        }
        let objects: Vec<_> = extents
            .overlapping(range)
            .filter_map(|record| self.pool.number(segment, u32::try_from(record).ok()?).ok())
            .collect();
        self.engine.touched(now, &objects, Look::File, &mut self.pool);
    }

    /// `Err`: nothing will come of it.
    pub(super) fn prefetch(
        &mut self,
        request: u64,
        segment: SegmentId,
        runs: &[Run],
    ) -> Result<(), String> {
        let of = self.pool.segment(segment).map_err(|error| chain(&error))?;
        if of.kind != SegmentKind::Data {
            return Err(format!("segment {segment} is a pack"));
        }
        let count = of.count;
        let records: Vec<_> = match self.access {
            Some(_) => {
                let extents = self.pool.extents(segment).map_err(|error| chain(&error))?;
                runs.iter().map(|run| records(&extents, *run)).collect()
            }
            None => runs.iter().map(|run| run.range()).collect(),
        };
        let objects = records.into_iter().filter_map(|records| {
            let first = self.pool.number(segment, records.start).ok()?;
            Some(first.0..first.0 + records.end.min(count).checked_sub(records.start)?)
        });
        self.engine.prefetch(request, objects.collect());
        Ok(())
    }

    /// Looks what the running requests have received. `true`: any.
    pub(super) fn progress(&mut self, now: Now) -> bool {
        for (request, running) in &self.running {
            let received = running.progress.load(Ordering::Relaxed);
            self.engine.progress(now, *request, received);
        }
        !self.running.is_empty()
    }

    pub(super) fn poll(&mut self, now: Now) -> Vec<Effect> {
        if self.access.is_none() {
            return self.engine.poll(now, &mut self.pool);
        }
        self.engine.poll(now, &mut Layered { pool: &mut self.pool, source: &*self.source })
    }

    /// Starts a request. `false`: there is news of it already, since nothing could be asked for.
    pub(super) fn send(
        &mut self,
        request: RequestId,
        lane: Lane,
        objects: &[ObjectNo],
        shared: &Shared,
    ) -> bool {
        let (mut keys, mut targets) = (Vec::with_capacity(objects.len()), HashMap::new());
        for no in objects {
            match self.target(*no) {
                Ok((key, target)) => {
                    keys.push(key);
                    targets.insert(key, target);
                }
                Err(error) => self.engine.failed(*no, DenyErrno::Eio, &chain(&error)),
            }
        }
        if keys.is_empty() {
            self.engine.finished(Now::ZERO, request, &Outcome::Done);
            return false;
        }
        self.counters.requests += 1;
        tracing::debug!(pool = %self.id, request = request.0, ?lane, objects = keys.len(), "fetch");
        let progress = Arc::default();
        let plan = Plan {
            pool: self.id,
            request,
            targets,
            spool: Arc::clone(&shared.spool),
            received: Arc::clone(&self.received),
            progress: Arc::clone(&progress),
            sent: Arc::clone(&self.sent),
            stall: Duration::from_secs(self.limits.stall_secs.max(1)),
            notes: shared.notes.clone(),
        };
        let task = tokio::spawn(request::run(Arc::clone(&self.source), keys, plan)).abort_handle();
        let objects = objects.to_vec();
        self.running.insert(request, Running { task, lane, objects, progress });
        true
    }

    fn target(
        &mut self,
        no: ObjectNo,
    ) -> Result<(crate::object::ObjectId, Arc<Target>), PoolError> {
        let unknown = PoolError::Unknown(SegmentId(0));
        let object = self.pool.object(no)?.ok_or(unknown)?;
        let home = self.pool.segment_of(no).ok_or(PoolError::Unknown(SegmentId(0)))?;
        let target = self.targets.entry(no).or_insert_with(|| {
            Arc::new(Target {
                no,
                segment: home.id,
                data: Arc::clone(&home.data),
                range: object.range,
                segment_size: home.size,
                done: Mutex::default(),
            })
        });
        Ok((object.key, Arc::clone(target)))
    }

    pub(super) fn note(&mut self, now: Now, request: RequestId, news: News, control: &Control) {
        match news {
            News::Arrived { no, bytes } => self.arrived(now, request, no, bytes, control),
            News::Failed { no, errno, reason } => {
                self.engine.failed(no, errno, &reason);
                self.say(reason, control);
            }
            News::Finished(outcome) => self.finished(now, request, &outcome, control),
        }
    }

    fn arrived(
        &mut self,
        now: Now,
        request: RequestId,
        no: ObjectNo,
        bytes: u64,
        control: &Control,
    ) {
        let target = self.targets.remove(&no);
        match self.engine.arrived(now, request, no) {
            Arrival::Again => return,
            Arrival::Awaited => {}
            Arrival::Unasked => self.counters.read_ahead_objects += 1,
        }
        self.counters.objects += 1;
        self.counters.content_bytes += bytes;
        if let Some(target) = target {
            self.cache.written(target.segment, &target.data);
        }
        if let Some(segment) = self.pool.arrived(no) {
            self.check_complete(segment, control);
        }
    }

    fn finished(&mut self, now: Now, request: RequestId, outcome: &Outcome, control: &Control) {
        let Some(ended) = self.running.remove(&request) else { return };
        for no in ended.objects {
            // Unless another request may still bring it.
            if self.targets.get(&no).is_some_and(|target| Arc::strong_count(target) == 1) {
                self.targets.remove(&no);
            }
        }
        self.engine.finished(now, request, outcome);
        match outcome {
            Outcome::Done => self.say(String::new(), control),
            Outcome::Retry { reason, .. } => {
                self.counters.retries += 1;
                self.say(reason.clone(), control);
            }
            Outcome::Wrong { reason } => {
                self.counters.rejected_objects += 1;
                self.say(reason.clone(), control);
            }
            Outcome::Refused { reason }
            | Outcome::Missing { reason, .. }
            | Outcome::Disk { reason, .. } => self.say(reason.clone(), control),
        }
        tracing::debug!(pool = %self.id, request = request.0, lane = ?ended.lane, ?outcome, "end");
    }

    /// Tells of trouble when it is news; an empty message says that it is over.
    fn say(&mut self, message: String, control: &Control) {
        let message = shortened(message);
        if self.trouble != message {
            self.trouble.clone_from(&message);
            control.send(FromWorker::Trouble { pool: self.id, message });
        }
    }

    /// All objects of an event are there: is its range?
    pub(super) fn ready(
        &mut self,
        event: EventId,
        segment: SegmentId,
        range: ByteRange,
        shared: &Shared,
    ) -> Result<Ready, Denial> {
        let failed = |error: PoolError| (DenyErrno::Eio, chain(&error));
        let holes = self.pool.holes(segment, range).map_err(failed)?;
        if holes.is_empty() {
            return Ok(Ready::Allow);
        }
        match self.pool.segment(segment).map_err(failed)?.kind {
            SegmentKind::Data => match self.fill_gaps(segment, &holes)? {
                true => Ok(Ready::Allow),
                false => Ok(Ready::Surprise),
            },
            SegmentKind::Pack => {
                // The kernel asks page by page: the rest of the objects is next.
                let whole = self.whole_objects(segment, range);
                let end = whole.end().min(range.end() + COMPOSED_AHEAD);
                // in packs of old a block may have a part of an object that is not here
                let end = (end / BLOCK * BLOCK).max(range.end());
                let more = ByteRange::between(range.offset(), end);
                let holes = self.pool.holes(segment, more).map_err(failed)?;
                self.compose(event, segment, holes, shared)
            }
        }
    }

    /// Fills holes in which there is no object. `false`: in one there is.
    fn fill_gaps(&mut self, segment: SegmentId, holes: &[ByteRange]) -> Result<bool, Denial> {
        let failed = |error: PoolError| (DenyErrno::Eio, chain(&error));
        if !self.absent(segment, holes).map_err(failed)?.is_empty() {
            return Ok(false);
        }
        let data = Arc::clone(&self.pool.segment(segment).map_err(failed)?.data);
        for hole in holes {
            fill::zero(&data, *hole).map_err(|error| {
                (fill::deny_errno(&error), format!("can't write into segment {segment}: {error}"))
            })?;
        }
        self.cache.written(segment, &data);
        Ok(true)
    }

    fn compose(
        &mut self,
        event: EventId,
        segment: SegmentId,
        holes: Vec<ByteRange>,
        shared: &Shared,
    ) -> Result<Ready, Denial> {
        let failed = |error: PoolError| (DenyErrno::Eio, chain(&error));
        if !self.absent_of_pack(segment, &holes).map_err(failed)?.is_empty() {
            return Ok(Ready::Surprise);
        }
        let mut contents = Vec::new();
        for (record, no, _) in self.entries(segment, &holes).map_err(failed)? {
            let object = self.pool.object(no).map_err(failed)?;
            if let (Some(object), Some(home)) = (object, self.pool.segment_of(no)) {
                contents.push((record, Arc::clone(&home.data), object.range.offset()));
            }
        }
        let extents = self.pool.extents(segment).map_err(failed)?;
        let of = self.pool.segment(segment).map_err(failed)?;
        let (pack, frame) = (Arc::clone(&of.data), Arc::clone(&of.frame));
        self.cache.written(segment, &pack);
        let composition = Composition { pack, extents, frame, holes, contents };
        let slow = shared.slow.clone();
        tokio::task::spawn_blocking(move || {
            let result = composition.write().map_err(|error| {
                (fill::deny_errno(&error), format!("can't make a part of the pack: {error}"))
            });
            let _ = slow.send(Slow::Composed { event, result });
        });
        Ok(Ready::Composing)
    }

    /// Blocks of a pack have been written.
    pub(super) fn composed(&mut self, segment: SegmentId, control: &Control) {
        self.check_complete(segment, control);
    }

    /// Tells the supervisor once nothing of a segment is a hole.
    pub(super) fn check_complete(&mut self, segment: SegmentId, control: &Control) {
        let full = self.pool.is_full(segment).unwrap_or(false) || {
            // Objects may all be there and what is between them not.
            let kind = self.pool.segment(segment).map(|segment| (segment.kind, segment.size));
            match kind {
                Ok((SegmentKind::Data, size)) if self.pool.lacks_nothing(segment) => {
                    let whole = ByteRange::new(0, size);
                    let holes = self.pool.holes(segment, whole).unwrap_or_default();
                    self.fill_gaps(segment, &holes).unwrap_or(false)
                }
                _ => false,
            }
        };
        let Ok(of) = self.pool.segment_mut(segment) else { return };
        if full && !std::mem::replace(&mut of.told_complete, true) {
            let objects = of.objects();
            self.engine.completed(objects);
            control.send(FromWorker::Complete { segment });
        }
    }

    pub(super) fn index_names(&self, shared: &Shared) {
        let (indexes, objects) = (self.pool.indexes(), self.pool.len());
        let (slow, pool) = (shared.slow.clone(), self.id);
        tokio::task::spawn_blocking(move || match NameIndex::build(&indexes) {
            Ok(index) => {
                let _ = slow.send(Slow::Names { pool, index, objects });
            }
            Err(error) => tracing::warn!(%pool, %error, "can't make an index of names"),
        });
    }

    /// What has been done since the last time, if anything.
    pub(super) fn report(&mut self) -> Option<Counters> {
        let mut counters = std::mem::take(&mut self.counters);
        counters.received_bytes = self.received.swap(0, Ordering::Relaxed);
        counters.sent_bytes = self.sent.swap(0, Ordering::Relaxed);
        (counters != Counters::default()).then_some(counters)
    }

    /// Gives back page cache, on a thread of its own.
    pub(super) fn drop_cache(&mut self) {
        let files = self.cache.due();
        if !files.is_empty() {
            tokio::task::spawn_blocking(move || fill::drop_cache(&files));
        }
    }

    /// Ends all requests.
    pub(super) fn stop(mut self, control: &Control) {
        for running in self.running.values() {
            running.task.abort();
        }
        if let Some(counters) = self.report() {
            control.send(FromWorker::Report { pool: self.id, counters });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::HashKind;
    use crate::segment::extents::ExtentsWriter;
    use crate::source::oci::fetch::chunk_key;

    /// Whatever length its chunks have: all that is asked for is of places.
    #[test]
    fn runs_are_of_places() {
        let size = 10 * CHUNK + 5;
        for length in [CHUNK, 4 * CHUNK] {
            let mut writer = ExtentsWriter::new(SegmentId(1), SegmentKind::Data, HashKind::Sha256);
            for offset in (0..size).step_by(length as usize) {
                let len = length.min(size - offset);
                writer.push_file(offset, len, chunk_key(offset, b""), 0, b"");
            }
            let mut file = Vec::new();
            writer.write(&mut file, size).unwrap();
            let extents = Extents::read(&file[..]).unwrap();
            let of = |first, count| records(&extents, Run { first, count });
            let records_of_all = u32::try_from(size.div_ceil(length)).unwrap();
            assert_eq!(of(0, 11), 0..records_of_all);
            assert_eq!(of(0, u32::MAX), 0..records_of_all);
            assert!(of(11, 1).is_empty() && of(u32::MAX, 9).is_empty());
            let (fourth, last) = if length == CHUNK { (4, 10) } else { (1, 2) };
            assert_eq!(of(4, 1), fourth..fourth + 1);
            assert_eq!(of(10, 1), last..last + 1);
        }
    }
}
