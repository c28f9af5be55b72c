//! Mounts: bringing trees up and taking them down.
//!
//! The order is what keeps readers from ever seeing a hole: attach the segments to their shard (the
//! worker has them, they are marked), *then* mount. And back: unmount, and leave the marks where
//! they are as long as somebody, such as a container with mounts of its own, may still see the tree.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hydrant_api::{ErrorCode, UmountRequest, path_from_text};
use tracing::{error, info, warn};

use super::clone::Cloning;
use super::durable;
use super::git::{Git, Remote};
use super::images;
use super::origins::{Access, GitAccess, REACHED};
use super::shard::Command;
use super::snapshots;
use super::store::Store;
use super::target::{Target, canonical};
use super::{Supervisor, blocking, history, internal, lock, require_owner, shard_of};
use crate::admin::{ApiError, Caller};
use crate::builder::pack;
use crate::catalog::{Catalog, CatalogError, Mount, Pool, Tree};
use crate::ids::{MountId, PoolId, SegmentId, ShardId, TreeId};
use crate::mount::{self, DetachedMount, Layers, MountPoint, TreeMount, Unmount, UnmountError};
use crate::queue::wire::{GitOrigin, OriginSpec};
use crate::segment::SegmentKind;
use crate::sys::user::User;

/// A tree that is mounted.
#[derive(Debug, Clone)]
pub struct Live {
    /// Of each of its layers.
    pub pools: Vec<PoolId>,
    pub directory: PathBuf,
}

/// The trees that a mount shows, with their pools, the lowest first. One, but for a container image.
pub type Trees = Vec<(Tree, Pool)>;

fn pools_of(trees: &[(Tree, Pool)]) -> Vec<PoolId> {
    trees.iter().map(|(_, pool)| pool.id).collect()
}

/// All trees that are mounted.
#[derive(Debug, Default)]
pub struct LiveMounts {
    pub mounts: HashMap<MountId, Live>,
    /// Layers that are mounted for containerd, and their pools.
    pub layers: HashMap<TreeId, PoolId>,
    /// The daemon is about to end: there are no new ones.
    pub stopping: bool,
}

impl LiveMounts {
    /// The pools of all that is mounted.
    pub fn pools(&self) -> impl Iterator<Item = PoolId> {
        let mounts = self.mounts.values().flat_map(|live| live.pools.iter().copied());
        mounts.chain(self.layers.values().copied())
    }
}

/// The waits before another look at a segment that is not used, and open; they double.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Removes a segment. `false`: it is open somewhere.
fn try_to_remove(store: &Store, pool: PoolId, segment: SegmentId) -> bool {
    match store.remove_unused(pool, segment) {
        Ok(removed) => return removed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => warn!(%pool, %segment, %error, "can't remove a segment that is not used"),
    }
    true
}

/// What `st_ino` of a file of the image has besides its number there (`xino` of overlayfs).
pub const INO_OR: u64 = 1 << 63;

/// Whether a mount is that of the tree whose changes are in `upper`.
fn ours(upper: &Path) -> impl Fn(&MountPoint) -> bool + use<> {
    // as the kernel shows it
    let upper = fs::canonicalize(upper).unwrap_or_else(|_| upper.to_owned());
    move |mount| mount.is_hydrant() && mount.upper.as_deref() == Some(&upper)
}

/// Where the tree is mounted whose changes are in `upper`.
pub(super) fn find(upper: &Path) -> Option<PathBuf> {
    let ours = ours(upper);
    mount::mounts().ok()?.into_iter().find(ours).map(|mount| mount.path)
}

/// The existence pack of a tree, where it has an image of its own: its segment is the tree's last. In
/// trees that were made before it was so it is a file of the tree's image.
fn own_pack(tree: &mut mount::Image) -> std::io::Result<Option<mount::Image>> {
    let image = pack::image_path(&tree.image);
    Ok(match image.try_exists()? {
        true => tree.devices.pop().map(|segment| mount::Image { image, devices: vec![segment] }),
        false => None,
    })
}

pub(super) type Attached = tokio::sync::oneshot::Receiver<Result<(), String>>;

pub(super) async fn all_attached(replies: Vec<Attached>) -> Result<(), ApiError> {
    for answer in replies {
        match answer.await {
            Ok(Ok(())) => {}
            Ok(Err(message)) => return Err(ApiError::internal(message)),
            Err(_) => return Err(ApiError::internal("the shard has ended")),
        }
    }
    Ok(())
}

/// A git that fetched a tree's history ends with its supervisor, which takes a moment.
const HISTORY_ENDS: Duration = Duration::from_secs(2);

/// Unmounts what supervisors have left whose groups are gone.
pub async fn clear_unguarded(
    catalog: &Catalog,
    store: &Store,
    guarded: &HashSet<ShardId>,
    shards: u16,
) {
    snapshots::clear_unguarded_layers(catalog, store, guarded, shards).await;
    let mounts = match catalog.mounts().await {
        Ok(mounts) => mounts,
        Err(error) => {
            error!(%error, "can't read which trees were mounted");
            return;
        }
    };
    let until = Instant::now() + HISTORY_ENDS;
    for mount in mounts {
        let pools = pools_shown(catalog, &mount).await.unwrap_or_default();
        let is_guarded = |pool| shard_of(pool, shards).is_some_and(|s| guarded.contains(&s));
        if !pools.is_empty() && pools.into_iter().all(is_guarded) {
            continue;
        }
        let upper = store.upper_dir(mount.id);
        if let Err(error) = clear_leftover(&mount.directory, &upper, until) {
            error!(mount = %mount.id, directory = %mount.directory.display(), %error,
                "a tree that was left unguarded can't be unmounted: what is read there may be zeros");
        }
    }
}

/// The pools of all that a mount shows.
async fn pools_shown(catalog: &Catalog, mount: &Mount) -> Result<Vec<PoolId>, CatalogError> {
    let mut trees = vec![mount.tree];
    if let Some(id) = mount.image
        && let Some(image) = catalog.image(id).await?
    {
        trees = image.layers.into_iter().map(|(tree, _)| tree).collect();
    }
    let mut pools = Vec::with_capacity(trees.len());
    for tree in trees {
        pools.extend(catalog.tree(tree).await?.map(|tree| tree.pool));
    }
    Ok(pools)
}

/// A daemon that was killed, with all that could have kept its groups, has left its mount: nothing
/// guarded it since, so what it shows can't be trusted.
fn clear_leftover(directory: &Path, upper: &Path, until: Instant) -> Result<(), ApiError> {
    let ours = ours(upper);
    let found = mount::mounted_at(directory).ok().flatten();
    if !found.as_ref().is_some_and(&ours) {
        return Ok(());
    }
    warn!(directory = %directory.display(), "nothing guarded this tree since the daemon was killed");
    let cant = |error| internal("can't unmount what a killed daemon left", &error);
    let mut result = mount::unmount(directory, Unmount::Idle, &ours);
    while matches!(result, Err(UnmountError::Busy { .. })) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
        result = mount::unmount(directory, Unmount::Idle, &ours);
    }
    match result {
        Err(UnmountError::Busy { users, .. }) => {
            let pids: Vec<_> = users.iter().map(|user| user.pid).collect();
            error!(directory = %directory.display(), ?pids,
                "the daemon was killed while this tree was in use: processes that go on using it \
                 may have read zeros; end them");
            mount::unmount(directory, Unmount::Lazy, &ours).map_err(cant)?;
            // a second overlay on the same `upper` beside the first would damage it
            Err(ApiError::conflict(format!(
                "{} was in use when the daemon was killed, by the processes {pids:?}",
                directory.display()
            ))
            .with_hint("end them, then `hydrant mount` it"))
        }
        result => result.map_err(cant),
    }
}

/// Sees to it that a tree is mounted nowhere: two mounts of one tree would damage it.
fn not_mounted(directory: &Path, layers: Layers<'_>) -> Result<(), ApiError> {
    clear_leftover(directory, layers.upper, Instant::now() + HISTORY_ENDS)?;
    if let Some(elsewhere) = find(layers.upper) {
        let message = format!("the tree is still mounted, at {}", elsewhere.display());
        return Err(ApiError::conflict(message).with_hint("unmount it there first"));
    }
    match mount::in_use(layers) {
        Ok(false) => Ok(()),
        Ok(true) => Err(ApiError::conflict(
            "the tree is mounted nowhere any more, but processes go on using it, or another mount \
             namespace has it",
        )
        .with_hint("end them, then `hydrant mount` it")),
        // the mount will say what is wrong
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "can't ask whether a tree is in use");
            Ok(())
        }
    }
}

impl Supervisor {
    pub(super) async fn mount_at(&self, directory: &Path) -> Result<Option<Mount>, ApiError> {
        let found = self.catalog.mount_by_directory(directory).await;
        found.map_err(|error| internal("can't read the catalog", &error))
    }

    /// The mount at a directory, for somebody who may change it.
    pub(super) async fn callers_mount(
        &self,
        caller: &Caller,
        directory: &str,
    ) -> Result<Mount, ApiError> {
        let path = path_from_text(directory);
        let mut found = self.mount_at(&path).await?;
        if found.is_none()
            && let Ok(path) = blocking(move || canonical(&path)).await
        {
            found = self.mount_at(&path).await?;
        }
        let mount = found.ok_or_else(|| {
            ApiError::not_found(format!("{directory} is no tree of Hydrant's"))
                .with_hint("`hydrant ls` lists them")
        })?;
        require_owner(caller, mount.owner, directory)?;
        Ok(mount)
    }

    /// The tree of a mount; of an image, that of the uppermost layer.
    pub(super) async fn tree_of(&self, mount: &Mount) -> Result<(Tree, Pool), ApiError> {
        self.tree_and_pool(mount.tree).await
    }

    pub(super) async fn tree_and_pool(&self, id: TreeId) -> Result<(Tree, Pool), ApiError> {
        let failed = |error| internal("can't read the catalog", &error);
        let lost = || ApiError::internal("the catalog has lost the tree; remove and clone it anew");
        let tree = self.catalog.tree(id).await.map_err(failed)?.ok_or_else(lost)?;
        let pool = self.catalog.pool(tree.pool).await.map_err(failed)?.ok_or_else(lost)?;
        Ok((tree, pool))
    }

    /// All that a mount shows.
    pub(super) async fn trees_of(&self, mount: &Mount) -> Result<Trees, ApiError> {
        let Some(id) = mount.image else { return Ok(vec![self.tree_of(mount).await?]) };
        let failed = |error| internal("can't read the catalog", &error);
        let lost =
            || ApiError::internal("the catalog has lost the image; remove and mount it anew");
        let image = self.catalog.image(id).await.map_err(failed)?.ok_or_else(lost)?;
        let mut trees = Vec::with_capacity(image.layers.len());
        for (tree, _) in image.layers {
            trees.push(self.tree_and_pool(tree).await?);
        }
        Ok(trees)
    }

    /// Takes the trees' segments into service and makes their mount, in no place yet. `fresh`: for the
    /// first time.
    pub(super) async fn make_mount(
        &self,
        mount: &Mount,
        trees: &[(Tree, Pool)],
        fresh: bool,
    ) -> Result<DetachedMount, ApiError> {
        self.serve(trees).await?;
        let store = Arc::clone(&self.store);
        let directory = self.store.mount_dir(mount.id);
        let image = |(tree, pool): &(Tree, Pool)| mount::Image {
            image: store.root().join("trees").join(&tree.image),
            devices: tree.segments.iter().map(|id| store.data_path(pool.id, *id)).collect(),
        };
        let mut images = trees.iter().rev().map(image);
        let mut top = images.next().ok_or_else(|| ApiError::internal("the mount has no tree"))?;
        let below: Vec<_> = images.collect();
        let pack = own_pack(&mut top)
            .map_err(|error| internal("can't look for the image of the existence pack", &error))?;
        let (upper, work) = (store.upper_dir(mount.id), directory.join("work"));
        let (read_only, restricted) = (mount.read_only, mount.owner.uid != 0);
        // mounting reads the image
        let made = tokio::task::spawn_blocking(move || {
            let layers = Some(Layers { upper: &upper, work: &work });
            let mount::Image { image, devices } = &top;
            let (pack, below) = (pack.as_ref(), &below[..]);
            let tree =
                TreeMount { image, devices, pack, below, fresh, layers, read_only, restricted };
            mount::mount(&tree)
        })
        .await;
        let made = made.map_err(|error| internal("can't mount the tree", &error))?;
        made.map_err(|error| {
            let error = internal("can't mount the tree", &error);
            ApiError { code: ErrorCode::Unsupported, ..error }
                .with_hint("`hydrant doctor` checks what this machine can do")
        })
    }

    /// Attaches all segments of a tree to its shard: marked, and in the worker's hands.
    pub(super) async fn serve(&self, trees: &[(Tree, Pool)]) -> Result<(), ApiError> {
        all_attached(self.attach_trees(trees)?).await
    }

    pub(super) fn attach_trees(&self, trees: &[(Tree, Pool)]) -> Result<Vec<Attached>, ApiError> {
        let mut replies = Vec::new();
        for (tree, pool) in trees {
            replies.extend(self.attach_segments(tree, pool)?);
        }
        Ok(replies)
    }

    fn attach_segments(&self, tree: &Tree, pool: &Pool) -> Result<Vec<Attached>, ApiError> {
        if let Some(refusal) = images::refusal(tree)
            && lock(&self.live).layers.contains_key(&tree.id)
        {
            // containerd has it: it is not to be filled again
            return Err(refusal);
        }
        let shard = self.shard(pool.id)?;
        let cant = |error| internal("can't read the pool's origin", &error);
        let origin = if images::is_layer(pool) {
            OriginSpec::Layer(Box::new(self.layer_origin(pool)?.0))
        } else {
            OriginSpec::Git(serde_json::from_value(pool.origin.clone()).map_err(cant)?)
        };
        shard.send(Command::Pool { pool: pool.id, origin, limits: self.limits() });
        let attach = |segment: &SegmentId| {
            let (reply, answer) = tokio::sync::oneshot::channel();
            shard.send(Command::Attach { pool: pool.id, segment: *segment, reply });
            answer
        };
        Ok(tree.segments.iter().map(attach).collect())
    }

    /// Attaches what has been mounted, in its place, all the time. Nobody waits for that but who reads.
    pub(super) fn attach_again(
        &self,
        place: &Path,
        trees: &[(Tree, Pool)],
    ) -> Result<(), ApiError> {
        let mut replies = Vec::new();
        for (tree, pool) in trees {
            match self.attach_segments(tree, pool) {
                Ok(attached) => replies.extend(attached),
                // the others are served all the same
                Err(error) if tree.refuted.is_some() => {
                    error!(place = %place.display(), %error, "a layer is not served");
                }
                Err(error) => return Err(error),
            }
        }
        let (place, live) = (place.to_owned(), Arc::clone(&self.live));
        tokio::spawn(async move {
            if let Err(error) = all_attached(replies).await
                // it is the next supervisor's by now
                && !lock(&live).stopping
            {
                error!(place = %place.display(), %error, "can't serve all of what is mounted");
            }
        });
        Ok(())
    }

    /// Puts a mount in its place. Segments that need no events lose their marks.
    pub(super) fn attach_mount(
        &self,
        mount: &Mount,
        trees: &[(Tree, Pool)],
        detached: DetachedMount,
        target: BorrowedFd<'_>,
    ) -> Result<(), ApiError> {
        let mut live = lock(&self.live);
        if live.stopping {
            return Err(ApiError::conflict("Hydrant is stopping"));
        }
        detached.attach(target).map_err(|error| internal("can't attach the mount", &error))?;
        let this = Live { pools: pools_of(trees), directory: mount.directory.clone() };
        live.mounts.insert(mount.id, this);
        Ok(())
    }

    pub(super) async fn unmark_complete(&self, tree: &Tree) -> Result<(), ApiError> {
        let shard = self.shard(tree.pool)?;
        let segments = self.catalog.segments_of(tree).await;
        let segments = segments.map_err(|error| internal("can't read the catalog", &error))?;
        for segment in segments.iter().filter(|segment| segment.complete) {
            shard.send(Command::Unmark { segment: segment.id });
        }
        Ok(())
    }

    /// Mounts a tree whose files are there.
    pub(super) async fn bring_up(&self, mount: &Mount) -> Result<(), ApiError> {
        if lock(&self.live).mounts.contains_key(&mount.id) {
            return Ok(());
        }
        let trees = self.trees_of(mount).await?;
        let _not_evicted = self.eviction.read().await;
        let _in_use: Vec<_> = trees.iter().map(|(_, pool)| Cloning::begin(self, pool.id)).collect();
        for (_, pool) in &trees {
            self.introduce_origin(mount, pool)?;
        }
        if self.is_guarded(mount, &pools_of(&trees)).await {
            self.adopt(mount, &trees)?;
        } else {
            let (directory, upper) = (mount.directory.clone(), self.store.upper_dir(mount.id));
            let work = self.store.mount_dir(mount.id).join("work");
            let place = self.store.mount_dir(mount.id);
            let fetching = history::is_wanted(mount);
            blocking(move || {
                not_mounted(&directory, Layers { upper: &upper, work: &work })?;
                if fetching && let Err(error) = history::restore(&place, &upper) {
                    warn!(%error, upper = %upper.display(), "can't put .git/shallow back");
                }
                Ok(())
            })
            .await?;
            // marked by a removal that failed: from now on somebody may write into it again
            durable::keep(&self.store.mount_dir(mount.id))
                .map_err(|error| internal("can't keep the tree", &error))?;
            let target = Target::existing(&mount.directory, mount.owner).await?;
            let detached = self.make_mount(mount, &trees, false).await?;
            self.attach_mount(mount, &trees, detached, target.fd.as_fd())?;
        }
        for (tree, _) in &trees {
            self.unmark_complete(tree).await?;
        }
        if mount.image.is_some() {
            self.fill_in_background(&trees, images::Wanted::Pulled).await;
        }
        info!(mount = %mount.id, directory = %mount.directory.display(), "mounted");
        if history::is_wanted(mount)
            && let Some((_, pool)) = trees.last()
        {
            self.fetch_history(mount.id, self.git_of(mount, pool)?);
        }
        Ok(())
    }

    /// It is mounted, and its group has been open all the time.
    async fn is_guarded(&self, mount: &Mount, pools: &[PoolId]) -> bool {
        if pools.is_empty() || !pools.iter().all(|pool| self.kept.contains(&self.shard_id(*pool))) {
            return false;
        }
        let (directory, upper) = (mount.directory.clone(), self.store.upper_dir(mount.id));
        let look = move || {
            Ok(mount::mounted_at(&directory).ok().flatten().as_ref().is_some_and(ours(&upper)))
        };
        blocking(look).await.unwrap_or(false)
    }

    /// Goes on with a mount that a supervisor before this one has made. Nobody has to wait for the
    /// worker: the segments are marked, and who reads waits.
    fn adopt(&self, mount: &Mount, trees: &[(Tree, Pool)]) -> Result<(), ApiError> {
        self.attach_again(&mount.directory, trees)?;
        let live = Live { pools: pools_of(trees), directory: mount.directory.clone() };
        lock(&self.live).mounts.insert(mount.id, live);
        Ok(())
    }

    pub(super) fn git_of(&self, mount: &Mount, pool: &Pool) -> Result<Git, ApiError> {
        let user = User::lookup(mount.owner.uid, mount.owner.gid)
            .map_err(|error| internal("can't look the user up", &error))?;
        let directory = self.store.upper_dir(mount.id);
        Ok(Git { user, environment: pool.environment.clone(), directory })
    }

    pub(super) fn introduce_origin(&self, mount: &Mount, pool: &Pool) -> Result<(), ApiError> {
        if images::is_layer(pool) {
            return self.introduce_layer(pool);
        }
        if self.origins.knows(pool.id) {
            return Ok(());
        }
        let git = self.git_of(mount, pool)?;
        let origin: GitOrigin = serde_json::from_value(pool.origin.clone())
            .map_err(|error| internal("can't read the pool's origin", &error))?;
        // older catalogs don't have it
        let reached = pool.origin.get(REACHED).and_then(|url| url.as_str()).unwrap_or(&pool.url);
        let remote = match &origin.transport {
            crate::queue::wire::GitTransport::Http(http) => Remote::Http(http.url.clone()),
            crate::queue::wire::GitTransport::Pipe => match Remote::parse(reached) {
                Ok(Remote::Http(_)) | Err(_) => Remote::Local(git.directory.join(".git")),
                Ok(remote) => remote,
            },
        };
        let url = match &remote {
            Remote::Http(url) => url.clone(),
            Remote::Local(_) | Remote::Ssh { .. } => reached.to_owned(),
        };
        self.origins.insert(pool.id, Access::Git(GitAccess::new(url, remote, git)));
        Ok(())
    }

    /// As [`introduce_origin`](Self::introduce_origin), for a layer.
    pub(super) fn introduce_layer(&self, pool: &Pool) -> Result<(), ApiError> {
        let (_, access) = self.layer_origin(pool)?;
        self.origins.insert(pool.id, Access::Registry(access));
        Ok(())
    }

    pub(super) async fn mount_again(
        &self,
        caller: &Caller,
        directory: &str,
    ) -> Result<hydrant_api::Mount, ApiError> {
        let mount = self.callers_mount(caller, directory).await?;
        let _busy = self.begin(&mount.directory)?;
        self.bring_up(&mount).await?;
        self.set_mounted(&mount, true).await?;
        self.describe(&Mount { mounted: true, ..mount }).await
    }

    pub(super) async fn set_mounted(&self, mount: &Mount, mounted: bool) -> Result<(), ApiError> {
        let set = self.catalog.set_mounted(mount.id, mounted).await;
        set.map_err(|error| internal("can't note it in the catalog", &error))
    }

    pub(super) async fn umount_request(
        &self,
        caller: &Caller,
        request: &UmountRequest,
    ) -> Result<Vec<hydrant_api::Mount>, ApiError> {
        let mounts = match &request.directory {
            Some(directory) => vec![self.callers_mount(caller, directory).await?],
            None => {
                let all = self.catalog.mounts().await;
                let all = all.map_err(|error| internal("can't read the catalog", &error))?;
                all.into_iter()
                    .filter(|mount| mount.mounted && caller.may_change(mount.owner))
                    .collect()
            }
        };
        let mut unmounted = Vec::new();
        for mount in mounts {
            let _busy = self.begin(&mount.directory)?;
            self.take_down(&mount).await?;
            self.set_mounted(&mount, false).await?;
            unmounted.push(self.describe(&Mount { mounted: false, ..mount }).await?);
        }
        Ok(unmounted)
    }

    /// Unmounts a tree that nobody uses.
    pub(super) async fn take_down(&self, mount: &Mount) -> Result<(), ApiError> {
        if !lock(&self.live).mounts.contains_key(&mount.id) {
            return Ok(());
        }
        let upper = self.store.upper_dir(mount.id);
        // a directory above it may have been renamed
        let path = find(&upper).unwrap_or_else(|| mount.directory.clone());
        let ours = ours(&upper);
        let fetching = self.stop_history(mount.id).await;
        // writes back what is dirty in `upper`
        let result =
            tokio::task::spawn_blocking(move || mount::unmount(&path, Unmount::Idle, ours)).await;
        if !matches!(result, Ok(Ok(())))
            && let Some(git) = fetching
            && !lock(&self.live).stopping
        {
            self.fetch_history(mount.id, git);
        }
        let shown = mount.directory.display();
        match result.map_err(|error| internal("can't unmount", &error))? {
            Ok(()) => {}
            // the user has unmounted it
            Err(UnmountError::NotOurs { .. }) if find(&upper).is_none() => {}
            Err(error @ UnmountError::Busy { .. }) => {
                return Err(ApiError::conflict(error.to_string())
                    .with_hint("end the processes that work in it, or leave the directory"));
            }
            Err(error) => return Err(internal(&format!("can't unmount {shown}"), &error)),
        }
        {
            let mut live = lock(&self.live);
            if let Some(gone) = live.mounts.remove(&mount.id) {
                self.end_fills(&live, gone.pools);
            }
        }
        info!(mount = %mount.id, directory = %mount.directory.display(), "unmounted");
        Ok(())
    }

    /// Of pools of which nothing is mounted any more nothing comes by itself. In the hands of who has the lock: who mounts one
    /// of them again has that filled later.
    pub(super) fn end_fills(&self, live: &LiveMounts, pools: impl IntoIterator<Item = PoolId>) {
        let used: HashSet<_> = live.pools().collect();
        self.forget_fills(&pools.into_iter().filter(|pool| !used.contains(pool)).collect());
    }

    /// Takes back a mount that could not be made. Leaves nothing behind.
    pub(super) async fn undo_mount(&self, id: MountId) {
        if let Ok(mounts) = self.catalog.mounts().await
            && let Some(mount) = mounts.iter().find(|mount| mount.id == id)
            && let Err(error) = self.take_down(mount).await
        {
            // served as long as it is there
            warn!(%error, "can't unmount what could not be made whole");
            return;
        }
        let directory = self.store.mount_dir(id);
        // should we not get to the end
        durable::mark_disposable(&directory).ok();
        if let Err(error) = self.catalog.remove_mount(id).await {
            warn!(%error, "can't take back a mount's record");
        }
        self.collect_garbage().await;
        if let Err(error) = durable::remove(directory.clone()).await {
            warn!(%error, directory = %directory.display(), "can't remove what is left of it");
        }
    }

    /// Mounts all that is to be mounted, at the start of the daemon.
    pub(super) async fn restore(&self) {
        let mounts = match self.catalog.mounts().await {
            Ok(mounts) => mounts,
            Err(error) => {
                error!(%error, "can't read which trees to mount");
                self.serve_all();
                return;
            }
        };
        self.adopt_layers().await;
        let mut absent = Vec::new();
        for mount in mounts.into_iter().filter(|mount| mount.mounted) {
            let pools = pools_shown(&self.catalog, &mount).await.unwrap_or_default();
            if self.is_guarded(&mount, &pools).await {
                self.try_to_bring_up(&mount).await;
            } else {
                absent.push(mount);
            }
        }
        self.serve_all();
        for mount in absent {
            self.try_to_bring_up(&mount).await;
        }
    }

    async fn try_to_bring_up(&self, mount: &Mount) {
        if let Err(error) = self.bring_up(mount).await {
            error!(mount = %mount.id, directory = %mount.directory.display(), %error,
                "can't mount a tree");
        }
    }

    /// Readers are served from now on.
    fn serve_all(&self) {
        self.shards.iter().for_each(|shard| shard.send(Command::Serve));
    }

    /// Removes the files that no tree refers to any more. Pools in use are left for another time.
    pub(super) async fn collect_garbage(&self) {
        let in_use = self.pools_in_use();
        let garbage = match self.catalog.take_garbage(in_use).await {
            Ok(garbage) => garbage,
            Err(error) => {
                error!(%error, "can't find out what is not used any more");
                return;
            }
        };
        for (_, image) in &garbage.trees {
            let image = self.store.root().join("trees").join(image);
            for image in [pack::image_path(&image), image] {
                if let Err(error) = fs::remove_file(&image)
                    && error.kind() != std::io::ErrorKind::NotFound
                {
                    warn!(%error, file = %image.display(), "can't remove an image that is not used");
                }
            }
        }
        let pools: HashSet<PoolId> = garbage.segments.iter().map(|(pool, _)| *pool).collect();
        let detached: HashSet<PoolId> = self.detach_unused(pools).await;
        for (pool, segment) in garbage.segments {
            if detached.contains(&pool) {
                let is_last = garbage.pools.contains(&pool);
                self.remove_segment(pool, segment, is_last).await;
            }
        }
        for pool in garbage.pools {
            fs::remove_dir(self.store.pool_dir(pool)).ok();
        }
    }

    /// The pools of trees that are mounted, being mounted or being cloned.
    fn pools_in_use(&self) -> impl FnOnce() -> HashSet<PoolId> + Send + use<> {
        let (live, cloning) = (Arc::clone(&self.live), Arc::clone(&self.cloning));
        move || {
            let mut pools: HashSet<_> = lock(&live).pools().collect();
            pools.extend(lock(&cloning).iter());
            pools
        }
    }

    /// Takes pools out of service, but for those that have come into use again: what is not used in
    /// them goes at the next start.
    pub(super) async fn detach_unused(&self, mut pools: HashSet<PoolId>) -> HashSet<PoolId> {
        let mut replies = Vec::new();
        {
            // Who comes into use later is behind this in the shard's commands.
            let live = lock(&self.live);
            let cloning = lock(&self.cloning);
            let used: HashSet<_> = live.pools().collect();
            pools.retain(|pool| !cloning.contains(pool) && !used.contains(pool));
            for pool in pools.iter().copied() {
                let (reply, answer) = tokio::sync::oneshot::channel();
                if let Ok(shard) = self.shard(pool) {
                    shard.send(Command::Detach { pool, reply });
                    replies.push(answer);
                }
                self.origins.remove(pool);
            }
            // before any of them comes into use again, and is filled anew
            self.forget_fills(&pools);
        }
        for answer in replies {
            answer.await.ok();
        }
        pools
    }

    /// Removes a segment's files. Comes back to it as long as it is open somewhere.
    async fn remove_segment(&self, pool: PoolId, segment: SegmentId, with_pool: bool) {
        // the kernel and the worker let go of their files a moment after they were told to
        for _ in 0..20 {
            if try_to_remove(&self.store, pool, segment) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        info!(%pool, %segment, "a segment goes later: it is written to the disk yet, or a mount in another namespace has it");
        let store = Arc::clone(&self.store);
        tokio::spawn(async move {
            let mut wait = FIRST_WAIT;
            while !try_to_remove(&store, pool, segment) {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
            if with_pool {
                fs::remove_dir(store.pool_dir(pool)).ok();
            }
        });
    }

    /// Bytes of content that a pool has.
    pub(super) async fn fetched_bytes(&self, pool: PoolId) -> u64 {
        let Ok(segments) = self.catalog.segments(pool).await else { return 0 };
        let data = segments.iter().filter(|segment| segment.kind == SegmentKind::Data);
        data.filter_map(|segment| self.store.present_bytes(pool, segment.id).ok())
            .map(|(present, _)| present)
            .sum()
    }
}
