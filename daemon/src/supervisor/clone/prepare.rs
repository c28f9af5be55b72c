//! From a URL to the files of a tree, ready to be mounted.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use hydrant_api::{ErrorCode, History};
use nix::fcntl::OFlag;
use tracing::warn;

use super::builder::Builder;
use super::{Clone, Cloning, Prepared, beneath};
use crate::admin::{ApiError, ProgressSender};
use crate::builder::{self, Built, IndexJob, Job, PackJob, Reply};
use crate::catalog::{CatalogError, NewPool, NewSegment, NewTree, Pool, Tree};
use crate::ids::{SegmentId, TreeId};
use crate::queue::wire::{GitOrigin, GitTransport};
use crate::supervisor::durable::Synced;
use crate::supervisor::git::{self, Extent, Git, GitError, Head, Remote, Revision, Way};
use crate::supervisor::import::{self, ImportError};
use crate::supervisor::internal;
use crate::supervisor::origins::{Access, GitAccess, REACHED};

/// The most segments that one tree may bring: an EROFS image has at most 65,535 devices.
const MAX_NEW_SEGMENTS: u64 = 65_535;

/// The git index's name, in `.git` and before it is there.
const INDEX: &str = "index";

/// Why a tree can't be prepared.
enum Trouble {
    /// No files can be had of the origin by their ids; why, and what would help.
    Withheld(String),
    Other(ApiError),
}

impl From<ApiError> for Trouble {
    fn from(error: ApiError) -> Self {
        Self::Other(error)
    }
}

impl<'a> Clone<'a> {
    /// Metadata, manifest, image, segments: all but the mount. Also all content, where the origin gives it no other
    /// way.
    pub(super) async fn prepare(&self) -> Result<Prepared<'a>, ApiError> {
        let message = match self.prepare_as(false).await {
            Err(Trouble::Withheld(message)) => message,
            Err(Trouble::Other(error)) => return Err(error),
            Ok(prepared) => return Ok(prepared),
        };
        warn!(url = git::for_display(&self.request.url), message, "fetching all content");
        self.progress.note(format!("all content is fetched at once, by git: {message}"));
        self.git.remove_clone().await.map_err(origin)?;
        self.prepare_as(true).await.map_err(|trouble| match trouble {
            Trouble::Withheld(message) => imported(ImportError::Withheld(message)),
            Trouble::Other(error) => error,
        })
    }

    /// `whole`: git clones all content, and the segments are filled from that.
    async fn prepare_as(&self, whole: bool) -> Result<Prepared<'a>, Trouble> {
        let supervisor = self.supervisor;
        let url = &self.request.url;
        let remote = Remote::parse(url).map_err(origin)?;
        self.progress.step("metadata");
        // These wait while git is at work; and what needs no commit is asked meanwhile.
        let importer =
            import::Waiting::start(&supervisor.store, &supervisor.cgroups, &self.directory);
        let importer = importer.map_err(imported)?;
        let mut builder = Builder::start().map_err(|e| internal("can't start the builder", &e))?;
        let beside = Git { directory: supervisor.store.owner_dir(self.mount), ..self.git.clone() };
        let shallow = self.request.history != History::Full;
        let asked = self.request.revision.as_deref().map(Revision::new);
        let revision = asked.and_then(|asked| asked.name);
        let extent = Extent { revision, shallow, whole };
        let progress = |line: &str| git_progress(self.progress, line);
        let (cloned, way, numbers) = tokio::join!(
            self.git.clone_metadata(url, &remote, extent, progress),
            async {
                let mut way = beside.way(url).await?;
                let web = way.web.take();
                let transport = if whole { &GitTransport::Pipe } else { &way.transport };
                importer.introduce(transport, web, supervisor.limits()).await?;
                Ok(way)
            },
            self.numbers(),
        );
        cloned.map_err(|e| {
            origin(match asked {
                Some(asked) => asked.explain(e),
                None => e,
            })
        })?;
        if let Some(asked) = asked {
            asked.check(&self.git).await.map_err(origin)?;
        }
        let (Way { url, remote, transport, .. }, (first_segment, tree)) =
            (way.map_err(imported)?, numbers?);
        // while the rest goes on: it waits for the disk
        let owner = supervisor.store.owner_dir(self.mount);
        let synced = tokio::task::spawn_blocking(move || {
            let mut synced = Synced::default();
            synced.sync(&owner).map(|()| synced)
        });

        self.progress.step("sizes");
        let listing = importer.list(&self.git, whole).map_err(imported)?;
        let (head, revision, conversion) =
            tokio::join!(self.git.head(), self.git.revision(), self.git.conversion());
        let head = head.map_err(origin)?;
        let revision = revision.map_err(origin)?;
        let reached = url.clone();
        let access = GitAccess::new(url, remote, self.git.clone());
        let spec = GitOrigin { hash: head.commit.kind(), transport };
        let known = supervisor.known(&self.request.url, self.owner.uid, spec.hash, whole).await?;
        let here = Remote::Local(".git".into());
        let own = GitAccess::new(access.url.clone(), here, self.git.clone());
        let job = import::Job {
            store: &supervisor.store,
            access: if whole { &own } else { &access },
            head: &head,
            known,
            conversion: conversion.map_err(origin)?,
            whole,
        };
        let progress = |_: &str, done, total| self.progress.count(done, Some(total), "objects");
        let (import, pool, tracked) = tokio::join!(
            import::import(listing, job, progress),
            self.pool(&spec, &reached),
            async { if shallow { self.git.track_all_branches().await } else { Ok(()) } },
        );
        let import = import.map_err(|error| match error {
            ImportError::Withheld(message) => Trouble::Withheld(message),
            error => imported(error).into(),
        })?;
        let (pool, cloning) = pool?;
        tracked.map_err(origin)?;
        if let Some(advice) = &import.imported.advice {
            self.progress.note(advice.clone());
        }
        if import.imported.fetched_files > 0 && !whole {
            self.progress.note(format!(
                "{} files had to be fetched for their sizes; they are kept",
                import.imported.fetched_files
            ));
        }

        self.progress.step("tree");
        let mut segments = supervisor.catalog.segments(pool.id).await.map_err(catalog)?;
        // what others lack can't be had
        segments.retain(|segment| segment.complete || !whole);
        let job = Job {
            manifest: import.manifest.clone(),
            contents: Some(import.contents.clone()),
            pool: supervisor.store.pool_dir(pool.id),
            segments: segments.iter().map(|segment| segment.id).collect(),
            first_segment,
            image: supervisor.store.image_path(tree),
            owner: builder::Owner { uid: self.owner.uid, gid: self.owner.gid },
            pack: (!whole).then(|| PackJob {
                dir: self.directory.join("pack"),
                in_repository: Some(import.in_repository.clone()),
            }),
            index: Some(IndexJob {
                index: self.directory.join(INDEX),
                ino_or: super::super::mounts::INO_OR,
            }),
        };
        let built = match builder.build(job).await {
            Ok(Reply::Built(built)) => *built,
            Ok(Reply::Failed(message)) => {
                let message = format!("can't build the tree: {message}");
                return Err(ApiError::new(ErrorCode::Origin, message).into());
            }
            Ok(Reply::BuiltLayer(_) | Reply::Proved | Reply::Refuted(_)) => {
                let message = "the builder has built something else";
                return Err(ApiError::new(ErrorCode::Internal, message).into());
            }
            Err(error) => return Err(internal("the builder failed", &error).into()),
        };
        self.install(&built).map_err(|e| internal("can't install the tree's indexes", &e))?;
        import.remove_files();
        let tree = self.enter(&pool, tree, &built, &head, revision).await?;
        if whole {
            // once a part of them is lost it can't be had again
            for segment in built.segments.iter().filter(|segment| segment.new) {
                let complete = supervisor.catalog.set_complete(segment.segment, true);
                complete.await.map_err(catalog)?;
            }
        }
        supervisor.origins.insert(pool.id, Access::Git(access));
        Ok(Prepared { pool, tree, built, synced, _cloning: cloning })
    }

    /// The number of the tree, and the first of its segments'.
    async fn numbers(&self) -> Result<(SegmentId, TreeId), ApiError> {
        let numbers = &self.supervisor.catalog;
        let segments = numbers.allocate_segments(MAX_NEW_SEGMENTS).await.map_err(catalog)?;
        let tree = numbers.allocate_tree().await.map_err(catalog)?;
        Ok((segments.first().copied().unwrap_or(SegmentId(0)), tree))
    }

    /// The pool of the origin and its directory. `reached`: its URL after `insteadOf`.
    async fn pool(&self, spec: &GitOrigin, reached: &str) -> Result<(Pool, Cloning<'a>), ApiError> {
        let supervisor = self.supervisor;
        let mut origin =
            serde_json::to_value(spec).map_err(|e| internal("can't keep the origin", &e))?;
        if let (GitTransport::Pipe, Some(origin)) = (&spec.transport, origin.as_object_mut()) {
            origin.insert(REACHED.into(), reached.into());
        }
        let pool = NewPool {
            url: self.request.url.clone(),
            owner: self.owner,
            hash: spec.hash,
            origin,
            environment: self.request.environment.clone(),
        };
        let pool = supervisor.catalog.pool_for(pool).await.map_err(catalog)?;
        let cloning = Cloning::begin(supervisor, pool.id);
        // it may have gone in between, as garbage
        if supervisor.catalog.pool(pool.id).await.map_err(catalog)?.is_none() {
            return Err(ApiError::conflict("the repository's pool was just removed")
                .with_hint("try it again"));
        }
        supervisor
            .store
            .make_pool_dir(pool.id)
            .map_err(|error| internal("can't make the pool's directory", &error))?;
        Ok((pool, cloning))
    }

    async fn enter(
        &self,
        pool: &Pool,
        tree: TreeId,
        built: &Built,
        head: &Head,
        revision: String,
    ) -> Result<Tree, ApiError> {
        let image = format!("{tree}.erofs");
        let new = built.segments.iter().filter(|segment| segment.new);
        let new = new.map(|s| NewSegment { id: s.segment, kind: s.kind, size: s.size }).collect();
        let tree = NewTree {
            id: tree,
            pool: pool.id,
            commit: head.commit,
            root: head.tree,
            revision,
            image,
            segments: built.segments.iter().map(|segment| segment.segment).collect(),
            files: built.files + built.symlinks + built.converted,
            bytes: built.tree_bytes,
            implicit: 0,
            owner: self.owner,
        };
        let id = tree.id;
        let records = &self.supervisor.catalog;
        records.insert_tree(tree, new).await.map_err(catalog)?;
        let tree = records.tree(id).await.map_err(catalog)?;
        tree.ok_or_else(|| ApiError::internal("the catalog has lost the tree"))
    }

    /// Moves the git index and that of the existence pack to where git looks for them.
    fn install(&self, built: &Built) -> io::Result<()> {
        let upper = fs::File::open(&self.git.directory)?;
        let git = beneath(upper.as_fd(), ".git", OFlag::O_DIRECTORY)?;
        let from = fs::File::open(&self.directory)?;
        nix::fcntl::renameat(&from, INDEX, &git, INDEX)?;
        if built.pack.is_none() {
            return Ok(());
        }
        let target = beneath(&git, "objects/pack", OFlag::O_DIRECTORY)?;
        let from = fs::File::open(self.directory.join("pack"))?;
        for entry in fs::read_dir(self.directory.join("pack"))? {
            let name = entry?.file_name();
            nix::fcntl::renameat(&from, name.as_os_str(), &target, name.as_os_str())?;
        }
        fs::remove_dir(self.directory.join("pack"))
    }
}

fn catalog(error: CatalogError) -> ApiError {
    internal("the catalog failed", &error)
}

/// git's own progress, such as `Receiving objects:  42% (123/290)`.
fn git_progress(progress: &ProgressSender, line: &str) {
    let Some((_, counts)) = line.split_once('(') else { return };
    let Some((counts, _)) = counts.split_once(')') else { return };
    let Some((done, total)) = counts.split_once('/') else { return };
    if let (Ok(done), Ok(total)) = (done.trim().parse(), total.trim().parse()) {
        progress.count(done, Some(total), "objects");
    }
}

fn origin(error: GitError) -> ApiError {
    let hint = match &error {
        GitError::Start { source } if source.kind() == io::ErrorKind::NotFound => {
            Some("install git")
        }
        GitError::Failed { message, .. }
            if message.contains("could not read Username")
                || message.contains("Authentication") =>
        {
            Some("store a credential where git finds it: `git config credential.helper store`")
        }
        GitError::Failed { message, .. } if message.contains("certificate") => Some(
            "name the certificate of the server, or of who has signed it: \
             `git config --global http.sslCAInfo FILE`",
        ),
        _ => None,
    };
    let error = ApiError::from_error(ErrorCode::Origin, &error);
    match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    }
}

fn imported(error: ImportError) -> ApiError {
    match error {
        ImportError::Git(error) => origin(error),
        ImportError::Origin { message, hint } => {
            let error = ApiError::new(ErrorCode::Origin, message);
            hint.map_or_else(|| error.clone(), |hint| error.clone().with_hint(hint))
        }
        error => internal("can't import the tree", &error),
    }
}
