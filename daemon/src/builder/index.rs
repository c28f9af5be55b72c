//! Git's index of a tree that is mounted (gitformat-index(5)), version 2.
//!
//! Each entry has the stat data that the mounted file shows, so that `git status` finds every file
//! unchanged without a look at its content, and the index has the cache tree, so that git need not
//! hash any tree.

use std::io::{self, BufWriter, Write};

use crate::builder::pack::Hashing;
use crate::builder::tree::{Kind, Tree};

/// What the files of the mounted tree show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    pub uid: u32,
    pub gid: u32,
    /// What `st_ino` has besides the inode number in the image; git keeps the lower 32 bits.
    pub ino_or: u64,
}

/// Writes the index. `nids` are the inode numbers in the image, by node.
pub fn write(
    tree: &Tree,
    nids: &[u64],
    shown: &Shown,
    out: &mut BufWriter<impl Write>,
) -> io::Result<()> {
    let counts = Counts::new(tree);
    let mut out = Hashing { out, hasher: tree.header().hash.hasher() };
    out.write_all(b"DIRC\0\0\0\x02")?;
    out.write_all(&counts.entries[0].to_be_bytes())?;
    let mut entry = Vec::new();
    let mut path = Vec::new();
    for node in tree.numbers() {
        if tree.kind(node) == Kind::Directory {
            continue;
        }
        tree.path(node, &mut path);
        entry.clear();
        let nid = nids.get(node as usize).copied().unwrap_or_default();
        stat_data(tree, node, nid, shown, &mut entry);
        entry.extend_from_slice(tree.id_bytes(node));
        #[expect(clippy::cast_possible_truncation, reason = "0xfff stands for all longer paths")]
        let flags = path.len().min(0xfff) as u16;
        entry.extend_from_slice(&flags.to_be_bytes());
        entry.extend_from_slice(&path);
        // One to eight zeros, up to a multiple of eight bytes.
        entry.resize((entry.len() + 8) / 8 * 8, 0);
        out.write_all(&entry)?;
    }

    let cache_tree = cache_tree(tree, &counts);
    out.write_all(b"TREE")?;
    let len = u32::try_from(cache_tree.len()).map_err(io::Error::other)?;
    out.write_all(&len.to_be_bytes())?;
    out.write_all(&cache_tree)?;
    let Hashing { out, hasher } = out;
    out.write_all(hasher.finish().as_bytes())?;
    out.flush()
}

/// The ten numbers before an entry's id.
#[expect(clippy::cast_possible_truncation, reason = "git keeps the lower 32 bits of all of them")]
fn stat_data(tree: &Tree, node: u32, nid: u64, shown: &Shown, entry: &mut Vec<u8>) {
    let kind = tree.kind(node);
    let mode = match kind {
        Kind::Executable | Kind::ConvertedExecutable => 0o100_755,
        Kind::Symlink => 0o120_000,
        Kind::Gitlink | Kind::Directory => 0o160_000,
        Kind::File | Kind::Converted => 0o100_644_u32,
    };
    // Git looks itself at what we did not write, and at no stat data of a submodule.
    let numbers = match kind {
        Kind::File | Kind::Executable | Kind::Symlink => {
            let time = tree.header().mtime as u32;
            let ino = (nid | shown.ino_or) as u32;
            let size = tree.size(node) as u32;
            // No device: it is another one at each mount, and git, libgit2 and JGit don't look at it.
            [time, 0, time, 0, 0, ino, mode, shown.uid, shown.gid, size]
        }
        _ => [0, 0, 0, 0, 0, 0, mode, 0, 0, 0],
    };
    entry.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
}

/// For each directory, by node: entries of the index below it, and directories in it.
#[derive(Debug)]
struct Counts {
    entries: Vec<u32>,
    subtrees: Vec<u32>,
}

impl Counts {
    fn new(tree: &Tree) -> Self {
        let len = tree.len() as usize;
        let mut counts = Self { entries: vec![0; len], subtrees: vec![0; len] };
        // What is in a directory has higher numbers than it.
        for node in tree.numbers().rev() {
            let parent = tree.parent(node) as usize;
            if tree.kind(node) == Kind::Directory {
                counts.subtrees[parent] += 1;
                counts.entries[parent] += counts.entries[node as usize];
            } else {
                counts.entries[parent] += 1;
            }
        }
        counts
    }
}

/// The content of the extension `TREE`: each tree before its subtrees, which are sorted by the
/// length of their names first, then by their bytes (`subtree_name_cmp` in git's cache-tree.c).
fn cache_tree(tree: &Tree, counts: &Counts) -> Vec<u8> {
    let mut directories: Vec<u32> =
        tree.numbers().filter(|node| tree.kind(*node) == Kind::Directory).collect();
    // Last first, as they go on a stack.
    directories.sort_unstable_by(|a, b| {
        let key = |node: u32| (tree.name(node).len(), tree.name(node));
        tree.parent(*a).cmp(&tree.parent(*b)).then_with(|| key(*b).cmp(&key(*a)))
    });
    let mut out = Vec::new();
    let mut stack = vec![0];
    while let Some(node) = stack.pop() {
        out.extend_from_slice(tree.name(node));
        let (entries, subtrees) =
            (counts.entries[node as usize], counts.subtrees[node as usize] as usize);
        out.extend_from_slice(format!("\0{entries} {subtrees}\n").as_bytes());
        out.extend_from_slice(tree.id_bytes(node));
        let first = directories.partition_point(|directory| tree.parent(*directory) < node);
        stack.extend_from_slice(&directories[first..first + subtrees]);
    }
    out
}
