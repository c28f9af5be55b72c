//! containerd's snapshots: the supervisor as a [`Snapshotter`].
//!
//! A layer that is here as a tree (`hydrant image pull`, or pulled when containerd asks for it) is a committed snapshot at
//! once, without being unpacked: its image is mounted below `layers/`, once for all snapshots that have it
//! (`layers.rs`, `remote.rs`). Everything else is as with containerd's own overlayfs snapshotter: directories
//! into which containerd unpacks, and into which containers write (`directories.rs`). Both may be below each other.
//!
//! containerd mounts overlays itself, on what it is told here. So a layer that a snapshot has stays mounted as long as
//! there is the snapshot, and no directory is ever in the place of one that is not mounted: it would pass for an empty
//! layer.

mod directories;
mod layers;
mod listen;
mod remap;
mod remote;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub use layers::clear_unguarded_layers;

use self::directories::Owner;
use self::remap::Mapping;
use super::{Supervisor, blocking};
use crate::admin::ApiError;
use crate::catalog::{CatalogError, Labels, NewSnapshot, Refused, Snapshot, SnapshotKind};
use crate::ids::{SnapshotId, TreeId};
use crate::snapshotter::messages::{
    CommitRequest, CreateRequest, Info, Kind, Mount, Timestamp, UpdateRequest, UsageResponse,
};
use crate::snapshotter::{Error, REF, Snapshotter};

fn failed(error: CatalogError) -> Error {
    let error = super::internal("the catalog failed", &error);
    Error::Internal(error.message)
}

impl From<ApiError> for Error {
    fn from(error: ApiError) -> Self {
        Self::Internal(error.message)
    }
}

/// Says what is refused. `name`: what was to be made, `key`: of what; `parent`: on top of what.
fn refused(why: Refused, name: &str, key: &str, parent: &str) -> Error {
    match why {
        Refused::Missing => Error::NotFound(format!("there is no snapshot {key:?}")),
        Refused::ParentMissing => {
            Error::NotFound(format!("there is no snapshot {parent:?} to be the parent"))
        }
        Refused::ParentNotCommitted => {
            Error::Invalid(format!("the parent {parent:?} is not committed"))
        }
        Refused::Exists => Error::AlreadyExists(format!("there is a snapshot {name:?} already")),
        Refused::NotActive => {
            Error::FailedPrecondition(format!("the snapshot {key:?} is not active"))
        }
        Refused::HasChildren => Error::FailedPrecondition(format!(
            "can't remove the snapshot {key:?}: others are on top of it"
        )),
    }
}

fn timestamp(nanoseconds: i64) -> Option<Timestamp> {
    let nanos = i32::try_from(nanoseconds.rem_euclid(1_000_000_000)).unwrap_or(0);
    Some(Timestamp { seconds: nanoseconds.div_euclid(1_000_000_000), nanos })
}

fn info(snapshot: Snapshot) -> Info {
    let kind = match snapshot.kind {
        SnapshotKind::View => Kind::View,
        SnapshotKind::Active => Kind::Active,
        SnapshotKind::Committed => Kind::Committed,
    };
    Info {
        name: snapshot.name,
        parent: snapshot.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: timestamp(snapshot.created),
        updated_at: timestamp(snapshot.updated),
        labels: snapshot.labels.into_iter().collect(),
    }
}

/// What containerd is to mount to see a snapshot. `own`: its own directory; `below`: what it is on top of, the highest first.
fn mounts(kind: SnapshotKind, own: &Path, below: &[PathBuf], layers: bool) -> Vec<Mount> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let bind = |path: &Path, how: &str| Mount {
        r#type: "bind".into(),
        source: text(path),
        options: vec![how.into(), "rbind".into()],
        ..Mount::default()
    };
    let active = kind == SnapshotKind::Active;
    match below {
        [] => return vec![bind(&own.join("fs"), if active { "rw" } else { "ro" })],
        [only] if !active => return vec![bind(only, "ro")],
        _ => {}
    }
    let mut options = vec!["index=off".to_owned()];
    if layers {
        // layers are file systems of their own: otherwise a file's number changes when it is written to
        options.push("xino=on".into());
    }
    if active {
        options.push(format!("workdir={}", text(&own.join("work"))));
        options.push(format!("upperdir={}", text(&own.join("fs"))));
    }
    let below: Vec<_> = below.iter().map(|path| text(path)).collect();
    options.push(format!("lowerdir={}", below.join(":")));
    let (kind, source) = ("overlay".to_owned(), "overlay".to_owned());
    vec![Mount { r#type: kind, source, options, ..Mount::default() }]
}

impl Supervisor {
    /// Where a committed snapshot is, once its layer is mounted.
    fn place(&self, id: SnapshotId, tree: Option<TreeId>) -> PathBuf {
        match tree {
            Some(tree) => self.store.layer_dir(tree),
            None => self.store.snapshot_dir(id).join("fs"),
        }
    }

    /// Where the snapshots are that are below another, which are mounted then. The highest first.
    async fn places(&self, below: &[Snapshot]) -> Result<Vec<PathBuf>, Error> {
        let trees: Vec<_> = below.iter().filter_map(|snapshot| snapshot.tree).collect();
        for tree in &trees {
            let (tree, _) = self.tree_and_pool(*tree).await?;
            if let Some(refusal) = super::images::refusal(&tree) {
                return Err(Error::FailedPrecondition(refusal.message));
            }
        }
        self.mount_layers(&trees).await?;
        Ok(below.iter().map(|snapshot| self.place(snapshot.id, snapshot.tree)).collect())
    }

    /// The same as a snapshot on top of them is to see them: in a user namespace with other owners. Then also whose its own
    /// directory is if it is on top of nothing.
    async fn seen_by(
        &self,
        id: SnapshotId,
        name: &str,
        labels: &Labels,
        below: &[Snapshot],
    ) -> Result<(Vec<PathBuf>, Option<Owner>), Error> {
        let places = self.places(below).await?;
        let top = below.first().zip(places.first().map(PathBuf::as_path));
        match Mapping::wanted(name, labels, top)? {
            None => Ok((places, None)),
            Some(mapping) => {
                let root = mapping.root();
                Ok((self.map_owners(id, mapping, places).await?, Some(root)))
            }
        }
    }

    /// The snapshots from `parent` down.
    async fn parents(&self, parent: Option<&str>) -> Result<Vec<Snapshot>, Error> {
        let Some(parent) = parent else { return Ok(Vec::new()) };
        let below = self.catalog.snapshot_chain(parent).await.map_err(failed)?;
        match below.first().map(|snapshot| snapshot.kind) {
            None => Err(refused(Refused::ParentMissing, "", "", parent)),
            Some(SnapshotKind::Committed) => Ok(below),
            Some(_) => Err(refused(Refused::ParentNotCommitted, "", "", parent)),
        }
    }

    async fn make_snapshot(&self, new: NewSnapshot) -> Result<Vec<Mount>, Error> {
        let (id, name) = (new.id, new.name.clone());
        let below = self.parents(new.parent.as_deref()).await?;
        if self.catalog.snapshot(&name).await.map_err(failed)?.is_some() {
            return Err(refused(Refused::Exists, &name, "", ""));
        }
        let made = self.make_on_top(new, &below).await;
        if made.is_err() {
            self.unmap(id).await;
        }
        made
    }

    async fn make_on_top(&self, new: NewSnapshot, below: &[Snapshot]) -> Result<Vec<Mount>, Error> {
        let (id, kind, name) = (new.id, new.kind, new.name.clone());
        let (places, owner) = self.seen_by(id, &name, &new.labels, below).await?;
        let directory = self.store.snapshot_dir(id);
        let (own, like) = (directory.clone(), places.first().cloned());
        blocking(move || {
            let like = like.map(|like| Owner::of(&like)).transpose();
            like.and_then(|like| {
                directories::make(&own, kind == SnapshotKind::Active, like.or(owner))
            })
            .map_err(|error| super::internal("can't make the snapshot's directories", &error))
        })
        .await?;
        let parent = new.parent.clone().unwrap_or_default();
        let made = self.catalog.insert_snapshot(new).await;
        let made = made
            .map_err(failed)
            .and_then(|made| made.map_err(|why| refused(why, &name, "", &parent)));
        if let Err(error) = made {
            directories::remove_empty(&directory);
            return Err(error);
        }
        let layers = below.iter().any(|snapshot| snapshot.tree.is_some());
        Ok(mounts(kind, &directory, &places, layers))
    }

    /// The record of a snapshot.
    async fn snapshot_named(&self, key: &str) -> Result<Snapshot, Error> {
        let found = self.catalog.snapshot(key).await.map_err(failed)?;
        found.ok_or_else(|| refused(Refused::Missing, "", key, ""))
    }

    /// Bytes on the disk, and inodes.
    async fn usage_of(&self, snapshot: &Snapshot) -> Result<(u64, u64), Error> {
        if let Some(tree) = snapshot.tree {
            let (tree, pool) = self.tree_and_pool(tree).await?;
            let present = |id| self.store.present_bytes(pool.id, id).map_or(0, |(bytes, _)| bytes);
            return Ok((tree.segments.iter().map(|id| present(*id)).sum(), tree.files));
        }
        if snapshot.kind != SnapshotKind::Active {
            return Ok((snapshot.size, snapshot.inodes));
        }
        let directory = self.store.snapshot_dir(snapshot.id).join("fs");
        let usage = blocking(move || {
            directories::usage(&directory)
                .map_err(|error| super::internal("can't look what a snapshot uses", &error))
        });
        Ok(usage.await?)
    }
}

/// What is to be changed, of a field mask.
fn labels_to_change(request: &UpdateRequest) -> Result<Option<Vec<String>>, Error> {
    let paths = request.update_mask.as_ref().map_or(&[][..], |mask| &mask.paths);
    let mut only = Vec::new();
    for path in paths {
        match path.strip_prefix("labels.") {
            _ if path == "labels" => return Ok(None),
            Some(label) => only.push(label.to_owned()),
            None => return Err(Error::Invalid(format!("a snapshot's {path:?} can't be changed"))),
        }
    }
    Ok((!only.is_empty()).then_some(only))
}

impl Snapshotter for Supervisor {
    async fn create(&self, kind: Kind, request: CreateRequest) -> Result<Vec<Mount>, Error> {
        let CreateRequest { key, parent, labels, .. } = request;
        if key.is_empty() {
            return Err(Error::Invalid("a snapshot needs a name".into()));
        }
        let parent = (!parent.is_empty()).then_some(parent);
        let kind = match kind {
            Kind::View => SnapshotKind::View,
            _ => SnapshotKind::Active,
        };
        if let Some(target) = labels.get(REF).filter(|_| kind == SnapshotKind::Active)
            && self.has_layer(target, parent.as_deref(), &labels).await
        {
            return Err(refused(Refused::Exists, target, "", ""));
        }
        let id = self.catalog.allocate_snapshot().await.map_err(failed)?;
        let labels = labels.into_iter().collect();
        self.make_snapshot(NewSnapshot { id, name: key, parent, kind, tree: None, labels }).await
    }

    async fn mounts(&self, key: String) -> Result<Vec<Mount>, Error> {
        let chain = self.catalog.snapshot_chain(&key).await.map_err(failed)?;
        let Some((snapshot, below)) = chain.split_first() else {
            return Err(refused(Refused::Missing, "", &key, ""));
        };
        if snapshot.kind == SnapshotKind::Committed {
            let message = format!("the snapshot {key:?} is committed: make a view of it");
            return Err(Error::FailedPrecondition(message));
        }
        let (id, name, labels) = (snapshot.id, &snapshot.name, &snapshot.labels);
        let (places, _) = self.seen_by(id, name, labels, below).await?;
        let layers = below.iter().any(|snapshot| snapshot.tree.is_some());
        Ok(mounts(snapshot.kind, &self.store.snapshot_dir(snapshot.id), &places, layers))
    }

    async fn commit(&self, request: CommitRequest) -> Result<(), Error> {
        let CommitRequest { name, key, labels, .. } = request;
        if name.is_empty() {
            return Err(Error::Invalid("a snapshot needs a name".into()));
        }
        let snapshot = self.snapshot_named(&key).await?;
        let usage = self.usage_of(&snapshot).await?;
        let labels = labels.into_iter().collect();
        let done = self.catalog.commit_snapshot(key.clone(), name.clone(), labels, usage).await;
        done.map_err(failed)?.map_err(|why| refused(why, &name, &key, ""))?;
        self.unmap(snapshot.id).await;
        Ok(())
    }

    async fn remove(&self, key: String) -> Result<(), Error> {
        let snapshot = self.snapshot_named(&key).await?;
        let directory = self.store.snapshot_dir(snapshot.id);
        if snapshot.tree.is_none() {
            // should we not get to the end
            directories::mark(&directory).map_err(|error| Error::Internal(error.to_string()))?;
        }
        // as long as it is on record, nobody removes what it is on top of
        self.unmap(snapshot.id).await;
        let removed = self.catalog.remove_snapshot(key.clone()).await.map_err(failed)?;
        if let Err(why) = removed {
            directories::unmark(&directory);
            return Err(refused(why, "", &key, ""));
        }
        match snapshot.tree {
            Some(tree) => {
                self.unmount_unused(&[tree]).await;
                self.collect_garbage().await;
            }
            None => directories::remove(directory).await,
        }
        Ok(())
    }

    async fn stat(&self, key: String) -> Result<Info, Error> {
        Ok(info(self.snapshot_named(&key).await?))
    }

    async fn update(&self, request: UpdateRequest) -> Result<Info, Error> {
        let only = labels_to_change(&request)?;
        let Some(Info { name, labels, .. }) = request.info else {
            return Err(Error::Invalid("nothing is to be changed".into()));
        };
        let labels = labels.into_iter().collect();
        let done = self.catalog.label_snapshot(name.clone(), labels, only).await;
        let changed = done.map_err(failed)?.map_err(|why| refused(why, "", &name, ""))?;
        Ok(info(changed))
    }

    async fn list(&self) -> Result<Vec<Info>, Error> {
        let all = self.catalog.snapshots().await.map_err(failed)?;
        let refuted = self
            .catalog
            .refuted_trees(super::images::unbelieved(&self.config.images))
            .await
            .map_err(failed)?;
        let listed = all.into_iter().map(|mut snapshot| {
            // by that label containerd finds the snapshot that is here already: this is to be none of them
            if snapshot.tree.is_some_and(|tree| refuted.contains(&tree)) {
                snapshot.labels.remove(REF);
            }
            info(snapshot)
        });
        Ok(listed.collect())
    }

    async fn usage(&self, key: String) -> Result<UsageResponse, Error> {
        let (size, inodes) = self.usage_of(&self.snapshot_named(&key).await?).await?;
        let signed = |number| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(UsageResponse { size: signed(size), inodes: signed(inodes) })
    }

    async fn cleanup(&self) -> Result<(), Error> {
        let all = self.catalog.snapshots().await.map_err(failed)?;
        let known: HashSet<_> = all.iter().map(|s| s.id.0).collect();
        let left = super::durable::disposable(&self.store.snapshots_dir());
        for (number, directory) in left.map_err(|error| Error::Internal(error.to_string()))? {
            // one that is empty may be about to be filled
            if !known.contains(&number) && super::durable::is_marked(&directory) {
                directories::remove(directory).await;
            }
        }
        self.collect_garbage().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_is_to_mount() {
        let own = Path::new("/s/snapshots/7");
        let below = [PathBuf::from("/s/layers/3"), PathBuf::from("/s/snapshots/2/fs")];
        let shown = |kind, below: &[PathBuf]| {
            let mounts = mounts(kind, own, below, true);
            let shown = mounts.into_iter().map(|mount| {
                format!("{} {} {}", mount.r#type, mount.source, mount.options.join(","))
            });
            shown.collect::<Vec<_>>().join("; ")
        };
        use SnapshotKind::{Active, View};
        assert_eq!(shown(Active, &[]), "bind /s/snapshots/7/fs rw,rbind");
        assert_eq!(shown(View, &[]), "bind /s/snapshots/7/fs ro,rbind");
        assert_eq!(shown(View, &below[..1]), "bind /s/layers/3 ro,rbind");
        assert_eq!(
            shown(Active, &below[..1]),
            "overlay overlay index=off,xino=on,workdir=/s/snapshots/7/work,upperdir=/s/snapshots/7/fs,\
             lowerdir=/s/layers/3"
        );
        assert_eq!(
            shown(View, &below),
            "overlay overlay index=off,xino=on,lowerdir=/s/layers/3:/s/snapshots/2/fs"
        );
    }

    #[test]
    fn times_and_masks() {
        assert_eq!(timestamp(1_500_000_000), Some(Timestamp { seconds: 1, nanos: 500_000_000 }));
        assert_eq!(timestamp(-1), Some(Timestamp { seconds: -1, nanos: 999_999_999 }));
        let request = |paths: &[&str]| UpdateRequest {
            update_mask: Some(crate::snapshotter::messages::FieldMask {
                paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            }),
            ..UpdateRequest::default()
        };
        assert_eq!(labels_to_change(&request(&[])).unwrap(), None);
        assert_eq!(labels_to_change(&request(&["labels", "labels.a"])).unwrap(), None);
        let only = labels_to_change(&request(&["labels.a.b", "labels.c"])).unwrap();
        assert_eq!(only, Some(vec!["a.b".to_owned(), "c".to_owned()]));
        assert!(matches!(labels_to_change(&request(&["parent"])), Err(Error::Invalid(_))));
    }
}
