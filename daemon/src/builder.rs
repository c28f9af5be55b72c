//! The builder: a tree's files out of a manifest.
//!
//! A short-lived process of its own, so that the memory for a million names goes when it is done. It
//! runs as root, without network, and believes nothing of what it reads: the manifest and the content
//! come from the importer, which has parsed bytes from the origin.
//!
//! It reads a line of JSON, a [`Line`]: for a git tree a [`Job`], for which it makes new segments, the tree's
//! image, the existence pack with an image of its own, and the git index; for a layer of a container image a [`layer::LayerJob`]. It answers
//! with a [`Reply`].
//!
//! All paths it is given have to be in directories that only root can write to. What it makes is
//! durable when it answers; when it fails it leaves nothing. Until the answer is in the catalog none
//! of it counts: the next job may be given the same numbers and replaces what it finds there.

pub mod contents;
pub mod files;
pub mod image;
pub mod index;
pub mod layer;
pub mod pack;
pub mod place;
pub mod segment;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod tree;

use std::collections::HashSet;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ids::SegmentId;
use crate::manifest::ManifestError;
use crate::object::{HashKind, ObjectId};
use crate::segment::SegmentKind;
use crate::segment::extents::ExtentsError;

use files::{Made, sync_dir};
use pack::{Pack, Plan};
use place::Placed;
use tree::{Kind, Tree};

/// Who owns all files of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Owner {
    /// Gives a file to the owner.
    fn give(self, file: &fs_err::File) -> io::Result<()> {
        std::os::unix::fs::fchown(file.file(), Some(self.uid), Some(self.gid))
    }
}

/// What to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    pub manifest: PathBuf,
    /// Content that is here already: a stream of [`contents`].
    pub contents: Option<PathBuf>,
    /// The pool's directory.
    pub pool: PathBuf,
    /// The segments that the pool has.
    pub segments: Vec<SegmentId>,
    /// New segments get consecutive numbers from this one on.
    pub first_segment: SegmentId,
    /// Where the tree's image goes.
    pub image: PathBuf,
    pub owner: Owner,
    pub pack: Option<PackJob>,
    pub index: Option<IndexJob>,
}

/// An existence pack is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackJob {
    /// Where its index and `.keep` file go, for the supervisor to move into the repository.
    pub dir: PathBuf,
    /// Objects that the repository has, which are left out: an id in hexadecimal digits on each line.
    pub in_repository: Option<PathBuf>,
}

/// The git index is wanted. It need not be durable: git makes a new one when it is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexJob {
    pub index: PathBuf,
    /// What `st_ino` of the mounted files has besides the inode number in the image.
    pub ino_or: u64,
}

/// A segment that a tree refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentUse {
    pub segment: SegmentId,
    pub kind: SegmentKind,
    /// In bytes.
    pub size: u64,
    /// Made by this job.
    pub new: bool,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Built {
    pub hash: HashKind,
    /// In hexadecimal digits.
    pub commit: String,
    /// In hexadecimal digits.
    pub tree: String,
    /// In the order of the image's devices; behind them the existence pack, the one device of its own
    /// [image](pack::image_path).
    pub segments: Vec<SegmentUse>,
    /// The first number that is still free.
    pub next_segment: SegmentId,
    /// Regular files, symbolic links, submodules and converted files, by path.
    pub files: u64,
    pub symlinks: u64,
    pub gitlinks: u64,
    /// Files that are not in the image.
    pub converted: u64,
    pub directories: u64,
    /// The size of all files of the image, in bytes.
    pub tree_bytes: u64,
    /// Different objects that have a place in a segment.
    pub objects: u64,
    /// Bytes of content written into the new segments.
    pub filled_bytes: u64,
    /// In bytes.
    pub image_size: u64,
    pub pack: Option<Pack>,
}

/// A line of JSON for the builder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    Layer { layer: layer::LayerJob },
    Prove { prove: segment::ProveJob },
    Compare { compare: segment::CompareJob },
    Tree(Box<Job>),
}

/// The builder's answer to a line, itself a line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Built(Box<Built>),
    BuiltLayer(layer::LayerBuilt),
    Proved,
    /// The layer is not what its index says: how it differs, for people to read.
    Refuted(String),
    /// What went wrong, for people to read.
    Failed(String),
}

/// Why a tree can't be built.
#[derive(Debug, Error)]
pub enum BuildError {
    #[error("can't take the tree")]
    Manifest(#[from] ManifestError),
    #[error("can't take the tree: {0}")]
    Tree(String),
    #[error(
        "the origin gives object {key} a size of {} bytes, but it has been said to have {} bytes",
        .sizes[1], .sizes[0]
    )]
    Sizes { key: ObjectId, sizes: [u64; 2] },
    #[error("segment {segment} of the pool can't be used")]
    Extents { segment: SegmentId, source: ExtentsError },
    #[error("can't make the tree's image")]
    Image(#[from] crate::erofs::ErofsError),
    #[error("can't {doing}")]
    Io { doing: &'static str, source: io::Error },
}

impl BuildError {
    fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// A tree that was built.
#[derive(Debug)]
pub struct Builder {
    pub tree: Tree,
    /// The inode number of each node in the image.
    pub nids: Vec<u64>,
    pub built: Built,
}

/// Does a job.
pub fn build(job: &Job) -> Result<Builder, BuildError> {
    let open = |path: &PathBuf| {
        let file = fs_err::File::open(path);
        let file = file.map_err(BuildError::io("read what the importer wrote"))?;
        Ok::<_, BuildError>(BufReader::with_capacity(256 << 10, file))
    };
    let tree = Tree::read(open(&job.manifest)?)?;
    let mut made = Made::default();
    let mut placed = Placed::new(&tree, &job.pool, &job.segments, job.first_segment, &mut made)?;
    let filled_bytes = match &job.contents {
        Some(path) => placed.fill(&tree, open(path)?)?,
        None => 0,
    };
    let plan = match &job.pack {
        Some(wanted) => {
            let known = match &wanted.in_repository {
                Some(path) => read_ids(open(path)?)?,
                None => HashSet::new(),
            };
            let segment = placed.next_free(job.first_segment);
            pack::plan(&tree, &mut placed, &known, segment)?
        }
        None => None,
    };
    let (nids, image_size) = std::thread::scope(|scope| {
        let (tree, placed, plan) = (&tree, &placed, plan.as_ref());
        let pack = scope.spawn(move || write_pack(job, tree, placed, plan));
        let image = write_image(job, tree, placed, plan);
        let pack = pack.join().map_err(|_| BuildError::Tree("a thread has panicked".into()));
        let (files, nids, size) = image?;
        made.take(files);
        made.take(pack??);
        Ok::<_, BuildError>((nids, size))
    })?;
    let mut durable = || {
        made.settle()?;
        let dirs = [Some(job.pool.as_path()), job.image.parent()];
        let pack_dir = plan.as_ref().and(job.pack.as_ref()).map(|pack| pack.dir.as_path());
        dirs.into_iter().chain([pack_dir]).flatten().try_for_each(sync_dir)
    };
    durable().map_err(BuildError::io("make the tree's files durable"))?;
    let built = summary(&tree, &placed, job, filled_bytes, image_size, plan.map(|plan| plan.pack));
    made.keep();
    Ok(Builder { tree, nids, built })
}

fn write_pack(
    job: &Job,
    tree: &Tree,
    placed: &Placed,
    plan: Option<&Plan>,
) -> Result<Made, BuildError> {
    let mut made = Made::default();
    if let (Some(plan), Some(wanted)) = (plan, &job.pack) {
        let place = (wanted.dir.as_path(), job.owner);
        pack::write(plan, tree, placed, &job.pool, place, &mut made)?;
    }
    Ok(made)
}

/// Writes the images and the git index; gives the numbers of the inodes and the image's size.
fn write_image(
    job: &Job,
    tree: &Tree,
    placed: &Placed,
    plan: Option<&Plan>,
) -> Result<(Made, Vec<u64>, u64), BuildError> {
    let mut made = Made::default();
    let image = image::make(tree, placed, job.owner)?;
    let write = made.write(&job.image, 0o600, |out| image.layout.write(out));
    write.map_err(BuildError::io("write the tree's image"))?;
    let beside = pack::image_path(&job.image);
    let write = match plan {
        Some(plan) => {
            let layout = image::make_pack(tree, plan, job.owner)?;
            made.write(&beside, 0o600, |out| layout.write(out))
        }
        None => files::remove(&beside),
    };
    write.map_err(BuildError::io("write the existence pack's image"))?;
    if let Some(wanted) = &job.index {
        write_index(wanted, tree, &image.nids, job.owner, &mut made)?;
    }
    let size = image.layout.image_len();
    Ok((made, image.nids, size))
}

fn write_index(
    job: &IndexJob,
    tree: &Tree,
    nids: &[u64],
    owner: Owner,
    made: &mut Made,
) -> Result<(), BuildError> {
    let Owner { uid, gid } = owner;
    let shown = index::Shown { uid, gid, ino_or: job.ino_or };
    let mut write = || {
        let file = made.create(&job.index, 0o644)?;
        let mut out = BufWriter::with_capacity(256 << 10, file);
        index::write(tree, nids, &shown, &mut out)?;
        owner.give(out.get_ref())
    };
    write().map_err(BuildError::io("write the git index"))
}

fn summary(
    tree: &Tree,
    placed: &Placed,
    job: &Job,
    filled_bytes: u64,
    image_size: u64,
    pack: Option<Pack>,
) -> Built {
    let mut built = Built {
        hash: tree.header().hash,
        commit: tree.header().commit.to_string(),
        tree: tree.header().tree.to_string(),
        segments: placed.segments.clone(),
        next_segment: placed.next_free(job.first_segment),
        files: 0,
        symlinks: 0,
        gitlinks: 0,
        converted: 0,
        directories: 0,
        tree_bytes: 0,
        objects: placed.objects().len() as u64,
        filled_bytes,
        image_size,
        pack,
    };
    for node in tree.numbers() {
        *match tree.kind(node) {
            Kind::Directory => &mut built.directories,
            Kind::File | Kind::Executable => &mut built.files,
            Kind::Converted | Kind::ConvertedExecutable => &mut built.converted,
            Kind::Symlink => &mut built.symlinks,
            Kind::Gitlink => &mut built.gitlinks,
        } += 1;
        if place::is_file(tree, node) {
            built.tree_bytes = built.tree_bytes.saturating_add(tree.size(node));
        }
    }
    built
}

fn read_ids(input: impl BufRead) -> Result<HashSet<ObjectId>, BuildError> {
    let fail = BuildError::io("read which objects the repository has");
    let id = |line: io::Result<String>| {
        ObjectId::from_hex(line.map_err(&fail)?.as_bytes()).map_err(|e| fail(io::Error::other(e)))
    };
    input.lines().map(id).collect()
}

/// The process: lines of JSON in, lines of JSON out. Ends with the input.
pub fn run(mut input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let mut line = String::new();
    while input.read_line(&mut line)? > 0 {
        let reply = reply(&line).unwrap_or_else(|error| Reply::Failed(format!("{error:#}")));
        serde_json::to_writer(&mut output, &reply)?;
        output.write_all(b"\n")?;
        output.flush()?;
        line.clear();
    }
    Ok(())
}

fn reply(line: &str) -> anyhow::Result<Reply> {
    Ok(match serde_json::from_str(line)? {
        Line::Tree(job) => Reply::Built(Box::new(build(&job)?.built)),
        Line::Layer { layer } => Reply::BuiltLayer(layer::build(&layer)?),
        Line::Compare { compare } => verdict(segment::compare(&compare))?,
        Line::Prove { prove } => verdict(segment::prove(&prove))?,
    })
}

/// What can't be proved because of what is in it will never be: to whoever asks it is refuted. Only what may be otherwise
/// another time is a failure.
fn verdict(found: Result<Option<String>, BuildError>) -> Result<Reply, BuildError> {
    match found {
        Ok(None) => Ok(Reply::Proved),
        Ok(Some(how)) => Ok(Reply::Refuted(how)),
        Err(error @ (BuildError::Io { .. } | BuildError::Manifest(ManifestError::Io(_)))) => {
            Err(error)
        }
        Err(error) => {
            let error = anyhow::Error::from(error);
            Ok(Reply::Refuted(format!("it can't be proved: {error:#}")))
        }
    }
}
