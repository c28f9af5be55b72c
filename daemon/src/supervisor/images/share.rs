//! Which of the layers that are here a pull takes, and whence they come from then on.
//!
//! A layer is found by what is in it, in a pool of its own. All images share it that may rely on it: what was streamed, or proved, is what
//! its digest says. What was pulled by an index is what those say who have made the index, until all of it is here: the images
//! with that manifest, if it pins the index, or those in that repository, if nothing does. Others have pools of their own. An image that
//! is mounted keeps the layers that it has.

use std::collections::HashMap;

use hydrant_api::ErrorCode;
use tokio::time::Instant;
use tracing::warn;

use super::super::clone::Cloning;
use super::super::internal;
use super::{
    INDEX_PATIENCE, KnownOrigin, LAYER, Pull, ROOT, catalog, is_claim, is_mere_claim,
    is_vouched_for, known_origin, split_name,
};
use crate::admin::ApiError;
use crate::catalog::{Image, NewPool, Pool, Tree};
use crate::ids::TreeId;
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::image::{Layer, Repository};
use crate::source::oci::digest;

/// The image that is pulled, as far as it is here.
pub(super) struct Asked {
    manifest: ObjectId,
    here: Option<Here>,
}

struct Here {
    image: Image,
    mounted: Option<Mounted>,
}

/// The layers of an image that is mounted can't become others.
struct Mounted {
    at: String,
    /// The URLs of its layers' pools, by the digests of the archives.
    pools: HashMap<ObjectId, String>,
}

/// Whose a layer's pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The image has it already, and is mounted.
    Own,
    Everybody,
    /// Images' with this manifest.
    Manifest,
    /// These, in this repository.
    Repository,
}

/// All of the index that a layer was pulled by, and what is needed to fetch parts of the layer with it.
enum IndexState {
    /// It is here: the layer may come from anywhere.
    Whole,
    /// A part is where the layer has come from so far; nothing of the layer has to be fetched, or it has to be from there.
    Elsewhere,
    /// That part can't be had.
    Lost(ApiError),
}

fn in_use(at: &str) -> ApiError {
    let message = format!("the image is in use, at {at}, with layers that can't be relied on");
    ApiError::conflict(message).with_hint("`hydrant rm` removes a mount; then pull the image again")
}

impl<'s> Pull<'s, '_> {
    pub(super) async fn asked(
        &self,
        reference: &str,
        manifest: &ObjectId,
    ) -> Result<Asked, ApiError> {
        let supervisor = self.supervisor;
        let here = supervisor.catalog.image_of(reference.to_owned(), *manifest).await;
        let Some(image) = here.map_err(catalog)? else {
            return Ok(Asked { manifest: *manifest, here: None });
        };
        let mut mounted = None;
        if let Some(at) = self.mounted_at(&image).await? {
            let mut pools = HashMap::new();
            for (tree, _) in &image.layers {
                // the image may just be going
                if let Ok((tree, pool)) = supervisor.tree_and_pool(*tree).await {
                    pools.insert(tree.commit, pool.url);
                }
            }
            mounted = Some(Mounted { at, pools });
        }
        Ok(Asked { manifest: *manifest, here: Some(Here { image, mounted }) })
    }

    async fn mounted_at(&self, image: &Image) -> Result<Option<String>, ApiError> {
        let mounts = self.supervisor.catalog.mounts().await.map_err(catalog)?;
        let mount = mounts.into_iter().find(|mount| mount.image == Some(image.id));
        Ok(mount.map(|mount| mount.directory.display().to_string()))
    }

    /// To be called before these become the layers of the image: nobody may have mounted it with others meanwhile.
    pub(super) async fn check_mounts(
        &self,
        asked: &Asked,
        layers: &[(TreeId, u64)],
    ) -> Result<(), ApiError> {
        match &asked.here {
            Some(Here { image, .. }) if image.layers != layers => {
                self.mounted_at(image).await?.map_or(Ok(()), |at| Err(in_use(&at)))
            }
            _ => Ok(()),
        }
    }

    /// The pool that a layer has for this image, and the layer if it is here.
    pub(super) async fn take_layer(
        &self,
        layer: &Layer,
        image: &Asked,
    ) -> Result<(Pool, Cloning<'s>, Option<Tree>), ApiError> {
        let supervisor = self.supervisor;
        let everybody = format!("{LAYER}{}", digest::text(&layer.diff_id));
        let manifest = format!("{everybody}@{}", digest::text(&image.manifest));
        let Repository { registry, name, .. } = &self.repository;
        let repository = format!("{manifest}@{registry}/{name}");
        let mounted = image.here.as_ref().and_then(|here| here.mounted.as_ref());
        let own = mounted.and_then(|mounted| mounted.pools.get(&layer.diff_id));
        let own = own.map(|own| (Whose::Own, own.clone()));
        let others = [
            (Whose::Everybody, everybody),
            (Whose::Manifest, manifest),
            (Whose::Repository, repository),
        ];
        let mut why = None;
        for (whose, url) in own.into_iter().chain(others) {
            let (mut origin, mut environment) = (self.origin(layer), self.environment.to_vec());
            let found = supervisor.catalog.find_pool(url.clone(), ROOT.uid, HashKind::Sha256);
            let mut found = found.await.map_err(catalog)?;
            // it does not become garbage while it is looked at
            let _in_use = found.as_ref().map(|pool| Cloning::begin(supervisor, pool.id));
            if let Some(pool) = found.take()
                && let Some(tree) =
                    supervisor.catalog.tree_of_pool(pool.id).await.map_err(catalog)?
            {
                if !self.is_of_use(&tree, whose, &image.manifest).await? {
                    match mounted {
                        Some(Mounted { at, .. }) if whose == Whose::Own => return Err(in_use(at)),
                        _ => continue,
                    }
                }
                if let Ok(known) = known_origin(&pool) {
                    match self.index_of(&known, layer, &pool, &tree).await? {
                        IndexState::Whole => {}
                        IndexState::Elsewhere => (origin, environment) = (known, pool.environment),
                        IndexState::Lost(error) => {
                            warn!(%error, "a layer's index is not complete");
                            self.progress.note(error.message.clone());
                            (origin, environment) = (known, pool.environment);
                            if whose != Whose::Own {
                                why = Some(error);
                                continue;
                            }
                        }
                    }
                }
            } else if whose == Whose::Own {
                continue;
            }
            return self.take(url, &origin, environment).await;
        }
        let message = || format!("layer {} is not what it should be", digest::text(&layer.digest));
        let error = why.unwrap_or_else(|| ApiError::conflict(message()));
        Err(error.with_hint("remove the images that have this layer, and pull them again"))
    }

    fn origin(&self, layer: &Layer) -> KnownOrigin {
        KnownOrigin {
            registry: self.repository.registry.clone(),
            repository: self.repository.name.clone(),
            layer: *layer,
            user: self.user,
        }
    }

    /// The pool with this URL, which from now on fetches from there.
    async fn take(
        &self,
        url: String,
        origin: &KnownOrigin,
        environment: Vec<(String, String)>,
    ) -> Result<(Pool, Cloning<'s>, Option<Tree>), ApiError> {
        let supervisor = self.supervisor;
        let pool = NewPool {
            url,
            owner: ROOT,
            hash: HashKind::Sha256,
            origin: serde_json::to_value(origin)
                .map_err(|error| internal("can't keep the origin", &error))?,
            environment,
        };
        let pool = supervisor.catalog.pool_for(pool).await.map_err(catalog)?;
        let cloning = Cloning::begin(supervisor, pool.id);
        // it may have gone in between, as garbage
        if supervisor.catalog.pool(pool.id).await.map_err(catalog)?.is_none() {
            return Err(ApiError::conflict("a layer was just removed").with_hint("try it again"));
        }
        supervisor
            .store
            .make_pool_dir(pool.id)
            .map_err(|error| internal("can't make the layer's directory", &error))?;
        let tree = supervisor.catalog.tree_of_pool(pool.id).await.map_err(catalog)?;
        Ok((pool, cloning, tree))
    }

    /// Whether this image may have the layer of such a pool.
    async fn is_of_use(
        &self,
        tree: &Tree,
        whose: Whose,
        manifest: &ObjectId,
    ) -> Result<bool, ApiError> {
        if is_mere_claim(tree, &self.supervisor.config.images) {
            return Ok(false);
        }
        match whose {
            Whose::Own | Whose::Repository => Ok(true),
            Whose::Manifest if !is_claim(tree) => Ok(true),
            Whose::Manifest | Whose::Everybody => self.is_proved(tree, manifest).await,
        }
    }

    /// Whether a layer is what its `diff_id` says, or is said to be by an image with this manifest, in this repository if nothing else
    /// says it.
    async fn is_proved(&self, tree: &Tree, manifest: &ObjectId) -> Result<bool, ApiError> {
        let supervisor = self.supervisor;
        if is_vouched_for(tree, &supervisor.config.images.index_keys) {
            return Ok(true);
        }
        let images = supervisor.catalog.images().await.map_err(catalog)?;
        let Repository { registry, name, .. } = &self.repository;
        let ours = format!("{registry}/{name}");
        let is_claim = is_claim(tree);
        let is_of = |image: &Image| image.layers.iter().any(|(layer, _)| *layer == tree.id);
        let says = |image: &Image| !is_claim || split_name(&image.reference).0 == ours;
        let is_it = |image: &Image| image.manifest == *manifest && is_of(image) && says(image);
        Ok(images.iter().any(is_it))
    }

    fn is_of_ours(&self, origin: &KnownOrigin) -> bool {
        let Repository { registry, name, .. } = &self.repository;
        (&origin.registry, &origin.repository) == (registry, name)
    }

    /// Where the index of a layer is that has come from `known` so far.
    async fn index_of(
        &self,
        known: &KnownOrigin,
        layer: &Layer,
        pool: &Pool,
        tree: &Tree,
    ) -> Result<IndexState, ApiError> {
        let supervisor = self.supervisor;
        if known.layer.digest != layer.digest {
            // the same archive, compressed in another way: its access index is of the blob that it was made with
            return Ok(IndexState::Elsewhere);
        }
        if self.is_of_ours(known) && !supervisor.index_is_stuck(pool.id) {
            return Ok(IndexState::Whole);
        }
        let missing = match supervisor.missing_windows(tree).await {
            Ok(Some(missing)) => missing,
            Ok(None) => return Ok(IndexState::Whole),
            Err(error) => return Ok(IndexState::Lost(error)),
        };
        let segments = supervisor.catalog.segments_of(tree).await.map_err(catalog)?;
        if segments.iter().all(|segment| segment.complete) {
            return Ok(IndexState::Elsewhere);
        }
        let until = *self.index_until.get_or_init(|| Instant::now() + INDEX_PATIENCE);
        match supervisor.complete_index(tree, pool, missing, until).await {
            Ok(()) => Ok(IndexState::Whole),
            Err(error) => {
                let layer = digest::text(&known.layer.digest);
                let KnownOrigin { registry, repository, .. } = known;
                let message = format!(
                    "the index of layer {layer} can't be completed from {registry}/{repository}: {error}"
                );
                Ok(IndexState::Lost(ApiError::new(ErrorCode::Origin, message)))
            }
        }
    }
}
