//! A puller process, as the supervisor sees it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use hydrant_api::ErrorCode;
use tracing::warn;

use super::super::cgroups::Cgroups;
use super::super::import::IMPORTERS;
use super::super::internal;
use super::super::store::Store;
use super::super::worker::{ENVIRONMENT, Exit, cut, explain, in_group};
use super::RegistryAccess;
use super::layer::LayerFiles;
use crate::admin::ApiError;
use crate::layer::index::WindowsBlob;
use crate::object::ObjectId;
use crate::queue::wire::image::{
    FromPuller, PinnedFormat, Platform, Repository, Resolved, Shown, ToPuller,
};
use crate::queue::wire::{self, Limits};
use crate::source::oci::artifact::{Part, What};
use crate::source::oci::document::MAX_LAYERS;
use crate::source::oci::keys::PublicKey;
use crate::source::oci::trace::{self, Traced};
use crate::sys::cgroup::Cgroup;
use crate::sys::seqpacket::{self, Seqpacket};
use crate::sys::spawn::{Child, Role, Spawn};

/// A puller asks for credentials now and then, when its token has run out.
const MAX_UPCALLS: u32 = 1000;

/// Sizes and counts are not larger than this: they can be added up.
const MAX_SHOWN: u64 = 1 << 48;

/// A puller that is no longer wanted ends within this time.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// What is to be believed of what somebody has put beside an image.
#[derive(Debug)]
pub struct Trust {
    /// What these have signed.
    pub index_keys: Vec<PublicKey>,
    /// Of that, traces too.
    pub traces: bool,
    /// Indexes of SOCI of version 1, whoever has put them there.
    pub soci_v1: bool,
}

/// What comes of layers.
#[derive(Debug, Clone)]
pub enum Step {
    /// Bytes that have come of all of them.
    Progress(u64),
    /// Something that people should know.
    Note(String),
    /// What is to be fetched first of a layer.
    Trace { number: u32, runs: Vec<Traced> },
    /// It is in its files.
    Layer { number: u32, shown: Shown, pinned: Option<PinnedFormat> },
}

/// A puller at work.
#[derive(Debug)]
pub struct Puller {
    child: Child,
    /// Dropped after the process.
    cgroup: Option<Cgroup>,
    control: Seqpacket,
    /// `None`: it has nothing to ask for.
    access: Option<RegistryAccess>,
    upcalls: u32,
    buffer: Vec<u8>,
}

/// Whether these are parts of the layer, one of each kind at most.
fn are_of(parts: &[Part], what: What, layer: ObjectId) -> bool {
    let is_of =
        |part: &Part| part.kind.what() == what && part.layer == layer && part.size <= MAX_SHOWN;
    let once = |part: &Part| parts.iter().filter(|other| other.kind == part.kind).count() == 1;
    parts.iter().all(|part| is_of(part) && once(part))
}

pub(super) fn cant(what: &'static str) -> impl Fn(io::Error) -> ApiError {
    move |error| internal(what, &error)
}

impl Puller {
    pub fn start(
        store: &Store,
        cgroups: &Cgroups,
        access: RegistryAccess,
    ) -> Result<Self, ApiError> {
        Self::spawn(store, cgroups, Some(access))
    }

    /// One that is to read what is here.
    pub fn offline(store: &Store, cgroups: &Cgroups) -> Result<Self, ApiError> {
        Self::spawn(store, cgroups, None)
    }

    fn spawn(
        store: &Store,
        cgroups: &Cgroups,
        access: Option<RegistryAccess>,
    ) -> Result<Self, ApiError> {
        let (control, theirs) = seqpacket::pair().map_err(cant("can't make a socket"))?;
        let control = Seqpacket::new(control).map_err(cant("can't use a socket"))?;
        let spool = store.spool_dir(IMPORTERS).map_err(cant("can't make a scratch directory"))?;
        let arguments = store.worker_user.arguments();
        let puller = Spawn::role(Role::Puller).arguments(arguments).inherit(&ENVIRONMENT);
        let cgroup = cgroups.make("puller");
        let child = in_group(puller.fd(theirs).fd(spool), cgroup.as_ref()).start();
        let child = child.map_err(|error| internal("can't start the puller", &error))?;
        let buffer = vec![0; wire::MAX_MESSAGE];
        Ok(Self { child, cgroup, control, access, upcalls: 0, buffer })
    }

    async fn tell(&self, message: &ToPuller, fds: &[BorrowedFd<'_>]) -> Result<(), ApiError> {
        let failed = cant("can't talk to the puller");
        let bytes = wire::encode(message).map_err(|error| failed(io::Error::other(error)))?;
        self.control.send(&bytes, fds).await.map_err(failed)
    }

    /// The next message that is not about credentials.
    async fn hear(&mut self) -> Result<FromPuller, ApiError> {
        let failed = cant("can't understand the puller");
        loop {
            let received = self.control.recv(&mut self.buffer).await.map_err(&failed)?;
            let Some(received) = received else {
                let exit = tokio::time::timeout(END_PATIENCE, self.child.wait()).await;
                let exit = match exit {
                    Ok(status) => explain(Exit::from(status), self.cgroup.as_ref()).description,
                    Err(_) => "it hung up".to_owned(),
                };
                let message = format!("the puller ended without a result: {exit}");
                return Err(ApiError::internal(message));
            };
            let bytes = self.buffer.get(..received.length).unwrap_or_default();
            let message: FromPuller =
                wire::decode(bytes).map_err(|error| failed(io::Error::other(error)))?;
            match message {
                FromPuller::NeedCredential { request, url, rejected } => {
                    self.upcalls += 1;
                    if self.upcalls > MAX_UPCALLS {
                        return Err(ApiError::internal("the puller asks for too much"));
                    }
                    let result = match &self.access {
                        Some(access) => access.credential(&url, rejected.as_ref()).await,
                        None => Err("it is to ask nobody".into()),
                    };
                    self.tell(&ToPuller::Credential { request, result }, &[]).await?;
                }
                FromPuller::Failed { message, hint } => {
                    let error = ApiError::new(ErrorCode::Origin, cut(message));
                    return Err(match hint {
                        Some(hint) => error.with_hint(cut(hint)),
                        None => error,
                    });
                }
                message => return Ok(message),
            }
        }
    }

    /// Finds an image. `reference` is a tag or digest.
    pub async fn resolve(
        &mut self,
        repository: Repository,
        reference: &str,
        platform: Platform,
        limits: Limits,
        trust: Trust,
    ) -> Result<Resolved, ApiError> {
        let Trust { index_keys, traces, soci_v1 } = trust;
        let message = ToPuller::Image {
            version: wire::VERSION,
            repository: Box::new(repository),
            reference: reference.to_owned(),
            platform,
            limits,
            index_keys,
            traces,
            soci_v1,
        };
        self.tell(&message, &[]).await?;
        loop {
            match self.hear().await? {
                FromPuller::Resolved(resolved)
                    if resolved.layers.len() <= MAX_LAYERS
                        && resolved.layers.iter().all(|layer| layer.size <= MAX_SHOWN) =>
                {
                    return Ok(*resolved);
                }
                FromPuller::Progress { .. } => {}
                _ => return Err(ApiError::internal("the puller is out of step")),
            }
        }
    }

    /// Has the manifest written of what is in a layer: segment, access index, manifest. Or gives why that will never be.
    pub async fn reread(&mut self, files: [File; 3]) -> Result<Option<String>, ApiError> {
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.tell(&ToPuller::Reread { version: wire::VERSION }, &fds).await?;
        match self.hear().await? {
            FromPuller::Layer { .. } => Ok(None),
            FromPuller::Unreadable { message } => Ok(Some(cut(message))),
            _ => Err(ApiError::internal("the puller is out of step")),
        }
    }

    /// Has the windows of an index fetched into a file.
    pub async fn windows(
        &mut self,
        repository: Repository,
        limits: Limits,
        blob: WindowsBlob,
        file: &File,
    ) -> Result<(), ApiError> {
        let WindowsBlob { digest, len } = blob;
        let (version, repository) = (wire::VERSION, Box::new(repository));
        let blob = digest.into();
        let message = ToPuller::Windows { version, repository, limits, blob, len };
        self.tell(&message, &[file.as_fd()]).await?;
        match self.hear().await? {
            FromPuller::Windows => Ok(()),
            _ => Err(ApiError::internal("the puller is out of step")),
        }
    }

    /// Has parts of an artifact made, for the image with this manifest.
    pub async fn publish(
        &mut self,
        repository: Repository,
        image: ObjectId,
        what: What,
        limits: Limits,
        push: bool,
    ) -> Result<(), ApiError> {
        let (version, repository) = (wire::VERSION, Box::new(repository));
        let message = ToPuller::Publish { version, repository, image, what, limits, push };
        self.tell(&message, &[]).await?;
        match self.hear().await? {
            FromPuller::Ready => Ok(()),
            _ => Err(ApiError::internal("the puller is out of step")),
        }
    }

    /// The parts of a layer, of these files, one of each kind. None: there is no use in them. `guard` is dropped as soon as the files have been
    /// read: then the parts are pushed, which may take long.
    pub async fn parts<G>(
        &mut self,
        what: What,
        layer: ObjectId,
        files: &[File],
        guard: G,
    ) -> Result<Vec<Part>, ApiError> {
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.tell(&ToPuller::Part { layer }, &fds).await?;
        let mut heard = self.hear().await?;
        drop(guard);
        if heard == FromPuller::Ready {
            heard = self.hear().await?;
        }
        match heard {
            // they are going to be signed
            FromPuller::Parts { parts } if are_of(&parts, what, layer) => Ok(parts),
            _ => Err(ApiError::internal("the puller is out of step")),
        }
    }

    /// Puts the artifact into its repository; gives its digest.
    pub async fn sign(&mut self, signature: String) -> Result<ObjectId, ApiError> {
        self.tell(&ToPuller::Sign { signature }, &[]).await?;
        match self.hear().await? {
            FromPuller::Published { artifact } => Ok(artifact),
            _ => Err(ApiError::internal("the puller is out of step")),
        }
    }

    /// Has a layer fetched into its files.
    pub async fn fetch(&self, number: u32, files: &LayerFiles) -> Result<(), ApiError> {
        let fds = files.fds();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.tell(&ToPuller::Layer { number }, &fds).await
    }

    pub async fn next(&mut self) -> Result<Step, ApiError> {
        match self.hear().await? {
            FromPuller::Progress { received } => Ok(Step::Progress(received)),
            FromPuller::Trace { number, runs } if trace::is_sound(&runs) => {
                Ok(Step::Trace { number, runs })
            }
            FromPuller::Note { message } => Ok(Step::Note(cut(message))),
            FromPuller::Layer { number, shown: Shown { files, bytes, implicit }, pinned } => {
                let [files, bytes, implicit] = [files, bytes, implicit].map(|n| n.min(MAX_SHOWN));
                let shown = Shown { files, bytes, implicit };
                Ok(Step::Layer { number, shown, pinned })
            }
            _ => Err(ApiError::internal("the puller is out of step")),
        }
    }

    /// Lets it go. Nobody has to wait for that.
    pub fn end(self) {
        let Self { mut child, cgroup, control, .. } = self;
        tokio::spawn(async move {
            drop(control);
            if tokio::time::timeout(END_PATIENCE, child.wait()).await.is_err() {
                warn!(pid = child.id(), "killing a puller that goes on after its end");
                child.kill().ok();
                child.wait().await.ok();
            }
            drop(cgroup);
        });
    }
}
