//! The windows of a layer's spans: at the end of the file of its access index, or at the registry as long as they are not there.
//!
//! An index that somebody has published comes without them, and readers do not wait for all of them: those of the spans that a
//! request asks for are asked for side by side with these. A registry does about as much for a window as for a span, which is a
//! hundred times larger: so the windows of neighbours come with them, and are kept. Behind the pull, the supervisor has all of them
//! brought where they belong (`supervisor/images/windows.rs`).

use std::collections::VecDeque;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

use super::{Access, LayerSource};
use crate::layer::index::{Index, WindowsBlob};
use crate::layer::span::Proof;
use crate::object::ObjectId;
use crate::range::ByteRange;
use crate::source::FetchError;
use crate::source::oci::registry::{Need, refused, wrong};
use crate::source::oci::spans::{KEEP_FOR, tidy};

const REMEDY: &str = "remove its images, and pull them again";
/// The windows of so many spans, the first of them a multiple of it, come together: some 50 KiB as a rule, and at most 512 KiB.
pub(super) const GROUP: usize = 16;
/// So many such groups of a layer are kept, the latest: those that prefetches and readers are at.
const KEPT: usize = 32;
/// How long a request waits for a group that another one has asked for, before it asks for the windows that it needs itself.
pub(super) const PATIENCE: Duration = Duration::from_millis(200);

/// The frames of the windows of some spans in a row, all of them right.
#[derive(Debug, Default)]
struct Group {
    /// Where they begin among all windows.
    from: u64,
    bytes: Vec<u8>,
}

impl Group {
    /// `None` if one of them is wrong.
    fn new(index: &Index, spans: Range<usize>, bytes: Vec<u8>) -> Option<Self> {
        let group = Self { from: index.frames_at(spans.clone()).offset(), bytes };
        let is_right =
            |span| group.at(index, span).is_some_and(|frame| index.is_frame(span, frame));
        { spans }.all(is_right).then_some(group)
    }

    /// That of one of the spans; `None`: of another span.
    fn at(&self, index: &Index, span: usize) -> Option<&[u8]> {
        let at = index.frames_at(span..span + 1);
        let place = |at: u64| usize::try_from(at.checked_sub(self.from)?).ok();
        self.bytes.get(place(at.offset())?..place(at.end())?)
    }
}

/// The frames of the windows that a request needs.
#[derive(Debug, Default)]
pub(super) struct Frames {
    groups: Vec<Arc<Group>>,
    /// How many bytes have come from the registry for them.
    pub received: u64,
}

impl Frames {
    /// That of one of the spans; of no bytes if it needs no window.
    pub(super) fn of(&self, index: &Index, span: usize) -> Bytes {
        let frame = self.groups.iter().find_map(|group| group.at(index, span));
        // what is kept of one does not keep all of them
        Bytes::copy_from_slice(frame.unwrap_or_default())
    }
}

/// A group, once it has come.
type Awaited = Arc<OnceCell<Arc<Group>>>;

/// The groups of a layer that have come from the registry, or are about to come.
#[derive(Debug, Default)]
pub(super) struct Groups(Mutex<Latest>);

#[derive(Debug, Default)]
struct Latest {
    /// By their numbers; the one used last at the end.
    groups: VecDeque<(usize, Awaited)>,
    used: Option<Instant>,
    /// A task is at it ([`tidy`]).
    is_tidied: bool,
}

impl Groups {
    fn latest(&self) -> MutexGuard<'_, Latest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That of this number, to be called in a runtime.
    fn cell(self: &Arc<Self>, number: usize) -> Awaited {
        let mut latest = self.latest();
        let Latest { groups, used, is_tidied } = &mut *latest;
        *used = Some(Instant::now());
        let at = groups.iter().position(|(of, _)| *of == number);
        let (_, cell) = at.and_then(|at| groups.remove(at)).unwrap_or_default();
        groups.push_back((number, Arc::clone(&cell)));
        if groups.len() > KEPT {
            groups.pop_front();
        }
        if !std::mem::replace(is_tidied, true) {
            tokio::spawn(tidy(Arc::downgrade(self), KEEP_FOR, |groups| groups.is_tidy(KEEP_FOR)));
        }
        cell
    }

    /// Drops all of them if none was used for so long; no task is at it from then on.
    fn is_tidy(&self, keep_for: Duration) -> bool {
        let mut latest = self.latest();
        let is_tidy = latest.used.is_none_or(|used| used.elapsed() >= keep_for);
        if is_tidy {
            *latest = Latest::default();
        }
        is_tidy
    }

    /// They are in the file now.
    fn clear(&self) {
        self.latest().groups.clear();
    }
}

impl Access {
    /// The frames of these spans' windows, if all of them are in the file.
    fn frames_here(&self, spans: Range<usize>, range: ByteRange) -> std::io::Result<Option<Group>> {
        let mut bytes = vec![0; usize::try_from(range.len()).map_err(std::io::Error::other)?];
        let read = self.file.read_exact_at(&mut bytes, self.index.windows_at() + range.offset());
        match read {
            Ok(()) => Ok(Group::new(&self.index, spans, bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl LayerSource {
    /// The frames of the windows that these spans need. An error is not the fault of who has the layer.
    pub(super) async fn frames(
        &self,
        access: &Arc<Access>,
        spans: Range<usize>,
    ) -> Result<Frames, FetchError> {
        let range = access.index.frames_at(spans.clone());
        if range.is_empty() {
            return Ok(Frames::default());
        }
        let (of, wanted) = (Arc::clone(access), spans.clone());
        let here = tokio::task::spawn_blocking(move || of.frames_here(wanted, range)).await;
        let here = here.map_err(|e| refused(e.to_string()))?;
        let here = here.map_err(|e| refused(format!("can't read the layer's index: {e}")))?;
        if let Some(group) = here {
            self.windows.clear();
            return Ok(Frames { groups: vec![Arc::new(group)], received: 0 });
        }
        let index = &access.index;
        // only an index of somebody else's may be without; and a window that is wrong has to make a span that is refused
        let of = index.spans().get(spans.clone()).unwrap_or_default();
        let proved = index.is_pinned() && of.iter().all(|span| span.proof == Proof::Whole);
        let Some(blob) = index.windows_blob().filter(|_| proved) else {
            return Err(refused(format!("the layer's index is damaged; {REMEDY}")));
        };
        let received = AtomicU64::new(0);
        let numbers = spans.start / GROUP..spans.end.div_ceil(GROUP);
        let groups = numbers.map(|number| self.group(index, blob, number, &spans, &received));
        let groups = try_join_all(groups).await.map_err(explained)?;
        Ok(Frames { groups, received: received.into_inner() })
    }

    /// A group, or what these spans need of it if somebody else has asked for it and it does not come.
    async fn group(
        &self,
        index: &Index,
        blob: WindowsBlob,
        number: usize,
        spans: &Range<usize>,
        received: &AtomicU64,
    ) -> Result<Arc<Group>, FetchError> {
        let from = number * GROUP;
        let group = from..(from + GROUP).min(index.spans().len());
        let needed = group.start.max(spans.start)..group.end.min(spans.end);
        if index.frames_at(needed.clone()).is_empty() {
            return Ok(Arc::default());
        }
        let cell = self.windows.cell(number);
        let is_ours = AtomicBool::new(false);
        let shared = cell.get_or_try_init(|| {
            is_ours.store(true, Ordering::Relaxed);
            self.fetch_group(index, blob, group, received)
        });
        let in_vain = async {
            sleep(PATIENCE).await;
            if is_ours.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            group = shared => match group {
                // it may be a neighbour's that is
                Err(FetchError::Wrong { .. }) => {}
                group => return group.map(Arc::clone),
            },
            () = in_vain => {}
        }
        self.fetch_group(index, blob, needed, received).await
    }

    async fn fetch_group(
        &self,
        index: &Index,
        blob: WindowsBlob,
        spans: Range<usize>,
        received: &AtomicU64,
    ) -> Result<Arc<Group>, FetchError> {
        let range = index.frames_at(spans.clone());
        let id = ObjectId::from(blob.digest);
        let mut choices = self.registry.choices(Need::Content);
        let mut absent = None;
        loop {
            let host = match choices.ask() {
                Ok(host) => host,
                Err(error @ FetchError::Refused { .. }) => return Err(absent.unwrap_or(error)),
                // it may be had later
                Err(error) => return Err(error),
            };
            let count = |bytes| _ = received.fetch_add(bytes, Ordering::Relaxed);
            let came = host.range(&id, blob.len, range, count).await;
            match came.map(|bytes| Group::new(index, spans.clone(), bytes)) {
                Ok(Some(group)) => return Ok(Arc::new(group)),
                Ok(None) => choices.failed(wrong("a window's checksum is wrong"))?,
                // a mirror that has not got them may have the layer
                Err(error @ FetchError::Refused { .. }) => absent = Some(error),
                Err(error) => choices.failed(error)?,
            }
        }
    }
}

fn explained(error: FetchError) -> FetchError {
    let say = |message| format!("can't get what the layer's index needs: {message}");
    match error {
        FetchError::Refused { message } => {
            FetchError::Refused { message: format!("{}; {REMEDY}", say(message)) }
        }
        FetchError::Wrong { message } => FetchError::Wrong { message: say(message) },
        FetchError::Retry { message, after } => FetchError::Retry { message: say(message), after },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_latest_groups_are_kept_for_a_while() {
        let groups = Arc::<Groups>::default();
        let cells: Vec<_> = (0..=KEPT).map(|number| groups.cell(number)).collect();
        assert!(Arc::ptr_eq(&cells[1], &groups.cell(1)));
        assert!(!Arc::ptr_eq(&cells[0], &groups.cell(0)), "it had to go");
        assert!(Arc::ptr_eq(&cells[1], &groups.cell(1)), "it is younger than 2");
        assert!(!Arc::ptr_eq(&cells[2], &groups.cell(2)));
        assert!(groups.latest().is_tidied);
        assert!(!groups.is_tidy(KEEP_FOR));
        assert!(groups.is_tidy(Duration::ZERO));
        assert!(groups.latest().groups.is_empty() && !groups.latest().is_tidied);
        assert!(!Arc::ptr_eq(&cells[1], &groups.cell(1)), "nobody has asked for it since");
    }
}
