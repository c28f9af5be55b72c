//! What is to be fetched of all layers without anybody waiting for it, and what is under way of that.
//!
//! Pure: it does not ask for anything and has no clock. All times are by the clock of the shards
//! ([`now`](super::super::super::shard::now)).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::order::{self, Pieces};
use super::pace::{self, Backoff};
use super::replay::{self, Stretch};
use crate::ids::{PoolId, SegmentId, ShardId};
use crate::object::ObjectId;
use crate::queue::wire::Run;
use crate::supervisor::shard::{Demanded, Read};

/// A registry, as people name it. Its layers share a line, most likely.
pub type Registry = Arc<str>;

/// A layer of which something comes by itself, or has come.
#[derive(Debug, Clone)]
pub struct Fill {
    pub layer: ObjectId,
    pub pool: PoolId,
    /// What was read before.
    pub traced: Vec<Run>,
    pub trouble: Option<String>,
}

/// A layer that has been mounted: all of its segment may be to be filled.
#[derive(Debug, Clone)]
pub struct New {
    pub segment: SegmentId,
    /// In bytes.
    pub size: u64,
    pub pool: PoolId,
    pub shard: ShardId,
    pub registry: Registry,
    /// Nothing is asked for before that, but what was read before.
    pub from: Duration,
}

/// A segment that is to be filled.
#[derive(Debug)]
struct Missing {
    segment: SegmentId,
    pool: PoolId,
    shard: ShardId,
    registry: Registry,
    /// No other has it: what was asked for of the segment before it came into use again is no matter of this one.
    generation: u64,
    pieces: Pieces,
    under_way: usize,
    /// When a piece came last, or the first of those under way was asked for.
    heard: Duration,
    backoff: Backoff,
    /// Where it was read last.
    read: Option<Read>,
}

impl Missing {
    /// Pieces are under way and do not come.
    fn hangs(&self, now: Duration) -> bool {
        self.under_way > 0 && pace::is_slow(now, self.heard)
    }

    /// There is a piece to be asked for, as far as the layer is concerned.
    fn is_ready(&self, now: Duration) -> bool {
        let is_free = !self.backoff.is_probing() || self.under_way == 0;
        is_free && !self.hangs(now) && !self.pieces.is_empty() && self.backoff.left(now).is_none()
    }
}

/// What was read of a segment at an earlier start, and is asked for at once at this one. Nothing of it is asked for twice, and
/// with the first that does not come it is over: the fill knows how to go on with a line like that.
#[derive(Debug)]
struct Replay {
    pool: PoolId,
    shard: ShardId,
    registry: Registry,
    /// As that of what is [`Missing`].
    generation: u64,
    /// What has not been asked for, in order.
    left: VecDeque<Stretch>,
    /// In bytes.
    under_way: u64,
    /// As that of what is [`Missing`].
    heard: Duration,
}

impl Replay {
    /// Something is under way and does not come.
    fn hangs(&self, now: Duration) -> bool {
        self.under_way > 0 && pace::is_slow(now, self.heard)
    }
}

/// A piece that is to be asked for. To be given back with its [`End`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub segment: SegmentId,
    pub shard: ShardId,
    pub runs: Vec<Run>,
    /// Of those of the segment; `None`: it is of a replay.
    number: Option<u32>,
    generation: u64,
    registry: Registry,
    begun: Duration,
}

impl Piece {
    /// It was read before, and is not tried again.
    pub fn is_replayed(&self) -> bool {
        self.number.is_none()
    }
}

/// What has become of a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Came,
    Failed(String),
    /// The segment is not served any more.
    Gone,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub struct Next {
    pub pieces: Vec<Piece>,
    /// When to look again even if nothing happens, from now.
    pub wake: Option<Duration>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Filler {
    fills: BTreeMap<SegmentId, Fill>,
    /// In the order in which they were added, each segment once.
    missing: Vec<Missing>,
    replays: BTreeMap<SegmentId, Replay>,
    /// Pieces of what is missing, also those of which nobody wants to know any more.
    under_way: HashMap<Registry, usize>,
    last_generation: u64,
    /// When a layer was added last, and when a reader was last known to wait.
    mounted: Option<Duration>,
    demanded: Option<Duration>,
    /// There is a task that does what is [next](Self::next).
    runs: bool,
}

impl Filler {
    /// Of this layer something comes by itself from now on.
    pub fn show(&mut self, segment: SegmentId, fill: Fill) {
        self.fills.insert(segment, fill);
    }

    /// All layers that have been [shown](Self::show), each with its state as in [`hydrant_api::LayerFill`].
    pub fn shown(&self) -> Vec<(SegmentId, Fill, &'static str)> {
        let missing: HashMap<_, _> =
            self.missing.iter().map(|missing| (missing.segment, missing.under_way)).collect();
        let state = |segment| match (self.replays.contains_key(segment), missing.get(segment)) {
            (true, _) => "replaying",
            (false, Some(0)) => "waiting",
            (false, Some(_)) => "filling",
            (false, None) => "done",
        };
        self.fills.iter().map(|(id, fill)| (*id, fill.clone(), state(id))).collect()
    }

    /// A layer has been mounted of which all is to come. It takes the place of what was known of the segment: that may be from
    /// before it was evicted.
    pub fn add(&mut self, now: Duration, new: New) {
        let New { segment, size, pool, shard, registry, from } = new;
        self.mounted = self.mounted.max(Some(now));
        self.missing.retain(|missing| missing.segment != segment);
        let pieces = Pieces::new(size);
        if pieces.is_empty() {
            return;
        }
        let generation = self.generation();
        let (under_way, heard, backoff, read) = (0, now, Backoff::from(from), None);
        let missing = Missing {
            segment,
            pool,
            shard,
            registry,
            generation,
            pieces,
            under_way,
            heard,
            backoff,
            read,
        };
        self.missing.push(missing);
    }

    /// What was read of a mounted layer before is to come now, and before anything else of its registry. It takes the place of
    /// what another mount has left of its own replay of the segment, which is a part of it.
    pub fn replay(&mut self, now: Duration, new: &New, stretches: VecDeque<Stretch>) {
        if stretches.is_empty() {
            return;
        }
        let replay = Replay {
            pool: new.pool,
            shard: new.shard,
            registry: Arc::clone(&new.registry),
            generation: self.generation(),
            left: stretches,
            under_way: 0,
            heard: now,
        };
        self.replays.insert(new.segment, replay);
    }

    fn generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    /// `true`: a task is to be started, and counts as running.
    pub fn start(&mut self) -> bool {
        let is_idle = self.missing.is_empty() && self.replays.is_empty();
        !is_idle && !std::mem::replace(&mut self.runs, true)
    }

    /// These pools are not served any more.
    pub fn forget(&mut self, pools: &HashSet<PoolId>) {
        self.fills.retain(|_, fill| !pools.contains(&fill.pool));
        self.missing.retain(|missing| !pools.contains(&missing.pool));
        self.replays.retain(|_, replay| !pools.contains(&replay.pool));
    }

    /// What readers have waited for.
    pub fn demanded(&mut self, demanded: Demanded) {
        self.demanded = self.demanded.max(demanded.last);
        for read in demanded.reads {
            let of = self.missing.iter_mut().find(|missing| missing.segment == read.segment);
            if let Some(missing) = of
                && missing.read.is_none_or(|known| known.at <= read.at)
            {
                missing.read = Some(read);
            }
        }
    }

    /// The pieces that may be asked for now; they count as under way. `None`: all is done, and the task ends.
    pub fn next(&mut self, now: Duration) -> Option<Next> {
        if self.missing.is_empty() && self.replays.is_empty() && self.under_way.is_empty() {
            self.runs = false;
            return None;
        }
        let mut pieces = self.next_replayed(now);
        let busy = self.mounted.max(self.demanded);
        let quiet = busy.map_or(Duration::MAX, |busy| now.saturating_sub(busy));
        let limit = pace::limit(quiet);
        // what hangs is no reason not to fetch the rest
        let replays = self.replays.values().filter(|replay| !replay.hangs(now));
        let replayed: HashSet<_> = replays.map(|replay| Arc::clone(&replay.registry)).collect();
        let mut hanging: HashMap<Registry, usize> = HashMap::new();
        for missing in self.missing.iter().filter(|missing| missing.hangs(now)) {
            *hanging.entry(Arc::clone(&missing.registry)).or_default() += missing.under_way;
        }
        let mut wake: Option<Duration> = None;
        loop {
            let may_ask = |registry: &Registry| {
                let pieces = self.under_way.get(registry).copied().unwrap_or_default();
                let hanging = hanging.get(registry).copied().unwrap_or_default();
                !replayed.contains(registry) && pieces < limit + hanging
            };
            let ready = self.missing.iter_mut().enumerate().filter(|(_, of)| of.is_ready(now));
            let first = ready
                .filter(|(_, missing)| may_ask(&missing.registry))
                .max_by_key(|(place, of)| order::rank(of.read.map(|read| read.at), *place));
            let Some((_, missing)) = first else { break };
            let offset = missing.read.map_or(0, |read| read.offset);
            // it is ready, so there is one
            let Some(number) = missing.pieces.take(offset) else { break };
            if missing.under_way == 0 {
                missing.heard = now;
            }
            missing.under_way += 1;
            *self.under_way.entry(Arc::clone(&missing.registry)).or_default() += 1;
            pieces.push(Piece {
                segment: missing.segment,
                shard: missing.shard,
                runs: vec![order::run(number)],
                number: Some(number),
                generation: missing.generation,
                registry: Arc::clone(&missing.registry),
                begun: now,
            });
        }
        for missing in &self.missing {
            let later = match missing.backoff.left(now) {
                Some(left) => Some(left),
                None if missing.is_ready(now) && !replayed.contains(&missing.registry) => {
                    pace::until_more(quiet)
                }
                None => None,
            };
            wake = wake.into_iter().chain(later).min();
        }
        if self.missing.iter().any(|missing| missing.is_ready(now))
            || self.replays.values().any(|replay| !replay.left.is_empty())
        {
            let missing = self.missing.iter().filter(|missing| missing.under_way > 0);
            let replays = self.replays.values().filter(|replay| replay.under_way > 0);
            let heard = missing.map(|missing| missing.heard);
            let heard = heard.chain(replays.map(|replay| replay.heard));
            let slow = heard.filter_map(|heard| pace::until_slow(now, heard));
            wake = wake.into_iter().chain(slow).min();
        }
        Some(Next { pieces, wake })
    }

    /// What may be asked for now of what was read before: of each registry what was read first, so much of it that the line is
    /// full and the order still means something.
    fn next_replayed(&mut self, now: Duration) -> Vec<Piece> {
        let mut under_way: HashMap<Registry, u64> = HashMap::new();
        // what hangs does not hold others back
        for replay in self.replays.values().filter(|replay| !replay.hangs(now)) {
            *under_way.entry(Arc::clone(&replay.registry)).or_default() += replay.under_way;
        }
        let mut full = HashSet::new();
        let mut pieces = Vec::new();
        loop {
            let ready = self.replays.iter_mut().filter(|(_, replay)| {
                !replay.left.is_empty() && !replay.hangs(now) && !full.contains(&replay.registry)
            });
            let first = ready.min_by_key(|(_, of)| of.left.front().map(|stretch| stretch.place));
            let Some((segment, replay)) = first else { break };
            let of_registry = under_way.entry(Arc::clone(&replay.registry)).or_default();
            let bytes = replay.left.front().map_or(0, Stretch::bytes);
            if *of_registry + bytes > pace::REPLAYED {
                full.insert(Arc::clone(&replay.registry));
                continue;
            }
            let Some(stretch) = replay.left.pop_front() else { break };
            if replay.under_way == 0 {
                replay.heard = now;
            }
            replay.under_way += bytes;
            *of_registry += bytes;
            pieces.push(Piece {
                segment: *segment,
                shard: replay.shard,
                runs: stretch.runs,
                number: None,
                generation: replay.generation,
                registry: Arc::clone(&replay.registry),
                begun: now,
            });
        }
        pieces
    }

    /// A piece has come, or not.
    pub fn ended(&mut self, now: Duration, piece: &Piece, end: End) {
        let Some(number) = piece.number else { return self.replayed(now, piece, end) };
        if let Some(under_way) = self.under_way.get_mut(&piece.registry) {
            *under_way -= 1;
            if *under_way == 0 {
                self.under_way.remove(&piece.registry);
            }
        }
        let id = (piece.segment, piece.generation);
        let at = self.missing.iter().position(|of| (of.segment, of.generation) == id);
        let Some(at) = at else { return };
        let missing = &mut self.missing[at];
        missing.under_way -= 1;
        missing.heard = now;
        let fill = self.fills.get_mut(&piece.segment);
        match end {
            End::Came => {
                if missing.backoff.came(piece.begun)
                    && let Some(fill) = fill
                {
                    fill.trouble = None;
                }
                if missing.pieces.is_empty() && missing.under_way == 0 {
                    self.missing.remove(at);
                }
            }
            End::Failed(why) => {
                missing.pieces.put_back(number);
                missing.backoff.failed(now, piece.begun);
                if let Some(fill) = fill {
                    fill.trouble = Some(why);
                }
            }
            End::Gone => {
                self.missing.remove(at);
                self.fills.remove(&piece.segment);
            }
        }
    }

    /// The same of one that was read before.
    fn replayed(&mut self, now: Duration, piece: &Piece, end: End) {
        let Some(replay) = self.replays.get_mut(&piece.segment) else { return };
        if replay.generation != piece.generation {
            return;
        }
        if matches!(end, End::Failed(_)) {
            replay.left.clear();
        }
        replay.under_way -= replay::bytes(&piece.runs);
        replay.heard = now;
        if (replay.left.is_empty() && replay.under_way == 0) || end == End::Gone {
            self.replays.remove(&piece.segment);
        }
        if let End::Failed(why) = end
            && let Some(fill) = self.fills.get_mut(&piece.segment)
        {
            fill.trouble = Some(why);
        }
    }
}

#[cfg(test)]
mod tests;
