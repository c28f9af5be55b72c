//! Directories: sorted names in blocks.
//!
//! A block has its entries' fixed parts first and their names behind these, in the same order. The
//! kernel finds a name by the first name of each block, then within the block, both by bisection
//! (`fs/erofs/namei.c`).

use super::ondisk::DIRENT_SIZE;

/// A name and the index of its inode.
pub type Named<'a> = (&'a [u8], u32);

/// A directory's entries with `.` and `..` at their places.
///
/// `entries` must be sorted by name.
pub fn with_dots<'a>(
    entries: impl Iterator<Item = Named<'a>>,
    directory: u32,
    parent: u32,
) -> impl Iterator<Item = Named<'a>> {
    let mut dots = [(&b"."[..], directory), (&b".."[..], parent)].into_iter().peekable();
    let mut entries = entries.peekable();
    std::iter::from_fn(move || match (dots.peek(), entries.peek()) {
        (Some((dot, _)), Some((name, _))) if name < dot => entries.next(),
        (Some(_), _) => dots.next(),
        (None, _) => entries.next(),
    })
}

/// The directory's size in bytes: its full blocks, and what is used of the last.
pub fn size<'a>(entries: impl Iterator<Item = Named<'a>>, block_size: usize) -> u64 {
    let (mut full, mut used) = (0u64, 0);
    for (name, _) in entries {
        let need = DIRENT_SIZE + name.len();
        if used + need > block_size {
            full += block_size as u64;
            used = 0;
        }
        used += need;
    }
    full + used as u64
}

/// Hands out each block's entries, in order.
pub fn each_block<'a, E>(
    entries: impl Iterator<Item = Named<'a>>,
    block_size: usize,
    mut take: impl FnMut(&[Named<'a>]) -> Result<(), E>,
) -> Result<(), E> {
    let mut block: Vec<Named<'a>> = Vec::new();
    let mut used = 0;
    for (name, node) in entries {
        let need = DIRENT_SIZE + name.len();
        if used + need > block_size {
            take(&block)?;
            block.clear();
            used = 0;
        }
        used += need;
        block.push((name, node));
    }
    take(&block)
}

/// Appends one block, without the zeros at its end; `describe` gives inode number and file type.
pub fn append_block(out: &mut Vec<u8>, entries: &[Named<'_>], describe: impl Fn(u32) -> (u64, u8)) {
    let mut name_at = entries.len() * DIRENT_SIZE;
    for (name, node) in entries {
        let (nid, file_type) = describe(*node);
        out.extend(nid.to_le_bytes());
        out.extend((name_at as u16).to_le_bytes());
        out.extend([file_type, 0]);
        name_at += name.len();
    }
    entries.iter().for_each(|(name, _)| out.extend_from_slice(name));
}
