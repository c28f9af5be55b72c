//! Indexes and traces of layers that somebody has signed and put beside the image.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::pinned::SMALLEST;
use super::{Supervisor, retried};
use crate::layer::digest::Digest;
use crate::layer::index::WindowsBlob;
use crate::layer::pinned::Pin;
use crate::object::ObjectId;
use crate::queue::wire::image::{FromPuller, Layer};
use crate::source::oci::artifact::{self, Kind, Part, What};
use crate::source::oci::keys::PublicKey;
use crate::source::oci::registry::{INDEX_PATIENCE, Registry};
use crate::source::oci::trace::{self, MAX_TRACE, Traced};

/// What there is of these for one image. It is looked for once.
pub struct Signed {
    image: ObjectId,
    registry: Arc<Registry>,
    keys: Vec<PublicKey>,
    supervisor: Arc<Supervisor>,
    indexes: OnceCell<Beside>,
    traces: OnceCell<Beside>,
    /// Traces are wanted, and as far as they were, they have come in time.
    wants_traces: AtomicBool,
}

/// What was found.
#[derive(Default)]
struct Beside {
    parts: Vec<Part>,
    /// What is to be said of that as soon as it is wanted.
    notes: Mutex<Vec<String>>,
}

impl Signed {
    /// Of what these keys have signed; with `true`, traces too. They are looked for from now on.
    pub fn begin(
        image: ObjectId,
        registry: &Arc<Registry>,
        (keys, traces): (Vec<PublicKey>, bool),
        supervisor: Arc<Supervisor>,
    ) -> Arc<Self> {
        let (indexes, wants_traces) = (OnceCell::new(), AtomicBool::new(traces));
        let (registry, traces) = (Arc::clone(registry), OnceCell::new());
        let signed =
            Arc::new(Self { image, registry, keys, supervisor, indexes, traces, wants_traces });
        let looking = Arc::clone(&signed);
        tokio::spawn(async move {
            tokio::join!(looking.beside(What::Index), looking.beside(What::Trace));
        });
        signed
    }

    /// The digest of the image's manifest.
    pub fn image(&self) -> ObjectId {
        self.image
    }

    /// The index of a layer that has none of its own.
    pub async fn pin(&self, layer: &Layer) -> Option<Pin> {
        if layer.size < SMALLEST {
            return None;
        }
        let digest = |blob: ObjectId| blob.as_bytes().try_into().ok().map(Digest::from_bytes);
        let Part { blob, size, .. } = self.part(layer, Kind::Index).await?;
        let windows = self
            .part(layer, Kind::Windows)
            .await
            .and_then(|part| Some(WindowsBlob { digest: digest(part.blob)?, len: part.size }));
        Some(Pin::Own { blob: digest(blob)?, size, windows })
    }

    /// What is to be fetched first of a layer.
    pub async fn trace(&self, layer: &Layer) -> Option<Vec<Traced>> {
        if !self.wants_traces.load(Ordering::Relaxed) {
            return None;
        }
        let Part { blob, size, .. } = self.part(layer, Kind::Trace).await?;
        let found = match size > MAX_TRACE {
            true => Err("it is too long".to_owned()),
            false => {
                let blob = self.registry.short_blob(&blob);
                match tokio::time::timeout(INDEX_PATIENCE, blob).await {
                    Ok(Ok(bytes)) => {
                        trace::read(&bytes).ok_or_else(|| "it is not understood".into())
                    }
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err("it does not come".to_owned()),
                }
            }
        };
        if let Err(why) = &found {
            // nobody waits for the other layers' as well
            if self.wants_traces.swap(false, Ordering::Relaxed) {
                self.say(format!("no more traces of the image are used: of one, {why}")).await;
            }
        }
        found.ok()
    }

    async fn part(&self, layer: &Layer, kind: Kind) -> Option<Part> {
        let Beside { parts, notes } = self.beside(kind.what()).await;
        let notes = std::mem::take(&mut *notes.lock().unwrap_or_else(PoisonError::into_inner));
        for note in notes {
            self.say(note).await;
        }
        parts.iter().find(|part| part.kind == kind && part.layer == layer.digest).copied()
    }

    async fn beside(&self, what: What) -> &Beside {
        let beside = match what {
            What::Index => &self.indexes,
            What::Trace => &self.traces,
        };
        beside.get_or_init(|| self.look(what)).await
    }

    async fn look(&self, what: What) -> Beside {
        let wanted = what == What::Index || self.wants_traces.load(Ordering::Relaxed);
        if self.keys.is_empty() || !wanted {
            return Beside::default();
        }
        let (a, name) = match what {
            What::Index => ("an", what.name()),
            What::Trace => ("a", what.name()),
        };
        let only = |note| Beside { parts: Vec::new(), notes: Mutex::new(vec![note]) };
        // nobody waits long for what one can do without
        let found = retried(|| self.registry.artifacts(&self.image, what));
        let found = match tokio::time::timeout(INDEX_PATIENCE, found).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                return only(format!("no signed {name} of the image is used: {error}"));
            }
            Err(_) => {
                return only(format!("no signed {name} of the image comes, and none is used"));
            }
        };
        let mut notes = Vec::new();
        for manifest in found {
            match artifact::read(&manifest, what, &self.image, &self.keys) {
                Ok(parts) => return Beside { parts, notes: Mutex::new(notes) },
                Err(why) => notes.push(format!("{a} {name} of the image is not used: {why}")),
            }
        }
        Beside { parts: Vec::new(), notes: Mutex::new(notes) }
    }

    async fn say(&self, message: String) {
        tracing::warn!(message);
        if let Err(error) = self.supervisor.tell(&FromPuller::Note { message }).await {
            tracing::debug!("{error:#}");
        }
    }
}
