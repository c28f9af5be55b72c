//! Layers that are mounted for containerd's snapshots: the image of a layer, at `layers/<tree>`.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use tracing::{error, info, warn};

use super::super::clone::Cloning;
use super::super::images::{self, Wanted};
use super::super::store::Store;
use super::super::{Supervisor, blocking, internal, lock, shard_of};
use super::remap;
use crate::admin::ApiError;
use crate::catalog::{Catalog, Pool, Tree};
use crate::ids::{ShardId, TreeId};
use crate::mount::{self, MountPoint, TreeMount, Unmount, UnmountError};

/// What is mounted below `layers/`.
fn mounted(store: &Store) -> Vec<TreeId> {
    let directory = fs::canonicalize(store.layers_dir()).unwrap_or_else(|_| store.layers_dir());
    let found = mount::mounts().unwrap_or_default().into_iter().filter_map(|mount| {
        let name = mount.path.strip_prefix(&directory).ok()?.to_str()?;
        name.parse().ok().map(TreeId)
    });
    found.collect()
}

fn is_layer(mount: &MountPoint) -> bool {
    mount.kind == "erofs"
}

/// Takes a layer from its place. Who has it mounted elsewhere keeps it.
fn unmount(at: &Path) -> Result<(), UnmountError> {
    loop {
        match mount::unmount(at, Unmount::Lazy, is_layer) {
            // several, one on top of the other?
            Ok(()) => {}
            Err(UnmountError::NotOurs { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// There is no directory where no layer is mounted: it would be taken for an empty layer.
pub(super) fn remove_place(at: &Path) {
    match fs::remove_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(%error, place = %at.display(), "can't remove the place of a layer");
        }
        _ => {}
    }
}

/// Unmounts layers whose events nobody has taken since a daemon was killed.
pub async fn clear_unguarded_layers(
    catalog: &Catalog,
    store: &Store,
    guarded: &HashSet<ShardId>,
    shards: u16,
) {
    let is_guarded = async |id| {
        let tree = catalog.tree(id).await.ok().flatten();
        let shard = tree.and_then(|tree| shard_of(tree.pool, shards));
        shard.is_some_and(|shard| guarded.contains(&shard))
    };
    remap::clear_unguarded(catalog, store, is_guarded).await;
    for id in mounted(store) {
        if is_guarded(id).await {
            continue;
        }
        let at = store.layer_dir(id);
        warn!(layer = %at.display(), "nothing guarded this layer since the daemon was killed");
        if let Err(error) = unmount(&at) {
            error!(layer = %at.display(), error = &error as &dyn std::error::Error,
                "a layer that was left unguarded can't be unmounted: what is read there may be zeros");
        }
    }
    // of those, and of before a reboot
    for entry in fs::read_dir(store.layers_dir()).into_iter().flatten().flatten() {
        fs::remove_dir(entry.path()).ok();
    }
}

impl Supervisor {
    /// Mounts layers in their places, those that are not. Marked first, as everything.
    pub(super) async fn mount_layers(&self, ids: &[TreeId]) -> Result<(), ApiError> {
        let absent = |ids: &[TreeId]| -> Vec<TreeId> {
            let live = lock(&self.live);
            ids.iter().copied().filter(|id| !live.layers.contains_key(id)).collect()
        };
        if absent(ids).is_empty() {
            return Ok(());
        }
        let _alone = self.layers.lock().await;
        let _not_evicted = self.eviction.read().await;
        let mut trees = Vec::new();
        let mut in_use = Vec::new();
        for id in absent(ids) {
            let (_, pool) = self.tree_and_pool(id).await?;
            in_use.push(Cloning::begin(self, pool.id));
            // it may have gone in between, as garbage
            let (tree, pool) = self.tree_and_pool(id).await?;
            if let Some(refusal) = images::refusal(&tree) {
                return Err(refusal);
            }
            self.introduce_layer(&pool)?;
            if !trees.iter().any(|(known, _): &(Tree, Pool)| known.id == id) {
                trees.push((tree, pool));
            }
        }
        self.serve(&trees).await?;
        for (tree, pool) in &trees {
            self.mount_layer(tree, pool).await?;
            self.unmark_complete(tree).await?;
        }
        self.fill_in_background(&trees, Wanted::All).await;
        Ok(())
    }

    async fn mount_layer(&self, tree: &Tree, pool: &Pool) -> Result<(), ApiError> {
        let store = Arc::clone(&self.store);
        let image = self.store.root().join("trees").join(&tree.image);
        let devices: Vec<_> =
            tree.segments.iter().map(|id| self.store.data_path(pool.id, *id)).collect();
        let detached = blocking(move || {
            let tree = TreeMount {
                image: &image,
                devices: &devices,
                pack: None,
                below: &[],
                fresh: false,
                layers: None,
                read_only: true,
                restricted: false,
            };
            mount::mount(&tree).map_err(|error| internal("can't mount a layer", &error))
        })
        .await?;
        let at = store.layer_dir(tree.id);
        let mut live = lock(&self.live);
        if live.stopping {
            return Err(ApiError::conflict("Hydrant is stopping"));
        }
        let attach = || {
            fs::DirBuilder::new().mode(0o700).create(&at)?;
            let target = mount::open_target(&at, Some(0)).map_err(io::Error::other)?;
            detached.attach(target.as_fd()).map_err(io::Error::other)
        };
        if let Err(error) = attach() {
            remove_place(&at);
            return Err(internal(&format!("can't mount a layer at {}", at.display()), &error));
        }
        live.layers.insert(tree.id, pool.id);
        info!(layer = %tree.commit, at = %at.display(), "mounted for containerd");
        Ok(())
    }

    /// Unmounts those of these layers that no snapshot has any more.
    pub(super) async fn unmount_unused(&self, ids: &[TreeId]) {
        let _alone = self.layers.lock().await;
        let used = match self.catalog.snapshot_trees().await {
            Ok(used) => used,
            Err(error) => {
                error!(%error, "can't find out which layers are used");
                return;
            }
        };
        for id in ids.iter().filter(|id| !used.contains(id)) {
            self.unmount_layer(*id).await;
        }
    }

    /// Unmounts all layers, at the end of the daemon: after that, nobody begins to use them.
    pub(in super::super) async fn unmount_layers(&self) {
        let _alone = self.layers.lock().await;
        remap::clear_all(&self.store);
        let ids: Vec<_> = lock(&self.live).layers.keys().copied().collect();
        for id in ids {
            self.unmount_layer(id).await;
        }
    }

    async fn unmount_layer(&self, id: TreeId) {
        let at = self.store.layer_dir(id);
        let unmounted = blocking(move || {
            let failed = |error| internal(&format!("can't unmount {}", at.display()), &error);
            unmount(&at).map_err(failed)?;
            remove_place(&at);
            Ok(())
        });
        match unmounted.await {
            Ok(()) => {
                let mut live = lock(&self.live);
                let gone = live.layers.remove(&id);
                self.end_fills(&live, gone);
            }
            // served as long as it is there
            Err(error) => error!(%error, "a layer stays mounted"),
        }
    }

    /// Goes on with the layers that were mounted, and guarded, all the time.
    pub(in super::super) async fn adopt_layers(&self) {
        let used = self.catalog.snapshot_trees().await.unwrap_or_default();
        let mut unused = Vec::new();
        for id in mounted(&self.store) {
            let adopted = self.adopt_layer(id).await;
            if let Err(error) = &adopted {
                error!(tree = %id, %error, "can't serve a layer that is mounted");
            }
            if adopted.is_ok() && !used.contains(&id) {
                unused.push(id);
            }
        }
        self.unmount_unused(&unused).await;
    }

    async fn adopt_layer(&self, id: TreeId) -> Result<(), ApiError> {
        let (tree, pool) = self.tree_and_pool(id).await?;
        self.introduce_layer(&pool)?;
        let trees = [(tree, pool)];
        self.attach_again(&self.store.layer_dir(id), &trees)?;
        lock(&self.live).layers.insert(id, trees[0].1.id);
        let [(tree, _)] = &trees;
        if tree.refuted.is_some() {
            // its readers, who may have waited meanwhile, get errors
            self.close_layer(tree).await;
            return Ok(());
        }
        self.fill_in_background(&trees, Wanted::All).await;
        self.unmark_complete(tree).await
    }
}
