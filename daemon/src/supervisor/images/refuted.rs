//! Layers that are not what the index says that they were pulled by.
//!
//! Whoever mounts the image itself goes on to see what the image says. A snapshot of containerd's stands for all images with
//! that layer: nobody is to read one from then on.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use tracing::{error, warn};

use super::super::shard::Command;
use super::super::{Supervisor, lock};
use crate::admin::ApiError;
use crate::catalog::Tree;
use crate::ids::SegmentId;
use crate::segment::SegmentKind;

/// That a layer is not what its image says, as an error.
pub(in super::super) fn refusal(tree: &Tree) -> Option<ApiError> {
    let why = tree.refuted.as_ref()?;
    let message = format!("the layer sha256:{} is not what its image says: {why}", tree.commit);
    Some(ApiError::conflict(message).with_hint("remove the image: it may be damaged, or forged"))
}

impl Supervisor {
    /// All of a layer is here, and it is not what its index says.
    pub(in super::super) async fn refute_layer(&self, segment: SegmentId, why: String) {
        // nobody mounts it for containerd meanwhile
        let _alone = self.layers.lock().await;
        let tree = match self.catalog.set_refuted(segment, why).await {
            Ok(Some(tree)) => tree,
            Ok(None) => return,
            Err(error) => {
                error!(%segment, %error, "can't note that a layer is not what its image says");
                return;
            }
        };
        let why = tree.refuted.as_deref();
        error!(layer = %tree.commit, why, "a layer is not what its image says");
        if lock(&self.live).layers.contains_key(&tree.id) {
            self.close_layer(&tree).await;
        }
    }

    /// From now on, who reads the layer gets an error. It stays marked, and where it is.
    pub(in super::super) async fn close_layer(&self, tree: &Tree) {
        let pool = tree.pool;
        match self.shard(pool) {
            Ok(shard) => drop(shard.ask(|reply| Command::Detach { pool, reply }).await),
            Err(error) => error!(%pool, %error, "can't take a layer out of service"),
        }
        self.origins.remove(pool);
        for segment in &tree.segments {
            if let Err(error) = self.store.punch(pool, *segment, SegmentKind::Data) {
                error!(%pool, %segment, %error, "can't take away what is in a layer");
            }
        }
        let at = self.store.layer_dir(tree.id);
        let forgotten = tokio::task::spawn_blocking(move || forget(&at)).await;
        if let Ok(Err(error)) | Err(error) = forgotten.map_err(std::io::Error::other) {
            warn!(%error, "what is in memory of a layer may still be read");
        }
        error!(layer = %tree.commit, "its readers get errors: containerd has to pull its images again");
    }
}

/// Has the kernel forget what it has in memory of the files below a directory, but for what is mapped.
fn forget(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            forget(&entry.path())?;
        } else if kind.is_file() {
            let flags = O_NOFOLLOW | O_NONBLOCK;
            let file = fs::File::options().read(true).custom_flags(flags).open(entry.path())?;
            posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(())
}
