//! `hydrant rm`: taking a tree away, but never what the user made without being told to.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use hydrant_api::{RmRequest, Summary};
use tracing::info;

use nix::fcntl::OFlag;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::clone::beneath;
use super::durable;
use super::git::{Git, GitError};
use super::queue::{milliseconds, text};
use super::target::open_directory;
use super::{Supervisor, internal, lock};
use crate::admin::{ApiError, Caller, ProgressSender};
use crate::catalog::{Mount, Tree};
use crate::mount::{self, private};
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
        if mount.image.is_some() {
            return self.remove_image_mount(&mount, &tree, request, begun).await;
        }
        let git = Git { directory: mount.directory.clone(), ..self.git_of(&mount, &pool)? };
        let was_mounted = lock(&self.live).mounts.contains_key(&mount.id);
        if !request.discard {
            self.bring_up(&mount).await?;
        }
        let mut message = None;
        if request.keep {
            self.keep(&mount, &tree, &git, progress).await?;
            message = Some(format!("{} is an ordinary repository now", mount.directory.display()));
        } else if !request.discard {
            let changes = changes(&git, &self.git_of(&mount, &pool)?.directory, &tree).await;
            if !was_mounted && !matches!(&changes, Ok(changes) if changes.is_empty()) {
                // as it was
                self.take_down(&mount).await?;
            }
            let changes = changes.map_err(|e| internal("can't look for changes", &e))?;
            if !changes.is_empty() {
                return Err(refusal(&mount, &changes));
            }
        }
        self.take_down(&mount).await?;
        if request.keep {
            finish_repository(&git)
                .await
                .map_err(|e| internal("can't finish the repository", &e))?;
            // before the only other copy of what the user made goes
            let directory = mount.directory.clone();
            let synced = tokio::task::spawn_blocking(move || durable::sync_file_system(&directory));
            let synced = synced.await.map_err(io::Error::other).and_then(|synced| synced);
            synced.map_err(|e| internal("can't make the repository durable", &e))?;
        }
        self.forget_mount(&mount, request.keep).await?;
        Ok(Summary {
            files: tree.files,
            tree_bytes: tree.bytes,
            fetched_bytes: 0,
            elapsed_ms: milliseconds(begun.elapsed()),
            message,
        })
    }

    /// The mount of a container image, which is no repository.
    async fn remove_image_mount(
        &self,
        mount: &Mount,
        tree: &Tree,
        request: &RmRequest,
        begun: Instant,
    ) -> Result<Summary, ApiError> {
        if request.keep {
            return Err(ApiError::invalid("an image's mount can't be kept: it is no repository"));
        }
        if !request.discard {
            let changes = self.changes_of_image(mount);
            let changes = changes.map_err(|e| internal("can't look for changes", &e))?;
            if !changes.is_empty() {
                let mut error = refusal(mount, &changes);
                error.hint = Some("--discard throws them away".into());
                return Err(error);
            }
        }
        self.take_down(mount).await?;
        self.forget_mount(mount, false).await?;
        let (files, tree_bytes) = (tree.files, tree.bytes);
        let elapsed_ms = milliseconds(begun.elapsed());
        Ok(Summary { files, tree_bytes, elapsed_ms, ..Summary::default() })
    }

    /// Removes all that there is of an unmounted tree. `keep`: but its directory.
    async fn forget_mount(&self, mount: &Mount, keep: bool) -> Result<(), ApiError> {
        // should we not get to the end; a full disk must not stand in the way
        durable::mark_disposable(&self.store.mount_dir(mount.id)).ok();
        let failed = |error| internal("can't forget the mount", &error);
        self.catalog.remove_mount(mount.id).await.map_err(failed)?;
        let upper = self.store.mount_dir(mount.id);
        if let Err(error) = durable::remove(upper.clone()).await {
            return Err(internal(&format!("can't remove {}", upper.display()), &error));
        }
        if !keep {
            // somebody else's mount point, or gone: no matter
            remove_target(&mount.directory).ok();
        }
        self.collect_garbage().await;
        info!(mount = %mount.id, directory = %mount.directory.display(), keep, "removed");
        Ok(())
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
        progress.step("history");
        self.finish_history(mount.id).await;
        progress.step("copy");
        if let Some(pack) = &mount.pack {
            let objects = self.objects_of_pack(tree).await?;
            own_objects(git, pack, &objects)
                .await
                .map_err(|e| internal("can't pack the objects", &e))?;
        }
        let cant = |error: io::Error| internal("can't copy the tree", &error);
        // nobody can change it once it is unmounted; we go on reading through a mount of our own
        let tree_mount = private::PrivateMount::new(&mount.directory)
            .map_err(|error| internal("can't copy the tree", &error))?;
        self.take_down(mount).await?;
        progress.count(0, Some(tree.files), "files");
        let copied = copy_to(&tree_mount, &mount.directory, git).await;
        drop(tree_mount);
        let Err(error) = copied else { return Ok(()) };
        self.bring_up(mount).await?;
        Err(cant(error))
    }
}

/// Copies a tree to an empty directory, as the user. A failure leaves it empty.
async fn copy_to(tree: &private::PrivateMount, directory: &Path, git: &Git) -> io::Result<()> {
    let target = open_directory(directory)?;
    if !mount::is_empty(target.as_fd())? {
        let message = format!("below the mount, {} is not empty", directory.display());
        return Err(io::Error::other(message));
    }
    let root = tree.as_fd().try_clone_to_owned()?;
    let output = user::command("cp", &git.user, &[], root)?
        .args(["--archive", "--reflink=auto", "--", "."])
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .await?;
    if output.status.success() {
        return Ok(());
    }
    // a part of a copy would be in the way of the next mount, and get mixed with the next copy
    let args = [".", "-xdev", "-mindepth", "1", "-delete"];
    let mut find = user::command("find", &git.user, &[], target)?;
    find.args(args).stdin(Stdio::null()).output().await?;
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
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

/// Gives the repository a pack of its own for what the existence pack stands for: these objects.
async fn own_objects(git: &Git, pack: &str, objects: &[ObjectId]) -> Result<(), GitError> {
    let ids: String = objects.iter().map(|id| format!("{id}\n")).collect();
    // entries of the existence pack are not compressed
    let args = ["pack-objects", "--quiet", "--no-reuse-object", ".git/objects/pack/pack"];
    git.output_of(&args, ids.as_bytes()).await?;
    let io = |source| GitError::Start { source };
    let root = open_directory(&git.directory).map_err(io)?;
    let packs = beneath(&root, ".git/objects/pack", OFlag::O_DIRECTORY).map_err(io)?;
    for suffix in ["keep", "idx", "rev", "promisor", "pack"] {
        let name = format!("{pack}.{suffix}");
        // it is gone in the user's view; the image below doesn't change
        match unlinkat(&packs, name.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(nix::Error::ENOENT) => {}
            Err(errno) => return Err(io(errno.into())),
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
    // of an origin on this machine: unless the user has set another one since
    let (name, ours) = ("remote.origin.uploadpack", super::git::LOCAL_UPLOAD_PACK);
    git.output(&["config", "--unset-all", "--fixed-value", name, ours]).await.ok();
    // the files are others, with the same content
    git.output(&["update-index", "-q", "--refresh"]).await.ok();
    Ok(())
}

/// What the user made: files that differ, commits that are nowhere else, stashes. Whatever the user's
/// configuration keeps out of sight in `git status`.
async fn changes(git: &Git, upper: &Path, tree: &Tree) -> Result<Vec<String>, GitError> {
    const HERE: [&str; 4] = ["--git-dir=.git", "--work-tree=.", "-c", "core.fsmonitor=false"];
    let status = ["status", "--porcelain", "--ignored", "-z"];
    let all = ["--untracked-files=normal", "--ignore-submodules=none"];
    let status = git.output(&[&HERE[..], &status, &all].concat()).await?;
    let mut changes: Vec<_> =
        status.split(|b| *b == 0).filter(|entry| !entry.is_empty()).map(text).collect();

    let listed = git.output(&[&HERE[..], &["ls-files", "-v", "-z"]].concat()).await?;
    let written = unlooked(&listed, upper).map_err(|source| GitError::Start { source })?;
    changes.extend(written.iter().map(|path| format!("file that git doesn't look at: {path}")));

    // a commit that only a tag of the user's own leads to is nowhere else either
    let format = "--format=%(objectname) %(*objectname)";
    let tags = git.output(&[&HERE[..], &["for-each-ref", format, "refs/tags"]].concat()).await?;
    let mut known = format!("^{}\n", tree.commit);
    for line in String::from_utf8_lossy(&tags).lines() {
        let id = line.split(' ').rfind(|id| !id.is_empty()).unwrap_or_default();
        if ObjectId::from_hex(id.as_bytes()).is_ok() && !is_loose(git, id) {
            known.push_str(&format!("^{id}\n"));
        }
    }
    let log = ["log", "--max-count=1000", "--format=%h %s", "--branches", "--tags", "HEAD"];
    let log = [&HERE[..], &log, &["--stdin", "--not", "--remotes"]].concat();
    let commits = git.output_of(&log, known.as_bytes()).await?;
    let stash = ["stash", "list", "--format=%gd %s"];
    let stashes = git.output(&[&HERE[..], &stash].concat()).await?;
    for (what, lines) in [("commit", commits), ("stash", stashes)] {
        let lines = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        changes.extend(lines.map(|line| format!("{what} {}", text(line))));
    }
    Ok(changes)
}

/// Files that have been written and that git was told to take for unchanged (`ls-files -v`:
/// `assume-unchanged` in lower case, `skip-worktree` is `S`).
fn unlooked(listed: &[u8], upper: &Path) -> io::Result<Vec<String>> {
    let upper = fs::File::open(upper)?;
    let written = |path: &[u8]| {
        let found = beneath(&upper, Path::new(OsStr::from_bytes(path)), OFlag::O_PATH);
        let metadata = found.and_then(|fd| fs::File::from(fd).metadata());
        metadata.is_ok_and(|metadata| metadata.is_file())
    };
    let entries = listed.split(|b| *b == 0).filter_map(|entry| match entry {
        [tag, b' ', path @ ..] if *tag == b'S' || tag.is_ascii_lowercase() => Some(path),
        _ => None,
    });
    Ok(entries.filter(|path| written(path)).map(text).collect())
}

/// What comes from a promisor comes as a pack, and nothing packs what is made here (`gc.auto`).
fn is_loose(git: &Git, id: &str) -> bool {
    let (directory, name) = id.split_at(2);
    let objects = git.directory.join(".git/objects");
    objects.join(directory).join(name).symlink_metadata().is_ok()
}

/// Removes the empty directory that a tree was mounted on.
fn remove_target(directory: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Ok(());
    };
    // without links, as when it was mounted: not in another place that its owner leads us to
    Ok(unlinkat(open_directory(parent)?, name, UnlinkatFlags::RemoveDir)?)
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
