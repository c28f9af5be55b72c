//! One request for chunks of a layer: which spans it needs, whence they come, and what becomes of those that are wrong.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{MaybeDone, maybe_done};

use super::windows::Frames;
use super::{Access, LayerSource, Wanted, chunk_key, place_key};
use crate::layer::span::MAX_IN_MEMORY;
use crate::object::ObjectId;
use crate::range::ByteRange;
use crate::source::oci::assembly::{Assembly, Complete, Piece};
use crate::source::oci::registry::{self, Part, refused, wrong};
use crate::source::oci::spans::{Claim, Encoded, Need};
use crate::source::{Content, FetchError, Sink};

/// One call of [`LayerSource::fetch`](super::LayerSource).
pub(super) struct Request<'a> {
    source: &'a LayerSource,
    access: &'a Arc<Access>,
    assembly: Assembly,
    /// Chunks that are wrong, which may be the fault of what was in memory.
    doubtful: Vec<Wanted>,
    sink: &'a mut dyn Sink,
}

/// A part of the layer's blob whose reading has begun.
struct Begun<'a> {
    part: Part<'a>,
    /// What was read of it already.
    read: VecDeque<Result<Option<Bytes>, FetchError>>,
}

impl<'a> Begun<'a> {
    /// Asks for the part while the windows of its spans are on their way. It is read meanwhile: its host need not wait, nor do the
    /// windows where they come by the same connection.
    async fn new<F: Future>(
        part: impl Future<Output = Result<Part<'a>, FetchError>>,
        mut windows: Pin<&mut MaybeDone<F>>,
    ) -> Result<Self, FetchError> {
        let others = async {
            windows.as_mut().await;
            std::future::pending::<Infallible>().await
        };
        let mut part = tokio::select! {
            part = part => part?,
            never = others => match never {},
        };
        let mut read = VecDeque::new();
        while read.back().is_none_or(|last| matches!(last, Ok(Some(_)))) {
            tokio::select! {
                biased;
                () = windows.as_mut() => break,
                piece = part.next() => read.push_back(piece),
            }
        }
        windows.await;
        Ok(Self { part, read })
    }

    /// The next bytes; `None` once all have come.
    async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        match self.read.pop_front() {
            Some(piece) => piece,
            None => self.part.next().await,
        }
    }
}

/// What has become of some spans.
struct Decoded {
    assembly: Assembly,
    complete: Vec<Complete>,
    doubtful: Vec<Wanted>,
    /// The numbers of those from memory that are wrong.
    wrong: Vec<usize>,
}

impl<'a> Request<'a> {
    pub(super) fn new(
        source: &'a LayerSource,
        access: &'a Arc<Access>,
        sink: &'a mut dyn Sink,
    ) -> Self {
        Self { source, access, assembly: Assembly::default(), doubtful: Vec::new(), sink }
    }

    /// Fetches these chunks, which are in order.
    pub(super) async fn run(mut self, wanted: &[Wanted]) -> Result<(), FetchError> {
        let Self { source: LayerSource { spans, .. }, access, .. } = self;
        self.assembly = access.assembly(wanted);
        let needs = access.needs(wanted);
        let mut coming = Vec::new();
        for run in access.runs(&needs) {
            let mut found = spans.find(needs[run].iter().copied());
            coming.append(&mut found.coming);
            let wrong = self.remember(found.here).await?;
            found.absent.extend(needs.iter().filter(|need| wrong.contains(&need.number)));
            self.fetch(found.absent, Some(found.claim)).await?;
        }
        if !coming.is_empty() {
            let (here, mut absent) = spans.wait(coming).await;
            let wrong = self.remember(here).await?;
            absent.extend(needs.iter().filter(|need| wrong.contains(&need.number)));
            let claim = spans.claim(&absent);
            self.fetch(absent, Some(claim)).await?;
        }
        let doubtful = std::mem::take(&mut self.doubtful);
        if !doubtful.is_empty() {
            // before a host is blamed, all of it comes from there
            let needs = access.needs(&doubtful);
            needs.iter().for_each(|need| spans.forget(need.number));
            self.assembly = access.assembly(&doubtful);
            self.fetch(needs, None).await?;
        }
        match self.assembly.open() {
            None => Ok(()),
            Some(key) => {
                let message = "its spans don't cover it".to_owned();
                Err(FetchError::Missing { key, message })
            }
        }
    }

    /// Takes spans that were in memory; gives the numbers of those that are wrong.
    async fn remember(&mut self, spans: Vec<(usize, Encoded)>) -> Result<Vec<usize>, FetchError> {
        if spans.is_empty() {
            return Ok(Vec::new());
        }
        let assembly = self.assembly.clone();
        let diff_id = self.source.layer.diff_id;
        let decoded = decode(self.access, diff_id, assembly, spans, true).await?;
        for number in &decoded.wrong {
            tracing::debug!(span = number, "what was kept of the layer is wrong");
            self.source.spans.forget(*number);
        }
        let wrong = decoded.wrong.clone();
        self.hand_over(decoded)?;
        Ok(wrong)
    }

    /// Fetches these spans, whoever else may be doing so.
    async fn fetch(
        &mut self,
        mut needs: Vec<Need>,
        mut claim: Option<Claim<'_>>,
    ) -> Result<(), FetchError> {
        let LayerSource { registry, layer, .. } = self.source;
        needs.sort_unstable_by_key(|need| need.number);
        for run in self.access.runs(&needs) {
            let needs = &needs[run];
            let (Some(first), Some(last)) = (needs.first(), needs.last()) else { continue };
            let numbers = first.number..last.number + 1;
            let spans = &self.access.index.spans()[numbers.clone()];
            if spans.iter().any(|span| span.uncompressed.len() > MAX_IN_MEMORY) {
                return Err(refused("the layer is compressed in one piece; pull the image anew"));
            }
            let mut choices = registry.choices(registry::Need::Content);
            let frames = maybe_done(self.source.frames(self.access, numbers.clone()));
            let mut frames = pin!(frames);
            // what has come of the chunks before need not come again
            while let Some(next) = self.assembly.first_needed(numbers.clone()) {
                let rest = next..numbers.end;
                let part = choices.ask()?.part(&layer.digest, layer.size, self.place(rest.clone()));
                let begun = Begun::new(part, frames.as_mut()).await;
                let came = match (begun, frames.as_mut().output_mut()) {
                    (Ok(begun), Some(Ok(frames))) => {
                        self.sink.received(std::mem::take(&mut frames.received));
                        self.stream(begun, rest, frames, claim.as_mut()).await
                    }
                    (Err(error), _) => Err(error),
                    // it is not this host's fault
                    (Ok(_), _) => match frames.as_mut().take_output() {
                        Some(Err(error)) => return Err(error),
                        _ => return Err(refused("a task ended")),
                    },
                };
                let Err(error) = came else { break };
                // a chunk is put together of what one host has sent
                self.assembly.give_back(numbers.clone());
                if matches!(error, FetchError::Wrong { .. }) {
                    numbers.clone().for_each(|number| self.source.spans.forget(number));
                }
                choices.failed(error)?;
            }
        }
        Ok(())
    }

    /// Where these spans are in the layer's blob.
    fn place(&self, numbers: Range<usize>) -> ByteRange {
        let spans = &self.access.index.spans()[numbers];
        let from = spans.first().map_or(0, |span| span.compressed.offset());
        let to = spans.iter().map(|span| span.compressed.end()).max().unwrap_or(from);
        ByteRange::between(from, to)
    }

    /// Hands each chunk of these spans over as soon as it is there: who waits for the first of them need not wait for the
    /// last.
    async fn stream(
        &mut self,
        mut begun: Begun<'_>,
        numbers: Range<usize>,
        frames: &Frames,
        mut claim: Option<&mut Claim<'_>>,
    ) -> Result<(), FetchError> {
        let (layer, access) = (self.source.layer, self.access);
        let range = self.place(numbers.clone());
        let from = range.offset();
        let mut left = numbers.clone().zip(&access.index.spans()[numbers]).peekable();
        let mut bytes = Vec::with_capacity(range.len() as usize);
        while let Some(piece) = begun.next().await? {
            self.sink.received(piece.len() as u64);
            bytes.extend_from_slice(&piece);
            let have = from + bytes.len() as u64;
            let mut came = Vec::new();
            while let Some((number, span)) = left.next_if(|(_, of)| of.compressed.end() <= have) {
                let start = (span.compressed.offset() - from) as usize;
                let end = start + span.compressed.len() as usize;
                // neighbours may share a byte
                let bytes = Bytes::copy_from_slice(&bytes[start..end]);
                came.push((number, Encoded { bytes, frame: frames.of(&access.index, number) }));
            }
            if came.is_empty() {
                continue;
            }
            let (assembly, encoded) = (self.assembly.clone(), came.clone());
            let decoded = decode(access, layer.diff_id, assembly, encoded, false).await?;
            if let Some(claim) = &mut claim {
                came.into_iter().for_each(|(number, encoded)| claim.deliver(number, encoded));
                self.source.spans.tidy_later();
            }
            self.hand_over(decoded)?;
        }
        Ok(())
    }

    fn hand_over(&mut self, decoded: Decoded) -> Result<(), FetchError> {
        let Decoded { assembly, complete, mut doubtful, .. } = decoded;
        self.assembly = assembly;
        self.doubtful.append(&mut doubtful);
        for Complete { key, content, .. } in complete {
            self.sink.object(key, Content::Memory(content)).map_err(FetchError::Sink)?;
        }
        Ok(())
    }
}

/// Decodes spans, and puts together what is complete with them. Of what has just come, nothing may be wrong.
async fn decode(
    access: &Arc<Access>,
    diff_id: ObjectId,
    mut assembly: Assembly,
    spans: Vec<(usize, Encoded)>,
    from_memory: bool,
) -> Result<Decoded, FetchError> {
    let of = Arc::clone(access);
    let decode = move || {
        let (mut complete, mut doubtful, mut wrong_ones) = (Vec::new(), Vec::new(), Vec::new());
        for (number, Encoded { bytes, frame }) in spans {
            let span = &of.index.spans()[number];
            let window = of.index.unpack_window(number, &frame).map_err(|e| e.to_string());
            match window.and_then(|w| span.decode(&bytes, &w).map_err(|e| e.to_string())) {
                Ok(decoded) => {
                    let (range, bytes) = (span.uncompressed, Bytes::from(decoded));
                    let piece = Piece { range, bytes, from_memory };
                    complete.append(&mut assembly.take(number, piece));
                }
                Err(_) if from_memory => wrong_ones.push(number),
                Err(error) => return Err(wrong(error)),
            }
        }
        let is_right = |chunk: &Complete| {
            let place = chunk.place.offset();
            of.index.is_pinned() && place_key(&diff_id, place) == chunk.key
                || chunk_key(place, &chunk.content) == chunk.key
        };
        for chunk in complete.extract_if(.., |chunk| !is_right(chunk)) {
            if !chunk.from_memory {
                return Err(wrong(format!("bytes {} of the layer are others", chunk.place)));
            }
            doubtful.push((chunk.key, chunk.place));
        }
        Ok(Decoded { assembly, complete, doubtful, wrong: wrong_ones })
    };
    let decoded = tokio::task::spawn_blocking(decode).await;
    decoded.map_err(|e| refused(e.to_string()))?
}
