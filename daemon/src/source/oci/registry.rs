//! One repository at a registry: documents and blobs over HTTP, with whatever proof of identity the
//! registry wants (the distribution specification, and Docker's "token authentication").

mod auth;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    HeaderValue, RANGE, USER_AGENT,
};
use reqwest::{Client, Response, StatusCode, Url};

use self::auth::Auth;
use super::digest;
use super::document::{
    DOCKER_LIST, DOCKER_MANIFEST, Document, MAX_DOCUMENT, OCI_INDEX, OCI_MANIFEST, layers, read,
    ztocs,
};
use crate::layer::pinned::Pin;
use crate::object::ObjectId;
use crate::queue::wire::Limits;
use crate::queue::wire::image::{Platform, Repository, Resolved};
use crate::range::ByteRange;
use crate::source::FetchError;
use crate::source::git::{Credentials, Origin, broken, check_status, client, redirected, shown};

const AGENT: &str = concat!("hydrant/", env!("CARGO_PKG_VERSION"));

/// Blob stores are one hop away, sometimes two.
const REDIRECTS: usize = 8;

/// How long an index is waited for that an image can do without.
const INDEX_PATIENCE: Duration = Duration::from_secs(10);

/// A repository at a registry. Requests run side by side.
#[derive(Debug)]
pub struct Registry {
    client: Client,
    base: Url,
    name: String,
    origin: Origin,
    auth: Auth,
    stall: Duration,
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
    /// `credentials` is asked when the registry wants to know who we are.
    pub fn new(
        repository: &Repository,
        limits: Limits,
        credentials: Arc<dyn Credentials>,
    ) -> Result<Self, FetchError> {
        let stall = Duration::from_secs(limits.stall_secs.max(1));
        let connections = limits.connections.clamp(1, 64) as usize;
        let base = Url::parse(&repository.registry.url)
            .map_err(|e| refused(format!("the registry's URL can't be used: {e}")))?;
        let auth = Auth::new(credentials, base.clone(), repository.name.clone());
        Ok(Self {
            client: client(&repository.registry, stall, connections)?,
            origin: Origin::from(&base),
            base,
            name: repository.name.clone(),
            auth,
            stall,
        })
    }

    fn url(&self, what: &str, reference: &str) -> Result<Url, FetchError> {
        let path = format!("v2/{}/{what}/{reference}", self.name);
        self.base.join(&path).map_err(|e| refused(format!("{path:?} can't be asked for: {e}")))
    }

    /// Finds an image: its manifest for a platform, what that names, and which indexes of its layers it pins.
    /// Everything is checked against its digest but the answer to a tag, of which nothing is known before.
    pub async fn resolve(
        &self,
        reference: &str,
        platform: &Platform,
    ) -> Result<(Resolved, Vec<Option<Pin>>), FetchError> {
        let not_ours = |e: super::document::DocumentError| {
            refused(format!("{}:{reference} can't be used: {e}", self.name))
        };
        let (first, kind, bytes) = self.manifest(reference, digest::parse(reference)).await?;
        let mut digest = first;
        let document = read(&bytes, &kind, platform).map_err(not_ours)?;
        let manifest = match document {
            Document::Manifest(manifest) => manifest,
            Document::Index(found) => {
                let wanted = digest::text(&found.digest);
                let (_, kind, bytes) = self.manifest(&wanted, Some(found.digest)).await?;
                digest = found.digest;
                match read(&bytes, &kind, platform).map_err(not_ours)? {
                    Document::Manifest(manifest) => manifest,
                    Document::Index(_) => {
                        return Err(refused("its index leads to another index"));
                    }
                }
            }
        };
        if manifest.config.size > MAX_DOCUMENT as u64 {
            return Err(refused("its configuration is too long"));
        }
        let url = self.url("blobs", &digest::text(&manifest.config.digest))?;
        let (_, response) = self.get(url, "*/*", None).await?;
        let config = self.body(response).await?;
        check_digest("the configuration", &config, &manifest.config.digest)?;
        let layers = layers(&manifest, &config, platform).map_err(not_ours)?;
        let (config, mut pins) = (manifest.config.digest, manifest.pins);
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
        Ok((Resolved { manifest: digest, digest: first, config, layers }, pins))
    }

    /// A manifest or index: its digest, its type and the bytes.
    async fn manifest(
        &self,
        reference: &str,
        expected: Option<ObjectId>,
    ) -> Result<(ObjectId, String, Bytes), FetchError> {
        let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
        let url = self.url("manifests", reference)?;
        let (_, response) = self.get(url, &accept, None).await?;
        let header = |name: &str| {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let kind = header(CONTENT_TYPE.as_str());
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let said = digest::parse(&header("docker-content-digest"));
        let bytes = self.body(response).await?;
        // a registry may serve schema 1 under the digest of something else
        if let Some(expected) = expected.or(said)
            && !kind.contains("manifest.v1")
        {
            check_digest("the manifest", &bytes, &expected)?;
        }
        Ok((digest::sha256(&bytes), kind, bytes))
    }

    /// Begins to read a blob from byte `offset` on. `size` is its whole length.
    pub async fn blob(
        &self,
        blob: &ObjectId,
        size: u64,
        offset: u64,
    ) -> Result<Response, FetchError> {
        let rest = ByteRange::between(offset, size);
        let range = (offset > 0).then_some(rest);
        let url = self.url("blobs", &digest::text(blob))?;
        let (url, response) = self.get(url, "*/*", range).await?;
        match range {
            Some(range) => check_range(&url, &response, range, size)?,
            None => check_length(&url, &response, size)?,
        }
        Ok(response)
    }

    /// Reads a part of a blob, whose length is `size`.
    pub async fn range(
        &self,
        blob: &ObjectId,
        size: u64,
        range: ByteRange,
        mut received: impl FnMut(u64),
    ) -> Result<Vec<u8>, FetchError> {
        let url = self.url("blobs", &digest::text(blob))?;
        let (url, mut response) = self.get(url, "*/*", Some(range)).await?;
        check_range(&url, &response, range, size)?;
        let mut bytes = Vec::with_capacity(usize::try_from(range.len()).unwrap_or_default());
        while let Some(piece) = self.piece(&mut response).await? {
            received(piece.len() as u64);
            bytes.extend_from_slice(&piece);
            if bytes.len() as u64 > range.len() {
                return Err(wrong(format!("{} sends more than was asked for", shown(&url))));
            }
        }
        if bytes.len() as u64 != range.len() {
            return Err(retry(format!("the answer of {} was cut short", shown(&url))));
        }
        Ok(bytes)
    }

    /// The next piece of an answer; `None` at its end.
    pub async fn piece(&self, response: &mut Response) -> Result<Option<Bytes>, FetchError> {
        match tokio::time::timeout(self.stall, response.chunk()).await {
            Ok(piece) => piece.map_err(|e| broken("the answer broke off", &e)),
            Err(_) => Err(self.stalled()),
        }
    }

    fn stalled(&self) -> FetchError {
        retry(format!("nothing came from the registry for {} s", self.stall.as_secs()))
    }

    async fn body(&self, mut response: Response) -> Result<Bytes, FetchError> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece(&mut response).await? {
            if body.len() + piece.len() > MAX_DOCUMENT {
                let at = shown(response.url());
                return Err(refused(format!("{at} sends more than {MAX_DOCUMENT} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.into())
    }

    /// `GET`, with a proof of identity for the registry itself and none for where it redirects to.
    async fn get(
        &self,
        mut url: Url,
        accept: &str,
        range: Option<ByteRange>,
    ) -> Result<(Url, Response), FetchError> {
        let mut redirects = 0;
        let mut asked = false;
        loop {
            let ours = Origin::from(&url) == self.origin;
            let proof = if ours { self.auth.current() } else { None };
            let mut request = self.client.get(url.clone());
            request = request.header(ACCEPT, accept).header(USER_AGENT, AGENT);
            // what has a digest is wanted as it is
            request = request.header(ACCEPT_ENCODING, "identity");
            if let Some(range) = range {
                let last = range.end().saturating_sub(1);
                request = request.header(RANGE, format!("bytes={}-{last}", range.offset()));
            }
            if let Some(proof) = &proof {
                request = request.header(AUTHORIZATION, proof.clone());
            }
            let response = self.send(request, &url).await?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED && ours && !asked {
                asked = true;
                self.auth.renew(self, response.headers(), proof).await?;
                continue;
            }
            if status.is_redirection() {
                redirects += 1;
                if redirects > REDIRECTS {
                    return Err(refused(format!("{} redirects for ever", shown(&url))));
                }
                url = redirected(&url, &response)?;
                continue;
            }
            return match status {
                StatusCode::NOT_FOUND => {
                    Err(refused(format!("the registry has no {}", shown(&url))))
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    Err(refused(format!("the registry does not let us have {}", shown(&url))))
                }
                _ => Ok((url, check_status(response)?)),
            };
        }
    }

    async fn send(
        &self,
        request: reqwest::RequestBuilder,
        url: &Url,
    ) -> Result<Response, FetchError> {
        match tokio::time::timeout(self.stall, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(broken(&format!("can't reach {}", shown(url)), &e)),
            Err(_) => Err(self.stalled()),
        }
    }
}

/// What was sent must have the digest that it was asked for by.
fn check_digest(what: &str, bytes: &[u8], expected: &ObjectId) -> Result<(), FetchError> {
    let found = digest::sha256(bytes);
    if found == *expected {
        return Ok(());
    }
    let (expected, found) = (digest::text(expected), digest::text(&found));
    Err(wrong(format!("{what} has the digest {found} instead of {expected}")))
}

fn number(value: Option<&HeaderValue>) -> Option<u64> {
    value?.to_str().ok()?.trim().parse().ok()
}

fn check_length(url: &Url, response: &Response, size: u64) -> Result<(), FetchError> {
    match number(response.headers().get(CONTENT_LENGTH)) {
        Some(found) if found != size => {
            let at = shown(url);
            Err(wrong(format!("{at} has {found} bytes, the manifest says {size}")))
        }
        _ => Ok(()),
    }
}

/// An answer to a request for a range has to be just that (RFC 9110, 15.3.7).
fn check_range(
    url: &Url,
    response: &Response,
    range: ByteRange,
    size: u64,
) -> Result<(), FetchError> {
    let at = shown(url);
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Err(refused(format!(
            "{at} answers {} to a request for a part of it",
            response.status()
        )));
    }
    let last = range.end().saturating_sub(1);
    let expected = format!("bytes {}-{last}/{size}", range.offset());
    let found = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    if found != Some(&expected) {
        let found = found.unwrap_or_default();
        return Err(wrong(format!("{at} sends {found:?} instead of {expected:?}")));
    }
    match number(response.headers().get(CONTENT_LENGTH)) {
        Some(len) if len != range.len() => {
            Err(wrong(format!("{at} sends {len} bytes instead of {}", range.len())))
        }
        _ => Ok(()),
    }
}
