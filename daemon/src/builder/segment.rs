//! The segment of a layer: proved to be the layer's archive, and its extent index.

pub(crate) mod same;

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::BuildError;
use super::files::{Made, sync_dir};
use crate::ids::SegmentId;
use crate::layer::digest::Hasher;
use crate::layer::index::Index;
use crate::layer::names::Names;
use crate::object::{HashKind, ObjectId};
use crate::range::ByteRange;
use crate::segment::SegmentKind;
use crate::segment::extents::ExtentsWriter;
use crate::source::oci::fetch::{CHUNK, chunk_key, place_key};

/// So many chunks are one directory to read-ahead: who reads two of them is likely to read the others.
const NEIGHBOURS: u64 = 32;

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentJob {
    pub segment: SegmentId,
    /// Its content, which is all there, unless it is pinned.
    pub data: PathBuf,
    /// The layer's access index, which is only made durable.
    pub access: PathBuf,
    /// What the content's SHA-256 has to be.
    pub diff_id: ObjectId,
    /// The access index is [pinned](crate::layer::pinned) by the image, and there is no content yet.
    pub pinned: bool,
}

/// A layer whose content has come piece by piece, and is all there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProveJob {
    pub data: PathBuf,
    pub access: PathBuf,
}

/// Two manifests of such a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompareJob {
    /// What its index says, of which the image was made.
    pub said: PathBuf,
    /// What its archive says.
    pub truth: PathBuf,
}

/// Reads the segment and writes its extent index beside it, the chunks by their hashes, and the names of its files, as `manifest`
/// says them. All files are durable when this returns the length in bytes.
pub fn check(job: &SegmentJob, manifest: &Path, made: &mut Made) -> Result<u64, BuildError> {
    let file = fs_err::File::open(manifest);
    let file = file.map_err(BuildError::io("read what the importer wrote"))?;
    let names = Names::read(BufReader::with_capacity(256 << 10, file))?;
    let failed = BuildError::io("read the layer's segment");
    let mut options = fs_err::OpenOptions::new();
    let mut data = options.read(true).write(job.pinned).open(&job.data).map_err(&failed)?;
    let mut extents = ExtentsWriter::new(job.segment, SegmentKind::Data, HashKind::Sha256);
    let mut push = |range: ByteRange, key| {
        let neighbourhood = range.offset() / CHUNK / NEIGHBOURS;
        let neighbourhood = u32::try_from(neighbourhood).unwrap_or(u32::MAX);
        extents.push_file(range.offset(), range.len(), key, neighbourhood, &names.path(range));
    };
    let size = if job.pinned {
        let index = read_index(&job.access)?;
        if !index.is_pinned() || index.diff_id().as_bytes() != job.diff_id.as_bytes() {
            return Err(BuildError::Tree("the layer's index is of another layer".into()));
        }
        let size = index.uncompressed_len();
        data.file().set_len(size).map_err(&failed)?;
        for offset in (0..size).step_by(CHUNK as usize) {
            push(ByteRange::new(offset, CHUNK).clamp(size), place_key(&job.diff_id, offset));
        }
        size
    } else {
        let mut whole = HashKind::Sha256.hasher();
        let mut chunk = Vec::with_capacity(CHUNK as usize);
        let mut offset = 0;
        loop {
            chunk.clear();
            (&mut data).take(CHUNK).read_to_end(&mut chunk).map_err(&failed)?;
            if chunk.is_empty() {
                break;
            }
            whole.update(&chunk);
            let range = ByteRange::new(offset, chunk.len() as u64);
            push(range, chunk_key(offset, &chunk));
            offset = range.end();
        }
        let found = whole.finish();
        if found != job.diff_id {
            return Err(BuildError::Tree(format!(
                "the layer's archive has the digest sha256:{found} instead of sha256:{}",
                job.diff_id
            )));
        }
        offset
    };
    let sync = |path: &Path| fs_err::File::open(path)?.sync_all();
    let mut write = || -> io::Result<()> {
        made.write(&job.data.with_extension("extents"), 0o600, |out| extents.write(out, size))?;
        made.write(&job.data.with_extension("names"), 0o600, |out| names.write(out))?;
        data.sync_all()?;
        sync(&job.access)?;
        if job.pinned {
            // it is kept for the proof
            sync(manifest)?;
        }
        job.data.parent().map_or(Ok(()), sync_dir)
    };
    write().map_err(BuildError::io("keep the layer's segment"))?;
    Ok(size)
}

/// The index without its windows, of which any part may have yet to come.
fn read_index(access: &Path) -> Result<Index, BuildError> {
    let file = fs_err::File::open(access).map_err(BuildError::io("read the layer's index"))?;
    let read = Index::read(file).map_err(BuildError::io("read the layer's index"))?;
    read.map_err(|error| BuildError::Tree(error.to_string()))
}

/// Proves that a segment that was filled by a pinned index is the layer's archive. Gives what else it is.
pub fn prove(job: &ProveJob) -> Result<Option<String>, BuildError> {
    let index = read_index(&job.access)?;
    let failed = BuildError::io("read the layer's segment");
    let mut data =
        BufReader::with_capacity(1 << 20, fs_err::File::open(&job.data).map_err(&failed)?);
    let mut hasher = Hasher::default();
    let mut bytes = Vec::new();
    for span in index.spans() {
        bytes.clear();
        let len = span.uncompressed.len();
        (&mut data).take(len).read_to_end(&mut bytes).map_err(&failed)?;
        let archived = span.archived(&bytes).and_then(|archived| bytes.get(..archived));
        let archived = archived.filter(|_| bytes.len() as u64 == len).ok_or_else(|| {
            let message = format!(
                "bytes {} of the layer have longer headers than was foreseen",
                span.uncompressed
            );
            BuildError::Tree(message)
        })?;
        hasher.update(archived);
    }
    let found = hasher.finish();
    if found != index.diff_id() {
        let expected = index.diff_id();
        return Ok(Some(format!(
            "the layer's archive has the digest {found} instead of {expected}"
        )));
    }
    Ok(None)
}

/// Proves that the image of a layer shows what is in its archive. Gives how they differ.
pub fn compare(job: &CompareJob) -> Result<Option<String>, BuildError> {
    let open = |path: &Path| {
        let file = fs_err::File::open(path);
        let file = file.map_err(BuildError::io("read what the puller wrote"))?;
        Ok::<_, BuildError>(BufReader::with_capacity(256 << 10, file))
    };
    let difference = same::difference(open(&job.said)?, open(&job.truth)?)?;
    Ok(difference.map(|what| format!("the layer's archive and its index differ: {what}")))
}
