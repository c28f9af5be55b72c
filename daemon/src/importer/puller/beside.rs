//! Indexes and traces of layers that somebody has put beside the image: those that are signed, and those of SOCI, if they are to be
//! believed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::pinned::SMALLEST;
use super::{Supervisor, retried};
use crate::layer::digest::Digest;
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
    indexes: OnceCell<Parts>,
    traces: OnceCell<Parts>,
    ztocs: OnceCell<Ztocs>,
    /// Traces are wanted, and as far as they were, they have come in time.
    wants_traces: AtomicBool,
}

/// What was found of what is signed.
#[derive(Default)]
struct Parts {
    parts: Vec<Part>,
    /// What is to be said of that as soon as it is wanted.
    notes: Mutex<Vec<String>>,
}

/// What was found of SOCI's.
#[derive(Default)]
struct Ztocs {
    /// By the digests of the layers' blobs.
    pins: BTreeMap<ObjectId, Pin>,
    /// As in [`Parts`].
    note: Mutex<Option<String>>,
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
        let digest = |blob: ObjectId| blob.as_bytes().try_into().ok().map(Digest::from_bytes);
        let Some(Part { blob, size, .. }) = self.part(layer, Kind::Index).await else {
            let Ztocs { pins, note } = self.ztocs().await;
            let note = note.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(note) = note {
                self.say(note).await;
            }
            return pins.get(&layer.digest).copied();
        };
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
        let Parts { parts, notes } = self.parts(kind.what()).await;
        let notes = std::mem::take(&mut *notes.lock().unwrap_or_else(PoisonError::into_inner));
        for note in notes {
            self.say(note).await;
        }
        parts.iter().find(|part| part.kind == kind && part.layer == layer.digest).copied()
    }

    async fn parts(&self, what: What) -> &Parts {
        let parts = match what {
            What::Index => &self.indexes,
            What::Trace => &self.traces,
        };
        parts.get_or_init(|| self.look_for_signed(what)).await
    }

    async fn ztocs(&self) -> &Ztocs {
        self.ztocs.get_or_init(|| self.look_for_ztocs()).await
    }

    /// The zTOCs of the index that was found last, of those that have any.
    async fn look_for_ztocs(&self) -> Ztocs {
        if !self.trust.soci_v1 {
            return Ztocs::default();
        }
        let found = retried(|| self.registry.artifacts(&self.image, soci::INDEX_KIND_1));
        let why = match tokio::time::timeout(INDEX_PATIENCE, found).await {
            Ok(Ok(found)) => {
                let mut ztocs = found.iter().map(|index| ztocs_beside(index, &self.image));
                let pins = ztocs.find(|ztocs| !ztocs.is_empty()).unwrap_or_default();
                return Ztocs { pins, ..Ztocs::default() };
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not come".into(),
        };
        let note = format!("no SOCI index beside the image is used: {why}");
        Ztocs { note: Mutex::new(Some(note)), ..Ztocs::default() }
    }

    async fn look_for_signed(&self, what: What) -> Parts {
        let wanted = what == What::Index || self.wants_traces.load(Ordering::Relaxed);
        if self.trust.keys.is_empty() || !wanted {
            return Parts::default();
        }
        let (a, name) = match what {
            What::Index => ("an", what.name()),
            What::Trace => ("a", what.name()),
        };
        let only = |note| Parts { parts: Vec::new(), notes: Mutex::new(vec![note]) };
        // nobody waits long for what one can do without
        let found = retried(|| self.registry.artifacts(&self.image, what.artifact_type()));
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
            match artifact::read(&manifest, what, &self.image, &self.trust.keys) {
                Ok(parts) => return Parts { parts, notes: Mutex::new(notes) },
                Err(why) => notes.push(format!("{a} {name} of the image is not used: {why}")),
            }
        }
        Parts { parts: Vec::new(), notes: Mutex::new(notes) }
    }

    async fn say(&self, message: String) {
        tracing::warn!(message);
        if let Err(error) = self.supervisor.tell(&FromPuller::Note { message }).await {
            tracing::debug!("{error:#}");
        }
    }
}
