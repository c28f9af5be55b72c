//! The files of the state directory.
//!
//! ```text
//! STATE/catalog.sqlite
//! STATE/pools/<pool>/<segment>.data      sparse: a hole is "not fetched"
//! STATE/pools/<pool>/<segment>.extents   which object lies where
//! STATE/pools/<pool>/<segment>.access    of a layer: which parts of the blob make which of the segment
//! STATE/trees/<tree>.erofs               metadata of a tree
//! STATE/trees/<tree>.pack.erofs          the same of its existence pack
//! STATE/mounts/<mount>/owner/upper       what the user wrote; `owner` is theirs alone
//! STATE/mounts/<mount>/work              overlayfs' own
//! STATE/layers/<tree>                    where the layers of containerd's snapshots are mounted
//! STATE/snapshots/<snapshot>/{fs,work}   of containerd's snapshots that are no layers
//! STATE/spool/<shard>                    a worker's own scratch space
//! ```
//!
//! Segments are only opened through a private clone of the mount, which no group watches: through
//! any other path our own access would wait for an answer of our own.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use hydrant_api::Owner;
use nix::fcntl::OFlag;

use super::durable;
use crate::fanotify::{Error, FileId, Group, mark};
use crate::ids::{MountId, PoolId, SegmentId, ShardId, SnapshotId, TreeId};
use crate::layer::names::Names;
use crate::mount::mounts;
use crate::mount::private::PrivateMount;
use crate::range::ByteRange;
use crate::segment::SegmentKind;
use crate::segment::extents::{Extents, ExtentsError};
use crate::segment::presence;
use crate::sys::lease;

/// Who a worker is: nobody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerUser {
    pub uid: u32,
    pub gid: u32,
    /// It is content with a kernel that has no Landlock.
    pub without_landlock: bool,
}

impl WorkerUser {
    /// What a process is told about who it is to be.
    pub fn arguments(self) -> impl Iterator<Item = String> {
        let Self { uid, gid, without_landlock } = self;
        let landlock = without_landlock.then(|| "--without-landlock".to_owned());
        [format!("--uid={uid}"), format!("--gid={gid}")].into_iter().chain(landlock)
    }
}

/// The state directory of this daemon.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    private: PrivateMount,
    pub worker_user: WorkerUser,
}

/// A segment's file as the kernel names it in events.
#[derive(Debug, Clone, Copy)]
pub struct SegmentFile {
    pub id: FileId,
    /// In bytes.
    pub size: u64,
}

impl Store {
    /// Makes the directories where they are missing. Others may pass through, to reach what is
    /// theirs, but not list.
    pub fn open(root: &Path, worker_user: WorkerUser) -> io::Result<Self> {
        let make = |path: &Path, mode| match std::fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
        {
            Ok(()) => Ok(()),
            Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
        make(root, 0o711)?;
        make(&root.join("mounts"), 0o711)?;
        for private in ["pools", "trees", "spool", "layers", "mapped", "snapshots"] {
            make(&root.join(private), 0o700)?;
        }
        if !root.join("catalog.sqlite").exists() {
            // what the catalog will speak of
            durable::sync(root)?;
            root.parent().map_or(Ok(()), durable::sync)?;
        }
        let private = PrivateMount::new(root).map_err(io::Error::other)?;
        Ok(Self { root: root.to_owned(), private, worker_user })
    }

    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Below it are all segments.
    #[must_use]
    pub fn pools_dir(&self) -> PathBuf {
        self.root.join("pools")
    }

    /// Makes a pool's directory where it is missing.
    pub fn make_pool_dir(&self, pool: PoolId) -> io::Result<()> {
        match std::fs::create_dir(self.pool_dir(pool)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
            Ok(()) => durable::sync(&self.root.join("pools")),
        }
    }

    #[must_use]
    pub fn pool_dir(&self, pool: PoolId) -> PathBuf {
        self.root.join(format!("pools/{pool}"))
    }

    #[must_use]
    pub fn data_path(&self, pool: PoolId, segment: SegmentId) -> PathBuf {
        self.root.join(format!("pools/{pool}/{segment}.data"))
    }

    #[must_use]
    pub fn image_path(&self, tree: TreeId) -> PathBuf {
        self.root.join(format!("trees/{tree}.erofs"))
    }

    #[must_use]
    pub fn mount_dir(&self, mount: MountId) -> PathBuf {
        self.root.join(format!("mounts/{mount}"))
    }

    /// Makes a mount's directory, durably disposable, with those in it that overlayfs needs.
    pub fn make_mount_dir(&self, mount: MountId, owner: Owner) -> io::Result<()> {
        let make = |path: &Path, mode| std::fs::DirBuilder::new().mode(mode).create(path);
        let give = |path: &Path| chown(path, Some(owner.uid), Some(owner.gid));
        let directory = self.mount_dir(mount);
        make(&directory, 0o711)?;
        durable::mark_disposable(&directory)?;
        directory.parent().map_or(Ok(()), durable::sync)?;
        make(&directory.join("work"), 0o700)?;
        // only the owner gets to `upper`, whose own mode is the tree's
        for (path, mode) in [(self.owner_dir(mount), 0o700), (self.upper_dir(mount), 0o755)] {
            make(&path, mode)?;
            give(&path)?;
        }
        Ok(())
    }

    /// Where the owner, and nobody else, can reach the changes to a tree.
    #[must_use]
    pub fn owner_dir(&self, mount: MountId) -> PathBuf {
        self.mount_dir(mount).join("owner")
    }

    /// What the user has changed in a tree.
    #[must_use]
    pub fn upper_dir(&self, mount: MountId) -> PathBuf {
        self.owner_dir(mount).join("upper")
    }

    /// Below it, layers are mounted for containerd.
    #[must_use]
    pub fn layers_dir(&self) -> PathBuf {
        self.root.join("layers")
    }

    #[must_use]
    pub fn layer_dir(&self, tree: TreeId) -> PathBuf {
        self.root.join(format!("layers/{tree}"))
    }

    /// Below it, what snapshots are on top of is mounted with other owners.
    #[must_use]
    pub fn mapped_dir(&self) -> PathBuf {
        self.root.join("mapped")
    }

    #[must_use]
    pub fn mapped_for(&self, snapshot: SnapshotId) -> PathBuf {
        self.root.join(format!("mapped/{snapshot}"))
    }

    #[must_use]
    pub fn snapshots_dir(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    #[must_use]
    pub fn snapshot_dir(&self, snapshot: SnapshotId) -> PathBuf {
        self.root.join(format!("snapshots/{snapshot}"))
    }

    /// The scratch directory of a shard's worker, empty and the worker's own.
    pub fn spool_dir(&self, shard: ShardId) -> io::Result<OwnedFd> {
        let path = self.root.join(format!("spool/{shard}"));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let (uid, gid) = (self.worker_user.uid, self.worker_user.gid);
        chown(&path, Some(uid), Some(gid))?;
        Ok(OwnedFd::from(File::open(&path)?))
    }

    /// An error if the file system has no pre-content events.
    pub fn check_events(&self) -> io::Result<()> {
        let group = Group::stock().map_err(io::Error::other)?;
        match mark::ignore_mount(&group, self.private.as_fd()) {
            Err(Error::Mark { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                let root = self.root.canonicalize()?;
                let all = mounts()?.into_iter();
                // the last one of those on the same directory is on top
                let mount = all
                    .filter(|mount| root.starts_with(&mount.path))
                    .max_by_key(|mount| mount.path.as_os_str().len());
                let kind = mount.map_or("a file system".into(), |mount| mount.kind);
                Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "{} is on {kind}, which has no pre-content events: \
                         it needs ext4, xfs or btrfs; use --state-dir",
                        self.root.display()
                    ),
                ))
            }
            // whoever starts the shards will say
            _ => Ok(()),
        }
    }

    /// Lets a group overlook what goes through the private mount.
    pub fn ignore_for(&self, group: &Group) -> io::Result<()> {
        mark::ignore_mount(group, self.private.as_fd()).map_err(io::Error::other)
    }

    fn open_private(
        &self,
        pool: PoolId,
        segment: SegmentId,
        kind: &str,
        flags: OFlag,
    ) -> io::Result<File> {
        let name = format!("pools/{pool}/{segment}.{kind}");
        self.private.open(Path::new(&name), flags).map(File::from).map_err(|error| error.source)
    }

    /// A segment's data for reading and writing, its extent index and, of a layer, its access index, in a way that raises no events.
    pub fn open_for_worker(&self, pool: PoolId, segment: SegmentId) -> io::Result<Vec<OwnedFd>> {
        let data = self.open_private(pool, segment, "data", OFlag::O_RDWR)?;
        let extents = self.open_private(pool, segment, "extents", OFlag::O_RDONLY)?;
        let mut fds = vec![data.into(), extents.into()];
        match self.open_private(pool, segment, "access", OFlag::O_RDONLY) {
            Ok(access) => fds.push(access.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(fds)
    }

    /// A layer's data and its access index, for reading alone, in a way that raises no events.
    pub fn open_to_reread(&self, pool: PoolId, segment: SegmentId) -> io::Result<[File; 2]> {
        let open = |kind| self.open_private(pool, segment, kind, OFlag::O_RDONLY);
        Ok([open("data")?, open("access")?])
    }

    /// A layer's access index, for reading and writing.
    pub fn open_index(&self, pool: PoolId, segment: SegmentId) -> io::Result<File> {
        self.open_private(pool, segment, "access", OFlag::O_RDWR)
    }

    /// Marks a segment: from here on its readers wait for what is not there.
    pub fn mark(&self, group: &Group, pool: PoolId, segment: SegmentId) -> io::Result<SegmentFile> {
        let file = self.open_private(pool, segment, "data", OFlag::O_RDONLY)?;
        mark::add(group, file.as_fd()).map_err(io::Error::other)?;
        let metadata = file.metadata()?;
        Ok(SegmentFile { id: FileId::of(&file)?, size: metadata.len() })
    }

    pub fn unmark(&self, group: &Group, pool: PoolId, segment: SegmentId) -> io::Result<()> {
        let file = self.open_private(pool, segment, "data", OFlag::O_RDONLY)?;
        mark::remove(group, file.as_fd()).map(drop).map_err(io::Error::other)
    }

    /// All of a range is there.
    pub fn is_present(
        &self,
        pool: PoolId,
        segment: SegmentId,
        range: ByteRange,
    ) -> io::Result<bool> {
        let file = self.open_private(pool, segment, "data", OFlag::O_RDONLY)?;
        Ok(presence::present(file.as_fd(), range)?)
    }

    /// True when no block of a segment is missing; then it is also on the disk.
    pub fn sync_if_complete(
        &self,
        pool: PoolId,
        segment: SegmentId,
        size: u64,
    ) -> io::Result<bool> {
        let file = self.open_private(pool, segment, "data", OFlag::O_RDONLY)?;
        if !presence::present(file.as_fd(), ByteRange::new(0, size))? {
            return Ok(false);
        }
        file.sync_data()?;
        Ok(true)
    }

    /// How many bytes of a segment are there, and its size.
    pub fn present_bytes(&self, pool: PoolId, segment: SegmentId) -> io::Result<(u64, u64)> {
        let metadata = self.open_private(pool, segment, "data", OFlag::O_PATH)?.metadata()?;
        Ok(((metadata.blocks() * 512).min(metadata.len()), metadata.len()))
    }

    /// Makes holes of all that was fetched into a segment, which are durable after [`sync`](Self::sync).
    /// The ends of a pack stay: they were written, and made durable, when it was laid out.
    pub fn punch(&self, pool: PoolId, segment: SegmentId, kind: SegmentKind) -> io::Result<()> {
        let file = self.open_private(pool, segment, "data", OFlag::O_RDWR)?;
        let size = file.metadata()?.len();
        let fetched = match kind {
            // also behind the end: of a part of a block the kernel makes zeros, which count as there
            SegmentKind::Data => ByteRange::new(0, size).to_blocks(),
            SegmentKind::Pack => {
                let extents = self.extents(pool, segment).map_err(io::Error::other)?;
                let entries =
                    extents.get(0).zip(extents.len().checked_sub(1).and_then(|n| extents.get(n)));
                let Some((first, last)) = entries else { return Ok(()) };
                ByteRange::between(first.range.offset(), last.range.end()).to_blocks().clamp(size)
            }
        };
        if fetched.is_empty() {
            return Ok(());
        }
        presence::punch(&file, fetched)
    }

    /// Removes a segment that nobody has open. `false`: a mount in some namespace still has it, and
    /// the marks go with the name, so it stays.
    pub fn remove_unused(&self, pool: PoolId, segment: SegmentId) -> io::Result<bool> {
        if self.is_in_use(pool, segment)? {
            return Ok(false);
        }
        let data = self.data_path(pool, segment);
        std::fs::remove_file(data.with_extension("extents"))?;
        for of_layers in ["access", "manifest", "names", "reread"] {
            match std::fs::remove_file(data.with_extension(of_layers)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::remove_file(data)?;
        Ok(true)
    }

    /// Whether anybody, in whatever mount namespace, has a segment open.
    pub fn is_in_use(&self, pool: PoolId, segment: SegmentId) -> io::Result<bool> {
        lease::is_open_elsewhere(&self.open_private(pool, segment, "data", OFlag::O_RDONLY)?)
    }

    /// The names of a layer's files; `None` for other segments, and for layers of before there were names.
    pub fn names(&self, pool: PoolId, segment: SegmentId) -> Option<Names> {
        let mut file = self.open_private(pool, segment, "names", OFlag::O_RDONLY).ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        Names::parse(&bytes)
    }

    /// A segment's extent index.
    pub fn extents(&self, pool: PoolId, segment: SegmentId) -> Result<Extents, ExtentsError> {
        Extents::read(io::BufReader::new(self.open_private(
            pool,
            segment,
            "extents",
            OFlag::O_RDONLY,
        )?))
    }

    /// Makes all that was written to the state directory durable.
    pub fn sync(&self) -> io::Result<()> {
        durable::sync_file_system(&self.root)
    }
}
