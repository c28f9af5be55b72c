//! Indexes and traces of an image's layers, as they are kept at its registry: an artifact that refers to the image's manifest
//! (OCI image specification 1.1, `manifest.md`, "subject").
//!
//! Whoever can push to the repository can push such an artifact. So it is used only with a good signature, by a key that the
//! configuration names: Ed25519 (RFC 8032) over a [`statement`], which names the image and each blob by its digest.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::digest;
use super::document::{Descriptor, OCI_INDEX, OCI_MANIFEST};
use super::keys::{PublicKey, Signer};
use crate::object::ObjectId;

/// What artifacts say that they are (`artifactType`).
const INDEXES: &str = "application/vnd.hydrant.index.v1+json";
const TRACES: &str = "application/vnd.hydrant.trace.v1+json";
/// The media types of its blobs.
const INDEX: &str = "application/vnd.hydrant.layer.index.v1";
const WINDOWS: &str = "application/vnd.hydrant.layer.windows.v1";
const TRACE: &str = "application/vnd.hydrant.layer.trace.v1+json";
/// The annotation of the manifest with the signature, and of a blob's descriptor with its layer.
const SIGNATURE: &str = "io.hydrant.signature";
const LAYER: &str = "io.hydrant.layer";
const EMPTY_KIND: &str = "application/vnd.oci.empty.v1+json";
/// What artifacts have for a configuration.
pub const EMPTY: &[u8] = b"{}";
/// The most blobs of an artifact: two for each layer.
const MAX_PARTS: usize = 2 * super::document::MAX_LAYERS;

/// What an artifact has of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    Index,
    /// What to fetch first of it.
    Trace,
}

impl What {
    /// What the artifact says that it is.
    #[must_use]
    pub fn artifact_type(self) -> &'static str {
        match self {
            Self::Index => INDEXES,
            Self::Trace => TRACES,
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Trace => "trace",
        }
    }
}

/// What a blob of an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Index,
    /// What an index needs and does not have in it ([`WindowsBlob`](crate::layer::index::WindowsBlob)). It names this blob.
    Windows,
    Trace,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Index, Self::Windows, Self::Trace];

    fn media_type(self) -> &'static str {
        match self {
            Self::Index => INDEX,
            Self::Windows => WINDOWS,
            Self::Trace => TRACE,
        }
    }

    /// In whose artifact it is.
    #[must_use]
    pub fn what(self) -> What {
        match self {
            Self::Index | Self::Windows => What::Index,
            Self::Trace => What::Trace,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Windows => "windows",
            Self::Trace => "trace",
        }
    }
}

/// A blob of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub kind: Kind,
    /// The digest of the layer's blob.
    pub layer: ObjectId,
    pub blob: ObjectId,
    /// The length of the blob in bytes.
    pub size: u64,
}

/// Why an artifact is not used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unusable {
    #[error("it can't be read: {0}")]
    Json(String),
    #[error("it is something else")]
    Kind,
    #[error("it is not signed")]
    NotSigned,
    #[error("no key that is configured (`index_keys`) has signed it")]
    Signature,
}

/// What is signed: lines of text with the digests of the image's manifest and of all blobs, in their order.
#[must_use]
pub fn statement(image: &ObjectId, parts: &[Part]) -> Vec<u8> {
    let mut text = format!("hydrant layers 1\nimage {}\n", digest::text(image));
    for Part { kind, layer, blob, size } in parts {
        let (kind, layer, blob) = (kind.name(), digest::text(layer), digest::text(blob));
        // a String takes whatever is written
        let _ = writeln!(text, "{kind} {layer} {blob} {size}");
    }
    text.into_bytes()
}

/// Signs a statement; in base64.
#[must_use]
pub fn sign(signer: &Signer, image: &ObjectId, parts: &[Part]) -> String {
    STANDARD.encode(signer.sign(&statement(image, parts)))
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u32,
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: RawDescriptor,
    layers: Vec<RawDescriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<RawDescriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawIndex {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    manifests: Vec<RawDescriptor>,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

fn descriptor(kind: &str, digest: &ObjectId, size: u64) -> RawDescriptor {
    let (media_type, digest) = (kind.to_owned(), digest::text(digest));
    RawDescriptor { media_type, digest, size, ..RawDescriptor::default() }
}

/// The artifact's manifest. `image`: that of the image.
#[must_use]
pub fn manifest(image: &Descriptor, what: What, parts: &[Part], signature: &str) -> Vec<u8> {
    let layers = parts.iter().map(|part| RawDescriptor {
        annotations: Some(BTreeMap::from([(LAYER.into(), digest::text(&part.layer))])),
        ..descriptor(part.kind.media_type(), &part.blob, part.size)
    });
    let manifest = RawManifest {
        schema_version: 2,
        media_type: OCI_MANIFEST.into(),
        artifact_type: what.artifact_type().into(),
        config: descriptor(EMPTY_KIND, &digest::sha256(EMPTY), EMPTY.len() as u64),
        layers: layers.collect(),
        subject: Some(descriptor(&image.kind, &image.digest, image.size)),
        annotations: BTreeMap::from([(SIGNATURE.into(), signature.into())]),
    };
    // maps with texts for keys can be written
    serde_json::to_vec(&manifest).unwrap_or_default()
}

/// Reads an artifact's manifest. What it gives is what somebody has signed who is trusted.
pub fn read(
    bytes: &[u8],
    what: What,
    image: &ObjectId,
    keys: &[PublicKey],
) -> Result<Vec<Part>, Unusable> {
    let manifest: RawManifest =
        serde_json::from_slice(bytes).map_err(|error| Unusable::Json(error.to_string()))?;
    if manifest.artifact_type != what.artifact_type() || manifest.layers.len() > MAX_PARTS {
        return Err(Unusable::Kind);
    }
    let signature = manifest.annotations.get(SIGNATURE).ok_or(Unusable::NotSigned)?;
    let signature = STANDARD.decode(signature).map_err(|_| Unusable::Signature)?;
    let mut parts = Vec::with_capacity(manifest.layers.len());
    for layer in &manifest.layers {
        let of = layer.annotations.as_ref().and_then(|a| digest::parse(a.get(LAYER)?));
        let parsed = of.zip(digest::parse(&layer.digest));
        let mut kinds = Kind::ALL.into_iter().filter(|kind| kind.what() == what);
        match parsed.zip(kinds.find(|kind| layer.media_type == kind.media_type())) {
            Some(((of, blob), kind)) => {
                parts.push(Part { kind, layer: of, blob, size: layer.size });
            }
            None => return Err(Unusable::Kind),
        }
    }
    let statement = statement(image, &parts);
    if keys.iter().any(|key| key.verify(&statement, &signature)) {
        Ok(parts)
    } else {
        Err(Unusable::Signature)
    }
}

/// The artifacts of this type that a list of referrers names, the last one first.
#[must_use]
pub fn listed(index: &[u8], kind: &str) -> Vec<ObjectId> {
    let Ok(index) = serde_json::from_slice::<RawIndex>(index) else { return Vec::new() };
    let ours = index.manifests.iter().filter(|one| one.artifact_type.as_deref() == Some(kind));
    let mut found: Vec<_> = ours.filter_map(|one| digest::parse(&one.digest)).collect();
    found.reverse();
    found
}

/// The list of referrers that a registry keeps under a tag which has no list of its own, with one more; the list
/// there is now, if there is one.
#[must_use]
pub fn list_with(
    now: Option<&[u8]>,
    what: What,
    artifact: &ObjectId,
    size: u64,
) -> Option<Vec<u8>> {
    let mut index = match now {
        Some(now) => serde_json::from_slice(now).ok()?,
        None => RawIndex {
            schema_version: 2,
            media_type: OCI_INDEX.into(),
            manifests: Vec::new(),
            rest: BTreeMap::new(),
        },
    };
    let new = RawDescriptor {
        artifact_type: Some(what.artifact_type().into()),
        ..descriptor(OCI_MANIFEST, artifact, size)
    };
    index.manifests.retain(|one| one.digest != new.digest);
    index.manifests.push(new);
    serde_json::to_vec(&index).ok()
}

/// The tag of that list.
#[must_use]
pub fn list_tag(image: &ObjectId) -> String {
    digest::text(image).replace(':', "-")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::source::oci::keys::tests::key;

    fn made() -> (Descriptor, Vec<Part>, Signer) {
        let id = |n: u8| digest::sha256(&[n]);
        let image = Descriptor { kind: OCI_MANIFEST.into(), digest: id(0), size: 7 };
        let part = |kind, n| Part { kind, layer: id(n), blob: id(n + 1), size: 99 };
        let parts = vec![part(Kind::Index, 1), part(Kind::Windows, 1), part(Kind::Index, 3)];
        (image, parts, Signer::from_pem(&key(1)).unwrap())
    }

    #[test]
    fn what_is_signed_is_read() {
        let (image, parts, signer) = made();
        let keys = [signer.public()];
        let signature = sign(&signer, &image.digest, &parts);
        let manifest =
            |what, parts: &[Part], signature: &str| manifest(&image, what, parts, signature);
        let read = |text: &[u8], image: &ObjectId, keys: &[PublicKey]| {
            read(text, What::Index, image, keys)
        };
        let text = manifest(What::Index, &parts, &signature);
        assert_eq!(read(&text, &image.digest, &keys).unwrap(), parts);
        // the same, said to be traces
        let traces = manifest(What::Trace, &parts, &signature);
        assert_eq!(read(&traces, &image.digest, &keys).unwrap_err(), Unusable::Kind);
        let traces = super::read(&traces, What::Trace, &image.digest, &keys);
        assert_eq!(traces.unwrap_err(), Unusable::Kind);
        // windows, said to be an index
        let renamed = String::from_utf8(text.clone()).unwrap().replace(WINDOWS, INDEX);
        let refused = read(renamed.as_bytes(), &image.digest, &keys);
        assert_eq!(refused.unwrap_err(), Unusable::Signature);
        // of another image, by another key, without a key, without a signature
        let other = Signer::from_pem(&key(2)).unwrap();
        for refused in [
            read(&text, &digest::sha256(b"other"), &keys),
            read(&text, &image.digest, &[other.public()]),
            read(&text, &image.digest, &[]),
            read(&manifest(What::Index, &parts[1..], &signature), &image.digest, &keys),
            read(&manifest(What::Index, &parts, ""), &image.digest, &keys),
        ] {
            assert_eq!(refused.unwrap_err(), Unusable::Signature);
        }
        let unsigned = String::from_utf8(text).unwrap().replace(SIGNATURE, "another");
        let refused = read(unsigned.as_bytes(), &image.digest, &keys);
        assert_eq!(refused.unwrap_err(), Unusable::NotSigned);
        assert!(matches!(read(b"{}", &image.digest, &keys), Err(Unusable::Json(_))));
    }

    #[test]
    fn a_list_of_referrers() {
        let (one, two) = (digest::sha256(b"1"), digest::sha256(b"2"));
        let index = What::Index;
        let first = list_with(None, index, &one, 5).unwrap();
        let others = String::from_utf8(first).unwrap().replacen(
            "\"manifests\":[",
            r#""manifests":[{"mediaType":"m","digest":"sha256:00","size":1,"artifactType":"other","x":1},"#,
            1,
        );
        let both = list_with(Some(others.as_bytes()), index, &two, 6).unwrap();
        let all = list_with(Some(&both), What::Trace, &digest::sha256(b"3"), 7).unwrap();
        assert_eq!(listed(&all, index.artifact_type()), [two, one]);
        assert_eq!(listed(&all, What::Trace.artifact_type()), [digest::sha256(b"3")]);
        assert!(String::from_utf8(both.clone()).unwrap().contains("\"x\":1"));
        let again = list_with(Some(&both), index, &one, 5).unwrap();
        assert_eq!(listed(&again, index.artifact_type()), [one, two]);
        assert_eq!(list_with(Some(b"["), index, &one, 5), None);
        assert!(list_tag(&one).starts_with("sha256-6b86b273"));
    }

    proptest! {
        #[test]
        fn no_change_is_overlooked(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let (image, parts, signer) = made();
            let signature = sign(&signer, &image.digest, &parts);
            let mut text = manifest(&image, What::Index, &parts, &signature);
            let at = at.index(text.len());
            text[at] = byte;
            if let Ok(found) = read(&text, What::Index, &image.digest, &[signer.public()]) {
                prop_assert_eq!(found, parts);
            }
            let _ = listed(&text, What::Index.artifact_type());
        }
    }
}
