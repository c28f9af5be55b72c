//! Manifests, indexes and configurations: the JSON documents of an image (OCI image specification,
//! and Docker's image manifest version 2, schema 2).

use std::collections::BTreeMap;

use serde::Deserialize;
use thiserror::Error;

use super::digest;
use crate::layer::pinned::{Pin, soci};
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
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// What refers to something else (the image specification, `subject`).
#[derive(Debug, Deserialize)]
struct RawReferrer {
    subject: RawDescriptor,
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
    annotations: Option<BTreeMap<String, String>>,
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
    /// For each layer, the index that the manifest pins.
    pub pins: Vec<Option<Pin>>,
    /// The index of SOCI that it pins.
    pub soci: Option<ObjectId>,
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
            RawDocument {
                config: Some(config),
                layers: Some(layers),
                manifests: None,
                annotations,
                ..
            },
        ) => {
            let soci = annotations.as_ref().and_then(|known| known.get(soci::INDEX_DIGEST));
            if layers.len() > MAX_LAYERS {
                return Err(DocumentError::TooMany(layers.len()));
            }
            let pin = |raw: &RawDescriptor| raw.annotations.as_ref().and_then(Pin::of);
            let pins = layers.iter().map(pin).collect();
            let layers = layers.iter().enumerate();
            let layers = layers.map(|(n, raw)| Ok((raw.check()?, codec(n, raw)?)));
            Ok(Document::Manifest(Manifest {
                layers: layers.collect::<Result<_, _>>()?,
                config: config.check()?,
                pins,
                soci: soci.and_then(|text| digest::parse(text)),
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

/// The zTOCs that an index of SOCI, which the image pins, has by the layers that they are of. What can't be read has none.
#[must_use]
pub fn ztocs(bytes: &[u8]) -> BTreeMap<ObjectId, Pin> {
    ztocs_of(bytes, soci::INDEX_KIND, 2)
}

/// The same, of an index of version 1, which refers to the image.
#[must_use]
pub fn ztocs_beside(bytes: &[u8], image: &ObjectId) -> BTreeMap<ObjectId, Pin> {
    let referrer = serde_json::from_slice::<RawReferrer>(bytes);
    match referrer.map(|raw| digest::parse(&raw.subject.digest)) {
        Ok(Some(subject)) if subject == *image => ztocs_of(bytes, soci::INDEX_KIND_1, 1),
        _ => BTreeMap::new(),
    }
}

fn ztocs_of(bytes: &[u8], kind: &str, version: u8) -> BTreeMap<ObjectId, Pin> {
    let mut found = BTreeMap::new();
    let Ok(raw) = serde_json::from_slice::<RawDocument>(bytes) else { return found };
    if raw.config.is_none_or(|config| config.media_type != kind) {
        return found;
    }
    for ztoc in raw.layers.iter().flatten() {
        let layer = ztoc.annotations.as_ref().and_then(|known| known.get(soci::LAYER_DIGEST));
        let layer = layer.and_then(|text| digest::parse(text));
        if let Some((layer, digest)) = layer.zip(ztoc.digest.parse().ok()) {
            found.insert(layer, Pin::Soci { ztoc: digest, size: ztoc.size, version });
        }
    }
    found
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ours() -> Platform {
        Platform { os: "linux".into(), architecture: "arm64".into(), variant: "v8".into() }
    }

    fn digest_of(n: u8) -> String {
        digest::text(&digest::sha256(&[n]))
    }

    fn index(platforms: &[&str]) -> String {
        let manifests = platforms.iter().zip(1..).map(|(platform, n)| {
            format!(
                r#"{{"mediaType": "{OCI_MANIFEST}", "digest": "{}", "size": 7, "platform": {platform}}}"#,
                digest_of(n)
            )
        });
        let manifests: Vec<_> = manifests.collect();
        format!(r#"{{"schemaVersion": 2, "manifests": [{}]}}"#, manifests.join(","))
    }

    fn manifest(kinds: &[&str]) -> String {
        let layers = kinds.iter().zip(1..).map(|(kind, n)| {
            format!(r#"{{"mediaType": "{kind}", "digest": "{}", "size": 9}}"#, digest_of(n))
        });
        let layers: Vec<_> = layers.collect();
        format!(
            r#"{{"schemaVersion": 2, "config": {{"digest": "{}", "size": 2}}, "layers": [{}]}}"#,
            digest_of(0),
            layers.join(",")
        )
    }

    #[test]
    fn the_manifest_for_the_platform_is_chosen() {
        let amd = r#"{"os": "linux", "architecture": "amd64"}"#;
        let v6 = r#"{"os": "linux", "architecture": "arm64", "variant": "v6"}"#;
        let v8 = r#"{"os": "linux", "architecture": "arm64", "variant": "v8"}"#;
        let any = r#"{"os": "linux", "architecture": "arm64"}"#;
        let chosen =
            |platforms: &[&str]| match read(index(platforms).as_bytes(), OCI_INDEX, &ours()) {
                Ok(Document::Index(found)) => Ok(found.digest),
                Ok(Document::Manifest(_)) => panic!("it is an index"),
                Err(error) => Err(error.to_string()),
            };
        let number = |n: u8| Ok(digest::sha256(&[n]));
        assert_eq!(chosen(&[amd, v6, v8]), number(3));
        assert_eq!(chosen(&[amd, any, v8]), number(2));
        assert_eq!(chosen(&[amd, v6]), number(2), "better than nothing");
        let error = chosen(&[amd]).unwrap_err();
        assert_eq!(error, "it has nothing for linux/arm64, only for linux/amd64");
    }

    #[test]
    fn layers_by_their_types() {
        let read = |kinds: &[&str]| read(manifest(kinds).as_bytes(), "application/json", &ours());
        let Ok(Document::Manifest(found)) = read(&[
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.v1.tar",
        ]) else {
            panic!("a manifest")
        };
        let codecs: Vec<_> = found.layers.iter().map(|(_, codec)| *codec).collect();
        assert_eq!(codecs, [Codec::Gzip, Codec::Zstd, Codec::Plain]);
        for foreign in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        ] {
            assert_eq!(read(&[foreign]), Err(DocumentError::Foreign(1)));
        }
        let other = "application/vnd.oci.image.layer.v1.squashfs";
        assert!(matches!(read(&[other]), Err(DocumentError::LayerKind(1, _))));

        let config =
            |ids: &[String]| format!(r#"{{"os": "linux", "rootfs": {{"diff_ids": {ids:?}}}}}"#);
        let ids: Vec<_> = (4..7).map(digest_of).collect();
        let known = layers(&found, config(&ids).as_bytes(), &ours()).unwrap();
        assert_eq!(known[2].diff_id, digest::sha256(&[6]));
        let error = layers(&found, config(&ids[..2]).as_bytes(), &ours()).unwrap_err();
        assert_eq!(error, DocumentError::Layers { layers: 3, diff_ids: 2 });
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let read = |text: &str, kind| read(text.as_bytes(), kind, &ours()).unwrap_err();
        let old = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        assert_eq!(read("{}", old), DocumentError::Schema1);
        let old = r#"{"schemaVersion": 1, "fsLayers": []}"#;
        assert_eq!(read(old, "application/json"), DocumentError::Schema1);
        assert!(matches!(read("{}", OCI_MANIFEST), DocumentError::Kind(_)));
        assert!(matches!(read("<html>", "text/html"), DocumentError::Json(..)));
        let digest =
            r#"{"schemaVersion": 2, "config": {"digest": "md5:1", "size": 1}, "layers": []}"#;
        assert!(matches!(read(digest, OCI_MANIFEST), DocumentError::Digest(_)));
        // an index that is a manifest as well
        let both = manifest(&[]).replace("\"layers\"", "\"manifests\": [], \"layers\"");
        assert!(matches!(read(&both, OCI_INDEX), DocumentError::Kind(_)));
    }

    /// Bytes put in the place of others, wherever.
    fn mangled(text: &str, changes: &[(usize, char)], cut: usize) -> Vec<u8> {
        let mut chars: Vec<char> = text.chars().collect();
        for (at, to) in changes {
            let at = at % chars.len();
            chars[at] = *to;
        }
        chars.truncate(chars.len() - cut % chars.len());
        String::from_iter(chars).into_bytes()
    }

    fn changes() -> impl Strategy<Value = Vec<(usize, char)>> {
        let to = prop_oneof![
            any::<char>(),
            prop::sample::select("\"{}[],:0129-efnul".chars().collect::<Vec<_>>())
        ];
        prop::collection::vec((any::<usize>(), to), 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn mangled_documents(changes in changes(), of_config in changes(), cut in 0usize..30, kind in 0..3) {
            let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
            let pinned = format!(
                r#""annotations": {{"containerd.io/snapshot/stargz/toc.digest": "{}"}}, "size""#,
                digest_of(9)
            );
            let document = match kind {
                0 => index(&[r#"{"os": "linux", "architecture": "arm64"}"#, r#"{"os": "unknown"}"#]),
                1 => manifest(&[layer, layer]),
                _ => manifest(&[layer, layer]).replacen("\"size\"", &pinned, 2),
            };
            let bytes = mangled(&document, &changes, cut % 2 * cut);
            let Ok(found) = read(&bytes, "application/json", &ours()) else { return Ok(()) };
            let Document::Manifest(found) = found else { return Ok(()) };
            prop_assert_eq!(found.pins.len(), found.layers.len());
            let ids = [digest_of(1), digest_of(2)];
            let config = format!(r#"{{"os": "linux", "architecture": "arm64", "rootfs": {{"diff_ids": {ids:?}}}}}"#);
            let config = mangled(&config, &of_config, cut / 2);
            if let Ok(layers) = layers(&found, &config, &ours()) {
                prop_assert_eq!(layers.len(), found.layers.len());
                for (layer, (descriptor, _)) in layers.iter().zip(&found.layers) {
                    prop_assert!(layer.digest == descriptor.digest && layer.size == descriptor.size);
                }
            }
        }

        #[test]
        fn a_mangled_index_of_ztocs(changes in changes(), cut in 0usize..30) {
            let ztoc = |n| format!(
                r#"{{"mediaType": "application/octet-stream", "digest": "{}", "size": 7, "annotations": {{"{}": "{}"}}}}"#,
                digest_of(n), soci::LAYER_DIGEST, digest_of(n + 1)
            );
            let document = format!(
                r#"{{"schemaVersion": 2, "config": {{"mediaType": "{}", "digest": "{}", "size": 2}}, "layers": [{}, {}]}}"#,
                soci::INDEX_KIND, digest_of(1), ztoc(2), ztoc(4)
            );
            prop_assert_eq!(ztocs(document.as_bytes()).len(), 2);
            prop_assert!(ztocs(&mangled(&document, &changes, cut % 2 * cut)).len() <= 2);
            // one of the other version refers to the image
            let image = digest::sha256(b"image");
            prop_assert!(ztocs_beside(document.as_bytes(), &image).is_empty());
            let subject = format!(r#""subject": {{"digest": "{}", "size": 7}}, "config""#, digest::text(&image));
            let beside = document.replace(soci::INDEX_KIND, soci::INDEX_KIND_1).replace(r#""config""#, &subject);
            prop_assert_eq!(ztocs_beside(beside.as_bytes(), &image).len(), 2);
            prop_assert!(ztocs_beside(beside.as_bytes(), &digest::sha256(b"other")).is_empty());
            prop_assert!(ztocs(beside.as_bytes()).is_empty());
            prop_assert!(ztocs_beside(&mangled(&beside, &changes, cut % 2 * cut), &image).len() <= 2);
        }

        #[test]
        fn bytes_that_are_nothing(bytes: Vec<u8>) {
            prop_assert!(ztocs(&bytes).is_empty());
            prop_assert!(ztocs_beside(&bytes, &digest::sha256(b"image")).is_empty());
            prop_assert!(read(&bytes, OCI_MANIFEST, &ours()).is_err());
        }
    }
}
