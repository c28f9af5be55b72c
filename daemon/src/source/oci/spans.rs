//! Spans of a layer that more than one request needs.
//!
//! Requests ask for chunks, and what is fetched are spans: one that lies across the edge of what a request asks for is
//! needed by the request for what is beside that, too. It is to be fetched once:
//!
//! - Whoever fetches it says so ([`Claim`]), and others wait; but not longer than [`PATIENCE`], so that nobody hangs on
//!   somebody else's slow request. A claim ends with its request, whatever becomes of that.
//! - What has come is kept as long as a part of it has not been asked for, up to [`KEPT`] bytes in all. That part need not
//!   ever be asked for: who has waited in vain has fetched the span as well. So it is given for [`KEEP_FOR`] at most, and
//!   its memory goes within twice that.
//!
//! All these bytes are compressed, as a host has sent them. They prove nothing: who takes them decodes and verifies them as
//! if they had just come, and [forgets](Spans::forget) them if they are wrong.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

/// How long a request waits for what others are fetching.
pub const PATIENCE: Duration = Duration::from_millis(50);
/// The most bytes that are kept of a layer, compressed.
pub const KEPT: u64 = 16 << 20;
/// How long a span is kept. Who needs the rest of it asks soon or, in general, not at all.
pub const KEEP_FOR: Duration = Duration::from_secs(10);

/// A span as it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Its compressed bytes.
    pub bytes: Bytes,
    /// The frame of the window that they are decoded with; of no bytes if they need none.
    pub frame: Bytes,
}

impl Encoded {
    fn len(&self) -> u64 {
        (self.bytes.len() + self.frame.len()) as u64
    }
}

/// A span that a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Its number in the layer's index.
    pub number: usize,
    /// How many bytes of the segment the request wants of it, and how many it has.
    pub asked: u64,
    pub len: u64,
}

impl Need {
    /// Others are going to need it, too.
    fn is_shared(self) -> bool {
        self.asked < self.len
    }
}

/// The spans of one layer that are at hand, or about to be.
#[derive(Debug, Default)]
pub struct Spans(Mutex<Table>);

/// A span, once it has come. The sender is the claim's.
type Awaited = watch::Receiver<Option<Encoded>>;

#[derive(Debug, Default)]
struct Table {
    coming: HashMap<usize, Awaited>,
    kept: HashMap<usize, Kept>,
    /// By age: which span that is.
    ages: BTreeMap<u64, usize>,
    next_age: u64,
    /// Of all that is kept.
    bytes: u64,
    /// A task is at it ([`tidy`]).
    is_tidied: bool,
}

#[derive(Debug)]
struct Kept {
    encoded: Encoded,
    age: u64,
    since: Instant,
    /// Bytes of the segment that nobody has asked for.
    left: u64,
}

/// What there is of the spans that a request needs.
#[derive(Debug)]
pub struct Found<'a> {
    pub here: Vec<(usize, Encoded)>,
    pub coming: Vec<Coming>,
    /// These are for the request itself to fetch.
    pub absent: Vec<Need>,
    /// Of those that are absent, what others are going to need.
    pub claim: Claim<'a>,
}

/// A span that another request is fetching.
#[derive(Debug)]
pub struct Coming {
    need: Need,
    awaited: Awaited,
}

/// A request is fetching these spans. When it is dropped, whoever waits for one that was not
/// [delivered](Self::deliver) goes on without it.
#[derive(Debug)]
pub struct Claim<'a> {
    spans: &'a Spans,
    open: HashMap<usize, (Need, watch::Sender<Option<Encoded>>)>,
}

impl Spans {
    /// The table, without what has been kept for too long.
    fn table(&self) -> MutexGuard<'_, Table> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.expire(Instant::now());
        table
    }

    /// Sees to it that what is kept goes also when there are no more requests: within twice [`KEEP_FOR`]. To be called, in a
    /// runtime, whenever something has been kept.
    pub fn tidy_later(self: &Arc<Self>) {
        let mut table = self.table();
        if !table.kept.is_empty() && !std::mem::replace(&mut table.is_tidied, true) {
            tokio::spawn(tidy(Arc::downgrade(self), KEEP_FOR, Self::is_tidy));
        }
    }

    /// Drops what has been kept for too long; if nothing is left, no task is at it from now on.
    fn is_tidy(&self) -> bool {
        let mut table = self.table();
        table.is_tidied = !table.kept.is_empty();
        !table.is_tidied
    }

    /// Looks for what a request needs, and claims what nobody has and others are going to need.
    pub fn find(&self, needs: impl IntoIterator<Item = Need>) -> Found<'_> {
        let (mut here, mut coming, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        let mut open = HashMap::new();
        let mut table = self.table();
        for need in needs {
            if let Some(encoded) = table.used(need) {
                here.push((need.number, encoded));
            } else if let Some(awaited) = table.coming.get(&need.number) {
                coming.push(Coming { need, awaited: awaited.clone() });
            } else {
                table.claim(need, &mut open);
                absent.push(need);
            }
        }
        drop(table);
        Found { here, coming, absent, claim: Claim { spans: self, open } }
    }

    /// Claims those of these spans that nobody is fetching.
    pub fn claim(&self, needs: &[Need]) -> Claim<'_> {
        let mut open = HashMap::new();
        let mut table = self.table();
        for need in needs {
            table.claim(*need, &mut open);
        }
        drop(table);
        Claim { spans: self, open }
    }

    /// Waits for what others are fetching, for at most [`PATIENCE`] in all. Gives what has come and what has not.
    pub async fn wait(&self, coming: Vec<Coming>) -> (Vec<(usize, Encoded)>, Vec<Need>) {
        let until = Instant::now() + PATIENCE;
        let (mut here, mut absent) = (Vec::new(), Vec::new());
        for Coming { need, mut awaited } in coming {
            // an error: it has been given up
            let come = timeout_at(until, awaited.wait_for(Option::is_some)).await;
            let come = come.ok().and_then(|come| come.ok()?.clone());
            match come {
                Some(encoded) => {
                    self.table().used(need);
                    here.push((need.number, encoded));
                }
                None => absent.push(need),
            }
        }
        (here, absent)
    }

    /// What was kept of a span is wrong.
    pub fn forget(&self, number: usize) {
        self.table().remove(number);
    }
}

/// Has what has been kept for too long dropped, this often, until nothing is kept (`is_tidy`) or the layer is gone.
pub async fn tidy<T>(kept: Weak<T>, every: Duration, is_tidy: impl Fn(&T) -> bool) {
    loop {
        sleep(every).await;
        let Some(kept) = kept.upgrade() else { return };
        if is_tidy(&kept) {
            return;
        }
    }
}

impl Table {
    fn claim(
        &mut self,
        need: Need,
        open: &mut HashMap<usize, (Need, watch::Sender<Option<Encoded>>)>,
    ) {
        if need.is_shared() && !self.coming.contains_key(&need.number) {
            let (sender, awaited) = watch::channel(None);
            self.coming.insert(need.number, awaited);
            open.insert(need.number, (need, sender));
        }
    }

    /// What is kept of a span. It goes once all of it has been asked for.
    fn used(&mut self, need: Need) -> Option<Encoded> {
        let kept = self.kept.get_mut(&need.number)?;
        kept.left = kept.left.saturating_sub(need.asked);
        let (encoded, left) = (kept.encoded.clone(), kept.left);
        if left == 0 {
            self.remove(need.number);
        }
        Some(encoded)
    }

    /// Keeps a span from now on, in place of the oldest ones.
    fn keep(&mut self, now: Instant, need: Need, encoded: Encoded) {
        self.remove(need.number);
        let len = encoded.len();
        if len > KEPT {
            return;
        }
        while self.bytes + len > KEPT
            && let Some((_, oldest)) = self.ages.first_key_value()
        {
            self.remove(*oldest);
        }
        self.next_age += 1;
        self.bytes += len;
        self.ages.insert(self.next_age, need.number);
        let left = need.len.saturating_sub(need.asked);
        self.kept.insert(need.number, Kept { encoded, age: self.next_age, since: now, left });
    }

    /// Drops what has been kept for [`KEEP_FOR`] by now.
    fn expire(&mut self, now: Instant) {
        while let Some((_, oldest)) = self.ages.first_key_value()
            && self.kept.get(oldest).is_some_and(|kept| now - kept.since >= KEEP_FOR)
        {
            self.remove(*oldest);
        }
    }

    fn remove(&mut self, number: usize) {
        if let Some(kept) = self.kept.remove(&number) {
            self.ages.remove(&kept.age);
            self.bytes -= kept.encoded.len();
        }
    }
}

impl Claim<'_> {
    /// A span has come. It is kept if it was claimed, and should not be a part of all that has come with it.
    pub fn deliver(&mut self, number: usize, encoded: Encoded) {
        let Some((need, sender)) = self.open.remove(&number) else { return };
        let mut table = self.spans.table();
        table.coming.remove(&number);
        table.keep(Instant::now(), need, encoded.clone());
        drop(table);
        sender.send_replace(Some(encoded));
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut table = self.spans.table();
        for number in self.open.keys() {
            table.coming.remove(number);
        }
    }
}

#[cfg(test)]
mod tests;
