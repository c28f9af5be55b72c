//! `hydrant prefetch`: fetching before somebody waits.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use hydrant_api::{PrefetchRequest, Summary, path_from_text};

use super::queue::milliseconds;
use super::target::canonical;
use super::{Supervisor, blocking, internal};
use crate::admin::{ApiError, Caller, ProgressSender};
use crate::catalog::{Mount, Pool, Tree};
use crate::ids::SegmentId;
use crate::queue::wire::Run;
use crate::segment::SegmentKind;
use crate::source::oci::fetch::chunks;

/// Records asked for at a time, so that progress can be told.
const STEP: u32 = 2000;

/// What is below a path.
#[derive(Debug, Default)]
struct Below {
    files: u64,
    bytes: u64,
    /// What may have to be fetched.
    runs: Vec<(SegmentId, Run)>,
}

impl Supervisor {
    pub(super) async fn prefetch_request(
        &self,
        caller: &Caller,
        request: &PrefetchRequest,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        let path = path_from_text(&request.path);
        let path = blocking(move || canonical(&path)).await?;
        let mut found = None;
        for ancestor in path.ancestors() {
            if let Some(mount) = self.mount_at(ancestor).await? {
                found = Some((mount, path.strip_prefix(ancestor).unwrap_or(Path::new(""))));
                break;
            }
        }
        let (mount, inside) = found.ok_or_else(|| {
            ApiError::not_found(format!("{} is in no tree of Hydrant's", path.display()))
                .with_hint("`hydrant ls` lists them")
        })?;
        super::require_owner(caller, mount.owner, &mount.directory.display().to_string())?;
        if !mount.mounted {
            return Err(ApiError::conflict(format!(
                "{} is not mounted",
                mount.directory.display()
            ))
            .with_hint(format!("hydrant mount {}", mount.directory.display())));
        }
        self.prefetch_below(&mount, inside, progress).await
    }

    /// Fetches all files of a tree below `inside`, which is relative to the tree's root.
    pub(super) async fn prefetch_below(
        &self,
        mount: &Mount,
        inside: &Path,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        let begun = Instant::now();
        // what is in a layer has no paths of its own: it is fetched whole
        let inside = if mount.image.is_some() { Path::new("") } else { inside };
        let trees = self.trees_of(mount).await?;
        let mut runs = Vec::new();
        let (mut files, mut bytes) = (0, 0);
        for (tree, pool) in &trees {
            let of_tree = self.below(tree, pool, inside, mount.image.is_some()).await?;
            runs.extend(of_tree.runs.into_iter().map(|(segment, run)| (pool.id, segment, run)));
            files += of_tree.files;
            bytes += of_tree.bytes;
        }
        let total: u64 = runs.iter().map(|(.., run)| u64::from(run.count)).sum();
        progress.step("fetch");
        let mut done = 0;
        // two at a time: one is fetched while the other's end is waited for
        let mut pending: std::collections::VecDeque<(u32, _)> = std::collections::VecDeque::new();
        let mut next = runs.into_iter();
        loop {
            while pending.len() < 2
                && let Some((pool, segment, run)) = next.next()
            {
                pending.push_back((run.count, self.shard(pool)?.prefetch(segment, vec![run])));
            }
            let Some((count, answer)) = pending.pop_front() else { break };
            answer
                .await
                .map_err(|_| ApiError::internal("the shard has ended"))?
                .map_err(|message| ApiError::new(hydrant_api::ErrorCode::Origin, message))?;
            done += u64::from(count);
            progress.count(done, Some(total), "files");
        }
        let mut fetched_bytes = 0;
        for (_, pool) in &trees {
            fetched_bytes += self.fetched_bytes(pool.id).await;
        }
        Ok(Summary {
            files,
            tree_bytes: bytes,
            fetched_bytes,
            elapsed_ms: milliseconds(begun.elapsed()),
            message: None,
        })
    }

    /// `layer`: it is one, and fetched by chunks.
    async fn below(
        &self,
        tree: &Tree,
        pool: &Pool,
        inside: &Path,
        layer: bool,
    ) -> Result<Below, ApiError> {
        let failed = |error| internal("can't read the catalog", &error);
        let segments = self.catalog.segments_of(tree).await.map_err(failed)?;
        let wanted: Vec<_> = segments
            .iter()
            .filter(|s| s.kind == SegmentKind::Data)
            // what all of a tree is, the catalog knows
            .filter(|s| !s.complete || !inside.as_os_str().is_empty())
            .map(|s| (s.id, s.complete))
            .collect();
        let (store, pool, inside) =
            (std::sync::Arc::clone(&self.store), pool.id, inside.as_os_str().as_bytes().to_vec());
        let whole = inside.is_empty().then_some((tree.files, tree.bytes));
        let found = tokio::task::spawn_blocking(move || {
            let mut found = Below::default();
            for (segment, complete) in wanted {
                let extents = store.extents(pool, segment)?;
                for (record, extent) in (0..).zip(extents.iter()) {
                    if is_below(extents.path(&extent), &inside) {
                        found.files += 1;
                        found.bytes += extent.size;
                        if !complete {
                            let records =
                                if layer { chunks(extent.range) } else { record..record + 1 };
                            records.for_each(|record| extend(&mut found.runs, segment, record));
                        }
                    }
                }
            }
            (found.files, found.bytes) = whole.unwrap_or((found.files, found.bytes));
            Ok::<_, crate::segment::extents::ExtentsError>(found)
        })
        .await
        .map_err(|error| internal("can't list the files", &error))?;
        found.map_err(|error| internal("can't list the files", &error))
    }
}

fn is_below(path: &[u8], inside: &[u8]) -> bool {
    inside.is_empty()
        || path.strip_prefix(inside).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn extend(runs: &mut Vec<(SegmentId, Run)>, segment: SegmentId, record: u32) {
    if let Some((of, run)) = runs.last_mut()
        && *of == segment
        && run.count < STEP
        && run.take(record)
    {
        return;
    }
    runs.push((segment, Run::one(record)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_a_directory() {
        assert!(is_below(b"a/b", b""));
        assert!(is_below(b"a/b", b"a"));
        assert!(is_below(b"a/b", b"a/b"));
        assert!(!is_below(b"ab/c", b"a"));
    }

    #[test]
    fn runs_join_neighbours() {
        let mut runs = Vec::new();
        for record in [0, 1, 3] {
            extend(&mut runs, SegmentId(1), record);
        }
        extend(&mut runs, SegmentId(2), 4);
        let counts: Vec<_> =
            runs.iter().map(|(segment, run)| (segment.0, run.first, run.count)).collect();
        assert_eq!(counts, [(1, 0, 2), (1, 3, 1), (2, 4, 1)]);
    }
}
