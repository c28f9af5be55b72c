//! Indexes of layers that somebody has signed and put beside the image.

use std::sync::Arc;

use tokio::sync::OnceCell;

use super::Supervisor;
use super::pinned::SMALLEST;
use crate::layer::digest::Digest;
use crate::layer::pinned::Pin;
use crate::object::ObjectId;
use crate::queue::wire::image::{FromPuller, Layer};
use crate::source::oci::artifact::{self, Part, What};
use crate::source::oci::keys::PublicKey;
use crate::source::oci::registry::{INDEX_PATIENCE, Registry};

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
        if self.keys.is_empty() || layer.size < SMALLEST {
            return None;
        }
        let parts = self.parts.get_or_init(|| self.find(registry)).await;
        let is_it = |part: &&Part| part.what == What::Index && part.layer == layer.digest;
        let Part { blob, size, .. } = parts.iter().find(is_it)?;
        let blob = Digest::from_bytes(blob.as_bytes().try_into().ok()?);
        Some(Pin::Own { blob, size: *size })
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
        for manifest in found {
            match artifact::read(&manifest, &self.image, &self.keys) {
                Ok(parts) => return parts,
                Err(why) => self.say(format!("an index of the image is not used: {why}")).await,
            }
        }
        Vec::new()
    }

    async fn say(&self, message: String) {
        tracing::warn!(message);
        if let Err(error) = self.supervisor.tell(&FromPuller::Note { message }).await {
            tracing::debug!("{error:#}");
        }
    }
}
