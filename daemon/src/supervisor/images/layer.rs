//! One layer: its files, from the puller by way of the builder into the catalog.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hydrant_api::ErrorCode;
use tracing::warn;

use super::super::clone::Builder;
use super::super::internal;
use super::{Pull, ROOT, catalog};
use crate::admin::ApiError;
use crate::builder::Reply;
use crate::builder::layer::LayerJob;
use crate::builder::segment::SegmentJob;
use crate::catalog::{NewSegment, NewTree, Pool, Tree};
use crate::ids::{SegmentId, TreeId};
use crate::queue::wire::image::{Layer, PinnedFormat, Shown};
use crate::segment::SegmentKind;

/// The files of a layer that is being pulled. Those that are not kept are removed with it.
#[derive(Debug)]
pub struct LayerFiles {
    pub segment: SegmentId,
    pub tree: TreeId,
    data: (PathBuf, File),
    manifest: (PathBuf, File),
    /// Which parts of the blob make which parts of the segment.
    access: (PathBuf, File),
    keep: bool,
    /// The manifest too: what the image shows is to be proved.
    unproved: bool,
}

/// The path of a layer's access index, beside its segment.
fn access_path(data: &Path) -> PathBuf {
    data.with_extension("access")
}

impl LayerFiles {
    fn create(data: PathBuf, segment: SegmentId, tree: TreeId) -> io::Result<Self> {
        let create = |path: PathBuf| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true).mode(0o600);
            let file = options.open(&path)?;
            Ok::<_, io::Error>((path, file))
        };
        Ok(Self {
            segment,
            tree,
            manifest: create(data.with_extension("manifest"))?,
            access: create(access_path(&data))?,
            data: create(data)?,
            keep: false,
            unproved: false,
        })
    }

    /// As the puller wants them: segment, manifest, access index.
    pub fn fds(&self) -> Vec<OwnedFd> {
        let files = [&self.data.1, &self.manifest.1, &self.access.1];
        files.into_iter().filter_map(|file| file.try_clone().ok().map(OwnedFd::from)).collect()
    }
}

impl Drop for LayerFiles {
    fn drop(&mut self) {
        let unwanted: &[&PathBuf] = match self.keep {
            true if self.unproved => &[],
            true => &[&self.manifest.0],
            false => &[&self.manifest.0, &self.access.0, &self.data.0],
        };
        for path in unwanted {
            if let Err(error) = std::fs::remove_file(path) {
                warn!(%error, path = %path.display(), "can't remove a layer's file");
            }
        }
    }
}

impl Pull<'_, '_> {
    pub(super) async fn begin_layer(&self, pool: &Pool) -> Result<LayerFiles, ApiError> {
        let supervisor = self.supervisor;
        let segments = supervisor.catalog.allocate_segments(1).await.map_err(catalog)?;
        let segment = segments.first().copied();
        let segment = segment.ok_or_else(|| ApiError::internal("the catalog has no numbers"))?;
        let tree = supervisor.catalog.allocate_tree().await.map_err(catalog)?;
        let data = supervisor.store.data_path(pool.id, segment);
        LayerFiles::create(data, segment, tree)
            .map_err(|error| internal("can't make a layer's files", &error))
    }

    /// Has the builder check what the puller made and make the image of it; puts it on record.
    pub(super) async fn finish_layer(
        &self,
        pool: &Pool,
        layer: &Layer,
        mut files: LayerFiles,
        shown: Shown,
        pinned: Option<PinnedFormat>,
    ) -> Result<Tree, ApiError> {
        let supervisor = self.supervisor;
        let mut builder =
            Builder::start().map_err(|error| internal("can't start the builder", &error))?;
        let job = LayerJob {
            manifest: files.manifest.0.clone(),
            image: supervisor.store.image_path(files.tree),
            segment: Some(SegmentJob {
                segment: files.segment,
                data: files.data.0.clone(),
                access: files.access.0.clone(),
                diff_id: layer.diff_id,
                pinned: pinned.is_some(),
            }),
        };
        let built = match builder.build_layer(job).await {
            Ok(Reply::BuiltLayer(built)) => built,
            Ok(Reply::Failed(message)) => {
                let message = format!("can't build a layer: {message}");
                return Err(ApiError::new(ErrorCode::Origin, message));
            }
            Ok(Reply::Built(_) | Reply::Proved | Reply::Refuted(_)) => {
                return Err(ApiError::internal("the builder is out of step"));
            }
            Err(error) => return Err(internal("the builder failed", &error)),
        };
        let size = built.segments.iter().sum();
        let id = files.tree;
        let tree = NewTree {
            id,
            pool: pool.id,
            commit: layer.diff_id,
            root: layer.digest,
            // how it was pulled, unless it was streamed
            revision: pinned.map(|format| format.name().into()).unwrap_or_default(),
            image: format!("{id}.erofs"),
            segments: vec![files.segment],
            files: shown.files,
            bytes: shown.bytes,
            implicit: shown.implicit,
            owner: ROOT,
        };
        let segment = NewSegment { id: files.segment, kind: SegmentKind::Data, size };
        supervisor.catalog.insert_tree(tree, vec![segment]).await.map_err(catalog)?;
        files.keep = true;
        files.unproved = pinned.is_some();
        if pinned.is_none() {
            // the builder has read all of it and synced it
            supervisor.catalog.set_complete(files.segment, true).await.map_err(catalog)?;
        }
        let tree = supervisor.catalog.tree(id).await.map_err(catalog)?;
        tree.ok_or_else(|| ApiError::internal("the catalog has lost the layer"))
    }
}
