//! The tree that a layer's entries make.
//!
//! What runtimes make of a layer by unpacking it is the measure (containerd's `archive`), so that an image
//! shows the same by either way:
//!
//! - A later entry replaces an earlier one of its path; two directories are one, with the later one's owner, mode and
//!   time and the attributes of both.
//! - A directory that has no entry of its own is made with mode 755, owned by root; see [`Tree::implicit`].
//! - A symbolic link on the way to an entry is followed, within the tree. An entry below a file is refused.
//! - A hard link leads to what is at its target then, and gives it its own owner, mode, time and attributes. If there
//!   is nothing yet it is refused.
//! - Of an entry for the root only the time counts. Times before 1970 and after 2262 are taken for 1970.
//! - `.wh.NAME` becomes overlayfs' whiteout, `.wh..wh..opq` makes its directory opaque, other `.wh..wh.` names
//!   are aufs' own and left out. A whiteout hides lower layers only: a directory that
//!   is in the same layer with its whiteout is opaque, anything else simply replaces what is below.
//! - Attributes `trusted.*` (overlayfs' own are among them) and `user.overlay.*` are left out: a layer must not
//!   tell overlayfs anything by them. So are namespaces that Linux does not have, and `user.*` where it is not
//!   allowed. [`Summary::dropped_xattrs`] counts them.
//!
//! Refused is also what a file system or the image can't hold: see [`Why`]. Whoever calls can then have the
//! layer unpacked in the ordinary way.

mod write;

use std::collections::BTreeMap;

use thiserror::Error;

use super::tar::{Data, Entry, EntryKind, MAX_NAME, MAX_PATH, TarError, Timestamp, normalise};
use crate::erofs::OPAQUE_XATTR;
use crate::manifest::layer::{Attributes, Content, Kind, Piece, chunk_bits};

/// The most entries of a layer.
pub const MAX_ENTRIES: u64 = 1 << 23;
/// The most symbolic links on the way to an entry.
const MAX_LINKS: u32 = 255;
/// Attributes of one inode in bytes, as an image has room for them.
const MAX_XATTRS: usize = 192 << 10;
const ROOT: u32 = 0;

/// An entry that can't be part of a tree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{path:?} (at byte {header_at} of the archive) can't be part of the tree: {why}")]
pub struct Refused {
    pub path: String,
    pub header_at: u64,
    pub why: Why,
}

/// Why an entry is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Why {
    #[error("what it is in is not a directory")]
    NotInDirectory,
    #[error("too many symbolic links lead there")]
    TooManyLinks,
    #[error("its path is too long")]
    TooLong,
    #[error("it is a hard link to {0:?}, which is not there (before it)")]
    LinkToNothing(String),
    #[error("it is a hard link to a directory")]
    LinkToDirectory,
    #[error("a whiteout needs a name")]
    Whiteout,
    #[error("devices have numbers up to 4095:1048575")]
    DeviceNumber,
    #[error("its attributes are longer than an image has room for")]
    Xattrs,
    #[error("it is sparse, and {0}")]
    Sparse(&'static str),
    #[error("it is longer than a file can be")]
    Size,
    #[error("there are more than {MAX_ENTRIES} entries")]
    TooMany,
}

/// Why a layer can't be a tree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TreeError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error(transparent)]
    Refused(#[from] Box<Refused>),
    #[error(transparent)]
    Indexer(#[from] super::indexer::IndexerError),
}

/// What a tree has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Names of regular files and their sizes together, in bytes.
    pub files: u64,
    pub bytes: u64,
    pub directories: u64,
    /// Further names of inodes.
    pub hard_links: u64,
    pub symlinks: u64,
    pub whiteouts: u64,
    pub opaque: u64,
    /// Devices and fifos.
    pub special: u64,
    /// Attributes that were left out.
    pub dropped_xattrs: u64,
}

#[derive(Debug)]
struct Inode {
    attributes: Attributes,
    what: What,
}

#[derive(Debug)]
enum What {
    Directory { children: BTreeMap<Box<[u8]>, u32>, opaque: bool, implicit: bool },
    Other(Kind),
    Whiteout,
}

/// Takes entries one after the other.
#[derive(Debug)]
pub struct TreeBuilder {
    inodes: Vec<Inode>,
    entries: u64,
    dropped_xattrs: u64,
}

/// The tree of a layer.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
    dropped_xattrs: u64,
}

impl Default for TreeBuilder {
    fn default() -> Self {
        Self { inodes: vec![Inode::implicit()], entries: 0, dropped_xattrs: 0 }
    }
}

impl Inode {
    /// A directory that nothing has been said of.
    fn implicit() -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let what = What::Directory { children: BTreeMap::new(), opaque: false, implicit: true };
        Self { attributes, what }
    }
}

impl TreeBuilder {
    /// Adds the next entry of the archive.
    pub fn add(&mut self, entry: Entry) -> Result<(), TreeError> {
        let (path, header_at) = (entry.path.clone(), entry.header_at);
        self.try_add(entry).map_err(|why| {
            let path = String::from_utf8_lossy(&path).into_owned();
            TreeError::Refused(Box::new(Refused { path, header_at, why }))
        })
    }

    /// All entries were added.
    #[must_use]
    pub fn finish(self) -> Tree {
        Tree { inodes: self.inodes, dropped_xattrs: self.dropped_xattrs }
    }

    fn try_add(&mut self, entry: Entry) -> Result<(), Why> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES || self.inodes.len() >= u32::MAX as usize {
            return Err(Why::TooMany);
        }
        let (parent, name) = match entry.path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&entry.path[..slash], &entry.path[slash + 1..]),
            None => (&b""[..], &entry.path[..]),
        };
        if name.is_empty() {
            if entry.kind == EntryKind::Directory {
                self.inodes[ROOT as usize].attributes.mtime = bound(entry.mtime);
            }
            return Ok(());
        }
        let parent = self.walk(parent, true)?.ok_or(Why::NotInDirectory)?;
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(parent, name, hidden, &entry);
        }
        let name = name.to_vec();
        let mut attributes = Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: bound(entry.mtime),
            xattrs: entry.xattrs,
        };
        let special = !matches!(
            entry.kind,
            EntryKind::File(_) | EntryKind::Directory | EntryKind::HardLink(_)
        );
        self.filter(&mut attributes, special)?;
        let kind = match entry.kind {
            EntryKind::HardLink(target) => return self.link(parent, name, &target, attributes),
            EntryKind::Directory => return self.directory(parent, name, attributes),
            EntryKind::File(data) => Kind::File(content(data)?),
            EntryKind::Symlink(target) => {
                attributes.mode = 0o777;
                Kind::Symlink(target)
            }
            EntryKind::CharDevice { major, minor } => {
                check_device(major, minor)?;
                Kind::CharDevice { major, minor }
            }
            EntryKind::BlockDevice { major, minor } => {
                check_device(major, minor)?;
                Kind::BlockDevice { major, minor }
            }
            EntryKind::Fifo => Kind::Fifo,
        };
        let what = if kind == Kind::WHITEOUT { What::Whiteout } else { What::Other(kind) };
        let inode = self.make(Inode { attributes, what });
        self.set_child(parent, name, inode);
        Ok(())
    }

    /// The inode at a path, following symbolic links within the tree; `None` if it is not there, or, with
    /// `make`, if something on the way is not a directory. Missing directories are made with `make`.
    fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<u32>, Why> {
        // what is still to go, last first, and where it came by
        let mut rest: Vec<Vec<u8>> = components(path);
        let mut above: Vec<(u32, usize)> = Vec::new();
        let (mut at, mut path_len) = (ROOT, 0);
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == b".." {
                (at, path_len) = above.pop().unwrap_or((ROOT, 0));
                continue;
            }
            if path_len + name.len() > MAX_PATH || name.len() > MAX_NAME {
                return Err(Why::TooLong);
            }
            let child = self.child(at, &name);
            let next = match child.map(|child| (child, &self.inodes[child as usize].what)) {
                Some((child, What::Directory { .. })) => child,
                Some((_, What::Other(Kind::Symlink(target)))) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Why::TooManyLinks);
                    }
                    if target.starts_with(b"/") {
                        above.clear();
                        (at, path_len) = (ROOT, 0);
                    }
                    rest.append(&mut components(target));
                    continue;
                }
                Some((_, What::Whiteout)) if make => {
                    // the directory below was deleted, this is another one
                    let new = self.make(Inode::implicit());
                    self.set_opaque(new);
                    self.set_child(at, name.clone(), new);
                    new
                }
                None if make => {
                    let new = self.make(Inode::implicit());
                    self.set_child(at, name.clone(), new);
                    new
                }
                _ => return Ok(None),
            };
            above.push((at, path_len));
            path_len += name.len() + 1;
            at = next;
        }
        Ok(Some(at))
    }

    fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        match &self.inodes[directory as usize].what {
            What::Directory { children, .. } => children.get(name).copied(),
            _ => None,
        }
    }

    fn make(&mut self, inode: Inode) -> u32 {
        self.inodes.push(inode);
        // try_add has seen to it that it fits
        (self.inodes.len() - 1) as u32
    }

    fn set_child(&mut self, directory: u32, name: Vec<u8>, inode: u32) {
        if let What::Directory { children, .. } = &mut self.inodes[directory as usize].what {
            children.insert(name.into(), inode);
        }
    }

    fn set_opaque(&mut self, directory: u32) {
        if let What::Directory { opaque, .. } = &mut self.inodes[directory as usize].what {
            *opaque = true;
        }
    }

    fn whiteout(
        &mut self,
        parent: u32,
        name: &[u8],
        hidden: &[u8],
        entry: &Entry,
    ) -> Result<(), Why> {
        if name == b".wh..wh..opq" {
            self.set_opaque(parent);
            return Ok(());
        }
        match hidden {
            b"" | b"." | b".." => return Err(Why::Whiteout),
            _ if hidden.starts_with(b".wh.") => return Ok(()),
            _ => {}
        }
        match self.child(parent, hidden) {
            Some(child) => self.set_opaque(child),
            None => {
                let (uid, gid) = (entry.uid, entry.gid);
                let mtime = bound(entry.mtime);
                let attributes = Attributes { uid, gid, mtime, ..Attributes::default() };
                let inode = self.make(Inode { attributes, what: What::Whiteout });
                self.set_child(parent, hidden.to_vec(), inode);
            }
        }
        Ok(())
    }

    fn directory(&mut self, parent: u32, name: Vec<u8>, attributes: Attributes) -> Result<(), Why> {
        let child = self.child(parent, &name);
        let was_whiteout =
            child.is_some_and(|n| matches!(self.inodes[n as usize].what, What::Whiteout));
        match child.map(|child| &mut self.inodes[child as usize]) {
            Some(Inode { attributes: old, what: What::Directory { implicit, .. } }) => {
                *implicit = false;
                replace(old, attributes)
            }
            _ => {
                let (children, opaque) = (BTreeMap::new(), was_whiteout);
                let what = What::Directory { children, opaque, implicit: false };
                let inode = self.make(Inode { attributes, what });
                self.set_child(parent, name, inode);
                Ok(())
            }
        }
    }

    fn link(
        &mut self,
        parent: u32,
        name: Vec<u8>,
        target: &[u8],
        mut attributes: Attributes,
    ) -> Result<(), Why> {
        // what has this name goes first, also if that was the target
        if let What::Directory { children, .. } = &mut self.inodes[parent as usize].what {
            children.remove(&name[..]);
        }
        let shown = || Why::LinkToNothing(String::from_utf8_lossy(target).into_owned());
        let (above, last) = match target.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&target[..slash], &target[slash + 1..]),
            None => (&b""[..], target),
        };
        let above = self.walk(above, false)?.ok_or_else(shown)?;
        let child = self.child(above, last).ok_or_else(shown)?;
        let inode = &mut self.inodes[child as usize];
        match &inode.what {
            What::Directory { .. } => return Err(Why::LinkToDirectory),
            What::Whiteout => return Err(shown()),
            What::Other(Kind::Symlink(_)) => {
                attributes.mode = 0o777;
                attributes.xattrs.retain(|(name, _)| !name.starts_with(b"user."));
            }
            What::Other(Kind::File(_)) => {}
            What::Other(_) => attributes.xattrs.retain(|(name, _)| !name.starts_with(b"user.")),
        }
        replace(&mut inode.attributes, attributes)?;
        self.set_child(parent, name, child);
        Ok(())
    }

    /// Takes out the attributes that a layer must not or can't have.
    fn filter(&mut self, attributes: &mut Attributes, special: bool) -> Result<(), Why> {
        let before = attributes.xattrs.len();
        attributes.xattrs.retain(|(name, _)| {
            let user = name.len() > 5 && name.starts_with(b"user.") && !special;
            let kept = user && !name.starts_with(b"user.overlay.")
                || name.len() > 9 && name.starts_with(b"security.")
                || matches!(&name[..], b"system.posix_acl_access" | b"system.posix_acl_default");
            kept && name.len() <= 255 && !name.contains(&0)
        });
        self.dropped_xattrs += (before - attributes.xattrs.len()) as u64;
        check_xattrs(attributes)
    }
}

/// The names of a path, last first.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    names.rev().map(<[u8]>::to_vec).collect()
}

/// Gives an inode the attributes of a later entry; extended ones are added.
fn replace(old: &mut Attributes, new: Attributes) -> Result<(), Why> {
    let mut xattrs = std::mem::take(&mut old.xattrs);
    xattrs.retain(|(name, _)| new.xattrs.iter().all(|(newer, _)| newer != name));
    *old = new;
    old.xattrs.append(&mut xattrs);
    old.xattrs.sort_unstable();
    check_xattrs(old)
}

fn check_xattrs(attributes: &Attributes) -> Result<(), Why> {
    let fits = attributes.xattrs.iter().all(|(_, value)| u16::try_from(value.len()).is_ok());
    let len = attributes.xattrs.iter().map(|(name, value)| name.len() + value.len() + 8);
    if fits && len.sum::<usize>() <= MAX_XATTRS { Ok(()) } else { Err(Why::Xattrs) }
}

fn check_device(major: u32, minor: u32) -> Result<(), Why> {
    if major < 1 << 12 && minor < 1 << 20 { Ok(()) } else { Err(Why::DeviceNumber) }
}

fn content(data: Data) -> Result<Content, Why> {
    let size = i64::try_from(data.size).map(|_| data.size).map_err(|_| Why::Size)?;
    match data.pieces[..] {
        [] if size == 0 => Ok(Content::Empty),
        [piece] if piece.offset == 0 && piece.len == size => {
            Ok(Content::At { segment: 0, offset: piece.at, size })
        }
        _ => {
            let piece = |piece: &super::tar::Piece| {
                let super::tar::Piece { offset, at, len } = *piece;
                Piece { offset, at, len }
            };
            let pieces: Vec<_> = data.pieces.iter().map(piece).collect();
            chunk_bits(size, &pieces).map_err(Why::Sparse)?;
            Ok(Content::Sparse { segment: 0, size, pieces })
        }
    }
}

/// A time as it is set on files: as of the epoch if it is before, or after what 64 bits of nanoseconds hold.
fn bound(time: Timestamp) -> (i64, u32) {
    let last = (i64::MAX / 1_000_000_000, (i64::MAX % 1_000_000_000) as u32);
    let time = (time.secs, time.nanos);
    if time.0 < 0 || time > last { (0, 0) } else { time }
}

impl Tree {
    /// Does the root hide all lower layers? (Overlayfs itself does not look there.)
    #[must_use]
    pub fn is_opaque(&self) -> bool {
        matches!(self.inodes[ROOT as usize].what, What::Directory { opaque: true, .. })
    }

    /// The paths of directories that have no entry of their own, the root not among them. Where a lower
    /// layer has such a directory, runtimes give it the attributes of that one: see [`set`](Self::set).
    #[must_use]
    pub fn implicit(&self) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let mut stack = vec![(ROOT, Vec::new())];
        while let Some((number, path)) = stack.pop() {
            let What::Directory { children, implicit, .. } = &self.inodes[number as usize].what
            else {
                continue;
            };
            for (name, child) in children {
                let mut path: Vec<u8> = path.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                stack.push((*child, path));
            }
            if *implicit && number != ROOT {
                found.push(path);
            }
        }
        found.sort_unstable();
        found
    }

    /// The attributes of the directory at a path; no symbolic link is followed. `None` if there is no directory.
    #[must_use]
    pub fn directory(&self, path: &[u8]) -> Option<&Attributes> {
        let inode = self.inodes.get(self.find(path)? as usize)?;
        matches!(inode.what, What::Directory { .. }).then_some(&inode.attributes)
    }

    /// Gives the directory at a path other attributes. False if there is none.
    pub fn set(&mut self, path: &[u8], attributes: Attributes) -> bool {
        let inode = self.find(path).and_then(|number| self.inodes.get_mut(number as usize));
        match inode {
            Some(Inode { attributes: old, what: What::Directory { .. } }) => {
                *old = attributes;
                true
            }
            _ => false,
        }
    }

    fn find(&self, path: &[u8]) -> Option<u32> {
        let path = normalise(path).ok()?;
        components(&path).iter().rev().try_fold(ROOT, |at, name| {
            match &self.inodes[at as usize].what {
                What::Directory { children, .. } => children.get(&name[..]).copied(),
                _ => None,
            }
        })
    }
}

/// What overlayfs is told.
fn opaque_xattr() -> (Vec<u8>, Vec<u8>) {
    (OPAQUE_XATTR.0.to_vec(), OPAQUE_XATTR.1.to_vec())
}
