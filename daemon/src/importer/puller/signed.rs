//! Indexes of layers that somebody has signed and put beside the image.

use std::sync::Arc;

use tokio::sync::OnceCell;

use super::Supervisor;
use super::pinned::SMALLEST;
use crate::layer::digest::Digest;
use crate::layer::pinned::Pin;
use crate::object::ObjectId;
use crate::queue::wire::Run;
use crate::queue::wire::image::{FromPuller, Layer};
use crate::source::oci::artifact::{self, Part, What};
use crate::source::oci::keys::PublicKey;
use crate::source::oci::registry::{INDEX_PATIENCE, Registry};
use crate::source::oci::trace::{self, MAX_TRACE};

/// What there is of these for one image. It is looked for when a layer is to be fetched, once.
pub struct Signed {
    image: ObjectId,
    keys: Vec<PublicKey>,
    supervisor: Arc<Supervisor>,
    parts: OnceCell<Vec<Part>>,
}

impl Signed {
    pub fn new(image: ObjectId, keys: Vec<PublicKey>, supervisor: Arc<Supervisor>) -> Self {
        Self { image, keys, supervisor, parts: OnceCell::new() }
    }

    /// The index of a layer that has none of its own.
    pub async fn pin(&self, registry: &Registry, layer: &Layer) -> Option<Pin> {
        if layer.size < SMALLEST {
            return None;
        }
        let Part { blob, size, .. } = self.part(registry, layer, What::Index).await?;
        let blob = Digest::from_bytes(blob.as_bytes().try_into().ok()?);
        Some(Pin::Own { blob, size })
    }

    /// What is to be fetched first of a layer.
    pub async fn trace(&self, registry: &Registry, layer: &Layer) -> Option<Vec<Run>> {
        let Part { blob, size, .. } = self.part(registry, layer, What::Trace).await?;
        if size > MAX_TRACE {
            return None;
        }
        let bytes = tokio::time::timeout(INDEX_PATIENCE, registry.short_blob(&blob)).await;
        match bytes {
            Ok(Ok(bytes)) => trace::read(&bytes),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a trace of a layer is not used");
                None
            }
            Err(_) => None,
        }
    }

    async fn part(&self, registry: &Registry, layer: &Layer, what: What) -> Option<Part> {
        if self.keys.is_empty() {
            return None;
        }
        let parts = self.parts.get_or_init(|| self.find(registry)).await;
        parts.iter().find(|part| part.what == what && part.layer == layer.digest).copied()
    }

    async fn find(&self, registry: &Registry) -> Vec<Part> {
        // nobody waits long for what one can do without
        let found = tokio::time::timeout(INDEX_PATIENCE, registry.artifacts(&self.image)).await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                self.say(format!("no signed index of the image is used: {error}")).await;
                return Vec::new();
            }
            Err(_) => {
                self.say("no signed index of the image comes, and none is used".into()).await;
                return Vec::new();
            }
        };
        let mut parts = Vec::new();
        for manifest in found {
            match artifact::read(&manifest, &self.image, &self.keys) {
                // the last one counts
                Ok(more) => parts.extend(more),
                Err(why) => self.say(format!("an index of the image is not used: {why}")).await,
            }
        }
        parts
    }

    async fn say(&self, message: String) {
        tracing::warn!(message);
        if let Err(error) = self.supervisor.tell(&FromPuller::Note { message }).await {
            tracing::debug!("{error:#}");
        }
    }
}
