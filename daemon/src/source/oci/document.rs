//! Manifests, indexes and configurations: the JSON documents of an image (OCI image specification,
//! and Docker's image manifest version 2, schema 2).

use serde::Deserialize;
use thiserror::Error;

use super::digest;
use crate::object::ObjectId;
use crate::queue::wire::image::{Codec, Layer, Platform};

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// The longest of these documents, in bytes.
pub const MAX_DOCUMENT: usize = 8 << 20;
/// The most layers of an image. Overlayfs takes 500.
pub const MAX_LAYERS: usize = 400;

/// An image that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DocumentError {
    #[error("{0} can't be read: {1}")]
    Json(&'static str, String),
    #[error(
        "it is an image of Docker's old schema 1, which names no layers by what is in them; push it anew with a current program"
    )]
    Schema1,
    #[error("{0:?} is no image")]
    Kind(String),
    #[error("it has nothing for {wanted}, only for {found}")]
    Platform { wanted: String, found: String },
    #[error("layer {0} is not at the registry (a \"foreign\" layer)")]
    Foreign(usize),
    #[error("layer {0} is of type {1:?}, which is not known")]
    LayerKind(usize, String),
    #[error("{0:?} is no sha256 digest")]
    Digest(String),
    #[error("its manifest has {layers} layers, its configuration {diff_ids}")]
    Layers { layers: usize, diff_ids: usize },
    #[error("it has {0} layers; at most {MAX_LAYERS} can be mounted")]
    TooMany(usize),
}

/// What a digest stands for, its length in bytes, and its type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    pub kind: String,
    pub digest: ObjectId,
    pub size: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<RawPlatform>,
    #[serde(default)]
    urls: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct RawPlatform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    config: Option<RawDescriptor>,
    #[serde(default)]
    layers: Option<Vec<RawDescriptor>>,
}

#[derive(Debug, Deserialize)]
struct RawConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    rootfs: RawRootfs,
}

#[derive(Debug, Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// A manifest or what leads to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// For several platforms: the manifest for ours.
    Index(Descriptor),
    Manifest(Manifest),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub config: Descriptor,
    /// The lowest first.
    pub layers: Vec<(Descriptor, Codec)>,
}

impl RawDescriptor {
    fn check(&self) -> Result<Descriptor, DocumentError> {
        let digest = digest::parse(&self.digest);
        let digest = digest.ok_or_else(|| DocumentError::Digest(shortened(&self.digest)))?;
        Ok(Descriptor { kind: self.media_type.clone(), digest, size: self.size })
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Reads a document of type `kind` (`Content-Type`); `platform` is what an index is searched for.
pub fn read(bytes: &[u8], kind: &str, platform: &Platform) -> Result<Document, DocumentError> {
    if kind.contains("vnd.docker.distribution.manifest.v1") {
        return Err(DocumentError::Schema1);
    }
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|e| DocumentError::Json("its manifest", e.to_string()))?;
    if raw.schema_version == 1 {
        return Err(DocumentError::Schema1);
    }
    // some registries send application/json; the document itself knows better
    let known =
        |kind: &&str| matches!(*kind, OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST);
    let own = raw.media_type.clone();
    let kind = own.as_deref().filter(known).or(Some(kind).filter(known));
    match (kind, raw) {
        (
            None | Some(OCI_INDEX | DOCKER_LIST),
            RawDocument { manifests: Some(manifests), layers: None, .. },
        ) => choose(&manifests, platform).map(Document::Index),
        (
            None | Some(OCI_MANIFEST | DOCKER_MANIFEST),
            RawDocument { config: Some(config), layers: Some(layers), manifests: None, .. },
        ) => {
            if layers.len() > MAX_LAYERS {
                return Err(DocumentError::TooMany(layers.len()));
            }
            let layers = layers.iter().enumerate();
            let layers = layers.map(|(n, raw)| Ok((raw.check()?, codec(n, raw)?)));
            Ok(Document::Manifest(Manifest {
                layers: layers.collect::<Result<_, _>>()?,
                config: config.check()?,
            }))
        }
        (kind, _) => Err(DocumentError::Kind(shortened(kind.unwrap_or("the document")))),
    }
}

/// The manifest for a platform, of an index.
fn choose(manifests: &[RawDescriptor], platform: &Platform) -> Result<Descriptor, DocumentError> {
    let fits = |raw: &&RawDescriptor, variant: bool| {
        raw.platform.as_ref().is_some_and(|p| {
            p.os == platform.os
                && p.architecture == platform.architecture
                && (variant || p.variant.as_deref().is_none_or(|v| v == platform.variant))
        })
    };
    let exact = manifests.iter().find(|raw| fits(raw, false));
    let found = exact.or_else(|| manifests.iter().find(|raw| fits(raw, true)));
    let found = found.or(match manifests {
        // nothing to choose
        [only] if only.platform.is_none() => Some(only),
        _ => None,
    });
    match found {
        Some(raw) => raw.check(),
        None => {
            let known = manifests.iter().filter_map(|raw| raw.platform.as_ref());
            let known = known.filter(|p| p.os != "unknown").take(20);
            let known: Vec<_> = known
                .map(|p| format!("{}/{}", shortened(&p.os), shortened(&p.architecture)))
                .collect();
            let found = if known.is_empty() { "nothing".into() } else { known.join(", ") };
            let wanted = format!("{}/{}", platform.os, platform.architecture);
            Err(DocumentError::Platform { wanted, found })
        }
    }
}

fn codec(number: usize, raw: &RawDescriptor) -> Result<Codec, DocumentError> {
    let kind = raw.media_type.as_str();
    if kind.contains(".foreign.") || kind.contains(".nondistributable.") {
        return Err(DocumentError::Foreign(number + 1));
    }
    let codec = match kind {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Codec::Plain,
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Codec::Gzip,
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Codec::Zstd,
        _ => return Err(DocumentError::LayerKind(number + 1, shortened(kind))),
    };
    // a registry may have them all the same
    let _ = &raw.urls;
    Ok(codec)
}

/// The layers of an image, by its manifest and its configuration.
pub fn layers(
    manifest: &Manifest,
    config: &[u8],
    platform: &Platform,
) -> Result<Vec<Layer>, DocumentError> {
    let config: RawConfig = serde_json::from_slice(config)
        .map_err(|e| DocumentError::Json("its configuration", e.to_string()))?;
    let fits = |theirs: &str, ours: &str| theirs.is_empty() || theirs == ours;
    if !fits(&config.os, &platform.os) || !fits(&config.architecture, &platform.architecture) {
        let wanted = format!("{}/{}", platform.os, platform.architecture);
        let found = format!("{}/{}", shortened(&config.os), shortened(&config.architecture));
        return Err(DocumentError::Platform { wanted, found });
    }
    let (layers, diff_ids) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if layers != diff_ids {
        return Err(DocumentError::Layers { layers, diff_ids });
    }
    let pairs = manifest.layers.iter().zip(&config.rootfs.diff_ids);
    let layer = |((descriptor, codec), diff_id): (&(Descriptor, Codec), &String)| {
        let diff_id = digest::parse(diff_id);
        let diff_id = diff_id.ok_or_else(|| DocumentError::Digest("a diff_id".into()))?;
        let Descriptor { digest, size, .. } = *descriptor;
        Ok(Layer { digest, size, codec: *codec, diff_id })
    };
    pairs.map(layer).collect()
}
