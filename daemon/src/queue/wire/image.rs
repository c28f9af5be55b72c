//! What supervisor and *puller* say to each other: the importer of container images.

use serde::{Deserialize, Serialize};

use super::{Credential, HttpTransport, Limits};
use crate::object::ObjectId;
use crate::source::oci::artifact::{Part, What};
use crate::source::oci::keys::PublicKey;
use crate::source::oci::trace::Traced;

/// Which of an image's variants is wanted, in the words of Go (`GOOS`, `GOARCH`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    /// Such as `v8`.
    pub variant: String,
}

impl Platform {
    /// This machine's.
    #[must_use]
    pub fn ours() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "aarch64" => ("arm64", "v8"),
            "arm" => ("arm", "v7"),
            "x86" => ("386", ""),
            "powerpc64" => ("ppc64le", ""),
            "loongarch64" => ("loong64", ""),
            other => (other, ""),
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }
}

/// How a layer's tar archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    Plain,
    Gzip,
    Zstd,
}

/// A layer, as image and configuration name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Of what the registry has.
    pub digest: ObjectId,
    /// Its length in bytes.
    pub size: u64,
    pub codec: Codec,
    /// The SHA-256 of the tar archive.
    pub diff_id: ObjectId,
}

/// A repository at a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repository {
    /// As people name the registry: `docker.io`, `host:port`.
    pub registry: String,
    pub name: String,
    /// Where it can be asked for, the first choice first.
    pub hosts: Vec<Host>,
}

/// A server that has images of a registry: the registry itself, or a mirror.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `url` is that of its API, with a `/` at the end: `https://host/v2/`.
    pub http: HttpTransport,
    /// It is told whose images are meant.
    pub mirror: bool,
    /// It may say what a tag leads to.
    pub resolves: bool,
    /// It may give what is asked for by its digest.
    pub pulls: bool,
}

/// Where a layer's content comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOrigin {
    pub repository: Repository,
    pub layer: Layer,
}

/// An image at its registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// Of the manifest for the platform.
    pub manifest: ObjectId,
    /// Of what the reference leads to: the same, or an index.
    pub digest: ObjectId,
    /// Of the configuration.
    pub config: ObjectId,
    /// The lowest first.
    pub layers: Vec<Layer>,
}

/// What people are shown of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Names in it.
    pub files: u64,
    /// Of all files, in bytes.
    pub bytes: u64,
    /// Directories that have no entry of their own.
    pub implicit: u64,
}

/// Formats of indexes that come with images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PinnedFormat {
    Estargz,
    ZstdChunked,
    Soci,
    /// Not pinned by the image, nor signed: somebody has put it beside the image, and whoever has switched this on believes them.
    SociV1,
    /// Not pinned by the image, but signed by somebody who is trusted: our own.
    Signed,
}

impl PinnedFormat {
    /// As people know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Estargz => "eStargz",
            Self::ZstdChunked => "zstd:chunked",
            Self::Soci => "SOCI",
            Self::SociV1 => "SOCI v1",
            Self::Signed => "signed",
        }
    }
}

/// From the supervisor to a puller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPuller {
    /// The first message. Answered with [`FromPuller::Resolved`]. `reference`: a tag or a digest.
    Image {
        version: u32,
        repository: Box<Repository>,
        reference: String,
        platform: Platform,
        limits: Limits,
        /// Indexes that these have signed are believed.
        index_keys: Vec<PublicKey>,
        /// Traces too.
        traces: bool,
        /// Indexes of SOCI that nothing pins are believed.
        soci_v1: bool,
    },
    /// The first message, instead. An artifact is to be made of parts of this kind that follow, for the image with this manifest; with
    /// `push`, they are put into the repository. Answered with [`FromPuller::Ready`].
    Publish {
        version: u32,
        repository: Box<Repository>,
        image: ObjectId,
        what: What,
        limits: Limits,
        push: bool,
    },
    /// A part: the index of a layer, of which the fds are the segment, which is all there, and the access index; or a trace, which
    /// the fd holds. Answered with [`FromPuller::Parts`].
    Part { layer: ObjectId },
    /// All parts were made, and this is the signature of them: the artifact is to be put into the repository. Answered with
    /// [`FromPuller::Published`].
    Sign { signature: String },
    /// The first message, instead. A layer that was filled by an index is all in its segment (first fd; the second is its
    /// access index): write the manifest of what its archive says into the third fd. Answered with
    /// [`FromPuller::Layer`], after which the process ends.
    Reread { version: u32 },
    /// The first message, instead. This blob, which has the windows of an index, is to be fetched into the fd, a file. Answered with
    /// [`FromPuller::Windows`], after which the process ends.
    Windows {
        version: u32,
        repository: Box<Repository>,
        limits: Limits,
        blob: ObjectId,
        /// In bytes.
        len: u64,
    },
    /// Fetch layer `number`, counted from 0, into these fds: the segment, the manifest of its tree,
    /// its access index.
    Layer { number: u32 },
    /// As [`super::ToWorker::Credential`].
    Credential { request: u64, result: Result<Option<Credential>, String> },
}

/// From a puller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromPuller {
    NeedCredential {
        request: u64,
        url: String,
        rejected: Option<Credential>,
    },
    Resolved(Box<Resolved>),
    /// Something that people should know.
    Note {
        message: String,
    },
    /// What is to be fetched first of layer `number`, as somebody says who is trusted. Comes before the layer.
    Trace {
        number: u32,
        runs: Vec<Traced>,
    },
    /// Parts may follow. Or a part is made, and is being pushed.
    Ready,
    /// What was made of the layer; nothing: there is no use in it.
    Parts {
        parts: Vec<Part>,
    },
    /// The artifact is in the repository, with this digest.
    Published {
        artifact: ObjectId,
    },
    /// Bytes received of all layers that were asked for.
    Progress {
        received: u64,
    },
    /// The layer is in its files. `pinned`: its segment is empty, its index is of this format, and the image
    /// pins it.
    Layer {
        number: u32,
        shown: Shown,
        pinned: Option<PinnedFormat>,
    },
    /// All windows are in the file.
    Windows,
    /// What is in the layer can't be told, and never will be.
    Unreadable {
        message: String,
    },
    /// Nothing more will come.
    Failed {
        message: String,
        hint: Option<String>,
    },
}
