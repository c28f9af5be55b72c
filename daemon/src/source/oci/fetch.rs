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

use super::registry::{Need, Registry, refused, wrong};
use crate::layer::index::Index;
use crate::layer::span::MAX_IN_MEMORY;
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
}

/// What is known of a layer's segment.
#[derive(Debug)]
struct Access {
    index: Index,
    chunks: HashMap<ObjectId, ByteRange>,
}

/// Chunks that are put together from spans.
#[derive(Debug, Default, Clone)]
struct Assembly {
    /// Not complete yet, in order: key, place, what there is of it.
    open: std::collections::VecDeque<Chunk>,
}

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

    /// Consecutive spans that are to be asked for together.
    fn runs(&self, ranges: &[(ObjectId, ByteRange)]) -> Vec<Range<usize>> {
        let spans = self.index.spans();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (_, range) in ranges {
            for span in self.index.spans_for(*range) {
                match runs.last_mut() {
                    Some(run) if run.contains(&span) => {}
                    Some(run)
                        if run.end == span
                            && spans[span].compressed.end()
                                - spans[run.start].compressed.offset()
                                <= AT_ONCE =>
                    {
                        run.end += 1;
                    }
                    _ => runs.push(span..span + 1),
                }
            }
        }
        runs
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

impl Assembly {
    /// Takes the bytes of a span; gives the chunks that are complete with them.
    fn take(&mut self, range: ByteRange, bytes: &[u8]) -> Vec<Chunk> {
        for (_, place, content) in &mut self.open {
            let from = place.offset() + content.len() as u64;
            let to = place.end().min(range.end());
            if from < range.offset() || from >= to {
                continue;
            }
            let piece = bytes.get((from - range.offset()) as usize..(to - range.offset()) as usize);
            content.extend_from_slice(piece.unwrap_or_default());
        }
        let mut complete = Vec::new();
        while let Some((_, place, content)) = self.open.front()
            && content.len() as u64 == place.len()
        {
            complete.extend(self.open.pop_front());
        }
        complete
    }
}

/// A chunk, its place and its content.
type Chunk = (ObjectId, ByteRange, Vec<u8>);

impl LayerSource {
    /// Decodes the spans `run`, which begin with the first of `bytes`; gives what chunks are complete with them.
    async fn decode(
        &self,
        access: &Arc<Access>,
        run: Range<usize>,
        bytes: Vec<u8>,
        mut assembly: Assembly,
    ) -> Result<(Assembly, Vec<Chunk>), FetchError> {
        let (of, diff_id) = (Arc::clone(access), self.layer.diff_id);
        let decode = move || {
            let spans = of.index.spans();
            let from = spans.get(run.start).map_or(0, |span| span.compressed.offset());
            let mut complete = Vec::new();
            for number in run {
                let span = &spans[number];
                let start = (span.compressed.offset() - from) as usize;
                let piece = bytes.get(start..start + span.compressed.len() as usize);
                let window = of.index.window(number);
                let window = window.map_err(|e| refused(e.to_string()))?;
                let decoded = span.decode(piece.unwrap_or_default(), &window);
                let decoded = decoded.map_err(|e| wrong(e.to_string()))?;
                complete.extend(assembly.take(span.uncompressed, &decoded));
            }
            for (key, place, content) in &complete {
                let pinned = of.index.is_pinned() && place_key(&diff_id, place.offset()) == *key;
                if !pinned && chunk_key(place.offset(), content) != *key {
                    return Err(wrong(format!("bytes {place} of the layer are others")));
                }
            }
            Ok((assembly, complete))
        };
        let decoded = tokio::task::spawn_blocking(decode).await;
        decoded.map_err(|e| refused(e.to_string()))?
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
        let open = wanted.iter().map(|(key, range)| (*key, *range, Vec::new())).collect();
        let mut assembly = Assembly { open };
        for run in access.runs(&wanted) {
            let spans = &access.index.spans()[run.clone()];
            let (Some(first), Some(last)) = (spans.first(), spans.last()) else { continue };
            if spans.iter().any(|span| span.uncompressed.len() > MAX_IN_MEMORY) {
                return Err(refused("the layer is compressed in one piece; pull the image anew"));
            }
            let blob = ByteRange::between(first.compressed.offset(), last.compressed.end());
            let mut choices = self.registry.choices(Need::Content);
            let complete = loop {
                let host = choices.ask()?;
                let received = |bytes| sink.received(bytes);
                let range = host.range(&self.layer.digest, self.layer.size, blob, received);
                let decoded = match range.await {
                    // of what is wrong, nothing is kept
                    Ok(bytes) => self.decode(&access, run.clone(), bytes, assembly.clone()).await,
                    Err(error) => Err(error),
                };
                match decoded {
                    Ok((rest, complete)) => {
                        assembly = rest;
                        break complete;
                    }
                    Err(error) => choices.failed(error)?,
                }
            };
            for (key, _, content) in complete {
                sink.object(key, Content::Memory(content)).map_err(FetchError::Sink)?;
            }
        }
        match assembly.open.pop_front() {
            None => Ok(()),
            Some((key, ..)) => {
                let message = "its spans don't cover it".to_owned();
                Err(FetchError::Missing { key, message })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_put_together_from_spans() {
        let content: Vec<u8> = (0..100).collect();
        let chunk = |from: usize, to: usize| {
            let key = chunk_key(from as u64, &content[from..to]);
            (key, ByteRange::between(from as u64, to as u64), Vec::new())
        };
        let mut assembly = Assembly { open: [chunk(10, 30), chunk(30, 50), chunk(70, 100)].into() };
        let mut found = Vec::new();
        // 60..65 is in no chunk that is wanted
        for (from, to) in [(0, 12), (12, 45), (45, 60), (60, 75), (75, 100)] {
            let span = ByteRange::between(from as u64, to as u64);
            for (key, place, bytes) in assembly.take(span, &content[from..to]) {
                assert_eq!(chunk_key(place.offset(), &bytes), key);
                found.push(place.offset());
            }
        }
        assert_eq!(found, [10, 30, 70]);
        assert!(assembly.open.is_empty());
    }

    #[test]
    fn a_span_that_is_missing_leaves_a_chunk_open() {
        let whole = ByteRange::new(0, 20);
        let mut assembly = Assembly { open: [(chunk_key(0, b""), whole, Vec::new())].into() };
        assert!(assembly.take(ByteRange::new(0, 8), &[1; 8]).is_empty());
        assert!(assembly.take(ByteRange::new(12, 8), &[1; 8]).is_empty());
        assert_eq!(assembly.open.len(), 1);
        assert_ne!(chunk_key(0, b"x"), chunk_key(1, b"x"), "the place is a part of the name");
    }
}
