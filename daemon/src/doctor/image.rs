//! The smallest tree that has all that the real ones have: an EROFS image (`fs/erofs/erofs_fs.h`) with
//! a directory `d` and in it a file `f` of one block, whose content is in a device.

/// Bytes in a block of the image, and in the file.
pub const BLOCK: usize = 4096;

/// Offsets in the image: superblock, its device table, the inodes.
const SUPERBLOCK: usize = 1024;
const DEVICE: usize = 1152;
const ROOT: usize = 1280;
const DIRECTORY: usize = 1408;
const FILE: usize = 1536;

/// An inode's number is its offset in units of 32 bytes.
const INODE_UNIT: usize = 32;
const COMPACT_INODE: usize = 32;

const FORMAT_INLINE: u16 = 2 << 1;
const FORMAT_CHUNKED: u16 = 4 << 1;
/// Chunks of one block, with an index of 8 bytes each.
const CHUNK_INDEXES: u32 = 0x20;
const FEATURE_CHUNKED_AND_DEVICES: u32 = 0x4 | 0x8;

const TYPE_FILE: u8 = 1;
const TYPE_DIRECTORY: u8 = 2;

/// The image: one block.
pub fn image() -> [u8; BLOCK] {
    let mut image = [0; BLOCK];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(place) = image.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(SUPERBLOCK, &0xE0F5_E1E2_u32.to_le_bytes());
    put(SUPERBLOCK + 12, &[12]); // block size, as a power of two
    put(SUPERBLOCK + 14, &nid(ROOT).to_le_bytes());
    put(SUPERBLOCK + 16, &3_u64.to_le_bytes()); // inodes
    put(SUPERBLOCK + 36, &1_u32.to_le_bytes()); // blocks
    // Overlayfs identifies the files of a lower layer by its UUID, which must not be all zeros.
    put(SUPERBLOCK + 48, b"hydrant doctor 1");
    put(SUPERBLOCK + 80, &FEATURE_CHUNKED_AND_DEVICES.to_le_bytes());
    put(SUPERBLOCK + 86, &1_u16.to_le_bytes()); // devices
    put(SUPERBLOCK + 88, &((DEVICE / 128) as u16).to_le_bytes());
    put(DEVICE + 64, &1_u32.to_le_bytes()); // its blocks

    let root = entries(&[(ROOT, b"."), (ROOT, b".."), (DIRECTORY, b"d")]);
    put(ROOT, &inode(FORMAT_INLINE, 0o040_755, 3, root.len(), 0));
    put(ROOT + COMPACT_INODE, &root);

    let directory = entries(&[(DIRECTORY, b"."), (ROOT, b".."), (FILE, b"f")]);
    put(DIRECTORY, &inode(FORMAT_INLINE, 0o040_755, 2, directory.len(), 0));
    put(DIRECTORY + COMPACT_INODE, &directory);

    put(FILE, &inode(FORMAT_CHUNKED, 0o100_644, 1, BLOCK, CHUNK_INDEXES));
    // Its one chunk: device 1, block 0.
    put(FILE + COMPACT_INODE + 2, &1_u16.to_le_bytes());
    image
}

fn nid(offset: usize) -> u16 {
    (offset / INODE_UNIT) as u16
}

/// `struct erofs_inode_compact`.
fn inode(format: u16, mode: u16, links: u16, size: usize, union: u32) -> [u8; COMPACT_INODE] {
    let mut inode = [0; COMPACT_INODE];
    let (first, rest) = inode.split_at_mut(16);
    first.copy_from_slice(&[0; 16]);
    for (place, value) in first.chunks_exact_mut(2).zip([format, 0, mode, links, size as u16]) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    if let Some(place) = rest.get_mut(..4) {
        place.copy_from_slice(&union.to_le_bytes());
    }
    inode
}

/// A directory's entries (`struct erofs_dirent`, 12 bytes each), then their names.
fn entries(entries: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut name_offset = entries.len() * 12;
    for (inode, name) in entries {
        let kind = if *inode == FILE { TYPE_FILE } else { TYPE_DIRECTORY };
        bytes.extend(u64::from(nid(*inode)).to_le_bytes());
        bytes.extend((name_offset as u16).to_le_bytes());
        bytes.extend([kind, 0]);
        name_offset += name.len();
    }
    bytes.extend(entries.iter().flat_map(|(_, name)| name.iter()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_tool_finds_no_fault() {
        let directory = tempfile::tempdir().unwrap();
        let (path, device) = (directory.path().join("image"), directory.path().join("device"));
        fs_err::write(&path, image()).unwrap();
        fs_err::write(&device, [7; BLOCK]).unwrap();
        let output = std::process::Command::new("fsck.erofs")
            .arg(format!("--device={}", device.display()))
            .arg(format!("--extract={}", directory.path().join("out").display()))
            .arg(&path)
            .output()
            .expect("fsck.erofs of the package erofs-utils");
        assert!(output.status.success(), "{output:?}");
        let content = fs_err::read(directory.path().join("out/d/f")).unwrap();
        assert_eq!(content, [7; BLOCK]);
    }
}
