//! The worker's process: its fds, its sandbox, its sources.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use super::control::Upcalls;
use super::queue::Queue;
use super::run::{SPARE_NAME, Sources, run};
use super::sandbox::{self, SandboxSpec};
use crate::ids::PoolId;
use crate::object::ObjectId;
use crate::queue::wire::image::Repository;
use crate::queue::wire::{Credential, Limits, OriginSpec};
use crate::range::ByteRange;
use crate::source::git::{
    Clients, Connector, Credentials, GitSource, Nobody, Pipe, load_system_roots,
};
use crate::source::oci::fetch::LayerSource;
use crate::source::oci::registry::Registry;
use crate::source::{Fetch, FetchError, Sink};

/// What a worker is started with: control socket, queue, scratch directory.
pub const FDS: usize = 3;

/// Runs the process: gives up privileges, then serves its queue. `event_files`: below this directory
/// are the files whose events it reads from the kernel itself, if it does.
pub fn main(
    uid: u32,
    gid: u32,
    without_landlock: bool,
    event_files: Option<PathBuf>,
    [control, queue, spool]: [OwnedFd; FDS],
) -> anyhow::Result<()> {
    // until it is told to take events
    let _ = nix::sys::prctl::set_name(SPARE_NAME);
    // the system's certificates, while they can be read wherever they are
    load_system_roots();
    let spool_dir = Some(spool.as_fd());
    let event_files = event_files.map(fs_err::File::open).transpose()?;
    let spec = SandboxSpec {
        uid,
        gid,
        spool_dir,
        readable: Vec::new(),
        event_files: event_files.as_ref().map(AsFd::as_fd),
        without_landlock,
    };
    sandbox::enter(&spec).context("can't enter the sandbox")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    runtime.block_on(async {
        let queue = Queue::new(queue).context("can't use the queue")?;
        run(control, queue, spool, PoolSources::default()).await.context("can't go on")
    })
}

/// How long connections are kept for layers that may come.
const KEEP_CONNECTED: Duration = Duration::from_secs(30);

/// The sources of layers share their connections.
#[derive(Debug)]
struct PoolSources {
    clients: Clients,
    /// One at a time: looking up names takes threads that others need, and may take long.
    preconnecting: Arc<Semaphore>,
}

impl Default for PoolSources {
    fn default() -> Self {
        Self { clients: Clients::default(), preconnecting: Arc::new(Semaphore::new(1)) }
    }
}

impl Sources for PoolSources {
    type Source = PoolSource;

    fn source(
        &self,
        _: PoolId,
        origin: OriginSpec,
        limits: Limits,
        upcalls: Upcalls,
    ) -> PoolSource {
        PoolSource::new(origin, limits, upcalls, &self.clients)
    }

    fn preconnect(&self, repository: &Repository, limits: Limits) {
        let Ok(permit) = Arc::clone(&self.preconnecting).try_acquire_owned() else { return };
        // what can't be used is told by who uses it
        let Ok(registry) =
            Registry::new(repository, limits, &(Arc::new(Nobody) as _), &self.clients)
        else {
            return;
        };
        tokio::spawn(async move {
            registry.preconnect().await;
            drop(permit);
            tokio::time::sleep(KEEP_CONNECTED).await;
        });
    }
}

/// Where a pool's content comes from.
#[derive(Debug)]
enum PoolSource {
    Git(GitSource),
    Layer(Box<LayerSource>),
    /// Its settings can't be used; the reason.
    Unusable(String),
}

impl PoolSource {
    fn new(origin: OriginSpec, limits: Limits, upcalls: Upcalls, clients: &Clients) -> Self {
        let supervisor = Arc::new(Supervisor(upcalls));
        let source = match origin {
            OriginSpec::Git(origin) => {
                let (credentials, connector) =
                    (Arc::clone(&supervisor) as _, Arc::clone(&supervisor) as _);
                GitSource::new(origin, limits, credentials, connector).map(|source| {
                    let known = supervisor.0.server();
                    source.introduce(known, move |server| supervisor.0.met(server));
                    Self::Git(source)
                })
            }
            OriginSpec::Layer(origin) => {
                let source = LayerSource::new(&origin, limits, &(supervisor as _), clients);
                source.map(|source| Self::Layer(Box::new(source)))
            }
        };
        source.unwrap_or_else(|error| Self::Unusable(error.to_string()))
    }
}

impl Fetch for PoolSource {
    async fn fetch(&self, keys: &[ObjectId], sink: &mut dyn Sink) -> Result<(), FetchError> {
        match self {
            Self::Git(source) => source.fetch(keys, sink).await.map_err(since_the_clone),
            Self::Layer(source) => source.fetch(keys, sink).await,
            Self::Unusable(message) => Err(FetchError::Refused { message: message.clone() }),
        }
    }

    fn attach(&self, extents: Arc<File>, access: Arc<File>) {
        if let Self::Layer(source) = self {
            source.attach(extents, access);
        }
    }

    fn decoded_with(&self, range: ByteRange) -> Option<ByteRange> {
        match self {
            Self::Layer(source) => source.decoded_with(range),
            Self::Git(_) | Self::Unusable(_) => None,
        }
    }
}

/// The origin had what it does not give now.
fn since_the_clone(error: FetchError) -> FetchError {
    match error {
        FetchError::Missing { key, message } => {
            let message = format!(
                "{message}; since the clone it has dropped the object, or its settings are against \
                 asking for objects by their ids"
            );
            FetchError::Missing { key, message }
        }
        error => error,
    }
}

/// The supervisor, as sources ask it for what a worker may not do.
struct Supervisor(Upcalls);

impl Credentials for Supervisor {
    fn get<'a>(
        &'a self,
        url: &'a str,
        rejected: Option<Credential>,
    ) -> BoxFuture<'a, Result<Option<Credential>, String>> {
        Box::pin(async move {
            self.0
                .need_credential(url.to_owned(), rejected)
                .await
                .map_err(|error| error.to_string())
        })
    }
}

impl Connector for Supervisor {
    fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>> {
        Box::pin(async move {
            let sockets = self.0.need_transport().await.map_err(|error| error.to_string())?;
            Pipe::received(sockets).map_err(|error| error.to_string())
        })
    }
}
