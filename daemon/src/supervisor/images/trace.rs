//! What the readers of layers wanted when these had just been mounted: remembered, and fetched before they ask at the next mount.

use std::collections::HashMap;

use hydrant_api::{TraceRequest, TracedLayer};
use tracing::warn;

use super::super::queue::Paths;
use super::super::{Supervisor, lock};
use super::{catalog, parse};
use crate::admin::{ApiError, Caller};
use crate::catalog::{Place, Tree};
use crate::ids::SegmentId;
use crate::object::ObjectId;
use crate::range::ByteRange;
use crate::source::oci::digest;
use crate::source::oci::fetch::CHUNK;
use crate::source::oci::trace::Traced;

impl Supervisor {
    pub(super) fn traces(&self) -> bool {
        self.config.images.trace.unwrap_or(true)
    }

    /// Readers wanted these chunks of a layer's segment.
    pub(in super::super) async fn add_to_trace(&self, segment: SegmentId, records: Vec<u32>) {
        if self.traces()
            && let Err(error) = self.catalog.add_to_trace(segment, records).await
        {
            warn!(%segment, %error, "what was read of a layer is not remembered");
        }
    }

    /// What readers of these layers wanted at an earlier time: chunks of the layers' segments, in order.
    pub(super) async fn traced(&self, trees: &[&Tree]) -> Vec<(Place, SegmentId, u32)> {
        if !self.traces() {
            return Vec::new();
        }
        let layers = trees.iter().map(|tree| tree.commit).collect();
        let records = self.catalog.placed_trace(layers).await.unwrap_or_else(|error| {
            warn!(%error, "can't tell what was read of the layers");
            Vec::new()
        });
        let segments = trees.iter().filter_map(|tree| Some((tree.commit, *tree.segments.first()?)));
        let segments: HashMap<_, _> = segments.collect();
        let of_segment = |(place, layer, record)| Some((place, *segments.get(&layer)?, record));
        records.into_iter().filter_map(of_segment).collect()
    }

    /// What to fetch first of a layer that was just pulled, as somebody says who is trusted.
    pub(super) async fn learn_trace(&self, tree: &Tree, runs: &[Traced]) {
        let Some(segment) = tree.segments.first() else { return };
        let Ok((_, size)) = self.store.present_bytes(tree.pool, *segment) else { return };
        let records = runs
            .iter()
            .flat_map(|Traced { run, place }| run.range().map(move |chunk| (chunk, *place)));
        let records = records.filter(|(chunk, _)| u64::from(*chunk) * CHUNK < size).collect();
        if self.traces()
            && let Err(error) = self.catalog.learn_trace(tree.commit, records).await
        {
            warn!(%segment, %error, "what is to be read of a layer is not remembered");
        }
    }

    /// `hydrant image trace`: what would be fetched first of an image's layers.
    pub(in super::super) async fn trace_request(
        &self,
        caller: &Caller,
        request: &TraceRequest,
    ) -> Result<Vec<TracedLayer>, ApiError> {
        caller.require_root("see and change traces of images")?;
        let reference = parse(&request.reference)?;
        let image = self.known_image(&reference, "`hydrant image ls` lists them").await?;
        if request.record && !self.traces() {
            let message = "nothing is recorded: the configuration says so";
            return Err(ApiError::conflict(message).with_hint(
                "take `trace = false` out of the section `[images]`, and restart the daemon",
            ));
        }
        let mut traced = Vec::with_capacity(image.layers.len());
        let mut paths = Paths::new(&self.store);
        for (tree, _) in &image.layers {
            let (tree, pool) = self.tree_and_pool(*tree).await?;
            if request.record {
                self.catalog.forget_trace(vec![tree.commit]).await.map_err(catalog)?;
                lock(&self.recorded_next).insert(tree.commit);
            }
            let records = self.catalog.trace(vec![tree.commit]).await.map_err(catalog)?;
            let segment = tree.segments.first().copied();
            let mut files = Vec::new();
            for (_, record) in &records {
                let at = ByteRange::new(u64::from(*record) * CHUNK, 1);
                files.extend(segment.and_then(|segment| paths.path(pool.id, segment, at)));
            }
            files.dedup();
            traced.push(TracedLayer {
                layer: digest::text(&tree.commit),
                bytes: records.len() as u64 * CHUNK,
                files,
            });
        }
        Ok(traced)
    }

    pub(super) async fn traced_bytes(&self, layers: &[ObjectId]) -> Result<u64, ApiError> {
        let records = self.catalog.trace(layers.to_vec()).await.map_err(catalog)?;
        Ok(records.len() as u64 * CHUNK)
    }
}
