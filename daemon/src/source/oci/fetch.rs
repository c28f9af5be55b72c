//! Parts of a layer, by ranges of its blob.
//!
//! The objects of a layer's segment are its *chunks*: [`CHUNK`] bytes each, named by the hash of their
//! place and content ([`chunk_key`]), which the builder has calculated. The layer's access index says
//! which bytes of the blob make them; it was written by a process that has read from the network, so what
//! comes of it counts only with the right name. Where the image pins the index, the layer was not read yet, and the names
//! are of places alone ([`place_key`]): the digests in the index count.

mod request;
mod windows;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use self::request::Request;
use self::windows::Groups;
use super::assembly::Assembly;
use super::registry::{Registry, refused};
use super::spans::{Need, Spans};
use crate::layer::index::Index;
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::Limits;
use crate::queue::wire::image::{Layer, LayerOrigin};
use crate::range::ByteRange;
use crate::segment::extents::Extents;
use crate::source::git::{Clients, Credentials};
use crate::source::{Fetch, FetchError, Sink};

/// The length of a chunk in bytes; the last one of a segment may be shorter. Segments that are older than this may have
/// chunks of another length, which their extent index says: all that is said of a segment's chunks elsewhere is of places.
pub const CHUNK: u64 = 256 << 10;
/// The most bytes of the blob that are asked for at once, but for a single span.
const AT_ONCE: u64 = 8 << 20;

/// The numbers of the chunks that have a byte in this range of a segment.
#[must_use]
pub fn chunks(range: ByteRange) -> Range<u32> {
    let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    number(range.offset() / CHUNK)..number(range.end().div_ceil(CHUNK))
}

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
    spans: Arc<Spans>,
    windows: Arc<Groups>,
}

/// What is known of a layer's segment.
#[derive(Debug)]
struct Access {
    /// Without its windows.
    index: Index,
    /// They are there, or may come to be.
    file: Arc<File>,
    chunks: HashMap<ObjectId, ByteRange>,
}

/// A chunk and its place.
type Wanted = (ObjectId, ByteRange);

impl LayerSource {
    /// As for [`Registry::new`].
    pub fn new(
        origin: &LayerOrigin,
        limits: Limits,
        credentials: &Arc<dyn Credentials>,
        clients: &Clients,
    ) -> Result<Self, FetchError> {
        Ok(Self {
            registry: Registry::new(&origin.repository, limits, credentials, clients)?,
            layer: origin.layer,
            files: Mutex::default(),
            access: tokio::sync::OnceCell::new(),
            spans: Arc::default(),
            windows: Arc::default(),
        })
    }

    async fn access(&self) -> Result<Arc<Access>, FetchError> {
        let read = async {
            let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (extents, access) =
                files.ok_or_else(|| refused("the layer has no access index"))?;
            let digest = self.layer.digest;
            let read = tokio::task::spawn_blocking(move || Access::read(&extents, access, &digest));
            let read = read.await.map_err(|e| refused(e.to_string()))?;
            read.map(Arc::new).map_err(refused)
        };
        self.access.get_or_try_init(|| read).await.map(Arc::clone)
    }
}

impl Access {
    fn read(extents: &File, access: Arc<File>, digest: &ObjectId) -> Result<Self, String> {
        let failed =
            |error: &dyn std::fmt::Display| format!("can't read the layer's index: {error}");
        let reader =
            |file: &File| Ok::<_, std::io::Error>(BufReader::new(At::new(file.try_clone()?)));
        let extents = reader(extents).map_err(|e| failed(&e))?;
        let extents = Extents::read(extents).map_err(|e| failed(&e))?;
        let index = reader(&access).and_then(Index::read).map_err(|e| failed(&e))?;
        let index = index.map_err(|e| failed(&e))?;
        if index.digest().as_bytes() != digest.as_bytes() {
            return Err(failed(&"it is of another blob, of the same content"));
        }
        if index.uncompressed_len() != extents.size() {
            return Err(failed(&"it does not fit the segment"));
        }
        let chunks = extents.iter().map(|extent| (extent.key, extent.range)).collect();
        Ok(Self { index, file: access, chunks })
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
        Request::new(self, &access, sink).run(&wanted).await
    }
}

#[cfg(test)]
mod tests;
