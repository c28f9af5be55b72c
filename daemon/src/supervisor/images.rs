//! Container images: pulling them, and mounting what was pulled.
//!
//! Each layer is a pool of its own with one segment (its archive) and one tree, found by what is in
//! it: all images that have the layer share them. An image is a name for a list of layers.

mod credentials;
mod fill;
mod hosts;
mod layer;
mod mounting;
mod prove;
mod publish;
mod puller;
mod refuted;
mod share;
mod trace;
mod windows;

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use hydrant_api as api;
use hydrant_api::{ErrorCode, ImageRequest, MountImageRequest, Owner, PullRequest, Summary};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

pub use credentials::RegistryAccess;
pub(super) use fill::{Fills, Wanted};
pub(super) use prove::prove;
pub(super) use refuted::refusal;
pub(super) use windows::Windows;

use self::puller::{Puller, Step, Trust};
use super::clone::Cloning;
use super::queue::milliseconds;
use super::shard::Command;
use super::{Supervisor, internal};
use crate::admin::{ApiError, Caller, ProgressSender};
use crate::catalog::{CatalogError, Image, NewImage, Pool, Tree};
use crate::config;
use crate::ids::{PoolId, SegmentId};
use crate::queue::wire::image::{Host, Layer, LayerOrigin, PinnedFormat, Platform, Repository};
use crate::segment::SegmentKind;
use crate::source::oci::digest;
use crate::source::oci::keys::PublicKey;
use crate::source::oci::reference::Reference;
use crate::sys::user::User;

/// What the URLs of layers' pools begin with; a digest follows.
pub(super) const LAYER: &str = "oci-layer:";

/// All layers belong to root: what is in them says whose the files are.
pub(super) const ROOT: Owner = Owner { uid: 0, gid: 0 };

/// When somebody else can pull an image as well, its registry has to say so soon what it is.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(20);

/// How long a pull waits for what other repositories have of indexes of its layers.
const INDEX_PATIENCE: Duration = Duration::from_secs(10);

/// How a layer's pool remembers its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KnownOrigin {
    /// As people name the registry: `docker.io`.
    registry: String,
    repository: String,
    layer: Layer,
    /// Whose credentials are used.
    user: Owner,
}

/// Whether a pool is a layer's.
pub(super) fn is_layer(pool: &Pool) -> bool {
    pool.url.starts_with(LAYER)
}

/// Whether a layer is what its digest says: it was streamed, or all of it was here and proved. What comes of it later proves
/// itself.
pub(super) fn is_known(tree: &Tree) -> bool {
    tree.revision.is_empty() || tree.proved
}

/// Whether it was pulled by an index that somebody has signed.
fn is_signed(tree: &Tree) -> bool {
    tree.revision == PinnedFormat::Signed.name()
}

/// Or, as long as nothing else has been found, somebody has signed that it is. Where no key is believed any more, nobody has.
pub(super) fn is_vouched_for(tree: &Tree, keys: &[PublicKey]) -> bool {
    is_known(tree) || is_signed(tree) && tree.refuted.is_none() && !keys.is_empty()
}

/// Whether what is in a layer is nothing but the claim of somebody who can push to the image's repository.
fn is_claim(tree: &Tree) -> bool {
    tree.revision == PinnedFormat::SociV1.name() && !is_known(tree)
}

/// And such claims are not believed (any more), or this one has turned out to be wrong.
fn is_mere_claim(tree: &Tree, images: &config::Images) -> bool {
    is_claim(tree) && (!images.soci_v1 || tree.refuted.is_some())
}

/// Whether containerd is to be given none of it.
pub(super) fn is_out(tree: &Tree, images: &config::Images) -> bool {
    tree.refuted.is_some() || is_mere_claim(tree, images)
}

/// The revision of trees that are such claims, if these are not believed.
pub(super) fn unbelieved(images: &config::Images) -> Option<&'static str> {
    (!images.soci_v1).then_some(PinnedFormat::SociV1.name())
}

fn known_origin(pool: &Pool) -> Result<KnownOrigin, ApiError> {
    serde_json::from_value(pool.origin.clone())
        .map_err(|error| internal("can't read the pool's origin", &error))
}

/// An image's name without its tag or digest, and that.
pub(super) fn split_name(reference: &str) -> (String, String) {
    match Reference::parse(reference) {
        Ok(Reference { registry, repository, tag, digest }) => {
            let digest = digest.map(|digest| digest::text(&digest));
            (format!("{registry}/{repository}"), tag.or(digest).unwrap_or_default())
        }
        Err(_) => (reference.to_owned(), String::new()),
    }
}

fn parse(reference: &str) -> Result<Reference, ApiError> {
    Reference::parse(reference).map_err(|error| ApiError::invalid(error.to_string()))
}

fn repository(reference: &Reference, hosts: Vec<Host>) -> Repository {
    let Reference { registry, repository, .. } = reference.clone();
    Repository { registry, name: repository, hosts }
}

fn access(
    repository: &Repository,
    user: Owner,
    environment: &[(String, String)],
) -> Result<RegistryAccess, ApiError> {
    let user = User::lookup(user.uid, user.gid)
        .map_err(|error| internal("can't look the user up", &error))?;
    Ok(RegistryAccess::new(repository, user, environment.to_vec()))
}

fn catalog(error: CatalogError) -> ApiError {
    internal("the catalog failed", &error)
}

/// A pull under way.
struct Pull<'s, 'a> {
    supervisor: &'s Supervisor,
    held: bool,
    repository: Repository,
    user: Owner,
    environment: &'a [(String, String)],
    progress: &'a ProgressSender,
    /// So long it waits for parts of indexes that layers of other repositories lack, once there is one.
    index_until: OnceLock<tokio::time::Instant>,
}

/// An image that was just pulled.
pub(super) struct Pulled<'a> {
    pub image: Image,
    /// Bytes of layers that came from the registry.
    pub received: u64,
    /// As long as there are these, its layers are no garbage.
    _in_use: Vec<Cloning<'a>>,
}

impl Supervisor {
    pub(super) async fn pull_request(
        &self,
        caller: &Caller,
        request: &PullRequest,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        caller.require_root("pull images")?;
        let begun = Instant::now();
        let reference = parse(&request.reference)?;
        let owner = request.owner.unwrap_or(ROOT);
        let (image, received) =
            self.pull(&reference, owner, &request.environment, progress).await?;
        let mut summary = Summary {
            fetched_bytes: received,
            elapsed_ms: milliseconds(begun.elapsed()),
            message: Some(format!("{} {}", image.reference, digest::text(&image.digest))),
            ..Summary::default()
        };
        for (tree, _) in &image.layers {
            let (tree, _) = self.tree_and_pool(*tree).await?;
            summary.files += tree.files;
            summary.tree_bytes += tree.bytes;
        }
        Ok(summary)
    }

    /// Pulls an image; gives it, and how many bytes of layers came from the registry.
    pub(super) async fn pull(
        &self,
        reference: &Reference,
        user: Owner,
        environment: &[(String, String)],
        progress: &ProgressSender,
    ) -> Result<(Image, u64), ApiError> {
        let manifest = reference.manifest();
        let pulled = self.pull_as(reference, &manifest, user, environment, true, progress).await?;
        Ok((pulled.image, pulled.received))
    }

    /// Pulls what `manifest`, a tag or digest, leads to, and names it `reference`. `held`: as in [`NewImage`].
    pub(super) async fn pull_as(
        &self,
        reference: &Reference,
        manifest: &str,
        user: Owner,
        environment: &[(String, String)],
        held: bool,
        progress: &ProgressSender,
    ) -> Result<Pulled<'_>, ApiError> {
        // one after the other: two images may have a layer in common
        let _pulling = self.pulling.lock().await;
        let hosts = hosts::of(self.host_settings(), reference);
        let hosts = hosts.map_err(|error| internal("can't tell where to ask for it", &error))?;
        let repository = repository(reference, hosts);
        let index_until = OnceLock::new();
        let pull =
            Pull { supervisor: self, repository, user, environment, held, progress, index_until };
        let pulled = pull.run(manifest, reference.to_string()).await;
        // layers of a pull that failed, and of an image whose name this one has now
        self.collect_garbage().await;
        if let Ok(Pulled { image, received, .. }) = &pulled {
            info!(image = image.reference, manifest = %image.manifest, layers = image.layers.len(),
                received, "pulled");
        }
        pulled
    }

    fn host_settings(&self) -> hosts::Settings<'_> {
        let images = &self.config.images;
        hosts::Settings {
            directory: images.hosts_dir.as_deref(),
            insecure: &images.insecure_registries,
        }
    }

    /// Where a layer comes from, as it is configured now, and the access to that.
    pub(super) fn layer_origin(
        &self,
        pool: &Pool,
    ) -> Result<(LayerOrigin, RegistryAccess), ApiError> {
        let KnownOrigin { registry, repository: name, layer, user } = known_origin(pool)?;
        let reference = Reference { registry, repository: name, tag: None, digest: None };
        let settings = self.host_settings();
        let hosts = hosts::of(settings, &reference).unwrap_or_else(|error| {
            warn!(pool = %pool.id, %error, "no mirrors are asked");
            vec![hosts::itself(settings, &reference)]
        });
        let repository = repository(&reference, hosts);
        let access = access(&repository, user, &pool.environment)?;
        Ok((LayerOrigin { repository, layer }, access))
    }

    /// The image of that name, pulled if it is not here.
    async fn image_for(
        &self,
        request: &MountImageRequest,
        progress: &ProgressSender,
    ) -> Result<Image, ApiError> {
        let reference = parse(&request.reference)?;
        let found = self.catalog.image_named(&reference.to_string()).await.map_err(catalog)?;
        if let Some(image) = found {
            for (tree, _) in &image.layers {
                let (tree, _) = self.tree_and_pool(*tree).await?;
                if is_mere_claim(&tree, &self.config.images) {
                    let layer = digest::text(&tree.root);
                    let message = format!("nobody who is believed says what is in layer {layer}");
                    let hint = format!("`hydrant image pull {reference}` pulls it anew");
                    return Err(ApiError::conflict(message).with_hint(hint));
                }
            }
            return Ok(image);
        }
        let owner = request.owner.unwrap_or(ROOT);
        let (image, _) = self.pull(&reference, owner, &request.environment, progress).await?;
        Ok(image)
    }

    pub(super) async fn mount_image_request(
        &self,
        caller: &Caller,
        request: &MountImageRequest,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        caller.require_root("mount images")?;
        let begun = Instant::now();
        let image = self.image_for(request, progress).await?;
        progress.step("mount");
        let mut summary = self.mount_new_image(caller, request, &image).await?;
        summary.elapsed_ms = milliseconds(begun.elapsed());
        Ok(summary)
    }

    pub(super) async fn list_images(&self) -> Result<Vec<api::Image>, ApiError> {
        let images = self.catalog.images().await.map_err(catalog)?;
        let mounts = self.catalog.mounts().await.map_err(catalog)?;
        let mut listed = Vec::with_capacity(images.len());
        for image in images {
            let (mut files, mut present_bytes, mut segment_bytes) = (0, 0, 0);
            let mut diff_ids = Vec::with_capacity(image.layers.len());
            let (mut unproved, mut refuted) = (0, Vec::new());
            for (tree, _) in &image.layers {
                let (tree, pool) = self.tree_and_pool(*tree).await?;
                files += tree.files;
                diff_ids.push(tree.commit);
                unproved += u64::from(!is_known(&tree));
                refuted.extend(refusal(&tree).map(|error| error.message));
                for segment in &tree.segments {
                    let (present, size) =
                        self.store.present_bytes(pool.id, *segment).unwrap_or((0, 0));
                    present_bytes += present;
                    segment_bytes += size;
                }
            }
            let of_it = mounts.iter().filter(|mount| mount.image == Some(image.id));
            listed.push(api::Image {
                digest: digest::text(&image.digest),
                manifest: digest::text(&image.manifest),
                config: digest::text(&image.config),
                layers: image.layers.len() as u64,
                files,
                bytes: image.layers.iter().map(|(_, bytes)| bytes).sum(),
                present_bytes,
                segment_bytes,
                unproved,
                refuted,
                traced_bytes: self.traced_bytes(&diff_ids).await?,
                pulled_ms: u64::try_from(image.pulled).unwrap_or(0).saturating_mul(1000),
                mounts: of_it.map(|m| hydrant_api::path_to_text(&m.directory)).collect(),
                reference: image.reference,
            });
        }
        Ok(listed)
    }

    pub(super) async fn remove_image(
        &self,
        caller: &Caller,
        request: &ImageRequest,
    ) -> Result<(), ApiError> {
        caller.require_root("remove images")?;
        let reference = parse(&request.reference)?;
        let image = self.known_image(&reference, "`hydrant image ls` lists them").await?;
        let mounts = self.catalog.mounts().await.map_err(catalog)?;
        let used: Vec<_> = mounts
            .iter()
            .filter(|mount| mount.image == Some(image.id))
            .map(|mount| mount.directory.display().to_string())
            .collect();
        if !used.is_empty() {
            let message = format!("{reference} is in use, at {}", used.join(", "));
            return Err(ApiError::conflict(message).with_hint("`hydrant rm` removes a mount"));
        }
        self.catalog.forget_image(image.id).await.map_err(catalog)?;
        self.collect_garbage().await;
        info!(image = image.reference, "removed");
        Ok(())
    }
}

impl Supervisor {
    /// The image of this name. `hint`: what helps if there is none.
    async fn known_image(&self, reference: &Reference, hint: &str) -> Result<Image, ApiError> {
        let image = self.catalog.image_named(&reference.to_string()).await.map_err(catalog)?;
        image.ok_or_else(|| {
            ApiError::not_found(format!("there is no image {reference}")).with_hint(hint)
        })
    }

    /// Lets go of the content of an image's layers, as far as no mount has them: it is fetched again
    /// when somebody reads it. Gives how many bytes that frees.
    pub(super) async fn evict_image(
        &self,
        caller: &Caller,
        request: &ImageRequest,
    ) -> Result<api::Evicted, ApiError> {
        caller.require_root("evict images")?;
        // no layer is being filled, and none comes into use
        let _pulling = self.pulling.lock().await;
        let _alone = self.eviction.write().await;
        let reference = parse(&request.reference)?;
        let image = self.known_image(&reference, "`hydrant image ls` lists them").await?;
        let mut evicted = api::Evicted { bytes: 0, in_use: 0 };
        for (tree, _) in &image.layers {
            let (tree, pool) = self.tree_and_pool(*tree).await?;
            if !self.detach_unused(HashSet::from([pool.id])).await.contains(&pool.id) {
                evicted.in_use += 1;
                continue;
            }
            for segment in &tree.segments {
                // another namespace may have it mounted, or the kernel let go of it in a moment
                if !self.is_unused(pool.id, *segment).await {
                    evicted.in_use += 1;
                    continue;
                }
                let (present, _) = self.store.present_bytes(pool.id, *segment).unwrap_or((0, 0));
                self.catalog.set_complete(*segment, false).await.map_err(catalog)?;
                self.store
                    .punch(pool.id, *segment, SegmentKind::Data)
                    .map_err(|error| internal("can't evict a layer", &error))?;
                evicted.bytes += present;
            }
        }
        info!(image = image.reference, bytes = evicted.bytes, "evicted");
        Ok(evicted)
    }

    async fn is_unused(&self, pool: PoolId, segment: SegmentId) -> bool {
        for _ in 0..20 {
            match self.store.is_in_use(pool, segment) {
                Ok(false) => return true,
                Ok(true) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => {
                    warn!(%pool, %segment, %error, "can't tell whether a layer is in use");
                    return false;
                }
            }
        }
        false
    }
}

impl<'s> Pull<'s, '_> {
    async fn run(&self, manifest: &str, reference: String) -> Result<Pulled<'s>, ApiError> {
        let supervisor = self.supervisor;
        self.progress.step("metadata");
        let access = access(&self.repository, self.user, self.environment)?;
        let mut puller = Puller::start(&supervisor.store, &supervisor.cgroups, access)?;
        let (repository, limits) = (self.repository.clone(), supervisor.limits());
        let index_keys = supervisor.config.images.index_keys.clone();
        let soci_v1 = supervisor.config.images.soci_v1;
        let trust = Trust { index_keys, traces: supervisor.traces(), soci_v1 };
        for shard in &supervisor.shards {
            let repository = repository.clone();
            shard.send(Command::Preconnect { repository, limits });
        }
        let resolved = puller.resolve(repository, manifest, Platform::ours(), limits, trust);
        let resolved = match self.held {
            true => resolved.await?,
            // containerd may know better how to reach it
            false => tokio::time::timeout(RESOLVE_PATIENCE, resolved).await.map_err(|_| {
                ApiError::new(
                    ErrorCode::Origin,
                    format!("{} does not answer", self.repository.registry),
                )
            })??,
        };

        self.progress.step("layers");
        // one of each, and nothing of them is garbage meanwhile
        let mut known: HashMap<_, (Pool, Cloning<'s>, Option<Tree>)> = HashMap::new();
        let mut wanted = HashMap::new();
        let mut traces = HashMap::new();
        let asked = self.asked(&reference, &resolved.manifest).await?;
        for (number, layer) in (0u32..).zip(&resolved.layers) {
            if known.contains_key(&layer.diff_id) {
                continue;
            }
            let (pool, cloning, tree) = self.take_layer(layer, &asked).await?;
            if tree.is_none() {
                let files = self.begin_layer(&pool).await?;
                puller.fetch(number, &files).await?;
                wanted.insert(number, (*layer, files));
            }
            known.insert(layer.diff_id, (pool, cloning, tree));
        }
        let total: u64 = wanted.values().map(|(layer, _)| layer.size).sum();
        self.progress.count(0, Some(total), "bytes");
        while !wanted.is_empty() {
            match puller.next().await? {
                Step::Progress(so_far) => {
                    self.progress.count(so_far.min(total), Some(total), "bytes");
                }
                Step::Note(message) => {
                    warn!(image = reference, message, "note of a pull");
                    self.progress.note(message);
                }
                Step::Trace { number, runs } => {
                    if wanted.contains_key(&number) {
                        traces.insert(number, runs);
                    }
                }
                Step::Layer { number, shown, pinned } => {
                    let (layer, files) = wanted.remove(&number).ok_or_else(|| {
                        ApiError::internal("the puller speaks of a layer that is not asked for")
                    })?;
                    if pinned == Some(PinnedFormat::Signed)
                        && supervisor.config.images.index_keys.is_empty()
                    {
                        let message = "the puller speaks of a signature, and no key is configured";
                        return Err(ApiError::internal(message));
                    }
                    if pinned == Some(PinnedFormat::SociV1) && !supervisor.config.images.soci_v1 {
                        let message = "the puller speaks of an index that is not to be used";
                        return Err(ApiError::internal(message));
                    }
                    if let Some((pool, _, tree)) = known.get_mut(&layer.diff_id) {
                        let finished = self.finish_layer(pool, &layer, files, shown, pinned);
                        let finished = &*tree.insert(finished.await?);
                        if let Some(runs) = traces.remove(&number) {
                            supervisor.learn_trace(finished, &runs).await;
                        }
                    }
                }
            }
        }
        puller.end();
        let tree = |layer: &Layer| {
            let tree = known.get(&layer.diff_id).and_then(|(_, _, tree)| tree.as_ref());
            tree.map(|tree| (tree.id, layer.size))
        };
        let layers: Option<Vec<_>> = resolved.layers.iter().map(tree).collect();
        let layers = layers.ok_or_else(|| ApiError::internal("a layer is missing"))?;
        if layers.is_empty() {
            let message = format!("{reference} has no layers: there is nothing to mount");
            return Err(ApiError::new(ErrorCode::Unsupported, message));
        }
        self.check_mounts(&asked, &layers).await?;
        let (digest, manifest, config) = (resolved.digest, resolved.manifest, resolved.config);
        let held = self.held;
        let image = NewImage { reference, digest, manifest, config, layers, held };
        let image = supervisor.catalog.insert_image(image).await.map_err(catalog)?;
        let trees = known.values().filter_map(|(_, _, tree)| tree.as_ref());
        trees.for_each(|tree| supervisor.want_windows(tree));
        let in_use = known.into_values().map(|(_, cloning, _)| cloning).collect();
        Ok(Pulled { image, received: total, _in_use: in_use })
    }
}
