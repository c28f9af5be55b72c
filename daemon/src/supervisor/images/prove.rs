//! Proving a layer that was pulled by its index, once all of it is here.

use std::io::{self, Read};

use super::super::clone::Builder;
use super::super::store::Store;
use crate::builder::Reply;
use crate::builder::segment::ProveJob;
use crate::ids::{PoolId, SegmentId};
use crate::layer::index::{HEAD_LEN, Index};

/// Sees to it that a segment is what its image says, if that has not been seen before. Anything but such a layer is.
pub async fn prove(store: &Store, pool: PoolId, segment: SegmentId) -> io::Result<()> {
    let data = store.data_path(pool, segment);
    let access = data.with_extension("access");
    let mut head = [0; HEAD_LEN];
    match std::fs::File::open(&access).and_then(|mut file| file.read_exact(&mut head)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    if !Index::is_pinned_by(&head).map_err(io::Error::other)? {
        return Ok(());
    }
    match Builder::start()?.prove(ProveJob { data, access }).await? {
        Reply::Proved => Ok(()),
        Reply::Failed(message) => Err(io::Error::other(message)),
        Reply::Built(_) | Reply::BuiltLayer(_) => {
            Err(io::Error::other("the builder is out of step"))
        }
    }
}
