//! Importing a revision: the supervisor's side of an importer and of a builder.
//!
//! ```text
//! git ls-tree ──────────────┐
//! the pool's sizes ─────────┤
//! git cat-file (what is     ├─▶ importer ──▶ manifest ──▶ builder ──▶ image, segments
//!   in the repository) ─────┤     │  ▲
//! git check-attr ───────────┘     │  └── sizes, objects: the origin
//! git index-pack ◀────────────────┘ the objects that git itself looks at
//! ```
//!
//! Every git runs as the user, the importer as nobody in a sandbox; only the builder, which knows no
//! network and checks each entry of the manifest, writes a file system image.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::cgroups::Cgroups;
use super::git::{self, Git, GitError, Head};
use super::known::Known;
use super::origins::GitAccess;
use super::store::Store;
use super::worker::{ENVIRONMENT, Exit, cut, explain, in_group};
use crate::ids::ShardId;
use crate::importer::{self, Fds, attributes};
use crate::queue::wire::{self, FromImporter, GitTransport, Imported, Limits, ToImporter};
use crate::sys::cgroup::Cgroup;
use crate::sys::seqpacket::{self, Seqpacket};
use crate::sys::spawn::{Child as Importer, Role, Spawn};

/// The scratch directory that importers share; no shard has this number.
pub(super) const IMPORTERS: ShardId = ShardId(u16::MAX);

/// An importer asks for a transport or a credential now and then, when a connection was lost.
const MAX_UPCALLS: u32 = 1000;

/// An importer that has said its last word ends within this time.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// An import that failed.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    Git(#[from] GitError),
    #[error("{what}")]
    Io { what: &'static str, source: io::Error },
    /// What the importer says.
    #[error("{message}")]
    Origin { message: String, hint: Option<String> },
    #[error("the importer ended without a result: {0}")]
    Ended(String),
}

/// What an importer made.
#[derive(Debug)]
pub struct Import {
    pub imported: Imported,
    pub manifest: PathBuf,
    /// Ids in hexadecimal, a line each.
    pub in_repository: PathBuf,
    /// Content that was fetched on the way.
    pub contents: PathBuf,
}

impl Import {
    /// Removes the files once they have been used.
    pub fn remove_files(&self) {
        for file in [&self.manifest, &self.in_repository, &self.contents] {
            if let Err(error) = std::fs::remove_file(file) {
                warn!(%error, file = %file.display(), "can't remove an import's file");
            }
        }
    }
}

/// What an import is about.
#[derive(Debug)]
pub struct Job<'a> {
    pub store: &'a Arc<Store>,
    pub access: &'a GitAccess,
    pub head: &'a Head,
    /// What the pool has already.
    pub known: Known,
    pub conversion: attributes::Config,
}

/// An importer that waits for its job.
#[derive(Debug)]
pub struct Waiting {
    importer: Importer,
    cgroup: Option<Cgroup>,
    control: Seqpacket,
    /// Where the lists go that it reads.
    tree: OwnedFd,
    local: OwnedFd,
    known: OwnedFd,
    attributes: OwnedFd,
    directory: PathBuf,
}

/// The gits around an importer.
#[derive(Debug, Default)]
struct Gits {
    /// With what reads their messages.
    children: Vec<(&'static str, Child, JoinHandle<String>)>,
    /// Where the list of attributes goes.
    attributes: Option<OwnedFd>,
}

fn pipe() -> Result<(OwnedFd, OwnedFd), ImportError> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|errno| ImportError::Io { what: "can't make a pipe", source: errno.into() })
}

impl Waiting {
    /// Starts an importer that is to write into an existing directory.
    pub fn start(store: &Store, cgroups: &Cgroups, directory: &Path) -> Result<Self, ImportError> {
        let io = |what: &'static str| move |source| ImportError::Io { what, source };
        let create = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            let file = options.open(directory.join(name));
            file.map(OwnedFd::from).map_err(io("can't create a file for the importer"))
        };
        let (control, theirs) = seqpacket::pair().map_err(io("can't make a socket"))?;
        let control = Seqpacket::new(control).map_err(io("can't use a socket"))?;
        let spool = store.spool_dir(IMPORTERS).map_err(io("can't make a scratch directory"))?;
        let (tree, tree_in) = pipe()?;
        let (local, local_in) = pipe()?;
        let (known, known_in) = pipe()?;
        let (attributes, attributes_in) = pipe()?;
        let fds = Fds {
            control: theirs,
            spool,
            tree,
            local,
            known,
            attributes,
            eager_pack: create("eager.pack")?,
            converted_pack: create("converted.pack")?,
            manifest: create("manifest")?,
            in_repository: create("in-repository")?,
            contents: create("contents")?,
        };
        let arguments = store.worker_user.arguments();
        let mut importer = Spawn::role(Role::Importer).arguments(arguments).inherit(&ENVIRONMENT);
        for fd in <[OwnedFd; importer::FDS]>::from(fds) {
            importer = importer.fd(fd);
        }
        let cgroup = cgroups.make("importer");
        let importer = in_group(importer, cgroup.as_ref()).start();
        let importer = importer.map_err(io_other).map_err(io("can't start the importer"))?;
        Ok(Self {
            importer,
            cgroup,
            control,
            tree: tree_in,
            local: local_in,
            known: known_in,
            attributes: attributes_in,
            directory: directory.to_owned(),
        })
    }

    /// Tells the importer where the repository is, so that it can get to know the server.
    pub async fn introduce(
        &self,
        transport: &GitTransport,
        limits: Limits,
    ) -> Result<(), ImportError> {
        let transport = Box::new(transport.clone());
        let message = ToImporter::Origin { version: wire::VERSION, transport, limits };
        tell(&self.control, &message, &[]).await
    }

    /// Starts the gits that list what is in the repository.
    pub fn list(self, git: &Git) -> Result<Listing, ImportError> {
        let mut gits = Gits { attributes: Some(self.attributes), ..Gits::default() };
        let mut command = git.command(&["ls-tree", "-r", "-t", "-z", "--full-tree", "HEAD"])?;
        command.stdout(Stdio::from(self.tree));
        gits.spawn("ls-tree", command)?;
        let format = "--batch-check=%(objectname) %(objecttype) %(objectsize)";
        let args = ["cat-file", "--batch-all-objects", "--unordered", format];
        let mut command = git.command(&args)?;
        command.stdout(Stdio::from(self.local)).env("GIT_NO_LAZY_FETCH", "1");
        gits.spawn("cat-file", command)?;
        let Self { importer, cgroup, control, known, directory, .. } = self;
        Ok(Listing { importer, cgroup, control, known, directory, gits })
    }
}

/// An importer whose lists are on their way.
#[derive(Debug)]
pub struct Listing {
    importer: Importer,
    /// Dropped after the importer.
    cgroup: Option<Cgroup>,
    control: Seqpacket,
    known: OwnedFd,
    directory: PathBuf,
    gits: Gits,
}

impl Gits {
    fn spawn(&mut self, name: &'static str, mut command: Command) -> Result<(), GitError> {
        let mut child = command.spawn().map_err(|source| GitError::Start { source })?;
        // at once: a git that can't say what is wrong with a tree would wait, and the importer for it
        let errors = tokio::spawn(git::last_of(child.stderr.take()));
        self.children.push((name, child, errors));
        Ok(())
    }

    /// Lists the attributes of all paths of the tree that say how a file is written.
    fn list_attributes(&mut self, git: &Git) -> Result<(), ImportError> {
        let Some(attributes) = self.attributes.take() else { return Ok(()) };
        let (paths, paths_in) = pipe()?;
        let mut command =
            git.command(&["ls-tree", "-r", "-z", "--full-tree", "--name-only", "HEAD"])?;
        command.stdout(Stdio::from(paths_in));
        self.spawn("ls-tree", command)?;
        let mut command = git.command(&["check-attr", "-z", "--stdin", "--source=HEAD"])?;
        command.args(importer::ATTRIBUTES);
        command.stdin(Stdio::from(paths)).stdout(Stdio::from(attributes));
        self.spawn("check-attr", command)?;
        Ok(())
    }

    /// Waits for all of them.
    async fn wait(self) -> Result<(), ImportError> {
        for (name, mut child, errors) in self.children {
            let status = child.wait().await.map_err(|source| GitError::Start { source })?;
            if !status.success() {
                let stderr = errors.await.unwrap_or_default();
                let message = format!("{status}: {}", stderr.trim());
                return Err(GitError::Failed { command: name.into(), message }.into());
            }
        }
        Ok(())
    }
}

/// Gives a pack to the repository: as one of a promisor's, so what its objects refer to may be
/// missing.
async fn index_pack(git: &Git, pack: &Path) -> Result<(), ImportError> {
    let io = |source| ImportError::Io { what: "can't read a pack", source };
    let file = File::open(pack).map_err(io)?;
    if file.metadata().map_err(io)?.len() == 0 {
        return std::fs::remove_file(pack).map_err(io);
    }
    let args = ["index-pack", "--stdin", "--promisor=hydrant"];
    let mut command = git.command(&args)?;
    command.stdin(Stdio::from(file));
    git::run(command, &args, None).await?;
    // the repository has it now
    std::fs::remove_file(pack).map_err(io)
}

async fn tell(
    control: &Seqpacket,
    message: &ToImporter,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ImportError> {
    let io = |source| ImportError::Io { what: "can't talk to the importer", source };
    let bytes = wire::encode(message).map_err(|error| io(io::Error::other(error)))?;
    control.send(&bytes, fds).await.map_err(io)
}

async fn hear(control: &Seqpacket) -> Result<Option<FromImporter>, ImportError> {
    let io = |source| ImportError::Io { what: "can't understand the importer", source };
    let mut buffer = vec![0; wire::MAX_MESSAGE];
    let Some(received) = control.recv(&mut buffer).await.map_err(io)? else { return Ok(None) };
    let bytes = buffer.get(..received.length).unwrap_or_default();
    wire::decode(bytes).map(Some).map_err(|error| io(io::Error::other(error)))
}

/// Waits for the end of an importer that has nothing more to do, or sees to it.
async fn end(importer: &mut Importer) -> Exit {
    if let Ok(status) = tokio::time::timeout(END_PATIENCE, importer.wait()).await {
        return Exit::from(status);
    }
    warn!(pid = importer.id(), "killing an importer that goes on after its end");
    if let Err(error) = importer.kill() {
        return Exit::from(Err(error));
    }
    Exit::from(importer.wait().await)
}

/// Runs an importer to its end. `progress` is told what it is doing.
pub async fn import(
    listing: Listing,
    job: Job<'_>,
    mut progress: impl FnMut(&str, u64, u64),
) -> Result<Import, ImportError> {
    let Listing { mut importer, cgroup, control, known, directory, mut gits } = listing;
    let path = |name: &str| directory.join(name);
    job.known.list(job.store, known);
    let message = ToImporter::Job {
        commit: job.head.commit,
        tree: job.head.tree,
        time: job.head.commit_time,
        conversion: job.conversion,
    };
    tell(&control, &message, &[]).await?;
    let mut upcalls = 0;
    let imported = loop {
        let Some(message) = hear(&control).await? else {
            let exit = explain(end(&mut importer).await, cgroup.as_ref());
            return Err(ImportError::Ended(exit.description));
        };
        if let FromImporter::NeedTransport { .. } | FromImporter::NeedCredential { .. } = message {
            upcalls += 1;
            if upcalls > MAX_UPCALLS {
                let message = "the importer had to reach the origin too often".into();
                return Err(ImportError::Origin { message, hint: None });
            }
        }
        match message {
            FromImporter::NeedTransport { request } => {
                let opened = job.access.transport().await;
                let (result, fds) = match opened {
                    Ok(fds) => (Ok(()), fds.into()),
                    Err(error) => (Err(error), Vec::new()),
                };
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                tell(&control, &ToImporter::Transport { request, result }, &fds).await?;
            }
            FromImporter::NeedCredential { request, url, rejected } => {
                let result = job.access.credential(&url, rejected.as_ref()).await;
                tell(&control, &ToImporter::Credential { request, result }, &[]).await?;
            }
            FromImporter::Eager { attributes } => {
                index_pack(&job.access.git, &path("eager.pack")).await?;
                if attributes {
                    gits.list_attributes(&job.access.git)?;
                }
                gits.attributes = None;
                tell(&control, &ToImporter::Attributes { listed: attributes }, &[]).await?;
            }
            FromImporter::Progress { step, done, total } => progress(&cut(step), done, total),
            FromImporter::Done(imported) => {
                let (sizes, advice) = (cut(imported.sizes), imported.advice.map(cut));
                break Imported { sizes, advice, ..imported };
            }
            FromImporter::Failed { message, hint } => {
                let (message, hint) = (cut(message), hint.map(cut));
                return Err(ImportError::Origin { message, hint });
            }
        }
    };
    // what it has made is there; nobody has to see it go
    tokio::spawn(async move { end(&mut importer).await });
    gits.wait().await?;
    index_pack(&job.access.git, &path("converted.pack")).await?;
    info!(
        names = imported.names,
        sizes = imported.sizes,
        fetched = imported.fetched_files,
        "imported"
    );
    Ok(Import {
        imported,
        manifest: path("manifest"),
        in_repository: path("in-repository"),
        contents: path("contents"),
    })
}

fn io_other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}
