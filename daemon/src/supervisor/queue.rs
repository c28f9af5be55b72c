//! The queue as people see it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use hydrant_api::{Process, QueueEvent, path_to_text};
use tracing::warn;

use super::Supervisor;
use super::shard::{Command, Snapshot};
use crate::admin::ApiError;
use crate::ids::{EventId, PoolId, SegmentId, ShardId};
use crate::layer::names::Names;
use crate::range::ByteRange;
use crate::segment::extents::{Extents, Place};

/// Event ids are unique within a shard; for people they are made unique by the shard's number.
const SHARD_STEP: u64 = 64;

impl Supervisor {
    pub(super) async fn snapshots(&self) -> Vec<Snapshot> {
        let mut snapshots = Vec::with_capacity(self.shards.len());
        for shard in &self.shards {
            snapshots.extend(shard.ask(|reply| Command::Snapshot { reply }).await);
        }
        snapshots
    }

    /// All events that wait, oldest first.
    pub(super) async fn queue_events(&self) -> Vec<QueueEvent> {
        let snapshots = self.snapshots().await;
        let directories = self.directories_of_pools().await;
        let waits = snapshots.iter().any(|snapshot| !snapshot.events.is_empty());
        let layers = match waits {
            true => self.catalog.layers_by_pool().await.unwrap_or_else(|error| {
                warn!(%error, "can't tell which layers are read");
                HashMap::new()
            }),
            false => HashMap::new(),
        };
        let store = std::sync::Arc::clone(&self.store);
        let pools =
            snapshots.iter().flat_map(|snapshot| snapshot.events.iter().map(|(_, p, _)| *p));
        let urls: HashMap<PoolId, String> =
            pools.filter_map(|pool| Some((pool, self.origins.url(pool)?))).collect();
        // reads extent indexes and /proc
        let listed = tokio::task::spawn_blocking(move || {
            let mut paths = Paths::new(&store);
            let mut events = Vec::new();
            for snapshot in &snapshots {
                for (event, pool, pending) in &snapshot.events {
                    let age = snapshot.now.saturating_sub(pending.arrived);
                    let in_flight = pending.dispatched.is_some();
                    let layer = layers.get(pool).cloned();
                    let (layer, images) = layer.map(|l| (l.layer, l.images)).unzip();
                    events.push(QueueEvent {
                        id: public_id(*event, snapshot.shard),
                        state: if in_flight { "in_flight" } else { "waiting" }.into(),
                        age_ms: milliseconds(age),
                        directory: directories.get(pool).cloned(),
                        images: images.unwrap_or_default(),
                        layer,
                        path: paths.path(*pool, pending.segment, pending.range),
                        segment: pending.segment.0,
                        offset: pending.range.offset(),
                        count: pending.range.len(),
                        process: process(pending.pid),
                        shard: snapshot.shard.0,
                        worker_pid: snapshot.worker_pid.filter(|_| in_flight),
                        attempts: pending.attempts,
                        origin: urls.get(pool).cloned(),
                        reason: pending.reason.clone(),
                    });
                }
            }
            events.sort_by_key(|event| std::cmp::Reverse(event.age_ms));
            events
        })
        .await;
        listed.unwrap_or_default()
    }

    /// Sends a command about one event to its shard. `false`: nobody waits for that event.
    pub(super) async fn event_command(
        &self,
        event: EventId,
        command: impl FnOnce(EventId, tokio::sync::oneshot::Sender<bool>) -> Command,
    ) -> Result<(), ApiError> {
        let shard = self.shards.iter().find(|shard| u64::from(shard.id.0) == event.0 % SHARD_STEP);
        let found = match shard {
            Some(shard) => shard.ask(|reply| command(EventId(event.0 / SHARD_STEP), reply)).await,
            None => None,
        };
        if found == Some(true) {
            return Ok(());
        }
        Err(no_event(event))
    }
}

pub(super) fn no_event(event: EventId) -> ApiError {
    ApiError::not_found(format!("nobody waits for event {event}"))
        .with_hint("`hydrant queue` lists the events that wait")
}

/// An event's id as people see it.
pub(super) fn public_id(event: EventId, shard: ShardId) -> u64 {
    event.0 * SHARD_STEP + u64::from(shard.0)
}

pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Looks up which file a range belongs to; each index is read once.
pub(super) struct Paths<'a> {
    store: &'a super::store::Store,
    read: HashMap<SegmentId, Option<Extents>>,
    names: HashMap<SegmentId, Option<Names>>,
}

impl<'a> Paths<'a> {
    pub(super) fn new(store: &'a super::store::Store) -> Self {
        Self { store, read: HashMap::new(), names: HashMap::new() }
    }

    /// The range and the rest of all objects that have a byte in it.
    pub(super) fn whole_objects(
        &mut self,
        pool: PoolId,
        segment: SegmentId,
        range: ByteRange,
    ) -> ByteRange {
        let Some(extents) = self.extents(pool, segment) else { return range };
        let records = extents.overlapping(range);
        let first = extents.get(records.start).map_or(range.offset(), |e| e.range.offset());
        let last = records.end.checked_sub(1).and_then(|record| extents.get(record));
        let end = last.map_or(range.end(), |extent| extent.range.end());
        ByteRange::between(first.min(range.offset()), end.max(range.end()))
    }

    fn extents(&mut self, pool: PoolId, segment: SegmentId) -> Option<&Extents> {
        let store = self.store;
        let read = self.read.entry(segment);
        read.or_insert_with(|| store.extents(pool, segment).ok()).as_ref()
    }

    pub(super) fn path(
        &mut self,
        pool: PoolId,
        segment: SegmentId,
        range: ByteRange,
    ) -> Option<String> {
        let store = self.store;
        let names = self.names.entry(segment).or_insert_with(|| store.names(pool, segment));
        if let Some(names) = names {
            // a piece of a layer is of many files
            return Some(text(&names.path(range))).filter(|path| !path.is_empty());
        }
        let extents = self.extents(pool, segment)?;
        let extent = extents.get(extents.overlapping(range).next()?)?;
        match extent.place {
            Place::File { .. } => Some(text(extents.path(&extent))),
            Place::Repeats { segment, record } => {
                let home = self.extents(pool, segment)?;
                let extent = home.get(record as usize)?;
                Some(format!(".git/objects/pack: {}", text(home.path(&extent))))
            }
        }
    }
}

/// Bytes of a path for people.
pub(super) fn text(bytes: &[u8]) -> String {
    path_to_text(Path::new(OsStr::from_bytes(bytes)))
}

/// What `/proc` tells of a process without waiting for it: a reader that is blocked in a page fault
/// may hold the lock that `cmdline` and `maps` want.
pub(super) fn process(pid: i32) -> Process {
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).ok();
    let line = |name| Some(String::from_utf8_lossy(&read(name)?).trim_end().to_owned());
    let status: Option<String> = line("status");
    let uid = status.as_deref().and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        line.split_whitespace().next()?.parse().ok()
    });
    let cgroups: Option<String> = line("cgroup");
    let cgroup = cgroups.as_deref().and_then(|cgroups| {
        let unified = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
        unified.map(str::to_owned)
    });
    let container = cgroups.as_deref().and_then(container);
    Process { pid, comm: line("comm"), uid, cgroup, container }
}

/// The id of the container that a process is in, by its cgroups, as those who run containers name them: `/docker/ID`,
/// `docker-ID.scope`, `cri-containerd-ID.scope`, `/kubepods/.../ID`. `ctr`'s, of `/NAMESPACE/ID`, need not look like one: there is
/// none but where containerd says so.
fn container(cgroups: &str) -> Option<String> {
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    for path in paths {
        let is_id = |id: &&str| id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
        let id_of = |part: &'_ str| -> Option<String> {
            let name = part.strip_suffix(".scope").unwrap_or(part);
            let id = name.rsplit(['-', ':']).next()?;
            Some(id).filter(is_id).map(str::to_owned)
        };
        // a container in a container is the innermost
        if let Some(id) = path.rsplit('/').find_map(id_of) {
            return Some(id);
        }
        let tasks = Path::new("/run/containerd/io.containerd.runtime.v2.task");
        let mut parts = path.strip_prefix('/')?.split('/');
        if let (Some(namespace), Some(id), None) = (parts.next(), parts.next(), parts.next())
            && !namespace.is_empty()
            && ![".", ".."].contains(&namespace)
            && ![".", "..", ""].contains(&id)
            && tasks.join(namespace).join(id).is_dir()
        {
            return Some(id.to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_by_their_cgroups() {
        let id = "0123456789abcdef".repeat(4);
        for path in [
            format!("/docker/{id}"),
            format!("/system.slice/docker-{id}.scope"),
            format!("/kubepods/burstable/pod1-2/{id}"),
            format!("/kubepods.slice/kubepods-pod1_2.slice/cri-containerd-{id}.scope"),
            format!("/system.slice:nerdctl:{id}"),
            format!("/docker/{id}/init.scope"),
        ] {
            assert_eq!(container(&format!("0::{path}")).as_ref(), Some(&id), "{path}");
            assert_eq!(container(&format!("4:memory:{path}\n0::/")).as_ref(), Some(&id), "{path}");
        }
        for path in
            ["/", "/user.slice/a.scope", "/system.slice/docker.service", "/default/x", "/../.."]
        {
            assert_eq!(container(&format!("0::{path}")), None, "{path}");
        }
        assert_eq!(container(""), None);
    }
}
