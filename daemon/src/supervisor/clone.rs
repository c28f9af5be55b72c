//! `hydrant clone`: from a URL to a tree in place.

mod builder;
mod prepare;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hydrant_api::{CloneRequest, History, Owner, Summary, path_from_text};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use tokio::task::JoinHandle;
use tracing::{info, warn};

pub(super) use self::builder::Builder;
use super::durable::{self, Synced};
use super::git::{self, Git};
use super::queue::milliseconds;
use super::target::Target;
use super::{Supervisor, history, internal, lock};
use crate::admin::{ApiError, Caller, ProgressSender};
use crate::builder::Built;
use crate::catalog::{Mount, NewMount, Pool, Tree};
use crate::ids::{MountId, PoolId};
use crate::mount;
use crate::sys::user::User;

/// A clone under way.
struct Clone<'a> {
    supervisor: &'a Supervisor,
    request: &'a CloneRequest,
    owner: Owner,
    git: Git,
    mount: MountId,
    /// `STATE/mounts/<mount>`
    directory: PathBuf,
    progress: &'a ProgressSender,
}

/// What has to be done about a tree whose files are there.
struct Prepared<'a> {
    pool: Pool,
    tree: Tree,
    built: Built,
    /// Of what git had written before the import began.
    synced: JoinHandle<io::Result<Synced>>,
    _cloning: Cloning<'a>,
}

/// Keeps a pool's files from being taken for garbage.
pub(super) struct Cloning<'a> {
    supervisor: &'a Supervisor,
    pool: PoolId,
}

impl<'a> Cloning<'a> {
    pub(super) fn begin(supervisor: &'a Supervisor, pool: PoolId) -> Self {
        lock(&supervisor.cloning).push(pool);
        Self { supervisor, pool }
    }
}

impl Drop for Cloning<'_> {
    fn drop(&mut self) {
        let mut cloning = lock(&self.supervisor.cloning);
        if let Some(at) = cloning.iter().position(|pool| *pool == self.pool) {
            cloning.swap_remove(at);
        }
    }
}

impl Supervisor {
    pub(super) async fn clone_to(
        &self,
        caller: &Caller,
        request: &CloneRequest,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        let begun = Instant::now();
        let owner = if caller.is_root() {
            request.owner.unwrap_or_else(|| caller.owner())
        } else {
            caller.owner()
        };
        let user = User::lookup(owner.uid, owner.gid)
            .map_err(|error| internal("can't look the user up", &error))?;
        let path = path_from_text(&request.directory);
        let _busy = self.begin(&path)?;
        let target = Target::prepare(&path, caller, &user).await?;
        if self.mount_at(&target.path).await?.is_some() {
            return Err(ApiError::conflict(format!(
                "{} has a tree already",
                target.path.display()
            ))
            .with_hint("`hydrant mount` mounts it, `hydrant rm` removes it"));
        }
        let mount = self.catalog.allocate_mount().await.map_err(|e| internal("can't clone", &e))?;
        let directory = self.store.mount_dir(mount);
        let git = Git {
            user,
            environment: request.environment.clone(),
            directory: self.store.upper_dir(mount),
        };
        let clone = Clone { supervisor: self, request, owner, git, mount, directory, progress };
        match clone.run(&target).await {
            Ok(mut summary) => {
                summary.elapsed_ms = milliseconds(begun.elapsed());
                Ok(summary)
            }
            Err(error) => {
                self.undo_mount(mount).await;
                target.undo();
                Err(error)
            }
        }
    }
}

impl<'a> Clone<'a> {
    async fn run(&self, target: &Target) -> Result<Summary, ApiError> {
        self.make_directories()
            .map_err(|error| internal("can't make room for the tree", &error))?;
        let prepared = self.prepare().await?;
        let Prepared { pool, tree, built, synced, _cloning } = prepared;
        let supervisor = self.supervisor;
        let revision = tree.revision.clone();
        let history = match self.request.history {
            History::Background if !self.request.read_only => history::FETCHING,
            History::None | History::Background => "shallow",
            History::Full => "complete",
        };
        let mount = NewMount {
            id: self.mount,
            tree: tree.id,
            directory: target.path.clone(),
            read_only: self.request.read_only,
            owner: self.owner,
            // not before it is all there
            mounted: false,
            pack: built.pack.as_ref().map(|pack| pack.name.clone()),
            history: history.into(),
            image: None,
        };
        let catalog = |error| internal("can't enter the tree into the catalog", &error);
        supervisor.catalog.insert_mount(mount.clone()).await.map_err(catalog)?;
        let mount = supervisor.mount_at(&target.path).await?;
        let mount = mount.ok_or_else(|| ApiError::internal("the catalog has lost the mount"))?;
        self.progress.step("mount");
        // what git converts is still to be written
        let writable = Mount { read_only: false, ..mount.clone() };
        let trees = vec![(tree.clone(), pool.clone())];
        let detached = supervisor.make_mount(&writable, &trees, false).await?;
        let synced = self.make_durable(synced).await;
        let synced = synced.map_err(|error| internal("can't make the tree durable", &error))?;
        supervisor.set_mounted(&mount, true).await?;
        supervisor.attach_mount(&mount, &trees, detached, target.fd.as_fd())?;
        if built.converted > 0 {
            self.write_converted(&target.path, built.converted, synced).await;
        }
        if mount.read_only {
            mount::make_read_only(&target.path)
                .map_err(|error| internal("can't make the tree read-only", &error))?;
        }
        if history::is_wanted(&mount) {
            supervisor.fetch_history(mount.id, self.git.clone());
        }
        info!(mount = %mount.id, url = git::for_display(&self.request.url), revision, directory = %target.path.display(),
            files = built.files, "cloned");
        Ok(Summary {
            files: built.files + built.symlinks + built.converted,
            tree_bytes: built.tree_bytes,
            fetched_bytes: supervisor.fetched_bytes(pool.id).await,
            elapsed_ms: 0,
            message: None,
        })
    }

    fn make_directories(&self) -> io::Result<()> {
        self.supervisor.store.make_mount_dir(self.mount, self.owner)?;
        fs::DirBuilder::new().mode(0o700).create(self.directory.join("pack"))
    }

    /// From here on the tree is there, whatever happens: all that it is made of is on the disk before the
    /// catalog says so, and before anybody can write into it.
    async fn make_durable(&self, synced: JoinHandle<io::Result<Synced>>) -> io::Result<Synced> {
        let mut synced = synced.await.map_err(io::Error::other)??;
        let owner = self.supervisor.store.owner_dir(self.mount);
        let directory = self.directory.clone();
        let done = tokio::task::spawn_blocking(move || {
            synced.sync(&owner)?;
            durable::keep(&directory)?;
            Ok(synced)
        });
        done.await.map_err(io::Error::other)?
    }

    /// Lets git write the files that attributes, filters or line ends have a say in.
    async fn write_converted(&self, directory: &Path, count: u64, mut synced: Synced) {
        self.progress.count(0, Some(count), "converted files");
        let git = Git { directory: directory.to_owned(), ..self.git.clone() };
        let write = async {
            let missing = git.output(&["ls-files", "--deleted", "-z"]).await?;
            // the index takes the place of one that is on the disk
            let durable = ["-c", "core.fsync=all"];
            let args = ["checkout-index", "--force", "--index", "-z", "--stdin"];
            git.output_of(&[&durable[..], &args].concat(), &missing).await
        };
        if let Err(error) = write.await {
            warn!(%error, "can't write the files that git converts");
            self.progress.note(format!("files that git converts are not all there: {error}"));
        }
        let owner = self.supervisor.store.owner_dir(self.mount);
        let synced = tokio::task::spawn_blocking(move || synced.sync(&owner)).await;
        if let Err(error) = synced.map_err(io::Error::other).and_then(|synced| synced) {
            warn!(%error, "can't make the files that git converts durable");
        }
    }
}

/// Opens a path below a directory that its owner may have changed at any time.
pub(super) fn beneath(
    directory: impl AsFd,
    path: impl AsRef<Path>,
    flags: OFlag,
) -> io::Result<OwnedFd> {
    let mode = if flags.contains(OFlag::O_CREAT) {
        Mode::from_bits_truncate(0o644)
    } else {
        Mode::empty()
    };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(directory.as_fd(), path.as_ref(), how)?)
}
