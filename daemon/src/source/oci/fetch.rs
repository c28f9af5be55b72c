//! Parts of a layer, by ranges of its blob.
//!
//! The objects of a layer's segment are its *chunks*: [`CHUNK`] bytes each, named by the hash of their
//! place and content ([`chunk_key`]), which the builder has calculated. The layer's access index says
//! which bytes of the blob make them; it was written by a process that has read from the network, so what
//! comes of it counts only with the right name. Where the image pins the index, the layer was not read yet, and the names
//! are of places alone ([`place_key`]): the digests in the index count.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::assembly::{Assembly, Complete, Piece};
use super::registry::{self, Registry, refused, wrong};
use super::spans::{Claim, Need, Spans};
use crate::layer::index::Index;
use crate::layer::span::{MAX_IN_MEMORY, Span};
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::Limits;
use crate::queue::wire::image::{Layer, LayerOrigin};
use crate::range::ByteRange;
use crate::segment::extents::Extents;
use crate::source::git::Credentials;
use crate::source::{Content, Fetch, FetchError, Sink};

/// The length of a chunk in bytes; the last one of a segment may be shorter.
pub const CHUNK: u64 = 1 << 20;
/// The most bytes of the blob that are asked for at once, but for a single span.
const AT_ONCE: u64 = 8 << 20;
/// The longest access index in bytes.
pub const MAX_INDEX: u64 = 1 << 30;

/// The name of a chunk: two of the same content at different places are two objects.
#[must_use]
pub fn chunk_key(offset: u64, content: &[u8]) -> ObjectId {
    let mut hasher = HashKind::Sha256.hasher();
    hasher.update(&offset.to_le_bytes());
    hasher.update(content);
    hasher.finish()
}

/// The name of a chunk of a layer that nobody has seen yet. Its content is proved by the spans of an index that the image
/// [pins](crate::layer::pinned).
#[must_use]
pub fn place_key(diff_id: &ObjectId, offset: u64) -> ObjectId {
    let mut hasher = HashKind::Sha256.hasher();
    hasher.update(b"place");
    hasher.update(diff_id.as_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.finish()
}

/// One layer as an origin.
#[derive(Debug)]
pub struct LayerSource {
    registry: Registry,
    layer: Layer,
    files: Mutex<Option<(Arc<File>, Arc<File>)>>,
    access: tokio::sync::OnceCell<Arc<Access>>,
    spans: Spans,
}

/// What is known of a layer's segment.
#[derive(Debug)]
struct Access {
    index: Index,
    chunks: HashMap<ObjectId, ByteRange>,
}

/// A chunk and its place.
type Wanted = (ObjectId, ByteRange);

impl LayerSource {
    pub fn new(
        origin: &LayerOrigin,
        limits: Limits,
        credentials: &Arc<dyn Credentials>,
    ) -> Result<Self, FetchError> {
        Ok(Self {
            registry: Registry::new(&origin.repository, limits, credentials)?,
            layer: origin.layer,
            files: Mutex::default(),
            access: tokio::sync::OnceCell::new(),
            spans: Spans::default(),
        })
    }

    async fn access(&self) -> Result<Arc<Access>, FetchError> {
        let read = async {
            let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (extents, access) =
                files.ok_or_else(|| refused("the layer has no access index"))?;
            let digest = self.layer.digest;
            let read =
                tokio::task::spawn_blocking(move || Access::read(&extents, &access, &digest));
            let read = read.await.map_err(|e| refused(e.to_string()))?;
            read.map(Arc::new).map_err(refused)
        };
        self.access.get_or_try_init(|| read).await.map(Arc::clone)
    }
}

impl Access {
    fn read(extents: &File, access: &File, digest: &ObjectId) -> Result<Self, String> {
        let failed =
            |error: &dyn std::fmt::Display| format!("can't read the layer's index: {error}");
        let reader =
            |file: &File| Ok::<_, std::io::Error>(BufReader::new(At::new(file.try_clone()?)));
        let extents = reader(extents).map_err(|e| failed(&e))?;
        let extents = Extents::read(extents).map_err(|e| failed(&e))?;
        let mut bytes = Vec::new();
        let mut access = reader(access).map_err(|e| failed(&e))?.take(MAX_INDEX);
        access.read_to_end(&mut bytes).map_err(|e| failed(&e))?;
        let index = Index::parse(&bytes).map_err(|e| failed(&e))?;
        if index.digest().as_bytes() != digest.as_bytes() {
            return Err(failed(&"it is of another blob, of the same content"));
        }
        if index.uncompressed_len() != extents.size() {
            return Err(failed(&"it does not fit the segment"));
        }
        let chunks = extents.iter().map(|extent| (extent.key, extent.range)).collect();
        Ok(Self { index, chunks })
    }

    /// The spans that make these chunks, which are in order.
    fn needs(&self, wanted: &[Wanted]) -> Vec<Need> {
        let mut needs: Vec<Need> = Vec::new();
        for (_, place) in wanted {
            let numbers = self.index.spans_for(*place);
            for (number, span) in numbers.clone().zip(&self.index.spans()[numbers]) {
                let span = span.uncompressed;
                let from = span.offset().max(place.offset());
                let asked = span.end().min(place.end()).saturating_sub(from);
                match needs.last_mut() {
                    Some(last) if last.number == number => last.asked += asked,
                    _ => needs.push(Need { number, asked, len: span.len() }),
                }
            }
        }
        needs
    }

    /// Consecutive spans that are to be asked for together, as places in `needs`, which is in order.
    fn runs(&self, needs: &[Need]) -> Vec<Range<usize>> {
        let compressed = |at: usize| self.index.spans()[needs[at].number].compressed;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (at, need) in needs.iter().enumerate() {
            match runs.last_mut() {
                Some(run)
                    if needs[run.end - 1].number + 1 == need.number
                        && compressed(at).end() - compressed(run.start).offset() <= AT_ONCE =>
                {
                    run.end += 1;
                }
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    /// What is to be put together.
    fn assembly(&self, wanted: &[Wanted]) -> Assembly {
        let spans = |place: &ByteRange| self.index.spans_for(*place);
        Assembly::new(wanted.iter().map(|(key, place)| (*key, *place, spans(place))))
    }
}

/// Reads a file from its start, wherever the fd stands that others share.
struct At {
    file: File,
    at: u64,
}

impl At {
    fn new(file: File) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = std::os::unix::fs::FileExt::read_at(&self.file, buffer, self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl LayerSource {
    /// Decodes spans, and puts together what is complete with them. Of what has just come, nothing may be wrong.
    async fn decode(
        &self,
        access: &Arc<Access>,
        mut assembly: Assembly,
        spans: Vec<(usize, Bytes)>,
        from_memory: bool,
    ) -> Result<Decoded, FetchError> {
        let (of, diff_id) = (Arc::clone(access), self.layer.diff_id);
        let decode = move || {
            let (mut complete, mut doubtful, mut wrong_ones) = (Vec::new(), Vec::new(), Vec::new());
            for (number, bytes) in spans {
                let span = &of.index.spans()[number];
                let window = of.index.window(number);
                let window = window.map_err(|e| refused(e.to_string()))?;
                match span.decode(&bytes, &window) {
                    Ok(decoded) => {
                        let (range, bytes) = (span.uncompressed, Bytes::from(decoded));
                        let piece = Piece { range, bytes, from_memory };
                        complete.append(&mut assembly.take(number, piece));
                    }
                    Err(_) if from_memory => wrong_ones.push(number),
                    Err(error) => return Err(wrong(error.to_string())),
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
}

/// One call of [`LayerSource::fetch`].
struct Request<'a> {
    source: &'a LayerSource,
    access: &'a Arc<Access>,
    assembly: Assembly,
    /// Chunks that are wrong, which may be the fault of what was in memory.
    doubtful: Vec<Wanted>,
    sink: &'a mut dyn Sink,
}

/// What has become of some spans.
struct Decoded {
    assembly: Assembly,
    complete: Vec<Complete>,
    doubtful: Vec<Wanted>,
    /// The numbers of those from memory that are wrong.
    wrong: Vec<usize>,
}

impl Request<'_> {
    async fn run(mut self, wanted: &[Wanted]) -> Result<(), FetchError> {
        let Self { source: LayerSource { spans, .. }, access, .. } = self;
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
    async fn remember(&mut self, spans: Vec<(usize, Bytes)>) -> Result<Vec<usize>, FetchError> {
        if spans.is_empty() {
            return Ok(Vec::new());
        }
        let assembly = self.assembly.clone();
        let decoded = self.source.decode(self.access, assembly, spans, true).await?;
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
            let spans = &self.access.index.spans()[first.number..=last.number];
            if spans.iter().any(|span| span.uncompressed.len() > MAX_IN_MEMORY) {
                return Err(refused("the layer is compressed in one piece; pull the image anew"));
            }
            let from = spans.first().map_or(0, |span| span.compressed.offset());
            let to = spans.last().map_or(0, |span| span.compressed.end());
            let blob = ByteRange::between(from, to);
            let mut choices = registry.choices(registry::Need::Content);
            let (came, decoded) = loop {
                let host = choices.ask()?;
                let received = |bytes| self.sink.received(bytes);
                let failure = match host.range(&layer.digest, layer.size, blob, received).await {
                    Ok(bytes) => {
                        let bytes = Bytes::from(bytes);
                        let piece = |span: &Span| {
                            let start = (span.compressed.offset() - from) as usize;
                            let end = start + span.compressed.len() as usize;
                            bytes.get(start..end).map(|piece| bytes.slice_ref(piece))
                        };
                        let pieces = spans.iter().map(|span| piece(span).unwrap_or_default());
                        let came: Vec<_> = (first.number..).zip(pieces).collect();
                        let (assembly, spans) = (self.assembly.clone(), came.clone());
                        match self.source.decode(self.access, assembly, spans, false).await {
                            Ok(decoded) => break (came, decoded),
                            Err(error) => error,
                        }
                    }
                    Err(error) => error,
                };
                choices.failed(failure)?;
            };
            if let Some(claim) = &mut claim {
                came.iter().for_each(|(number, bytes)| claim.deliver(*number, bytes));
            }
            drop(came);
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

impl Fetch for LayerSource {
    fn attach(&self, extents: Arc<File>, access: Arc<File>) {
        // they are read when they are needed
        *self.files.lock().unwrap_or_else(PoisonError::into_inner) = Some((extents, access));
    }

    fn decoded_with(&self, range: ByteRange) -> Option<ByteRange> {
        let index = &self.access.get()?.index;
        let spans = index.spans().get(index.spans_for(range))?;
        let (first, last) = (spans.first()?, spans.last()?);
        Some(ByteRange::between(first.uncompressed.offset(), last.uncompressed.end()))
    }

    async fn fetch(&self, keys: &[ObjectId], sink: &mut dyn Sink) -> Result<(), FetchError> {
        let access = self.access().await?;
        let mut wanted = Vec::with_capacity(keys.len());
        for key in keys {
            let message = "the layer has no such chunk".to_owned();
            let range = access.chunks.get(key).copied();
            wanted.push((*key, range.ok_or(FetchError::Missing { key: *key, message })?));
        }
        wanted.sort_unstable_by_key(|(_, range)| range.offset());
        let (source, access, doubtful) = (self, &access, Vec::new());
        let assembly = access.assembly(&wanted);
        Request { source, access, assembly, doubtful, sink }.run(&wanted).await
    }
}

#[cfg(test)]
mod tests;
