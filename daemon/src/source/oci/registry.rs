//! One repository at a registry and the registry's mirrors: whoever of them answers rightly first.

mod auth;
mod choices;
mod host;
mod push;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

pub use self::auth::IDENTITY_TOKEN;
pub use self::choices::{Choices, Need};
pub use self::host::{Host, Part};
use super::digest;
use super::document::{Document, DocumentError, MAX_DOCUMENT, Manifest, layers, read, ztocs};
use crate::layer::pinned::Pin;
use crate::object::ObjectId;
use crate::queue::wire::Limits;
use crate::queue::wire::image::{Platform, Repository, Resolved};
use crate::source::FetchError;
use crate::source::git::{Clients, Credentials};

/// How long an index is waited for that an image can do without.
pub const INDEX_PATIENCE: Duration = Duration::from_secs(10);

/// So many connections are opened before they are needed: as many requests as a layer's readers and prefetch make at first.
const PRECONNECTED: usize = 3;

/// How long a host is waited for when there are others.
const MIRROR_PATIENCE: Duration = Duration::from_secs(10);

/// A repository at a registry. Requests run side by side.
#[derive(Debug)]
pub struct Registry {
    hosts: Vec<Host>,
    /// As people name it.
    registry: String,
    name: String,
}

/// The manifest of an image for one platform.
#[derive(Debug)]
pub struct Found {
    /// What the image's name leads to: this manifest, or an index in which it is.
    first: ObjectId,
    /// The digest of the manifest.
    pub image: ObjectId,
    manifest: Manifest,
}

pub(super) fn refused(message: impl Into<String>) -> FetchError {
    FetchError::Refused { message: message.into() }
}

pub(super) fn retry(message: impl Into<String>) -> FetchError {
    FetchError::Retry { message: message.into(), after: None }
}

pub(super) fn wrong(message: impl Into<String>) -> FetchError {
    FetchError::Wrong { message: message.into() }
}

impl Registry {
    /// `credentials` is asked when a host wants to know who we are; connections are those of `clients`.
    pub fn new(
        repository: &Repository,
        limits: Limits,
        credentials: &Arc<dyn Credentials>,
        clients: &Clients,
    ) -> Result<Self, FetchError> {
        let stall = Duration::from_secs(limits.stall_secs.max(1));
        let last = repository.hosts.len().saturating_sub(1);
        let host = |(at, settings)| {
            // a request that has not come to the last host by then is given up
            let patience = if at == last { stall } else { MIRROR_PATIENCE.min(stall / 2) };
            Host::new(settings, repository, patience, Arc::clone(credentials), clients)
        };
        Ok(Self {
            hosts: repository.hosts.iter().enumerate().map(host).collect::<Result<_, _>>()?,
            registry: repository.registry.clone(),
            name: repository.name.clone(),
        })
    }

    /// Opens connections to the host that is asked first for blobs, so that who asks for some does not wait for handshakes. Whether
    /// it can be reached is not told, nor does it learn who we are, but by a client certificate.
    pub async fn preconnect(&self) {
        // where one connection is enough (HTTP/2), or one can't be had, there are no others
        if let Ok(host) = self.choices(Need::Content).ask()
            && host.ping().await
        {
            join_all((0..PRECONNECTED).map(|_| host.ping())).await;
        }
    }

    /// The hosts that may be asked, for one try of each.
    pub fn choices(&self, need: Need) -> Choices<'_> {
        Choices::new(&self.registry, &self.hosts, need)
    }

    /// Finds the manifest of an image for a platform. It is checked against its digest, but for the answer to a tag, of which
    /// nothing is known before.
    pub async fn find(&self, reference: &str, platform: &Platform) -> Result<Found, FetchError> {
        let not_ours = |e| self.cant_be_used(reference, &e);
        let (first, kind, bytes) = self.manifest(reference, digest::parse(reference)).await?;
        match read(&bytes, &kind, platform).map_err(not_ours)? {
            Document::Manifest(manifest) => Ok(Found { first, image: first, manifest }),
            Document::Index(found) => {
                let (image, wanted) = (found.digest, digest::text(&found.digest));
                let (_, kind, bytes) = self.manifest(&wanted, Some(image)).await?;
                match read(&bytes, &kind, platform).map_err(not_ours)? {
                    Document::Manifest(manifest) => Ok(Found { first, image, manifest }),
                    Document::Index(_) => Err(refused("its index leads to another index")),
                }
            }
        }
    }

    /// What the manifest names, all of it checked against its digest, and which indexes of the layers the image pins.
    pub async fn resolve(
        &self,
        found: &Found,
        reference: &str,
        platform: &Platform,
    ) -> Result<(Resolved, Vec<Option<Pin>>), FetchError> {
        let Found { first, image, manifest } = found;
        if manifest.config.size > MAX_DOCUMENT as u64 {
            return Err(refused("its configuration is too long"));
        }
        let config = self.configuration(&manifest.config.digest).await?;
        let layers = layers(manifest, &config, platform);
        let layers = layers.map_err(|e| self.cant_be_used(reference, &e))?;
        let mut pins = manifest.pins.clone();
        if let Some(index) = manifest.soci {
            // nobody waits long for what one can do without
            let text = digest::text(&index);
            let found = self.manifest(&text, Some(index));
            match tokio::time::timeout(INDEX_PATIENCE, found).await {
                Ok(Ok((_, _, bytes))) => {
                    let ztocs = ztocs(&bytes);
                    for (pin, layer) in pins.iter_mut().zip(&layers) {
                        *pin = pin.or_else(|| ztocs.get(&layer.digest).copied());
                    }
                }
                Ok(Err(error)) => tracing::warn!(%error, "the image's SOCI index is not used"),
                Err(_) => tracing::warn!("the image's SOCI index does not come, and is not used"),
            }
        }
        let config = manifest.config.digest;
        Ok((Resolved { manifest: *image, digest: *first, config, layers }, pins))
    }

    fn cant_be_used(&self, reference: &str, why: &DocumentError) -> FetchError {
        refused(format!("{}:{reference} can't be used: {why}", self.name))
    }

    /// A manifest or index: its digest, its type and the bytes.
    async fn manifest(
        &self,
        reference: &str,
        expected: Option<ObjectId>,
    ) -> Result<(ObjectId, String, Bytes), FetchError> {
        let need = if expected.is_some() { Need::Content } else { Need::Tag };
        let mut choices = self.choices(need);
        loop {
            match choices.ask()?.manifest(reference, expected).await {
                Ok(found) => return Ok(found),
                Err(error) => choices.failed(error)?,
            }
        }
    }

    /// A blob that is no longer than a document.
    pub async fn short_blob(&self, digest: &ObjectId) -> Result<Bytes, FetchError> {
        self.configuration(digest).await
    }

    async fn configuration(&self, digest: &ObjectId) -> Result<Bytes, FetchError> {
        let mut choices = self.choices(Need::Content);
        loop {
            match choices.ask()?.configuration(digest).await {
                Ok(found) => return Ok(found),
                Err(error) => choices.failed(error)?,
            }
        }
    }
}
