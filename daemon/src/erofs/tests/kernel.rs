//! What the kernel sees of an image that is mounted.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use fs_err as fs;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::support::{Files, Listing, Model, Seen, Xattrs, assert_same, device_content, join};
use super::zoo::{BUILD_TIME, zoo};
use crate::erofs::{FileContent, Layout, Meta, Node};

/// A mount that goes when this does.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Mounts an image on a new directory beside it: file-backed, without a loop device.
    pub fn erofs(files: &Files) -> Self {
        let devices: Vec<String> =
            files.devices.iter().map(|device| format!("device={}", device.display())).collect();
        Self::new(&files.image, &files.dir.path().join("mnt"), "erofs", &devices.join(","))
    }

    pub fn new(source: &Path, at: &Path, kind: &str, data: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let mounted = mount(Some(source), at, Some(kind), MsFlags::MS_RDONLY, Some(data));
        mounted.unwrap_or_else(|error| panic!("mount {kind}: {error}"));
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("can't unmount {}: {error}", self.0.display());
        }
    }
}

/// Everything below a directory.
pub fn listing(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut xattrs = xattrs(root);
    walk(root, b"", &mut listing);
    for (path, seen) in &mut listing {
        seen.xattrs = xattrs.remove(path).unwrap_or_default();
    }
    listing
}

fn walk(root: &Path, path: &[u8], listing: &mut Listing) {
    let full = root.join(OsStr::from_bytes(path));
    let meta = fs::symlink_metadata(&full).unwrap();
    let kind = meta.file_type();
    let number = meta.rdev();
    let is_device = kind.is_char_device() || kind.is_block_device();
    let device = (nix::sys::stat::major(number) as u32, nix::sys::stat::minor(number) as u32);
    let target = || fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec();
    let seen = Seen {
        nid: meta.ino(),
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        size: if kind.is_dir() { 0 } else { meta.size() },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        links: meta.nlink(),
        device: if is_device { device } else { (0, 0) },
        target: kind.is_symlink().then(target),
        data: kind.is_file().then(|| fs::read(&full).unwrap()),
        xattrs: Xattrs::new(),
    };
    let nid = seen.nid;
    assert!(listing.insert(path.to_vec(), seen).is_none());
    if kind.is_dir() {
        for entry in fs::read_dir(&full).unwrap() {
            let entry = entry.unwrap();
            let child = join(path, entry.file_name().as_bytes());
            walk(root, &child, listing);
            assert_eq!(entry.ino(), listing[&child].nid);
            let is_dir = listing[&child].mode & 0o170_000 == 0o040_000;
            assert_eq!(entry.file_type().unwrap().is_dir(), is_dir);
            assert_ne!(entry.ino(), nid);
        }
    }
}

/// The extended attributes of everything, by path. In Python: std has no way to them.
fn xattrs(root: &Path) -> HashMap<Vec<u8>, Xattrs> {
    const SCRIPT: &str = r"
import os, sys
def show(path, full):
    for name in os.listxattr(full, follow_symlinks=False):
        value = os.getxattr(full, name, follow_symlinks=False)
        print(path.hex() or '-', os.fsencode(name).hex(), value.hex() or '-')
    if os.path.isdir(full) and not os.path.islink(full):
        for name in os.listdir(full):
            show(path + b'/' + name if path else name, full + b'/' + name)
sys.setrecursionlimit(10000)
show(b'', os.fsencode(sys.argv[1]))
";
    let output = Command::new("python3").arg("-c").arg(SCRIPT).arg(root).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let unhex = |hex: &str| -> Vec<u8> {
        let hex = if hex == "-" { "" } else { hex };
        (0..hex.len() / 2)
            .map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap())
            .collect()
    };
    let mut found: HashMap<Vec<u8>, Xattrs> = HashMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let fields: Vec<Vec<u8>> = line.split(' ').map(unhex).collect();
        let set = found.entry(fields[0].clone()).or_default();
        assert!(set.insert(fields[1].clone(), fields[2].clone()).is_none());
    }
    found
}

/// The files come first: the mount must go before they do.
fn mounted(layout: &Layout, devices: &[Vec<u8>]) -> (Files, Mounted) {
    let files = Files::new(layout, devices);
    let mounted = Mounted::erofs(&files);
    (files, mounted)
}

#[test]
#[ignore = "needs root"]
fn root_kernel_sees_every_kind() {
    for block_bits in 9..=12 {
        let (layout, expected, devices) = zoo(block_bits).finish().unwrap();
        let (_files, mounted) = mounted(&layout, &devices);
        assert_same(&listing(&mounted.0), &expected);
        for path in expected.keys() {
            let meta = fs::symlink_metadata(mounted.0.join(OsStr::from_bytes(path))).unwrap();
            assert_eq!((meta.ctime(), meta.ctime_nsec()), (meta.mtime(), meta.mtime_nsec()));
        }
    }
}

#[test]
#[ignore = "needs root"]
fn root_kernel_reads_a_directory_of_100_000() {
    for block_bits in [9, 12] {
        let mut m = Model::new(block_bits, BUILD_TIME, &[100]);
        let plain = Meta { mode: 0o644, mtime: BUILD_TIME, ..Meta::default() };
        let many = m.add(m.root(), b"many", Meta { mode: 0o755, ..plain }, &[], Node::Directory);
        for n in 0..100_000u64 {
            let name = format!("{n}{}", "-name".repeat((n % 40) as usize));
            let node =
                Node::File(FileContent::Contiguous { device: 1, block: n % 90, size: n % 500 });
            m.add(many, name.as_bytes(), plain, &[], node);
        }
        let (layout, expected, devices) = m.finish().unwrap();
        let (_files, mounted) = mounted(&layout, &devices);
        let many = mounted.0.join("many");
        assert_eq!(fs::read_dir(&many).unwrap().count(), 100_000);
        for (path, seen) in &expected {
            let full = mounted.0.join(OsStr::from_bytes(path));
            let meta = fs::symlink_metadata(&full).unwrap();
            assert_eq!((meta.ino(), meta.mode()), (seen.nid, seen.mode), "{}", full.display());
            if let Some(data) = seen.data.as_ref().filter(|_| seen.nid % 97 == 0) {
                assert!(fs::read(&full).unwrap() == *data, "{}", full.display());
            }
        }
        for name in ["", "0", "99999-nam", "zzz", "50000-name-namf"].map(|name| format!("{name}?"))
        {
            assert!(!many.join(name).exists());
        }
    }
}

#[test]
#[ignore = "needs root"]
fn root_kernel_reads_from_many_devices() {
    for block_bits in [9, 12] {
        let mut m = Model::new(block_bits, BUILD_TIME, &[3; 100]);
        for device in 1..=100 {
            let run = FileContent::Contiguous { device, block: 1, size: 2 << block_bits };
            let name = format!("{device}");
            m.add(m.root(), name.as_bytes(), Meta::default(), &[], Node::File(run));
        }
        let block = 1 << block_bits;
        let all = (1..=100).map(|device| Some((device, u64::from(device) % 3))).collect();
        let chunks =
            FileContent::Chunks { chunk_bits: block_bits, size: 100 * block - 9, chunks: all };
        m.add(m.root(), b"all", Meta::default(), &[], Node::File(chunks));
        let (layout, expected, devices) = m.finish().unwrap();
        let (_files, mounted) = mounted(&layout, &devices);
        assert_same(&listing(&mounted.0), &expected);
    }
}

#[test]
#[ignore = "needs root"]
fn root_kernel_reads_far_into_huge_files() {
    for (block_bits, size) in [(12, 9u64 << 40), (9, 3 << 39)] {
        // one device, sparse, with something at a few places, and files all over it
        let blocks = size.div_ceil(1 << block_bits) + 1;
        let spec = crate::erofs::ImageSpec {
            block_bits,
            uuid: [1; 16],
            build_time: BUILD_TIME,
            devices: vec![blocks],
        };
        let mut b = crate::erofs::ImageBuilder::new(spec).unwrap();
        let root = b.root();
        let whole = FileContent::Contiguous { device: 1, block: 1, size };
        b.add(root, b"whole", &Meta::default(), Node::File(whole)).unwrap();
        let end = FileContent::Contiguous { device: 1, block: blocks - 1, size: 1 << block_bits };
        b.add(root, b"end", &Meta::default(), Node::File(end)).unwrap();
        let files = Files::new(&b.layout().unwrap(), &[Vec::new()]);
        let device = fs::File::options().write(true).open(&files.devices[0]).unwrap();
        device.set_len(blocks << block_bits).unwrap();
        let places = [0, 1 << 30, (1 << 32) + 3, (1 << 40) + 511, size - 600];
        for (n, place) in places.iter().enumerate() {
            let content = device_content(n as u16, 500);
            device.file().write_all_at(&content, place + (1 << block_bits)).unwrap();
        }
        let mounted = Mounted::erofs(&files);
        let file = fs::File::open(mounted.0.join("whole")).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size);
        for (n, place) in places.iter().enumerate() {
            let mut seen = vec![0; 500];
            file.file().read_exact_at(&mut seen, *place).unwrap();
            assert!(seen == device_content(n as u16, 500), "at {place}");
        }
        let end = fs::read(mounted.0.join("end")).unwrap();
        let mut want = vec![0; 1 << block_bits];
        let device = fs::File::open(&files.devices[0]).unwrap();
        device.file().read_exact_at(&mut want, (blocks - 1) << block_bits).unwrap();
        assert!(end == want && want.iter().any(|byte| *byte != 0));
    }
}
