//! Indexes and traces of layers that somebody has signed and put beside the image.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
use crate::source::oci::trace::{self, MAX_TRACE, Traced};

/// What there is of these for one image. It is looked for when a layer is to be fetched, once.
pub struct Signed {
    image: ObjectId,
    keys: Vec<PublicKey>,
    supervisor: Arc<Supervisor>,
    indexes: OnceCell<Vec<Part>>,
    traces: OnceCell<Vec<Part>>,
    /// Traces are wanted, and as far as they were, they have come in time.
    wants_traces: AtomicBool,
}

impl Signed {
    /// Of what these keys have signed; with `true`, traces too.
    pub fn new(
        image: ObjectId,
        (keys, traces): (Vec<PublicKey>, bool),
        supervisor: Arc<Supervisor>,
    ) -> Self {
        let (indexes, wants_traces) = (OnceCell::new(), AtomicBool::new(traces));
        Self { image, keys, supervisor, indexes, traces: OnceCell::new(), wants_traces }
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
    pub async fn trace(&self, registry: &Registry, layer: &Layer) -> Option<Vec<Traced>> {
        if !self.wants_traces.load(Ordering::Relaxed) {
            return None;
        }
        let Part { blob, size, .. } = self.part(registry, layer, What::Trace).await?;
        let found = match size > MAX_TRACE {
            true => Err("it is too long".to_owned()),
            false => match tokio::time::timeout(INDEX_PATIENCE, registry.short_blob(&blob)).await {
                Ok(Ok(bytes)) => trace::read(&bytes).ok_or_else(|| "it is not understood".into()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("it does not come".to_owned()),
            },
        };
        if let Err(why) = &found {
            // nobody waits for the other layers' as well
            if self.wants_traces.swap(false, Ordering::Relaxed) {
                self.say(format!("no more traces of the image are used: of one, {why}")).await;
            }
        }
        found.ok()
    }

    async fn part(&self, registry: &Registry, layer: &Layer, what: What) -> Option<Part> {
        if self.keys.is_empty() {
            return None;
        }
        let parts = match what {
            What::Index => &self.indexes,
            What::Trace => &self.traces,
        };
        let parts = parts.get_or_init(|| self.find(registry, what)).await;
        parts.iter().find(|part| part.what == what && part.layer == layer.digest).copied()
    }

    async fn find(&self, registry: &Registry, what: What) -> Vec<Part> {
        // nobody waits long for what one can do without
        let found = registry.artifacts(&self.image, what);
        let (a, name) = match what {
            What::Index => ("an", what.name()),
            What::Trace => ("a", what.name()),
        };
        let found = match tokio::time::timeout(INDEX_PATIENCE, found).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                self.say(format!("no signed {name} of the image is used: {error}")).await;
                return Vec::new();
            }
            Err(_) => {
                self.say(format!("no signed {name} of the image comes, and none is used")).await;
                return Vec::new();
            }
        };
        for manifest in found {
            match artifact::read(&manifest, what, &self.image, &self.keys) {
                Ok(parts) => return parts,
                Err(why) => self.say(format!("{a} {name} of the image is not used: {why}")).await,
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
