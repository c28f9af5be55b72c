//! Snapshots that need not be unpacked: containerd's contract for remote snapshotters
//! (its `docs/remote-snapshotter.md`).
//!
//! containerd asks for a snapshot to unpack a layer into, with the chain ID of what will come of it
//! ([`REF`]). If the layer is here as a tree, it becomes that snapshot, and containerd is told that
//! there is one already. The chain ID proves that it is the right one: it is a hash over the digests of all
//! layers up to this. It proves nothing of a layer that was pulled by its index and was never complete: what is known of that
//! is what *some* image pins, and the snapshot would stand for the layer of all images. So containerd unpacks it, unless the
//! administrator has said that this image's name is good for that ([`Containerd::lazy`](crate::config::Containerd::lazy)).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::super::clone::Cloning;
use super::super::images::{self, LAYER};
use super::super::{Supervisor, lock};
use super::failed;
use crate::admin::ProgressSender;
use crate::catalog::{NewSnapshot, Snapshot, SnapshotKind, Tree};
use crate::ids::TreeId;
use crate::object::ObjectId;
use crate::snapshotter::{Error, IMAGE_REF, MANIFEST_DIGEST, REF};
use crate::source::oci::digest;
use crate::source::oci::reference::Reference;

/// A pull that failed or did not give what was asked for is not tried again for so long.
const PAUSE: Duration = Duration::from_secs(60);

/// Variables of the daemon's own environment that say where root's credentials are.
const CREDENTIALS: [&str; 3] = ["HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE"];

type Labels = HashMap<String, String>;

/// The chain ID of a layer on top of others (OCI image specification, `config.md`, "Layer ChainID").
fn chain_id(below: Option<&str>, diff_id: &ObjectId) -> String {
    let diff_id = digest::text(diff_id);
    match below {
        None => diff_id,
        Some(below) => digest::text(&digest::sha256(format!("{below} {diff_id}").as_bytes())),
    }
}

impl Supervisor {
    /// Whether the snapshot that is to come of this one is here without being unpacked: as a layer. Then it is on record
    /// from now on. Whatever goes wrong, the answer is no: containerd unpacks it.
    pub(super) async fn has_layer(
        &self,
        target: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> bool {
        match self.find_layer(target, parent, labels).await {
            Ok(found) => found,
            Err(error) => {
                warn!(%error, chain = target, "a layer has to be unpacked");
                false
            }
        }
    }

    async fn find_layer(
        &self,
        target: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<bool, Error> {
        let all = self.catalog.snapshots().await.map_err(failed)?;
        let is_target =
            |labels: &crate::catalog::Labels| labels.get(REF).is_some_and(|found| found == target);
        // for another of containerd's namespaces
        let is_it = |snapshot: &&Snapshot| {
            snapshot.parent.as_deref() == parent && is_target(&snapshot.labels)
        };
        for tree in all.iter().filter(is_it).filter_map(|snapshot| snapshot.tree) {
            let (tree, _) = self.tree_and_pool(tree).await?;
            if !images::is_out(&tree, &self.config.images) {
                return Ok(true);
            }
        }
        let below = match parent {
            None => None,
            Some(name) => {
                let parent = all.iter().find(|snapshot| snapshot.name == name);
                let Some(chain) = parent.and_then(|parent| parent.labels.get(REF)) else {
                    return Ok(false); // it is no image's
                };
                Some(chain.clone())
            }
        };
        let mut pulled = None;
        let mut found = self.layer_of_chain(target, below.as_deref()).await?;
        if found.is_none() {
            pulled = self.pull_for_containerd(labels).await;
            if pulled.is_some() {
                found = self.layer_of_chain(target, below.as_deref()).await?;
            }
            if found.is_none() {
                if let Some(what) = what_to_pull(labels) {
                    lock(&self.useless_pulls).entry(what.2).or_insert_with(Instant::now);
                }
                return Ok(false);
            }
        }
        let Some(tree) = found else { return Ok(false) };
        let taken = self.take_layer(tree, target, parent, labels).await;
        drop(pulled);
        taken
    }

    /// Makes a committed snapshot of a layer, if it can be one.
    async fn take_layer(
        &self,
        id: TreeId,
        target: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<bool, Error> {
        let (_, pool) = self.tree_and_pool(id).await?;
        let _in_use = Cloning::begin(self, pool.id);
        let (tree, _) = self.tree_and_pool(id).await?;
        if tree.implicit > 0 && parent.is_some() {
            info!(layer = %tree.commit, directories = tree.implicit,
                "unpacked, as directories of it are what lower layers say");
            return Ok(false);
        }
        self.mount_layers(&[id]).await?;
        let number = self.catalog.allocate_snapshot().await.map_err(failed)?;
        let mut new = NewSnapshot {
            id: number,
            name: target.to_owned(),
            parent: parent.map(str::to_owned),
            kind: SnapshotKind::Committed,
            tree: Some(id),
            labels: labels.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        };
        let mut made = self.catalog.insert_snapshot(new.clone()).await.map_err(failed)?;
        if made == Err(crate::catalog::Refused::Exists) {
            // the same layers, on top of snapshots that were unpacked
            new.name = format!("{target}#{number}");
            made = self.catalog.insert_snapshot(new).await.map_err(failed)?;
        }
        if made.is_err() {
            self.unmount_unused(&[id]).await;
        }
        Ok(made.is_ok())
    }

    /// Whether containerd may have it: it is that layer, or an image that says so is believed.
    async fn may_be_taken(&self, tree: &Tree) -> Result<bool, Error> {
        if images::is_out(tree, &self.config.images) {
            return Ok(false);
        }
        if images::is_vouched_for(tree, &self.config.images.index_keys) {
            return Ok(true);
        }
        // the pool's origin tells who was asked last, and not who has said what is in it
        let names = self.catalog.names_of_tree(tree.id).await.map_err(failed)?;
        let lazy = &self.config.containerd.lazy;
        Ok(names.iter().any(|name| Reference::parse(name).is_ok_and(|image| lazy.contain(&image))))
    }

    /// The layer that makes `target` on top of `below`, and that containerd may have.
    async fn layer_of_chain(
        &self,
        target: &str,
        below: Option<&str>,
    ) -> Result<Option<TreeId>, Error> {
        let layers = self.catalog.trees_by_commit(LAYER).await.map_err(failed)?;
        for (_, id) in layers.iter().filter(|(diff_id, _)| chain_id(below, diff_id) == target) {
            let Some(tree) = self.catalog.tree(*id).await.map_err(failed)? else { continue };
            if self.may_be_taken(&tree).await? {
                return Ok(Some(*id));
            }
            let (layer, refuted) = (tree.commit, tree.refuted);
            info!(%layer, refuted, "not used, as it is not proved to be that layer");
        }
        Ok(None)
    }

    /// Pulls the image that containerd is unpacking, if it says which, as root. What is returned keeps its layers.
    async fn pull_for_containerd(&self, labels: &Labels) -> Option<images::Pulled<'_>> {
        let (reference, manifest, key) = what_to_pull(labels)?;
        {
            let mut useless = lock(&self.useless_pulls);
            useless.retain(|_, at| at.elapsed() < PAUSE);
            if useless.contains_key(&key) {
                debug!(image = key, "not pulled again so soon");
                return None;
            }
        }
        let variables = CREDENTIALS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)));
        let environment: Vec<_> = variables.collect();
        let (root, unwatched) = (images::ROOT, ProgressSender::unwatched());
        let pulled =
            self.pull_as(&reference, &manifest, root, &environment, false, &unwatched).await;
        match pulled {
            Ok(pulled) => Some(pulled),
            Err(error) => {
                warn!(%error, image = %reference, "can't pull an image for containerd, which pulls it itself");
                None
            }
        }
    }
}

/// The image, its manifest's tag or digest, and both as text.
fn what_to_pull(labels: &Labels) -> Option<(Reference, String, String)> {
    let reference = Reference::parse(labels.get(IMAGE_REF)?).ok()?;
    let pinned = labels.get(MANIFEST_DIGEST).and_then(|text| digest::parse(text));
    let manifest = pinned.map_or_else(|| reference.manifest(), |pinned| digest::text(&pinned));
    let key = format!("{reference} {manifest}");
    Some((reference, manifest, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids() {
        let diff = |n: u8| digest::sha256(&[n]);
        let first = chain_id(None, &diff(1));
        assert_eq!(first, digest::text(&diff(1)));
        let both = format!("{} {}", digest::text(&diff(1)), digest::text(&diff(2)));
        assert_eq!(
            chain_id(Some(&first), &diff(2)),
            digest::text(&digest::sha256(both.as_bytes()))
        );
    }

    #[test]
    fn the_image_that_is_unpacked() {
        let manifest = digest::text(&digest::sha256(b"m"));
        let mut labels = Labels::new();
        assert!(what_to_pull(&labels).is_none());
        labels.insert(IMAGE_REF.into(), "docker.io/library/a:1".into());
        assert_eq!(what_to_pull(&labels).unwrap().1, "1");
        labels.insert(MANIFEST_DIGEST.into(), manifest.clone());
        assert_eq!(what_to_pull(&labels).unwrap().1, manifest);
    }
}
