//! The sizes that a pool has already.
//!
//! Who clones an origin again needs nothing of it but what is new, also where the origin tells no
//! sizes: files that an earlier tree of the pool has are in its extent indexes, with their sizes.

use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::warn;

use super::store::Store;
use super::{Supervisor, internal};
use crate::admin::ApiError;
use crate::ids::{PoolId, SegmentId};
use crate::object::HashKind;
use crate::segment::SegmentKind;
use crate::segment::extents::Extents;

/// The data segments of a pool.
#[derive(Debug, Default)]
pub struct Known {
    segments: Vec<(PoolId, SegmentId)>,
}

impl Supervisor {
    /// What there is of an origin: the pool that a clone of it is going to get, if there is one. `whole`: no more
    /// than what is there with its content.
    pub(super) async fn known(
        &self,
        url: &str,
        uid: u32,
        hash: HashKind,
        whole: bool,
    ) -> Result<Known, ApiError> {
        let failed = |error| internal("can't read the catalog", &error);
        let pool = self.catalog.find_pool(url.to_owned(), uid, hash).await.map_err(failed)?;
        let Some(pool) = pool else { return Ok(Known::default()) };
        let segments = self.catalog.segments(pool.id).await.map_err(failed)?;
        let data = segments.iter().filter(|segment| segment.kind == SegmentKind::Data);
        let data = data.filter(|segment| segment.complete || !whole);
        Ok(Known { segments: data.map(|segment| (pool.id, segment.id)).collect() })
    }
}

impl Known {
    /// Lists the objects in the words of `git cat-file --batch-check`: `<id> blob <size>`. All of it
    /// goes into a pipe, as long as somebody reads.
    pub fn list(self, store: &Arc<Store>, out: OwnedFd) {
        let store = Arc::clone(store);
        tokio::task::spawn_blocking(move || {
            let mut out = BufWriter::with_capacity(1 << 16, std::fs::File::from(out));
            for (pool, segment) in self.segments {
                let written = match store.extents(pool, segment) {
                    Ok(extents) => write_objects(&extents, &mut out),
                    Err(error) => {
                        // its sizes are asked for, as those of a new origin
                        warn!(%pool, %segment, %error, "can't read what a segment has");
                        continue;
                    }
                };
                if written.is_err() {
                    // the importer has ended
                    return;
                }
            }
            out.flush().ok();
        });
    }
}

fn write_objects(extents: &Extents, out: &mut impl Write) -> io::Result<()> {
    extents.iter().try_for_each(|extent| writeln!(out, "{} blob {}", extent.key, extent.size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::importer::local_blob;
    use crate::object::ObjectId;
    use crate::segment::extents::ExtentsWriter;

    #[test]
    fn the_importer_understands_the_list() {
        for hash in [HashKind::Sha1, HashKind::Sha256] {
            let mut writer = ExtentsWriter::new(SegmentId(1), SegmentKind::Data, hash);
            let objects = [(b"a", 1), (b"b", 5000), (b"c", 1 << 40)]
                .map(|(content, size)| (ObjectId::of_blob(hash, content), size));
            for ((key, size), at) in objects.into_iter().zip([0, 4096, 12288]) {
                writer.push_file(at, size, key, 0, b"d/f");
            }
            let mut index = Vec::new();
            writer.write(&mut index, 1 << 41).unwrap();
            let extents = Extents::read(&index[..]).unwrap();
            let mut list = Vec::new();
            write_objects(&extents, &mut list).unwrap();
            let lines = list.strip_suffix(b"\n").unwrap().split(|byte| *byte == b'\n');
            let read: Vec<_> = lines.map(|line| local_blob(line).unwrap()).collect();
            assert_eq!(read, objects);
        }
    }
}
