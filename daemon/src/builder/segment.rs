//! The segment of a layer: proved to be the layer's archive, and its extent index.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::BuildError;
use super::files::{Made, sync_dir};
use crate::ids::SegmentId;
use crate::object::{HashKind, ObjectId};
use crate::segment::SegmentKind;
use crate::segment::extents::ExtentsWriter;
use crate::source::oci::fetch::{CHUNK, chunk_key};

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentJob {
    pub segment: SegmentId,
    /// Its content, which is all there.
    pub data: PathBuf,
    /// The layer's access index, which is only made durable.
    pub access: PathBuf,
    /// What the content's SHA-256 has to be.
    pub diff_id: ObjectId,
}

/// Reads the segment and writes its extent index beside it: the chunks by their names. All files are durable
/// when this returns the length in bytes.
pub fn check(job: &SegmentJob, made: &mut Made) -> Result<u64, BuildError> {
    let failed = BuildError::io("read the layer's segment");
    let mut data = fs_err::File::open(&job.data).map_err(&failed)?;
    let mut whole = HashKind::Sha256.hasher();
    let mut extents = ExtentsWriter::new(job.segment, SegmentKind::Data, HashKind::Sha256);
    let mut chunk = Vec::with_capacity(CHUNK as usize);
    let mut offset = 0;
    loop {
        chunk.clear();
        (&mut data).take(CHUNK).read_to_end(&mut chunk).map_err(&failed)?;
        if chunk.is_empty() {
            break;
        }
        whole.update(&chunk);
        let len = chunk.len() as u64;
        extents.push_file(offset, len, chunk_key(offset, &chunk), 0, b"");
        offset += len;
    }
    let found = whole.finish();
    if found != job.diff_id {
        return Err(BuildError::Tree(format!(
            "the layer's archive has the digest sha256:{found} instead of sha256:{}",
            job.diff_id
        )));
    }
    let sync = |path: &Path| fs_err::File::open(path)?.sync_all();
    let mut write = || -> io::Result<()> {
        made.write(&job.data.with_extension("extents"), 0o600, |out| extents.write(out, offset))?;
        data.sync_all()?;
        sync(&job.access)?;
        job.data.parent().map_or(Ok(()), sync_dir)
    };
    write().map_err(BuildError::io("keep the layer's segment"))?;
    Ok(offset)
}
