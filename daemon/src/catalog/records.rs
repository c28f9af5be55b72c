//! What the catalog holds, and how a row becomes it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use hydrant_api::Owner;
use rusqlite::types::Type;
use rusqlite::{Error, Result, Row};

use crate::ids::{ImageId, MountId, PoolId, SegmentId, TreeId};
use crate::object::{HashKind, ObjectId};
use crate::segment::SegmentKind;

/// A pool to be found or made.
#[derive(Debug, Clone, PartialEq)]
pub struct NewPool {
    pub url: String,
    pub owner: Owner,
    pub hash: HashKind,
    /// How the origin is reached, in the words of the source.
    pub origin: serde_json::Value,
    /// The owner's environment as git and ssh look at it.
    pub environment: Vec<(String, String)>,
}

/// An origin as one user sees it. Times are in seconds since the epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    pub id: PoolId,
    pub url: String,
    pub owner: Owner,
    pub hash: HashKind,
    pub origin: serde_json::Value,
    pub environment: Vec<(String, String)>,
    pub created: i64,
}

/// A segment that has been laid out, under a number from
/// [`allocate_segments`](super::Catalog::allocate_segments).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewSegment {
    pub id: SegmentId,
    pub kind: SegmentKind,
    /// In bytes.
    pub size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub id: SegmentId,
    pub pool: PoolId,
    pub kind: SegmentKind,
    /// In bytes.
    pub size: u64,
    /// Every block is there, and durable.
    pub complete: bool,
}

/// A tree whose image is in place, under a number from
/// [`allocate_tree`](super::Catalog::allocate_tree).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTree {
    pub id: TreeId,
    pub pool: PoolId,
    pub commit: ObjectId,
    /// The id of the commit's tree.
    pub root: ObjectId,
    pub revision: String,
    /// The name of the image's file in `trees/`.
    pub image: String,
    /// The devices of the image in order, old and new ones.
    pub segments: Vec<SegmentId>,
    pub files: u64,
    pub bytes: u64,
    /// Directories of a layer that have no entry of their own in it.
    pub implicit: u64,
    /// The owner of every file in the image.
    pub owner: Owner,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    pub id: TreeId,
    pub pool: PoolId,
    pub commit: ObjectId,
    pub root: ObjectId,
    pub revision: String,
    pub image: String,
    pub segments: Vec<SegmentId>,
    pub files: u64,
    pub bytes: u64,
    pub implicit: u64,
    pub owner: Owner,
    pub created: i64,
    /// A layer that was pulled by an index: all of it was here, and was what the index says.
    pub proved: bool,
    /// Or it was not, and why.
    pub refuted: Option<String>,
}

/// A mount, under a number from [`allocate_mount`](super::Catalog::allocate_mount).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMount {
    pub id: MountId,
    pub tree: TreeId,
    /// Absolute.
    pub directory: PathBuf,
    pub read_only: bool,
    pub owner: Owner,
    /// Is to be mounted, also after a restart.
    pub mounted: bool,
    /// The name of the existence pack, without `.pack`.
    pub pack: Option<String>,
    /// As in [`hydrant_api::Mount::history`].
    pub history: String,
    /// Whose uppermost layer `tree` is.
    pub image: Option<ImageId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: MountId,
    pub tree: TreeId,
    pub directory: PathBuf,
    pub read_only: bool,
    pub owner: Owner,
    pub mounted: bool,
    pub pack: Option<String>,
    pub history: String,
    pub created: i64,
    pub image: Option<ImageId>,
}

/// An image that has been pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// Complete: registry, repository, tag or digest.
    pub reference: String,
    pub digest: ObjectId,
    pub manifest: ObjectId,
    pub config: ObjectId,
    /// The trees of its layers, the lowest first, and how many bytes of each the registry has.
    pub layers: Vec<(TreeId, u64)>,
    /// It stays until it is removed; otherwise, only as long as containerd has a snapshot of it.
    pub held: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub id: ImageId,
    pub reference: String,
    pub digest: ObjectId,
    pub manifest: ObjectId,
    pub config: ObjectId,
    /// Seconds since the epoch.
    pub pulled: i64,
    /// Its name has not become another image's.
    pub named: bool,
    pub layers: Vec<(TreeId, u64)>,
}

impl Pool {
    pub(super) const COLUMNS: &str =
        "id, url, owner_uid, owner_gid, hash, origin, environment, created";

    pub(super) fn from_row(row: &Row<'_>) -> Result<Self> {
        let json = |column, text: String| {
            serde_json::from_str(&text)
                .map_err(|e| Error::FromSqlConversionFailure(column, Type::Text, Box::new(e)))
        };
        let environment: serde_json::Value = json(6, row.get(6)?)?;
        Ok(Self {
            id: PoolId(unsigned(row, 0)?),
            url: row.get(1)?,
            owner: owner(row, 2)?,
            hash: hash_from_text(&row.get::<_, String>(4)?, 4)?,
            origin: json(5, row.get(5)?)?,
            environment: serde_json::from_value(environment)
                .map_err(|e| Error::FromSqlConversionFailure(6, Type::Text, Box::new(e)))?,
            created: row.get(7)?,
        })
    }
}

impl Segment {
    pub(super) const COLUMNS: &str = "id, pool, kind, size, complete";

    pub(super) fn from_row(row: &Row<'_>) -> Result<Self> {
        Ok(Self {
            id: SegmentId(unsigned(row, 0)?),
            pool: PoolId(unsigned(row, 1)?),
            kind: kind_from_text(&row.get::<_, String>(2)?, 2)?,
            size: unsigned(row, 3)?,
            complete: row.get(4)?,
        })
    }
}

impl Tree {
    pub(super) const COLUMNS: &str = "id, pool, git_commit, root, revision, image, files, bytes, owner_uid, owner_gid, created, \
         implicit, proved, refuted";

    /// Without its segments, which are rows of another table.
    pub(super) fn from_row(row: &Row<'_>) -> Result<Self> {
        Ok(Self {
            id: TreeId(unsigned(row, 0)?),
            pool: PoolId(unsigned(row, 1)?),
            commit: object(row, 2)?,
            root: object(row, 3)?,
            revision: row.get(4)?,
            image: row.get(5)?,
            segments: Vec::new(),
            files: unsigned(row, 6)?,
            bytes: unsigned(row, 7)?,
            implicit: unsigned(row, 11)?,
            owner: owner(row, 8)?,
            created: row.get(10)?,
            proved: row.get(12)?,
            refuted: row.get(13)?,
        })
    }
}

impl Mount {
    pub(super) const COLUMNS: &str = "id, tree, directory, read_only, owner_uid, owner_gid, mounted, pack, history, created, \
         image";

    pub(super) fn from_row(row: &Row<'_>) -> Result<Self> {
        Ok(Self {
            id: MountId(unsigned(row, 0)?),
            tree: TreeId(unsigned(row, 1)?),
            directory: PathBuf::from(OsString::from_vec(row.get(2)?)),
            read_only: row.get(3)?,
            owner: owner(row, 4)?,
            mounted: row.get(6)?,
            pack: row.get(7)?,
            history: row.get(8)?,
            created: row.get(9)?,
            image: match row.get::<_, Option<i64>>(10)? {
                Some(_) => Some(ImageId(unsigned(row, 10)?)),
                None => None,
            },
        })
    }
}

impl Image {
    pub(super) const COLUMNS: &str = "id, reference, digest, manifest, config, pulled, named";

    /// Without its layers, which are rows of another table.
    pub(super) fn from_row(row: &Row<'_>) -> Result<Self> {
        Ok(Self {
            id: ImageId(unsigned(row, 0)?),
            reference: row.get(1)?,
            digest: object(row, 2)?,
            manifest: object(row, 3)?,
            config: object(row, 4)?,
            pulled: row.get(5)?,
            named: row.get(6)?,
            layers: Vec::new(),
        })
    }
}

/// SQLite's integers are signed.
pub(super) fn signed(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|e| Error::ToSqlConversionFailure(Box::new(e)))
}

pub(super) fn unsigned(row: &Row<'_>, column: usize) -> Result<u64> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| Error::IntegralValueOutOfRange(column, number))
}

pub(super) fn kind_text(kind: SegmentKind) -> &'static str {
    match kind {
        SegmentKind::Data => "data",
        SegmentKind::Pack => "pack",
    }
}

fn kind_from_text(text: &str, column: usize) -> Result<SegmentKind> {
    match text {
        "data" => Ok(SegmentKind::Data),
        "pack" => Ok(SegmentKind::Pack),
        _ => Err(unknown(text, column)),
    }
}

fn hash_from_text(text: &str, column: usize) -> Result<HashKind> {
    [HashKind::Sha1, HashKind::Sha256]
        .into_iter()
        .find(|hash| hash.name() == text)
        .ok_or_else(|| unknown(text, column))
}

fn unknown(text: &str, column: usize) -> Error {
    let what = format!("{text:?} is not known");
    Error::FromSqlConversionFailure(column, Type::Text, what.into())
}

pub(super) fn object(row: &Row<'_>, column: usize) -> Result<ObjectId> {
    ObjectId::from_bytes(&row.get::<_, Vec<u8>>(column)?)
        .map_err(|e| Error::FromSqlConversionFailure(column, Type::Blob, Box::new(e)))
}

/// The uid at `column`, the gid after it.
fn owner(row: &Row<'_>, column: usize) -> Result<Owner> {
    Ok(Owner { uid: row.get(column)?, gid: row.get(column + 1)? })
}
