//! User namespaces: snapshots whose files have other owners than in their layers.
//!
//! Labels say which ([`REMAP`]). Then all that the snapshot is on top of is mounted once more, with these owners (an "idmapped"
//! mount), at `mapped/<snapshot>/<number>`: that is what containerd mounts, and nothing is copied. The options that
//! containerd has for doing so itself (`uidmap=`, `gidmap=`) are of no use. Version 1 does not know them, and
//! from 2.1 on it makes one mount of the directory that all have in common (`core/mount/mount_linux.go`), in which our
//! layers are mounts of their own.
//!
//! If containerd does not know that we can do it (the capability `remap-ids` in its configuration), it makes a snapshot
//! on top of which it changes all owners, and asks with the same labels for the container's on top of that; before version
//! 2 also for the one that it is going to change. Both are left as they are.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tracing::error;

use super::super::store::Store;
use super::super::{Supervisor, blocking, internal, lock};
use super::directories::Owner;
use super::layers::remove_place;
use crate::admin::ApiError;
use crate::catalog::{Catalog, Labels, Snapshot};
use crate::ids::{SnapshotId, TreeId};
use crate::mount;
use crate::snapshotter::{Error, REF, REMAP};
use crate::sys::{self, user_namespace};

/// The IDs of a user namespace.
#[derive(Debug)]
pub struct Mapping {
    uids: Ids,
    gids: Ids,
}

/// Of users or of groups.
#[derive(Debug, PartialEq, Eq)]
struct Ids {
    /// What 0 becomes.
    root: u32,
    /// As [`user_namespace::make`] takes them.
    lines: String,
}

impl Mapping {
    /// What a snapshot wants on top of `top`, which is in that place. `None`: owners as they are there.
    pub fn wanted(
        name: &str,
        labels: &Labels,
        top: Option<(&Snapshot, &Path)>,
    ) -> Result<Option<Self>, Error> {
        let mapping = match REMAP.map(|label| labels.get(label)) {
            [None, None] => return Ok(None),
            [Some(uids), Some(gids)] => Self { uids: ids(uids)?, gids: ids(gids)? },
            _ => return Err(Error::Invalid(format!("of {REMAP:?} one is missing"))),
        };
        let root = mapping.root();
        if name.ends_with(&format!("-{}-{}-remap", root.uid, root.gid)) {
            return Ok(None); // it is about to be changed
        }
        if let Some((_, place)) = top.filter(|(top, _)| !top.labels.contains_key(REF)) {
            let found = Owner::of(place).map_err(|error| Error::Internal(error.to_string()))?;
            if found == root {
                return Ok(None); // it has been changed
            }
        }
        Ok(Some(mapping))
    }

    pub fn root(&self) -> Owner {
        Owner { uid: self.uids.root, gid: self.gids.root }
    }
}

/// `inside:outside:count`, several with commas.
fn ids(mappings: &str) -> Result<Ids, Error> {
    let invalid = || Error::Invalid(format!("{mappings:?} does not say which IDs a namespace has"));
    let (mut root, mut lines) = (None, String::new());
    for mapping in mappings.split(',') {
        let numbers: Result<Vec<u32>, _> = mapping.split(':').map(str::parse).collect();
        let Ok(&[inside, outside, count]) = numbers.as_deref() else { return Err(invalid()) };
        if count == 0 {
            return Err(invalid());
        }
        if inside == 0 {
            root = Some(outside);
        }
        lines += &format!("{inside} {outside} {count}\n");
    }
    root.map(|root| Ids { root, lines }).ok_or_else(invalid)
}

/// Mounts directories in their places, with other owners.
fn mount_mapped(mapping: &Mapping, wanted: &[(PathBuf, PathBuf)]) -> Result<(), ApiError> {
    let Mapping { uids, gids } = mapping;
    let namespace = user_namespace::make(&uids.lines, &gids.lines)
        .map_err(|error| internal("can't make a user namespace", &error))?;
    let mount = |directory: &Path, at: &Path| -> io::Result<()> {
        let mapped = mount::with_owners(directory, namespace.as_fd()).map_err(io::Error::other)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(at)?;
        let target = mount::open_target(at, Some(0)).map_err(io::Error::other)?;
        mapped.attach(target.as_fd()).map_err(io::Error::other)
    };
    for (directory, at) in wanted {
        mount(directory, at)
            .map_err(|error| internal("can't mount for a user namespace", &error))?;
    }
    Ok(())
}

/// Takes all from its place that is mounted for a snapshot. Who has it mounted elsewhere keeps it.
fn clear(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let at = entry.path();
        while mount::is_mounted_at(&at).unwrap_or(false) {
            if let Err(error) = sys::mount::unmount(&at, true) {
                error!(%error, place = %at.display(), "can't unmount what was mounted for a user namespace");
                break;
            }
        }
        remove_place(&at);
    }
    remove_place(directory);
}

fn snapshots(store: &Store) -> impl Iterator<Item = SnapshotId> {
    let entries = fs::read_dir(store.mapped_dir()).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(SnapshotId))
}

/// The same for all snapshots.
pub fn clear_all(store: &Store) {
    snapshots(store).for_each(|id| clear(&store.mapped_for(id)));
}

/// The same for snapshots that are no more, or on top of a layer that is not guarded.
pub async fn clear_unguarded(
    catalog: &Catalog,
    store: &Store,
    is_guarded: impl AsyncFn(TreeId) -> bool,
) {
    let all = catalog.snapshots().await.unwrap_or_default();
    for id in snapshots(store) {
        let chain = match all.iter().find(|snapshot| snapshot.id == id) {
            Some(snapshot) => catalog.snapshot_chain(&snapshot.name).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let mut stays = !chain.is_empty();
        for tree in chain.iter().filter_map(|snapshot| snapshot.tree) {
            stays &= is_guarded(tree).await;
        }
        if !stays {
            clear(&store.mapped_for(id));
        }
    }
}

impl Supervisor {
    /// Where directories are mounted with other owners, for a snapshot.
    pub(super) async fn map_owners(
        &self,
        id: SnapshotId,
        mapping: Mapping,
        directories: Vec<PathBuf>,
    ) -> Result<Vec<PathBuf>, ApiError> {
        let _alone = self.layers.lock().await;
        let own = self.store.mapped_for(id);
        let places: Vec<_> = (0..directories.len()).map(|n| own.join(n.to_string())).collect();
        let mut wanted: Vec<_> = directories.into_iter().zip(places.iter().cloned()).collect();
        wanted.retain(|(_, at)| !mount::is_mounted_at(at).unwrap_or(false));
        if wanted.is_empty() {
            return Ok(places);
        }
        // from then on all is unmounted, once nobody does this any more
        if lock(&self.live).stopping {
            return Err(ApiError::conflict("Hydrant is stopping"));
        }
        blocking(move || mount_mapped(&mapping, &wanted).inspect_err(|_| clear(&own))).await?;
        Ok(places)
    }

    /// Takes back [`map_owners`](Self::map_owners).
    pub(super) async fn unmap(&self, id: SnapshotId) {
        let own = self.store.mapped_for(id);
        if !own.exists() {
            return;
        }
        let _alone = self.layers.lock().await;
        let cleared = blocking(move || {
            clear(&own);
            Ok(())
        });
        if let Err(error) = cleared.await {
            error!(%error, snapshot = %id, "can't unmount what was mounted for a user namespace");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings() {
        let root = |mappings| ids(mappings).unwrap().root;
        assert_eq!(root("0:100000:65536"), 100_000);
        let both = Ids { root: 7, lines: "1 5 1\n0 7 1\n".into() };
        assert_eq!(ids("1:5:1,0:7:1").unwrap(), both);
        for wrong in ["", "0", "0:1", "0:1:0", "0:1:2:3", "1:1:1", "0:-1:1", "0:1:1,"] {
            assert!(ids(wrong).is_err(), "{wrong}");
        }
    }
}
