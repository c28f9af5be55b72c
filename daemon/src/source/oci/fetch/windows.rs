//! The windows of a layer's spans: at the end of the file of its access index, or at the registry as long as they are not there.
//!
//! An index that somebody has published comes without them, and readers do not wait for all of them: those of the spans that a
//! request asks for are asked for side by side with these. Behind the pull, the supervisor has all of them brought where they
//! belong (`supervisor/images/windows.rs`).

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::{Access, LayerSource};
use crate::layer::index::{Index, WindowsBlob};
use crate::layer::span::Proof;
use crate::object::ObjectId;
use crate::range::ByteRange;
use crate::source::FetchError;
use crate::source::oci::registry::{Need, refused, wrong};

const REMEDY: &str = "remove its images, and pull them again";

/// The frames of the windows of some spans in a row, all of them right.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// Where they begin among all windows.
    from: u64,
    bytes: Vec<u8>,
    /// How many bytes of them have come from the registry.
    pub received: u64,
}

impl Frames {
    /// `None` if one of them is wrong.
    fn new(index: &Index, spans: Range<usize>, bytes: Vec<u8>) -> Option<Self> {
        let frames = Self { from: index.frames_at(spans.clone()).offset(), bytes, received: 0 };
        { spans }.all(|span| index.is_frame(span, frames.at(index, span))).then_some(frames)
    }

    fn at(&self, index: &Index, span: usize) -> &[u8] {
        let at = index.frames_at(span..span + 1);
        let place = |at: u64| usize::try_from(at.checked_sub(self.from)?).ok();
        let found = place(at.offset()).zip(place(at.end()));
        found.and_then(|(start, end)| self.bytes.get(start..end)).unwrap_or_default()
    }

    /// That of one of the spans; of no bytes if it needs no window.
    pub(super) fn of(&self, index: &Index, span: usize) -> Bytes {
        // what is kept of one does not keep all of them
        Bytes::copy_from_slice(self.at(index, span))
    }
}

impl Access {
    /// The frames of these spans' windows, if all of them are in the file.
    fn frames_here(
        &self,
        spans: Range<usize>,
        range: ByteRange,
    ) -> std::io::Result<Option<Frames>> {
        let mut bytes = vec![0; usize::try_from(range.len()).map_err(std::io::Error::other)?];
        let read = self.file.read_exact_at(&mut bytes, self.index.windows_at() + range.offset());
        match read {
            Ok(()) => Ok(Frames::new(&self.index, spans, bytes)),
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
        if let Some(frames) = here {
            return Ok(frames);
        }
        let index = &access.index;
        // only an index of somebody else's may be without; and a window that is wrong has to make a span that is refused
        let of = index.spans().get(spans.clone()).unwrap_or_default();
        let proved = index.is_pinned() && of.iter().all(|span| span.proof == Proof::Whole);
        match index.windows_blob().filter(|_| proved) {
            Some(blob) => self.fetch_frames(index, blob, spans, range).await.map_err(explained),
            None => Err(refused(format!("the layer's index is damaged; {REMEDY}"))),
        }
    }

    async fn fetch_frames(
        &self,
        index: &Index,
        blob: WindowsBlob,
        spans: Range<usize>,
        range: ByteRange,
    ) -> Result<Frames, FetchError> {
        let id = ObjectId::from(blob.digest);
        let mut choices = self.registry.choices(Need::Content);
        let mut absent = None;
        let mut received = 0;
        loop {
            let host = match choices.ask() {
                Ok(host) => host,
                Err(error @ FetchError::Refused { .. }) => return Err(absent.unwrap_or(error)),
                // it may be had later
                Err(error) => return Err(error),
            };
            let came = host.range(&id, blob.len, range, |bytes| received += bytes).await;
            match came.map(|bytes| Frames::new(index, spans.clone(), bytes)) {
                Ok(Some(frames)) => return Ok(Frames { received, ..frames }),
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
