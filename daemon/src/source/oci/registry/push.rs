//! Putting artifacts into a repository (the distribution specification, "push" and "referrers").

use std::future::ready;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use reqwest::header::{CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};

use super::host::{Host, answered};
use super::{Registry, refused};
use crate::object::ObjectId;
use crate::source::FetchError;
use crate::source::git::{check_status, shown};
use crate::source::oci::artifact::{EMPTY, What, list_tag, list_with, listed};
use crate::source::oci::digest;
use crate::source::oci::document::{Descriptor, OCI_INDEX, OCI_MANIFEST};

const OCTETS: &str = "application/octet-stream";
/// By this a registry says that it has taken note of what an artifact refers to.
const SUBJECT: &str = "oci-subject";
/// Bytes per second of what is pushed, at least.
const PUSH_PACE: u64 = 64 << 10;
/// Of several artifacts, so many are looked at.
const MAX_LOOKED_AT: usize = 8;

impl Registry {
    /// The registry itself: mirrors are not written to.
    fn itself(&self) -> Result<&Host, FetchError> {
        let host = self.hosts.iter().find(|host| host.namespace.is_none());
        host.ok_or_else(|| refused(format!("{} itself is not configured", self.registry)))
    }

    /// An image's manifest, as an artifact refers to it.
    pub async fn describe(&self, image: &ObjectId) -> Result<Descriptor, FetchError> {
        let (digest, kind, bytes) = self.manifest(&digest::text(image), Some(*image)).await?;
        Ok(Descriptor { kind, digest, size: bytes.len() as u64 })
    }

    /// Manifests of artifacts of this type that refer to an image, the one that was found last first.
    pub async fn artifacts(&self, image: &ObjectId, kind: &str) -> Result<Vec<Bytes>, FetchError> {
        let mut found = Vec::new();
        let mut failed = None;
        for digest in self.itself()?.referrers(image, kind).await?.into_iter().take(MAX_LOOKED_AT) {
            // one that can't be had does not keep us from the others
            match self.manifest(&digest::text(&digest), Some(digest)).await {
                Ok((_, _, bytes)) => found.push(bytes),
                Err(error) => {
                    tracing::warn!(artifact = %digest, %error, "an artifact of the image can't be had");
                    failed = Some(error);
                }
            }
        }
        match failed {
            Some(error) if found.is_empty() => Err(error),
            _ => Ok(found),
        }
    }

    /// Puts a blob there, unless it is there.
    pub async fn push_blob(&self, blob: &ObjectId, bytes: Bytes) -> Result<(), FetchError> {
        self.itself()?.push_blob(blob, bytes).await
    }

    /// Puts an artifact's manifest there, with what it refers to. Gives its digest.
    pub async fn push_artifact(
        &self,
        image: &ObjectId,
        what: What,
        manifest: Vec<u8>,
    ) -> Result<ObjectId, FetchError> {
        let host = self.itself()?;
        host.push_blob(&digest::sha256(EMPTY), Bytes::from_static(EMPTY)).await?;
        let (artifact, size) = (digest::sha256(&manifest), manifest.len() as u64);
        let name = digest::text(&artifact);
        let answer = host.push_manifest(&name, manifest.into(), OCI_MANIFEST).await?;
        if !answer.contains_key(SUBJECT) {
            // who asks for what refers to the image looks under this tag then
            let tag = list_tag(image);
            let now = host.tagged_list(image).await?;
            let list = list_with(now.as_deref(), what, &artifact, size);
            let list = list.ok_or_else(|| refused(format!("the tag {tag} has no list")))?;
            host.push_manifest(&tag, list.into(), OCI_INDEX).await?;
        }
        Ok(artifact)
    }
}

impl Host {
    async fn referrers(&self, image: &ObjectId, kind: &str) -> Result<Vec<ObjectId>, FetchError> {
        let mut url = self.url("referrers", &digest::text(image))?;
        url.query_pairs_mut().append_pair("artifactType", kind);
        // asked for side by side, a registry without such a list does not cost a round trip more
        let (list, tagged) = (pin!(self.document(url)), pin!(self.tagged_list(image)));
        let (list, tagged) = match select(list, tagged).await {
            Either::Left((list, tagged)) => (list, Either::Left(tagged)),
            Either::Right((tagged, list)) => (list.await, Either::Right(ready(tagged))),
        };
        let list = match list {
            Ok(Some(list)) => Some(list),
            // that one does not know what it was asked for
            Ok(None) | Err(FetchError::Refused { .. }) => tagged.await?,
            Err(error) => return Err(error),
        };
        Ok(list.map(|list| listed(&list, kind)).unwrap_or_default())
    }

    /// The list of referrers that is kept under a tag; `None` if there is none.
    async fn tagged_list(&self, image: &ObjectId) -> Result<Option<Bytes>, FetchError> {
        self.document(self.url("manifests", &list_tag(image))?).await
    }

    async fn document(&self, url: Url) -> Result<Option<Bytes>, FetchError> {
        let (url, response) = self.ask(url, OCI_INDEX, None).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            _ => self.body(answered(&url, response)?).await.map(Some),
        }
    }

    async fn push_blob(&self, blob: &ObjectId, bytes: Bytes) -> Result<(), FetchError> {
        let name = digest::text(blob);
        let at = self.url("blobs", &name)?;
        if self.change(Method::HEAD, at, Bytes::new(), OCTETS).await?.status().is_success() {
            return Ok(());
        }
        let begin = self.url("blobs/uploads", "")?;
        let answer = self.change(Method::POST, begin.clone(), Bytes::new(), OCTETS).await?;
        let answer = check_status(answer)?;
        let to = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok());
        let to = to.and_then(|to| begin.join(to).ok());
        let mut to = to.ok_or_else(|| refused("the registry does not say where to put a blob"))?;
        to.query_pairs_mut().append_pair("digest", &name);
        check_status(self.change(Method::PUT, to, bytes, OCTETS).await?).map(drop)
    }

    async fn push_manifest(
        &self,
        reference: &str,
        bytes: Bytes,
        kind: &str,
    ) -> Result<HeaderMap, FetchError> {
        let url = self.url("manifests", reference)?;
        let answer = self.change(Method::PUT, url, bytes, kind).await?;
        Ok(check_status(answer)?.headers().clone())
    }

    /// A request with a body, with a proof of identity for the registry itself.
    async fn change(
        &self,
        method: Method,
        url: Url,
        body: Bytes,
        kind: &str,
    ) -> Result<Response, FetchError> {
        // the answer comes when all of the body is there
        let patience = self.patience + Duration::from_secs(body.len() as u64 / PUSH_PACE);
        let complete =
            |request: RequestBuilder| request.header(CONTENT_TYPE, kind).body(body.clone());
        let response = self.send_proved(method, &url, patience, &mut false, complete).await?;
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let at = shown(&url);
                Err(refused(format!("the registry does not let us write to {at}")))
            }
            _ => Ok(response),
        }
    }
}
