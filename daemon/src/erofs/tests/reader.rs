//! A reader of images, written from the format's description and sharing nothing with the writer.
//! It is strict: whatever is odd is a panic.

use std::collections::BTreeMap;

use super::support::{Listing, Seen, Xattrs, join};

pub struct Reader<'a> {
    image: &'a [u8],
    devices: &'a [Vec<u8>],
    block_size: u64,
    meta: u64,
    xattrs: u64,
    device_count: u16,
    pub root: u64,
    pub inodes: u64,
    /// What is in use: start to (end, whose).
    used: BTreeMap<u64, (u64, String)>,
}

struct Inode {
    nid: u64,
    mode: u32,
    layout: u16,
    size: u64,
    union: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    links: u64,
    /// First byte behind inode and attributes.
    behind: u64,
    xattrs: Xattrs,
}

impl<'a> Reader<'a> {
    pub fn new(image: &'a [u8], devices: &'a [Vec<u8>]) -> Self {
        let mut reader = Self {
            image,
            devices,
            block_size: 0,
            meta: 0,
            xattrs: 0,
            device_count: 0,
            root: 0,
            inodes: 0,
            used: BTreeMap::new(),
        };
        assert_eq!(reader.u32(1024), 0xe0f5_e1e2, "magic");
        let bits = image[1024 + 12];
        assert!((9..=12).contains(&bits));
        reader.block_size = 1 << bits;
        let covered = if bits > 10 { 1024..1usize << bits } else { 1024..1024 + (1 << bits) };
        let mut sb = image[covered].to_vec();
        sb[4..8].fill(0);
        assert_eq!(reader.u32(1028), checksum(&sb), "checksum");
        assert_eq!(reader.u32(1032), 3, "compatible features");
        assert_eq!(reader.u32(1024 + 80) & !0xc, 0, "incompatible features");
        reader.root = reader.u16(1024 + 14).into();
        reader.inodes = reader.u64(1024 + 16);
        assert_eq!(u64::from(reader.u32(1024 + 36)) * reader.block_size, image.len() as u64);
        reader.meta = u64::from(reader.u32(1024 + 40)) * reader.block_size;
        reader.xattrs = u64::from(reader.u32(1024 + 44)) * reader.block_size;
        reader.device_count = reader.u16(1024 + 86);
        let table = u64::from(reader.u16(1024 + 88)) * 128;
        if reader.device_count > 0 {
            assert!(table >= 1152);
            for n in 0..u64::from(reader.device_count) {
                let blocks = reader.u32(table + n * 128 + 64);
                if let Some(device) = devices.get(n as usize) {
                    assert_eq!(u64::from(blocks) * reader.block_size, device.len() as u64);
                }
            }
        }
        let end = if table > 0 { table + 128 * u64::from(reader.device_count) } else { 1152 };
        reader.take(0, end, "superblock and devices");
        reader
    }

    pub fn listing(&mut self) -> Listing {
        let mut listing = Listing::new();
        self.walk(self.root, self.root, b"", &mut listing);
        let mut nids: Vec<u64> = listing.values().map(|seen| seen.nid).collect();
        nids.sort_unstable();
        nids.dedup();
        assert_eq!(nids.len() as u64, self.inodes, "inodes");
        assert!(!nids.contains(&0));
        listing
    }

    fn walk(&mut self, nid: u64, parent: u64, path: &[u8], listing: &mut Listing) {
        let inode = self.inode(nid);
        let kind = inode.mode & 0o170_000;
        let whole = |reader: &mut Self, inode: &Inode| reader.data(inode);
        let mut seen = Seen {
            nid,
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            size: if kind == 0o040_000 { 0 } else { inode.size },
            mtime: inode.mtime,
            links: inode.links,
            device: (0, 0),
            target: None,
            data: None,
            xattrs: inode.xattrs.clone(),
        };
        match kind {
            0o100_000 => seen.data = Some(whole(self, &inode)),
            0o120_000 => seen.target = Some(whole(self, &inode)),
            0o020_000 | 0o060_000 => {
                let n = inode.union;
                seen.device = ((n >> 8) & 0xfff, (n & 0xff) | ((n >> 12) & 0xf_ff00));
            }
            0o040_000 => {
                let data = whole(self, &inode);
                listing.insert(path.to_vec(), seen);
                let entries = self.entries(&data);
                let names: Vec<&[u8]> = entries.iter().map(|(name, ..)| &name[..]).collect();
                assert!(names.is_sorted_by(|a, b| a < b), "sorted: {names:?}");
                let dots: Vec<_> =
                    entries.iter().filter(|(n, ..)| n == b"." || n == b"..").collect();
                assert_eq!(dots.len(), 2);
                assert_eq!((dots[0].1, dots[1].1), (nid, parent));
                for (name, child, file_type) in &entries {
                    assert_eq!(self.find(&data, name), Some(*child), "bisection");
                    if name != b"." && name != b".." {
                        let path = join(path, name);
                        self.walk(*child, nid, &path, listing);
                        let types = [0, 0o100, 0o040, 0o020, 0o060, 0o010, 0o140, 0o120];
                        let mode = listing[&path].mode;
                        assert_eq!(types[usize::from(*file_type)] << 9, mode & 0o170_000);
                    }
                }
                let absent = self.find(&data, b"not here\xff\xff\xff\xff");
                assert_eq!(absent, None);
                return;
            }
            _ => assert!(matches!(kind, 0o010_000 | 0o140_000), "kind {kind:o}"),
        }
        listing.insert(path.to_vec(), seen);
    }

    fn inode(&mut self, nid: u64) -> Inode {
        let at = self.meta + nid * 32;
        let format = self.u16(at);
        assert_eq!(format & !0xf, 0);
        let extended = format & 1 == 1;
        let words = u64::from(self.u16(at + 2));
        let xattr_len = if words == 0 { 0 } else { 12 + 4 * (words - 1) };
        let len = if extended { 64 } else { 32 };
        let epoch = (self.u64(1024 + 24) as i64, i64::from(self.u32(1024 + 32)));
        Inode {
            nid,
            mode: self.u16(at + 4).into(),
            layout: format >> 1,
            size: if extended { self.u64(at + 8) } else { self.u32(at + 8).into() },
            union: self.u32(at + 16),
            uid: if extended { self.u32(at + 24) } else { self.u16(at + 24).into() },
            gid: if extended { self.u32(at + 28) } else { self.u16(at + 26).into() },
            mtime: if extended {
                (self.u64(at + 32) as i64, self.u32(at + 40).into())
            } else {
                epoch
            },
            links: if extended { self.u32(at + 44).into() } else { self.u16(at + 6).into() },
            behind: at + len + xattr_len,
            xattrs: self.xattrs(at + len, xattr_len),
        }
    }

    fn xattrs(&self, at: u64, len: u64) -> Xattrs {
        let mut found = Xattrs::new();
        if len == 0 {
            return found;
        }
        assert!(len > 12, "no attributes at all are no header at all");
        let shared = u64::from(self.image[at as usize + 4]);
        for n in 0..shared {
            let id = u64::from(self.u32(at + 12 + 4 * n));
            self.xattr(self.xattrs + 4 * id, &mut found);
        }
        let mut entry = at + 12 + 4 * shared;
        while entry < at + len {
            entry = self.xattr(entry, &mut found);
        }
        assert_eq!(entry, at + len);
        found
    }

    fn xattr(&self, at: u64, found: &mut Xattrs) -> u64 {
        let prefix: &[u8] = match self.image[at as usize + 1] {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            other => panic!("namespace {other}"),
        };
        let name = at as usize + 4;
        let value = name + usize::from(self.image[at as usize]);
        let end = value + usize::from(self.u16(at + 2));
        let full = [prefix, &self.image[name..value]].concat();
        assert!(found.insert(full, self.image[value..end].to_vec()).is_none());
        (end as u64).next_multiple_of(4)
    }

    fn data(&mut self, inode: &Inode) -> Vec<u8> {
        let (nid, size, behind) = (inode.nid, inode.size, inode.behind);
        let start = self.meta + nid * 32;
        let whose = format!("inode {nid}");
        let mut out = Vec::new();
        match inode.layout {
            0 | 2 => {
                let tail = if inode.layout == 2 { size % self.block_size } else { 0 };
                assert!(inode.layout == 0 || tail > 0, "a tail of nothing");
                let flat = u64::from(inode.union) * self.block_size;
                if size > tail {
                    let end = flat + (size - tail).next_multiple_of(self.block_size);
                    self.take(flat, end, &whose);
                    out.extend(&self.image[flat as usize..(flat + size - tail) as usize]);
                    let rest = &self.image[(flat + size - tail) as usize..end as usize];
                    assert!(rest.iter().all(|byte| *byte == 0), "zeros behind the end");
                }
                let end = behind + tail;
                self.take(start, end, &whose);
                if tail > 0 {
                    assert_eq!(behind / self.block_size, (end - 1) / self.block_size, "one block");
                    out.extend(&self.image[behind as usize..end as usize]);
                }
            }
            4 => {
                assert_eq!(inode.union & !0x3f, 0);
                assert_eq!(inode.union & 0x20, 0x20, "indexes");
                let bits = self.block_size.trailing_zeros() + (inode.union & 0x1f);
                let indexes = behind.next_multiple_of(8);
                let count = size.div_ceil(1 << bits);
                self.take(start, indexes + 8 * count, &whose);
                for n in 0..count {
                    let len = (size - (n << bits)).min(1 << bits) as usize;
                    let at = indexes + 8 * n;
                    let (device, block) = (self.u16(at + 2), self.u32(at + 4));
                    assert_eq!(self.u16(at), 0);
                    if block == u32::MAX {
                        out.resize(out.len() + len, 0);
                    } else {
                        assert!(device > 0 && device <= self.device_count);
                        let from = block as usize * self.block_size as usize;
                        let device = &self.devices[usize::from(device) - 1];
                        out.extend(&device[from..from + len]);
                    }
                }
            }
            other => panic!("layout {other}"),
        }
        assert_eq!(out.len() as u64, size);
        out
    }

    /// Names, inode numbers and types of a directory.
    fn entries(&self, data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
        let mut all = Vec::new();
        for block in data.chunks(self.block_size as usize) {
            all.extend(block_entries(block));
        }
        all
    }

    /// As the kernel looks a name up: first the block, then in the block.
    fn find(&self, data: &[u8], name: &[u8]) -> Option<u64> {
        let blocks: Vec<&[u8]> = data.chunks(self.block_size as usize).collect();
        let after = blocks.partition_point(|block| &block_entries(block)[0].0[..] <= name);
        let entries = block_entries(blocks.get(after.checked_sub(1)?)?);
        let at = entries.binary_search_by(|(other, ..)| other[..].cmp(name)).ok()?;
        Some(entries[at].1)
    }

    /// Notes that a range is in use; the same one may be so more than once (hard links).
    fn take(&mut self, start: u64, end: u64, whose: &str) {
        let entry = (end, whose.to_owned());
        if self.used.get(&start) == Some(&entry) {
            return;
        }
        let before = self.used.range(..end).next_back();
        assert!(
            before.is_none_or(|(_, (before_end, _))| *before_end <= start),
            "{whose}: {before:?}"
        );
        self.used.insert(start, entry);
    }

    fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.image[at as usize..at as usize + 2].try_into().unwrap())
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.image[at as usize..at as usize + 4].try_into().unwrap())
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.image[at as usize..at as usize + 8].try_into().unwrap())
    }
}

fn block_entries(block: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
    let name_at =
        |n: usize| usize::from(u16::from_le_bytes([block[12 * n + 8], block[12 * n + 9]]));
    let count = name_at(0) / 12;
    assert!(count > 0 && name_at(0) % 12 == 0);
    let mut entries = Vec::new();
    for n in 0..count {
        let rest = &block[name_at(n)..];
        let len = if n + 1 < count {
            name_at(n + 1) - name_at(n)
        } else {
            rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len())
        };
        assert!((1..=255).contains(&len));
        let nid = u64::from_le_bytes(block[12 * n..12 * n + 8].try_into().unwrap());
        entries.push((rest[..len].to_vec(), nid, block[12 * n + 10]));
    }
    entries
}

/// CRC32C by its definition: a division of polynomials, bit by bit.
fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for bit in bytes.iter().flat_map(|byte| (0..8).map(move |n| u32::from(byte >> n & 1))) {
        let carry = (crc & 1) ^ bit;
        crc >>= 1;
        if carry == 1 {
            crc ^= 0x1edc_6f41_u32.reverse_bits();
        }
    }
    crc
}
