//! A host that has a registry's images: documents and blobs over HTTP, with whatever proof of identity it
//! wants (the distribution specification, and Docker's "token authentication").

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap,
    HeaderName, HeaderValue, RANGE, USER_AGENT,
};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use tokio::time::Instant;

use super::auth::Auth;
use super::choices::{Need, rest};
use super::{refused, retry, wrong};
use crate::object::ObjectId;
use crate::queue::wire::image::{self as wire, Repository};
use crate::range::ByteRange;
use crate::source::FetchError;
use crate::source::git::{Clients, Credentials, Origin, broken, check_status, redirected, shown};
use crate::source::oci::digest;
use crate::source::oci::document::{
    DOCKER_LIST, DOCKER_MANIFEST, MAX_DOCUMENT, OCI_INDEX, OCI_MANIFEST,
};

pub(super) const AGENT: &str = concat!("hydrant/", env!("CARGO_PKG_VERSION"));

/// Blob stores are one hop away, sometimes two.
const REDIRECTS: usize = 8;

/// A host. Requests run side by side.
#[derive(Debug)]
pub struct Host {
    pub(super) client: Arc<Client>,
    base: Url,
    repository: String,
    /// What a mirror is told of whose images are meant, as by containerd (`ns` in the query).
    pub(super) namespace: Option<String>,
    pub(super) extra: HeaderMap,
    pub(super) origin: Origin,
    pub(super) auth: Auth,
    /// How long it may be silent.
    pub(super) patience: Duration,
    resolves: bool,
    pulls: bool,
    /// Until then others are asked before.
    rests_until: Mutex<Option<Instant>>,
}

impl Host {
    pub(super) fn new(
        settings: &wire::Host,
        repository: &Repository,
        patience: Duration,
        credentials: Arc<dyn Credentials>,
        clients: &Clients,
    ) -> Result<Self, FetchError> {
        let http = &settings.http;
        let base = Url::parse(&http.url)
            .map_err(|e| refused(format!("the URL {:?} can't be used: {e}", http.url)))?;
        let mut extra = HeaderMap::new();
        for line in &http.extra_headers {
            let (name, value) = header(line)?;
            extra.append(name, value);
        }
        let auth = Auth::new(credentials, base.clone(), repository.name.clone());
        Ok(Self {
            client: clients.get(http, patience)?,
            origin: Origin::from(&base),
            base,
            repository: repository.name.clone(),
            namespace: settings.mirror.then(|| repository.registry.clone()),
            extra,
            auth,
            patience,
            resolves: settings.resolves,
            pulls: settings.pulls,
            rests_until: Mutex::default(),
        })
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Its URL, as it may be shown.
    pub(crate) fn shown(&self) -> String {
        shown(&self.base)
    }

    pub(super) fn can(&self, need: Need) -> bool {
        match need {
            Need::Tag => self.resolves,
            Need::Content => self.pulls,
        }
    }

    /// Until when it rests, if it does.
    pub(super) fn rests(&self, now: Instant) -> Option<Instant> {
        let until = *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.filter(|until| *until > now)
    }

    /// Others are asked before it for a while.
    pub fn has_failed(&self, error: &FetchError) {
        let until = Instant::now() + rest(error);
        let mut rests = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        *rests = rests.max(Some(until));
    }

    pub(super) fn url(&self, what: &str, reference: &str) -> Result<Url, FetchError> {
        let path = format!("{}/{what}/{reference}", self.repository);
        let url = self.base.join(&path);
        let mut url = url.map_err(|e| refused(format!("{path:?} can't be asked for: {e}")))?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    /// Asks whether it is a registry ("determining support" in the specification). Whether it has answered, whatever that is.
    pub(super) async fn ping(&self) -> bool {
        let request = self.client.get(self.base.clone()).header(USER_AGENT, AGENT);
        match self.send_within(self.patience, request, &self.base).await {
            // a connection is free for others once all of an answer was read
            Ok(response) => self.body(response).await.is_ok(),
            Err(error) => {
                tracing::debug!(%error, "no connection beforehand");
                false
            }
        }
    }

    /// A manifest or index: its digest, its type and the bytes.
    pub(super) async fn manifest(
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
            && !kind.contains("vnd.docker.distribution.manifest.v1")
        {
            check_digest("the manifest", &bytes, &expected)?;
        }
        Ok((digest::sha256(&bytes), kind, bytes))
    }

    /// An image's configuration.
    pub(super) async fn configuration(&self, digest: &ObjectId) -> Result<Bytes, FetchError> {
        let url = self.url("blobs", &digest::text(digest))?;
        let (_, response) = self.get(url, "*/*", None).await?;
        let bytes = self.body(response).await?;
        check_digest("the configuration", &bytes, digest)?;
        Ok(bytes)
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

    /// Begins to read a part of a blob, whose length is `size`.
    pub async fn part(
        &self,
        blob: &ObjectId,
        size: u64,
        range: ByteRange,
    ) -> Result<Part<'_>, FetchError> {
        let url = self.url("blobs", &digest::text(blob))?;
        let (url, response) = self.get(url, "*/*", Some(range)).await?;
        check_range(&url, &response, range, size)?;
        Ok(Part { host: self, response, left: range.len() })
    }

    /// Reads a part of a blob, whose length is `size`.
    pub async fn range(
        &self,
        blob: &ObjectId,
        size: u64,
        range: ByteRange,
        mut received: impl FnMut(u64),
    ) -> Result<Vec<u8>, FetchError> {
        let mut part = self.part(blob, size, range).await?;
        let mut bytes = Vec::with_capacity(usize::try_from(range.len()).unwrap_or_default());
        while let Some(piece) = part.next().await? {
            received(piece.len() as u64);
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// The next piece of an answer; `None` at its end.
    pub async fn piece(&self, response: &mut Response) -> Result<Option<Bytes>, FetchError> {
        match tokio::time::timeout(self.patience, response.chunk()).await {
            Ok(piece) => piece.map_err(|e| broken("the answer broke off", &e)),
            Err(_) => Err(self.stalled()),
        }
    }

    fn stalled(&self) -> FetchError {
        retry(format!("nothing came from {} for {:?}", self.shown(), self.patience))
    }

    pub(super) async fn body(&self, mut response: Response) -> Result<Bytes, FetchError> {
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

    async fn get(
        &self,
        url: Url,
        accept: &str,
        range: Option<ByteRange>,
    ) -> Result<(Url, Response), FetchError> {
        let (url, response) = self.ask(url, accept, range).await?;
        let response = answered(&url, response)?;
        Ok((url, response))
    }

    /// `GET`, with a proof of identity for the registry itself and none for where it redirects to. Whatever is answered.
    pub(super) async fn ask(
        &self,
        mut url: Url,
        accept: &str,
        range: Option<ByteRange>,
    ) -> Result<(Url, Response), FetchError> {
        let mut redirects = 0;
        let mut asked = false;
        loop {
            let complete = |request: RequestBuilder| {
                // what has a digest is wanted as it is
                let request = request.header(ACCEPT, accept).header(ACCEPT_ENCODING, "identity");
                match range {
                    Some(range) => {
                        let last = range.end().saturating_sub(1);
                        request.header(RANGE, format!("bytes={}-{last}", range.offset()))
                    }
                    None => request,
                }
            };
            let response =
                self.send_proved(Method::GET, &url, self.patience, &mut asked, complete).await?;
            if !response.status().is_redirection() {
                return Ok((url, response));
            }
            redirects += 1;
            if redirects > REDIRECTS {
                return Err(refused(format!("{} redirects for ever", shown(&url))));
            }
            url = redirected(&url, &response)?;
        }
    }

    /// Sends a request that is made `complete`, to the registry itself with a proof of identity. If it is refused, a new
    /// one is `asked` for, once.
    pub(super) async fn send_proved(
        &self,
        method: Method,
        url: &Url,
        patience: Duration,
        asked: &mut bool,
        complete: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, FetchError> {
        let ours = Origin::from(url) == self.origin;
        loop {
            let proof = if ours { self.auth.current() } else { None };
            let mut request = self.client.request(method.clone(), url.clone());
            if ours {
                // they may be secrets
                request = request.headers(self.extra.clone());
            }
            request = complete(request).header(USER_AGENT, AGENT);
            if let Some(proof) = &proof {
                request = request.header(AUTHORIZATION, proof.clone());
            }
            let response = self.send_within(patience, request, url).await?;
            if response.status() != StatusCode::UNAUTHORIZED || !ours || *asked {
                return Ok(response);
            }
            *asked = true;
            self.auth.renew(self, response.headers(), proof).await?;
        }
    }

    pub(super) async fn send(
        &self,
        request: RequestBuilder,
        url: &Url,
    ) -> Result<Response, FetchError> {
        self.send_within(self.patience, request, url).await
    }

    pub(super) async fn send_within(
        &self,
        patience: Duration,
        request: RequestBuilder,
        url: &Url,
    ) -> Result<Response, FetchError> {
        match tokio::time::timeout(patience, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(broken(&format!("can't reach {}", shown(url)), &e)),
            Err(_) => Err(self.stalled()),
        }
    }
}

/// A part of a blob, as it comes.
#[derive(Debug)]
pub struct Part<'a> {
    host: &'a Host,
    response: Response,
    /// Bytes that have not come.
    left: u64,
}

impl Part<'_> {
    /// The next bytes; `None` once all have come.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        let piece = self.host.piece(&mut self.response).await?;
        let at = || shown(self.response.url());
        match &piece {
            Some(piece) => match self.left.checked_sub(piece.len() as u64) {
                Some(left) => self.left = left,
                None => return Err(wrong(format!("{} sends more than was asked for", at()))),
            },
            None if self.left > 0 => {
                return Err(retry(format!("the answer of {} was cut short", at())));
            }
            None => {}
        }
        Ok(piece)
    }
}

/// What a request was answered with, if it was done.
pub(super) fn answered(url: &Url, response: Response) -> Result<Response, FetchError> {
    match response.status() {
        StatusCode::NOT_FOUND => Err(refused(format!("the registry has no {}", shown(url)))),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(refused(format!("the registry does not let us have {}", shown(url))))
        }
        _ => check_status(response),
    }
}

/// A configured header.
fn header(line: &str) -> Result<(HeaderName, HeaderValue), FetchError> {
    // The value may be a secret: it is not shown.
    let unusable = |name: &str| refused(format!("the header {name:?} can't be used"));
    let (name, value) = line.split_once(':').ok_or_else(|| unusable("without a colon"))?;
    let mut value = HeaderValue::try_from(value.trim()).map_err(|_| unusable(name))?;
    value.set_sensitive(true);
    Ok((HeaderName::try_from(name.trim()).map_err(|_| unusable(name))?, value))
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
