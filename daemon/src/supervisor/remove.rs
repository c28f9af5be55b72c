//! `hydrant rm`: taking a tree away, but never what the user made without being told to.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use hydrant_api::{ErrorCode, RmRequest, Summary};
use tracing::info;

use super::git::{Git, GitError};
use super::queue::{milliseconds, text};
use super::{Supervisor, internal};
use crate::admin::{ApiError, Caller, ProgressSender};
use crate::catalog::{Mount, Tree};
use crate::mount::private;
use crate::object::ObjectId;
use crate::segment::SegmentKind;
use crate::sys::user;

/// Changes that are listed; the rest is counted.
const LISTED: usize = 20;

impl Supervisor {
    pub(super) async fn remove_request(
        &self,
        caller: &Caller,
        request: &RmRequest,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        let begun = Instant::now();
        let mount = self.callers_mount(caller, &request.directory).await?;
        let _busy = self.begin(&mount.directory)?;
        let (tree, pool) = self.tree_of(&mount).await?;
        let git = Git { directory: mount.directory.clone(), ..self.git_of(&mount, &pool)? };
        if !request.discard {
            self.bring_up(&mount).await?;
        }
        let mut message = None;
        if request.keep {
            self.keep(&mount, &tree, &git, progress).await?;
            message = Some(format!("{} is an ordinary repository now", mount.directory.display()));
        } else if !request.discard {
            let changes =
                changes(&git).await.map_err(|e| internal("can't look for changes", &e))?;
            if !changes.is_empty() {
                return Err(refusal(&mount, &changes));
            }
        }
        self.take_down(&mount).await?;
        if request.keep {
            finish_repository(&git)
                .await
                .map_err(|e| internal("can't finish the repository", &e))?;
        }
        let failed = |error| internal("can't forget the mount", &error);
        self.catalog.remove_mount(mount.id).await.map_err(failed)?;
        let upper = self.store.mount_dir(mount.id);
        if let Err(error) = fs::remove_dir_all(&upper)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(internal(&format!("can't remove {}", upper.display()), &error));
        }
        if !request.keep {
            // somebody else's mount point, or gone: no matter
            fs::remove_dir(&mount.directory).ok();
        }
        self.collect_garbage().await;
        info!(mount = %mount.id, directory = %mount.directory.display(), keep = request.keep, "removed");
        Ok(Summary {
            files: tree.files,
            tree_bytes: tree.bytes,
            fetched_bytes: 0,
            elapsed_ms: milliseconds(begun.elapsed()),
            message,
        })
    }

    /// Puts an ordinary repository where the tree is mounted: below the mount for now.
    async fn keep(
        &self,
        mount: &Mount,
        tree: &Tree,
        git: &Git,
        progress: &ProgressSender,
    ) -> Result<(), ApiError> {
        self.prefetch_below(mount, Path::new(""), progress).await?;
        progress.step("copy");
        if let Some(pack) = &mount.pack {
            let objects = self.objects_of_pack(tree).await?;
            own_objects(git, pack, &objects)
                .await
                .map_err(|e| internal("can't pack the objects", &e))?;
        }
        let below = below_mount(&mount.directory)
            .map_err(|error| internal("can't reach below the mount", &error))?;
        progress.count(0, Some(tree.files), "files");
        let output = user::command("cp", &git.user, &[], below)
            .map_err(|error| internal("can't copy the tree", &error))?
            .args(["--archive", "--reflink=auto", "--"])
            .arg(mount.directory.join("."))
            .arg(".")
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|error| internal("can't copy the tree", &error))?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(ApiError::new(ErrorCode::Internal, format!("can't copy the tree: {}", stderr.trim())))
    }
}

impl Supervisor {
    /// The objects that a tree's existence pack stands for.
    async fn objects_of_pack(&self, tree: &Tree) -> Result<Vec<ObjectId>, ApiError> {
        let failed = |error| internal("can't read the catalog", &error);
        let segments = self.catalog.segments(tree.pool).await.map_err(failed)?;
        let mut objects = Vec::new();
        for segment in segments {
            if segment.kind == SegmentKind::Pack && tree.segments.contains(&segment.id) {
                let extents = self.store.extents(tree.pool, segment.id);
                let extents = extents.map_err(|e| internal("can't list the objects", &e))?;
                objects.extend(extents.iter().map(|extent| extent.key));
            }
        }
        Ok(objects)
    }
}

/// The empty directory that a tree is mounted on.
fn below_mount(directory: &Path) -> io::Result<OwnedFd> {
    let parent = directory.parent().unwrap_or(Path::new("/"));
    let name = directory.file_name().ok_or_else(|| io::Error::other("not a directory's name"))?;
    // a clone of the mount that the parent is on: without what is mounted below
    let clone = private::PrivateMount::new(parent).map_err(io::Error::other)?;
    let flags = nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_RDONLY;
    clone.open(Path::new(name), flags).map_err(|error| error.source)
}

/// Gives the repository a pack of its own for what the existence pack stands for: these objects.
async fn own_objects(git: &Git, pack: &str, objects: &[ObjectId]) -> Result<(), GitError> {
    let ids: String = objects.iter().map(|id| format!("{id}\n")).collect();
    git.output_of(&["pack-objects", "--quiet", ".git/objects/pack/pack"], ids.as_bytes()).await?;
    for suffix in ["keep", "idx", "rev", "promisor", "pack"] {
        let name = format!("{pack}.{suffix}");
        let path = git.directory.join(".git/objects/pack").join(name);
        // it is gone in the user's view; the image below doesn't change
        if let Err(source) = fs::remove_file(path)
            && source.kind() != io::ErrorKind::NotFound
        {
            return Err(GitError::Start { source });
        }
    }
    Ok(())
}

/// Takes back what was configured for a lazy tree.
async fn finish_repository(git: &Git) -> Result<(), GitError> {
    for setting in super::git::CONFIG {
        let name = setting.split('=').next().unwrap_or(setting);
        git.output(&["config", "--unset-all", name]).await.ok();
    }
    // the files are others, with the same content
    git.output(&["update-index", "-q", "--refresh"]).await.ok();
    Ok(())
}

/// What the user made: files that differ, commits that are nowhere else, stashes.
async fn changes(git: &Git) -> Result<Vec<String>, GitError> {
    let mut changes = Vec::new();
    let status = git.output(&["status", "--porcelain", "--ignored", "-z"]).await?;
    changes.extend(status.split(|b| *b == 0).filter(|e| !e.is_empty()).map(text));
    for (what, args) in [
        (
            "commit",
            &["log", "--format=%h %s", "--branches", "HEAD", "--not", "--remotes", "--tags"][..],
        ),
        ("stash", &["stash", "list", "--format=%gd %s"][..]),
    ] {
        let lines = git.output(args).await?;
        let lines = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        changes.extend(lines.map(|line| format!("{what} {}", text(line))));
    }
    Ok(changes)
}

fn refusal(mount: &Mount, changes: &[String]) -> ApiError {
    let mut message = format!("{} has changes:", mount.directory.display());
    for change in changes.iter().take(LISTED) {
        message.push_str("\n  ");
        message.push_str(change);
    }
    if changes.len() > LISTED {
        message.push_str(&format!("\n  and {} more", changes.len() - LISTED));
    }
    ApiError::conflict(message)
        .with_hint("--discard throws them away, --keep leaves an ordinary repository")
}
