//! Importing a revision: the supervisor's side of an importer and of a builder.
//!
//! ```text
//! git ls-tree ──────────────┐
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
use std::path::PathBuf;
use std::process::Stdio;

use tokio::process::{Child, Command};
use tracing::{debug, info};

use super::git::{Git, GitError, Head};
use super::origins::Access;
use super::store::Store;
use super::worker::ENVIRONMENT;
use crate::ids::ShardId;
use crate::queue::wire::{self, FromImporter, GitOrigin, Imported, Limits, OriginSpec, ToImporter};
use crate::sys::seqpacket::{self, Seqpacket};
use crate::sys::spawn::{Role, Spawn};

/// The numbers of an importer's fds.
pub mod fds {
    /// Control socket.
    pub const CONTROL: i32 = 3;
    /// The scratch directory.
    pub const SPOOL: i32 = 4;
    /// `git ls-tree -r -t -z --full-tree HEAD`, to be read.
    pub const TREE: i32 = 5;
    /// `git cat-file --batch-all-objects`: id, type and size of what is in the repository already.
    pub const LOCAL: i32 = 6;
    /// `git index-pack --stdin`, to be written to.
    pub const PACK: i32 = 7;
    /// The attributes of all paths, once they have been asked for.
    pub const ATTRIBUTES: i32 = 8;
    /// The manifest, to be written.
    pub const MANIFEST: i32 = 9;
    /// The ids of the objects that are in the repository in the end, to be written.
    pub const EAGER: i32 = 10;
}

/// The scratch directory that importers share; no shard has this number.
const IMPORTERS: ShardId = ShardId(u16::MAX);

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
    pub eager: PathBuf,
}

/// What an import is about.
#[derive(Debug)]
pub struct Job<'a> {
    pub store: &'a Store,
    pub access: &'a Access,
    pub origin: GitOrigin,
    pub limits: Limits,
    pub head: &'a Head,
    /// An existing directory for the manifest.
    pub directory: PathBuf,
}

/// The gits around an importer.
#[derive(Debug, Default)]
struct Gits {
    children: Vec<(&'static str, Child)>,
    /// Where the list of attributes goes.
    attributes: Option<OwnedFd>,
}

/// The importer's ends of the pipes, in the order of [`fds`] from [`fds::TREE`].
type Ends = [OwnedFd; 4];

fn pipe() -> Result<(OwnedFd, OwnedFd), ImportError> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|errno| ImportError::Io { what: "can't make a pipe", source: errno.into() })
}

impl Gits {
    fn start(git: &Git) -> Result<(Self, Ends), ImportError> {
        let mut gits = Self::default();
        let (tree, tree_in) = pipe()?;
        let mut command = git.command(&["ls-tree", "-r", "-t", "-z", "--full-tree", "HEAD"])?;
        command.stdout(Stdio::from(tree_in));
        gits.spawn("ls-tree", command)?;
        let (local, local_in) = pipe()?;
        let format = "--batch-check=%(objectname) %(objecttype) %(objectsize)";
        let args = ["cat-file", "--batch-all-objects", "--unordered", format];
        let mut command = git.command(&args)?;
        command.stdout(Stdio::from(local_in)).env("GIT_NO_LAZY_FETCH", "1");
        gits.spawn("cat-file", command)?;
        let (pack_out, pack) = pipe()?;
        // a promisor pack: what its objects refer to may be missing
        let mut command = git.command(&["index-pack", "--stdin", "--promisor=hydrant"])?;
        command.stdin(Stdio::from(pack_out)).stdout(Stdio::null());
        gits.spawn("index-pack", command)?;
        let (attributes, attributes_in) = pipe()?;
        gits.attributes = Some(attributes_in);
        Ok((gits, [tree, local, pack, attributes]))
    }

    fn spawn(&mut self, name: &'static str, mut command: Command) -> Result<(), GitError> {
        let child = command.spawn().map_err(|source| GitError::Start { source })?;
        self.children.push((name, child));
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
        command.args(crate::importer::ATTRIBUTES);
        command.stdin(Stdio::from(paths)).stdout(Stdio::from(attributes));
        self.spawn("check-attr", command)?;
        Ok(())
    }

    /// Waits for the gits of this name, or for all.
    async fn wait(&mut self, only: Option<&str>) -> Result<(), ImportError> {
        let waiting = std::mem::take(&mut self.children);
        for (name, child) in waiting {
            if only.is_some_and(|only| only != name) {
                self.children.push((name, child));
                continue;
            }
            let output =
                child.wait_with_output().await.map_err(|source| GitError::Start { source })?;
            if !output.status.success() {
                let stderr = String::from_utf8_lossy(&output.stderr);
                let message = format!("{}: {}", output.status, stderr.trim());
                return Err(GitError::Failed { command: name.into(), message }.into());
            }
        }
        Ok(())
    }
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

/// Runs an importer to its end. `progress` is told what it is doing.
pub async fn import(
    job: Job<'_>,
    mut progress: impl FnMut(&str, u64, u64),
) -> Result<Import, ImportError> {
    let io = |what: &'static str| move |source| ImportError::Io { what, source };
    let manifest = job.directory.join("manifest");
    let eager = job.directory.join("eager");
    let manifest_file = File::create(&manifest).map_err(io("can't create the manifest"))?;
    let eager_file = File::create(&eager).map_err(io("can't create the list of objects"))?;
    let (mut gits, ends) = Gits::start(&job.access.git)?;
    let (control, theirs) = seqpacket::pair().map_err(io("can't make a socket"))?;
    let control = Seqpacket::new(control).map_err(io("can't use a socket"))?;
    let spool = job.store.spool_dir(IMPORTERS).map_err(io("can't make a scratch directory"))?;
    let user = &job.store.worker_user;
    let mut importer = Spawn::role(Role::Importer)
        .argument(format!("--uid={}", user.uid))
        .argument(format!("--gid={}", user.gid))
        .inherit(&ENVIRONMENT)
        .fd(theirs)
        .fd(spool);
    for end in ends {
        importer = importer.fd(end);
    }
    // only the importer has its ends from now on, so that each git sees it end
    let mut importer = importer
        .fd(manifest_file)
        .fd(eager_file)
        .start()
        .map_err(|error| ImportError::Io { what: "can't start the importer", source: io::Error::other(error) })?;
    let message = ToImporter::Job {
        version: wire::VERSION,
        origin: OriginSpec::Git(job.origin.clone()),
        limits: job.limits,
        commit: job.head.commit,
        tree: job.head.tree,
        mtime: job.head.commit_time,
    };
    tell(&control, &message, &[]).await?;
    let imported = loop {
        let Some(message) = hear(&control).await? else {
            let status = importer.wait().await.map_err(io("can't wait for the importer"))?;
            return Err(ImportError::Ended(status.to_string()));
        };
        match message {
            FromImporter::NeedTransport { request } => {
                let opened = job.access.transport();
                let (result, fd) = match opened {
                    Ok(fd) => (Ok(()), Some(fd)),
                    Err(error) => (Err(error), None),
                };
                let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
                tell(&control, &ToImporter::Transport { request, result }, &fds).await?;
            }
            FromImporter::NeedCredential { request, url, rejected } => {
                let result = job.access.credential(&url, rejected.as_ref()).await;
                tell(&control, &ToImporter::Credential { request, result }, &[]).await?;
            }
            FromImporter::Eager { attributes } => {
                gits.wait(Some("index-pack")).await?;
                if attributes {
                    gits.list_attributes(&job.access.git)?;
                }
                gits.attributes = None;
                tell(&control, &ToImporter::Attributes { listed: attributes }, &[]).await?;
            }
            FromImporter::Progress { step, done, total } => progress(&step, done, total),
            FromImporter::Done(imported) => break imported,
            FromImporter::Failed { message, hint } => {
                return Err(ImportError::Origin { message, hint });
            }
        }
    };
    importer.wait().await.map_err(io("can't wait for the importer"))?;
    gits.wait(None).await?;
    info!(files = imported.files, bytes = imported.tree_bytes, sizes = imported.sizes, "imported");
    debug!(?imported.counters, "cost of the import");
    Ok(Import { imported, manifest, eager })
}
