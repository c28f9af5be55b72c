//! What `hydrant status` shows.

use std::collections::HashMap;

use hydrant_api as api;
use hydrant_api::path_to_text;

use super::queue::milliseconds;
use super::{Supervisor, internal, lock};
use crate::admin::ApiError;
use crate::catalog::Mount;
use crate::ids::PoolId;
use crate::segment::SegmentKind;

impl Supervisor {
    /// A mount as clients see it.
    pub(super) async fn describe(&self, mount: &Mount) -> Result<api::Mount, ApiError> {
        let failed = |error| internal("can't read the catalog", &error);
        let (tree, pool) = self.tree_of(mount).await?;
        let (mut present_bytes, mut segment_bytes, mut count, mut complete) = (0, 0, 0, 0);
        let (mut files, mut tree_bytes) = (0, 0);
        for (tree, pool) in self.trees_of(mount).await? {
            files += tree.files;
            tree_bytes += tree.bytes;
            let segments = self.catalog.segments(pool.id).await.map_err(failed)?;
            for segment in segments.iter().filter(|s| tree.segments.contains(&s.id)) {
                // of a pack the frame is there from the start, and its content is that of the others
                if segment.kind == SegmentKind::Data {
                    let (present, size) =
                        self.store.present_bytes(pool.id, segment.id).unwrap_or((0, 0));
                    present_bytes += present;
                    segment_bytes += size;
                }
                count += 1;
                complete += u64::from(segment.complete);
            }
        }
        let image = match mount.image {
            Some(id) => self.catalog.image(id).await.map_err(failed)?,
            None => None,
        };
        let (url, revision, commit) = match image {
            Some(image) => {
                let (name, revision) = super::images::split_name(&image.reference);
                (format!("oci://{name}"), revision, image.manifest)
            }
            None => (super::git::for_display(&pool.url), tree.revision, tree.commit),
        };
        Ok(api::Mount {
            directory: path_to_text(&mount.directory),
            url,
            revision,
            commit: commit.to_string(),
            owner: mount.owner,
            read_only: mount.read_only,
            mounted: lock(&self.live).mounts.contains_key(&mount.id),
            files,
            tree_bytes,
            present_bytes,
            segment_bytes,
            segments: count,
            complete_segments: complete,
            pool: pool.id.0,
            shard: self.shard_id(pool.id).0,
            history: mount.history.clone(),
            trouble: None,
        })
    }

    pub(super) async fn describe_all(&self) -> Result<Vec<api::Mount>, ApiError> {
        let mounts = self.catalog.mounts().await;
        let mounts = mounts.map_err(|error| internal("can't read the catalog", &error))?;
        let mut described = Vec::with_capacity(mounts.len());
        for mount in &mounts {
            described.push(self.describe(mount).await?);
        }
        let snapshots = self.snapshots().await;
        for mount in &mut described {
            let pool = PoolId(mount.pool);
            mount.trouble = snapshots.iter().find_map(|s| s.trouble.get(&pool).cloned());
        }
        Ok(described)
    }

    /// Where a tree of each pool is mounted.
    pub(super) async fn directories_of_pools(&self) -> HashMap<PoolId, String> {
        let live = lock(&self.live);
        let of_one = |live: &super::mounts::Live| {
            let directory = path_to_text(&live.directory);
            live.pools.iter().map(|pool| (*pool, directory.clone())).collect::<Vec<_>>()
        };
        live.mounts.values().flat_map(of_one).collect()
    }

    pub(super) async fn describe_daemon(&self) -> Result<api::Status, ApiError> {
        let snapshots = self.snapshots().await;
        let mut counters = api::Counters::default();
        let mut shards = Vec::new();
        for snapshot in &snapshots {
            let now = snapshot.now;
            let oldest = snapshot.events.first().map(|(_, _, pending)| pending.arrived);
            let longest = oldest.map_or(0, |arrived| milliseconds(now.saturating_sub(arrived)));
            let in_flight = snapshot.events.iter().filter(|(.., p)| p.dispatched.is_some()).count();
            let waiting = snapshot.events.len() - in_flight;
            shards.push(api::Shard {
                shard: snapshot.shard.0,
                worker_pid: snapshot.worker_pid,
                worker_deaths: snapshot.worker_deaths,
                last_death: snapshot.last_death.as_ref().map(super::workers::death),
                waiting: waiting as u64,
                in_flight: in_flight as u64,
                longest_wait_ms: longest,
            });
            let sums = &snapshot.counters;
            add(&mut counters.events, sums.events);
            add(&mut counters.answered_present, sums.answered_present);
            add(&mut counters.answered_fetched, sums.answered_fetched);
            add(&mut counters.denied, sums.denied);
            add(&mut counters.requeued, sums.requeued);
            add(&mut counters.waiting, snapshot.events.len() as u64);
            counters.longest_wait_ms =
                counters.longest_wait_ms.max(milliseconds(sums.longest_wait)).max(longest);
            for fetched in snapshot.fetched.values() {
                add(&mut counters.requests, fetched.requests);
                add(&mut counters.retries, fetched.retries);
                add(&mut counters.objects, fetched.objects);
                add(&mut counters.read_ahead_objects, fetched.read_ahead_objects);
                add(&mut counters.content_bytes, fetched.content_bytes);
                add(&mut counters.received_bytes, fetched.received_bytes);
                add(&mut counters.sent_bytes, fetched.sent_bytes);
                add(&mut counters.rejected_objects, fetched.rejected_objects);
            }
        }
        Ok(api::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            instance: self.instance,
            pid: i32::try_from(std::process::id()).unwrap_or(0),
            state_dir: path_to_text(&self.directories.state),
            run_dir: path_to_text(&self.directories.run),
            queue: self.queue.name().into(),
            mounts: self.describe_all().await?,
            shards,
            counters,
            layers: self.describe_fills().await?,
        })
    }
}

/// The numbers are a worker's, which may say anything.
fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}
