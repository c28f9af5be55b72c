//! Indexes and traces of layers that somebody has put beside the image: those that are signed, and those of SOCI, if they are to be
//! believed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::OnceCell;

use super::pinned::{SMALLEST, digest};
use super::{Supervisor, retried};
use crate::layer::index::WindowsBlob;
use crate::layer::pinned::{Pin, soci};
use crate::object::ObjectId;
use crate::queue::wire::image::{FromPuller, Layer};
use crate::source::oci::artifact::{self, Kind, Part, What};
use crate::source::oci::document::ztocs_beside;
use crate::source::oci::keys::PublicKey;
use crate::source::oci::registry::{INDEX_PATIENCE, Registry};
use crate::source::oci::trace::{self, MAX_TRACE, Traced};

/// What is to be believed.
#[derive(Debug, Clone)]
pub struct Trust {
    /// What these have signed: indexes.
    pub keys: Vec<PublicKey>,
    /// Traces too.
    pub traces: bool,
    /// Indexes of SOCI of version 1, which nobody has signed.
    pub soci_v1: bool,
}

/// What there is of these for one image. It is looked for once.
pub struct Beside {
    image: ObjectId,
    registry: Arc<Registry>,
    trust: Trust,
    supervisor: Arc<Supervisor>,
    indexes: OnceCell<Found<Vec<Part>>>,
    traces: OnceCell<Found<Vec<Part>>>,
    /// SOCI's, by the digests of the layers' blobs.
    ztocs: OnceCell<Found<BTreeMap<ObjectId, Pin>>>,
    /// Traces are wanted, and as far as they were, they have come in time.
    wants_traces: AtomicBool,
}

/// What was found.
#[derive(Default)]
struct Found<T> {
    found: T,
    /// What is to be said of that as soon as it is wanted.
    notes: Mutex<Vec<String>>,
}

impl<T> Found<T> {
    fn new(found: T, notes: Vec<String>) -> Self {
        Self { found, notes: Mutex::new(notes) }
    }
}

impl Beside {
    /// What is to be believed is looked for from now on.
    pub fn begin(
        image: ObjectId,
        registry: &Arc<Registry>,
        trust: Trust,
        supervisor: Arc<Supervisor>,
    ) -> Arc<Self> {
        let beside = Arc::new(Self {
            image,
            registry: Arc::clone(registry),
            wants_traces: AtomicBool::new(trust.traces),
            trust,
            supervisor,
            indexes: OnceCell::new(),
            traces: OnceCell::new(),
            ztocs: OnceCell::new(),
        });
        let looking = Arc::clone(&beside);
        tokio::spawn(async move {
            let signed =
                async { tokio::join!(looking.parts(What::Index), looking.parts(What::Trace)) };
            tokio::join!(signed, looking.ztocs());
        });
        beside
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
        let Some(Part { blob, size, .. }) = self.part(layer, Kind::Index).await else {
            let pins = self.with_notes(self.ztocs().await).await;
            return pins.get(&layer.digest).copied();
        };
        let windows = self.part(layer, Kind::Windows).await.and_then(|part| {
            Some(WindowsBlob { digest: digest(&part.blob).ok()?, len: part.size })
        });
        Some(Pin::Own { blob: digest(&blob).ok()?, size, windows })
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
        let parts = self.with_notes(self.parts(kind.what()).await).await;
        parts.iter().find(|part| part.kind == kind && part.layer == layer.digest).copied()
    }

    /// What was found, once the notes of it are said.
    async fn with_notes<'f, T>(&self, Found { found, notes }: &'f Found<T>) -> &'f T {
        let notes = std::mem::take(&mut *notes.lock().unwrap_or_else(PoisonError::into_inner));
        for note in notes {
            self.say(note).await;
        }
        found
    }

    async fn parts(&self, what: What) -> &Found<Vec<Part>> {
        let parts = match what {
            What::Index => &self.indexes,
            What::Trace => &self.traces,
        };
        parts.get_or_init(|| self.look_for_signed(what)).await
    }

    async fn ztocs(&self) -> &Found<BTreeMap<ObjectId, Pin>> {
        self.ztocs.get_or_init(|| self.look_for_ztocs()).await
    }

    /// The zTOCs of the index that was found last, of those that have any.
    async fn look_for_ztocs(&self) -> Found<BTreeMap<ObjectId, Pin>> {
        if !self.trust.soci_v1 {
            return Found::default();
        }
        let found = match self.artifacts(soci::INDEX_KIND_1, "SOCI index beside the image").await {
            Ok(found) => found,
            Err(note) => return Found::new(BTreeMap::new(), vec![note]),
        };
        let mut ztocs = found.iter().map(|index| ztocs_beside(index, &self.image));
        Found::new(ztocs.find(|ztocs| !ztocs.is_empty()).unwrap_or_default(), Vec::new())
    }

    /// The artifacts of a type. Or why there is no use in any, which people call `name`.
    async fn artifacts(&self, kind: &str, name: &str) -> Result<Vec<Bytes>, String> {
        // nobody waits long for what one can do without
        let found = retried(|| self.registry.artifacts(&self.image, kind));
        match tokio::time::timeout(INDEX_PATIENCE, found).await {
            Ok(found) => found.map_err(|error| format!("no {name} is used: {error}")),
            Err(_) => Err(format!("no {name} comes, and none is used")),
        }
    }

    async fn look_for_signed(&self, what: What) -> Found<Vec<Part>> {
        let wanted = what == What::Index || self.wants_traces.load(Ordering::Relaxed);
        if self.trust.keys.is_empty() || !wanted {
            return Found::default();
        }
        let (a, name) = match what {
            What::Index => ("an", what.name()),
            What::Trace => ("a", what.name()),
        };
        let signed = format!("signed {name} of the image");
        let found = match self.artifacts(what.artifact_type(), &signed).await {
            Ok(found) => found,
            Err(note) => return Found::new(Vec::new(), vec![note]),
        };
        let mut notes = Vec::new();
        for manifest in found {
            match artifact::read(&manifest, what, &self.image, &self.trust.keys) {
                Ok(parts) => return Found::new(parts, notes),
                Err(why) => notes.push(format!("{a} {name} of the image is not used: {why}")),
            }
        }
        Found::new(Vec::new(), notes)
    }

    async fn say(&self, message: String) {
        tracing::warn!(message);
        if let Err(error) = self.supervisor.tell(&FromPuller::Note { message }).await {
            tracing::debug!("{error:#}");
        }
    }
}
