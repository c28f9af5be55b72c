//! Proving a layer that was pulled by its index, once all of it is here: it is the archive that its digest says, and its image
//! shows what is in that.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use hydrant_api::ErrorCode;
use tracing::warn;

use super::super::cgroups::Cgroups;
use super::super::clone::Builder;
use super::super::shard::Completeness;
use super::super::store::Store;
use super::puller::Puller;
use crate::admin::ApiError;
use crate::builder::Reply;
use crate::builder::segment::{CompareJob, ProveJob};
use crate::ids::{PoolId, SegmentId};
use crate::layer::index::Head;

/// However large a layer is, its archive has been read by then.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Sees to it that a segment that is all there is what its image says, if that has not been seen before. Anything but a
/// layer that was pulled by its index is.
pub async fn prove(
    store: &Store,
    cgroups: &Cgroups,
    pool: PoolId,
    segment: SegmentId,
) -> io::Result<Completeness> {
    let data = store.data_path(pool, segment);
    let access = data.with_extension("access");
    let manifest = data.with_extension("manifest");
    let head = match File::open(&access) {
        Ok(file) => Head::read(file)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Completeness::Yes),
        Err(error) => return Err(error),
    };
    if !head.pinned {
        return Ok(Completeness::Yes);
    }
    let mut builder = Builder::start()?;
    if let Some(how) = refuted(builder.prove(ProveJob { data, access }).await?)? {
        return Ok(Completeness::Refuted(how));
    }
    if !manifest.exists() {
        // pulled by a program that kept none: nobody knows whether the image shows what is there
        return Ok(Completeness::Yes);
    }
    let truth = manifest.with_extension("reread");
    let read = reread(store, cgroups, pool, segment, &truth).await;
    let compared = match &read {
        Ok(Reread::Done) => {
            Some(builder.compare(CompareJob { said: manifest, truth: truth.clone() }).await)
        }
        _ => None,
    };
    if let Err(error) = std::fs::remove_file(&truth)
        && error.kind() != io::ErrorKind::NotFound
    {
        warn!(%error, path = %truth.display(), "can't remove a layer's file");
    }
    match (read?, compared) {
        (Reread::Done, Some(compared)) => {
            Ok(refuted(compared?)?.map_or(Completeness::Proved, Completeness::Refuted))
        }
        (Reread::Done, None) => Err(io::Error::other("it was not compared")),
        (Reread::Never(why), _) => Ok(Completeness::Refuted(format!("it can't be proved: {why}"))),
        (Reread::Died(why), _) => Ok(Completeness::Undecided(why)),
    }
}

/// What has come of reading the archive.
enum Reread {
    Done,
    /// It can't be read.
    Never(String),
    /// Who was to read it died, or took too long.
    Died(String),
}

fn refuted(reply: Reply) -> io::Result<Option<String>> {
    match reply {
        Reply::Proved => Ok(None),
        Reply::Refuted(how) => Ok(Some(how)),
        Reply::Failed(message) => Err(io::Error::other(message)),
        Reply::Built(_) | Reply::BuiltLayer(_) => {
            Err(io::Error::other("the builder is out of step"))
        }
    }
}

/// Has the manifest of the archive written that the segment holds.
async fn reread(
    store: &Store,
    cgroups: &Cgroups,
    pool: PoolId,
    segment: SegmentId,
    manifest: &Path,
) -> io::Result<Reread> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true).mode(0o600);
    let manifest = options.open(manifest)?;
    let [data, access] = store.open_to_reread(pool, segment)?;
    let mut puller = Puller::offline(store, cgroups).map_err(io::Error::other)?;
    let read = tokio::time::timeout(PATIENCE, puller.reread([data, access, manifest]));
    let read = read.await.unwrap_or_else(|_| Err(ApiError::internal("it takes too long")));
    puller.end();
    match read {
        Ok(None) => Ok(Reread::Done),
        Ok(Some(why)) => Ok(Reread::Never(why)),
        // it lives, and says what it lacks
        Err(error) if error.code == ErrorCode::Origin => Err(io::Error::other(error)),
        Err(error) => Ok(Reread::Died(error.to_string())),
    }
}
