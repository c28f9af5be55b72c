//! The proxy snapshotter of containerd: `containerd.services.snapshots.v1` over gRPC, on a socket of its own in the
//! run directory.
//!
//! containerd asks where a container's or an image's file tree is, and mounts it itself. Everything about snapshots is
//! the [`Snapshotter`]'s; here are the protocol ([`messages`], [`filter`]) and the socket. It is root's: who may
//! ask for snapshots can become root, so nobody else may connect.

pub mod filter;
pub mod messages;
mod server;

use std::future::Future;

use thiserror::Error;

use self::messages::{
    CommitRequest, CreateRequest, Info, Kind, Mount, UpdateRequest, UsageResponse,
};

pub use server::{METHODS, Socket, serve};

/// Names the snapshot that is to come of this one: the chain ID of an image's layers up to this.
pub const REF: &str = "containerd.io/snapshot.ref";
/// The image that is being unpacked.
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The digest of its manifest, if containerd says so.
pub const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Which IDs of the snapshot's files a user namespace wants for which: `inside:outside:count`, several with commas.
pub const REMAP: [&str; 2] =
    ["containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"];

/// Why something can't be done, as gRPC tells it apart.
#[derive(Debug, Error)]
pub enum Error {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Internal(String),
}

/// What containerd may ask. Each method is done to its end even when containerd no longer waits for it.
pub trait Snapshotter: Send + Sync + 'static {
    /// `Prepare` ([`Kind::Active`]) or `View`. [`Error::AlreadyExists`] of a snapshot with a [`REF`]: it is there, nothing
    /// need be unpacked.
    fn create(
        &self,
        kind: Kind,
        request: CreateRequest,
    ) -> impl Future<Output = Result<Vec<Mount>, Error>> + Send;

    fn mounts(&self, key: String) -> impl Future<Output = Result<Vec<Mount>, Error>> + Send;

    fn commit(&self, request: CommitRequest) -> impl Future<Output = Result<(), Error>> + Send;

    fn remove(&self, key: String) -> impl Future<Output = Result<(), Error>> + Send;

    fn stat(&self, key: String) -> impl Future<Output = Result<Info, Error>> + Send;

    fn update(&self, request: UpdateRequest) -> impl Future<Output = Result<Info, Error>> + Send;

    /// All of them.
    fn list(&self) -> impl Future<Output = Result<Vec<Info>, Error>> + Send;

    fn usage(&self, key: String) -> impl Future<Output = Result<UsageResponse, Error>> + Send;

    fn cleanup(&self) -> impl Future<Output = Result<(), Error>> + Send;
}
