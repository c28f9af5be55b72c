//! A tree as all sides of the tests see it, and the devices' content.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use fs_err as fs;
use tempfile::TempDir;

use crate::erofs::{
    ErofsError, FileContent, ImageBuilder, ImageSpec, Layout, Meta, Node, NodeId, Timestamp,
};

/// Extended attributes, names to values.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What there is to see of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub nid: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of anything but a directory.
    pub size: u64,
    pub mtime: (i64, i64),
    pub links: u64,
    pub device: (u32, u32),
    pub target: Option<Vec<u8>>,
    pub data: Option<Vec<u8>>,
    pub xattrs: Xattrs,
}

/// Paths below the root to what is there; the root is the empty path.
pub type Listing = BTreeMap<Vec<u8>, Seen>;

/// `path/name`, or just the name in the root.
pub fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

/// Fails at the first difference, saying which.
pub fn assert_same(seen: &Listing, expected: &Listing) {
    for (path, expected) in expected {
        let name = String::from_utf8_lossy(path);
        let seen = seen.get(path).unwrap_or_else(|| panic!("{name:?} is missing"));
        let short = |seen: &Seen| Seen { data: None, xattrs: Xattrs::new(), ..seen.clone() };
        assert_eq!(short(seen), short(expected), "{name:?}");
        assert!(seen.data == expected.data, "the content of {name:?}");
        assert!(seen.xattrs == expected.xattrs, "the attributes of {name:?}");
    }
    let more = seen.keys().find(|path| !expected.contains_key(*path));
    assert!(more.is_none(), "{:?} is too much", more.map(|path| String::from_utf8_lossy(path)));
}

/// Bytes that tell device and place.
pub fn device_content(device: u16, len: u64) -> Vec<u8> {
    let word = |n: u64| (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(device) << 20);
    (0..len.div_ceil(8)).flat_map(|n| word(n).to_le_bytes()).take(len as usize).collect()
}

/// A builder that keeps what it was told, as what must be seen.
pub struct Model {
    pub builder: ImageBuilder,
    pub devices: Vec<Vec<u8>>,
    block_size: u64,
    paths: HashMap<NodeId, Vec<u8>>,
    listing: Listing,
    names_of: HashMap<NodeId, Vec<Vec<u8>>>,
}

impl Model {
    /// `devices` lengths in blocks.
    pub fn new(block_bits: u8, build_time: Timestamp, devices: &[u64]) -> Self {
        let spec = ImageSpec {
            block_bits,
            uuid: *b"an example uuid!",
            build_time,
            devices: devices.to_vec(),
        };
        let block_size = spec.block_size();
        let contents = devices.iter().zip(1..).map(|(n, id)| device_content(id, n * block_size));
        let builder = ImageBuilder::new(spec).unwrap();
        let root = builder.root();
        let mut model = Self {
            builder,
            devices: contents.collect(),
            block_size,
            paths: HashMap::from([(root, Vec::new())]),
            listing: Listing::new(),
            names_of: HashMap::new(),
        };
        model.listing.insert(Vec::new(), seen(&Meta { mode: 0o40_755, ..Meta::default() }));
        model.names_of.insert(root, vec![Vec::new()]);
        model.set_meta(root, Meta { mode: 0o755, mtime: build_time, ..Meta::default() }, &[]);
        model
    }

    pub fn root(&self) -> NodeId {
        self.builder.root()
    }

    pub fn set_meta(&mut self, id: NodeId, mut meta: Meta, xattrs: &[(&[u8], &[u8])]) {
        meta.xattrs = self.builder.xattr_set(xattrs).unwrap();
        self.builder.set_meta(id, &meta).unwrap();
        for path in self.names_of[&id].clone() {
            let old = &self.listing[&path];
            let meta_part = seen(&meta);
            let mode = old.mode & 0o170_000 | meta_part.mode;
            let new = Seen {
                mode,
                uid: meta_part.uid,
                gid: meta_part.gid,
                mtime: meta_part.mtime,
                xattrs: xattrs.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect(),
                ..old.clone()
            };
            self.listing.insert(path, new);
        }
    }

    pub fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        mut meta: Meta,
        xattrs: &[(&[u8], &[u8])],
        node: Node,
    ) -> NodeId {
        meta.xattrs = self.builder.xattr_set(xattrs).unwrap();
        let mut new = seen(&meta);
        new.xattrs = xattrs.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect();
        let kind = match &node {
            Node::Directory => {
                new.links = 2;
                let above = self.paths[&parent].clone();
                self.listing.get_mut(&above).unwrap().links += 1;
                0o040_000
            }
            Node::File(content) => {
                let data = self.content(content);
                new.size = data.len() as u64;
                new.data = Some(data);
                0o100_000
            }
            Node::Symlink(target) => {
                new.size = target.len() as u64;
                new.target = Some(target.clone());
                0o120_000
            }
            Node::CharDevice { major, minor } => {
                new.device = (*major, *minor);
                0o020_000
            }
            Node::BlockDevice { major, minor } => {
                new.device = (*major, *minor);
                0o060_000
            }
            Node::Fifo => 0o010_000,
            Node::Socket => 0o140_000,
        };
        new.mode |= kind;
        let id = self.builder.add(parent, name, &meta, node).unwrap();
        let path = join(&self.paths[&parent], name);
        self.listing.insert(path.clone(), new);
        self.names_of.insert(id, vec![path.clone()]);
        self.paths.insert(id, path);
        id
    }

    pub fn link(&mut self, parent: NodeId, name: &[u8], target: NodeId) {
        self.builder.link(parent, name, target).unwrap();
        let path = join(&self.paths[&parent], name);
        let copy = self.listing[&self.paths[&target]].clone();
        self.listing.insert(path.clone(), copy);
        let names = self.names_of.get_mut(&target).unwrap();
        names.push(path);
        for name in names.clone() {
            self.listing.get_mut(&name).unwrap().links += 1;
        }
    }

    pub fn has(&self, parent: NodeId, name: &[u8]) -> bool {
        self.listing.contains_key(&join(&self.paths[&parent], name))
    }

    /// The layout, and what must be seen of it.
    pub fn finish(self) -> Result<(Layout, Listing, Vec<Vec<u8>>), ErofsError> {
        let layout = self.builder.layout()?;
        let mut listing = self.listing;
        for (id, names) in self.names_of {
            for name in names {
                listing.get_mut(&name).unwrap().nid = layout.nid(id).unwrap();
            }
        }
        Ok((layout, listing, self.devices))
    }

    fn content(&self, content: &FileContent) -> Vec<u8> {
        let read = |device: u16, block: u64, len: u64| {
            let start = (block * self.block_size) as usize;
            self.devices[usize::from(device) - 1][start..start + len as usize].to_vec()
        };
        match content {
            FileContent::Empty => Vec::new(),
            FileContent::Inline(bytes) => bytes.clone(),
            FileContent::Contiguous { size: 0, .. } => Vec::new(),
            FileContent::Contiguous { device, block, size } => read(*device, *block, *size),
            FileContent::Chunks { chunk_bits, size, chunks } => {
                let mut out = Vec::new();
                for chunk in chunks {
                    let len = (1 << chunk_bits).min(size - out.len() as u64);
                    match chunk {
                        Some((device, block)) => out.extend(read(*device, *block, len)),
                        None => out.resize(out.len() + len as usize, 0),
                    }
                }
                out
            }
        }
    }
}

fn seen(meta: &Meta) -> Seen {
    Seen {
        nid: 0,
        mode: meta.mode.into(),
        uid: meta.uid,
        gid: meta.gid,
        size: 0,
        mtime: (meta.mtime.secs, meta.mtime.nanos.into()),
        links: if meta.mode & 0o40_000 == 0 { 1 } else { 2 },
        device: (0, 0),
        target: None,
        data: None,
        xattrs: Xattrs::new(),
    }
}

/// The image's bytes.
pub fn image(layout: &Layout) -> Vec<u8> {
    let mut bytes = Vec::new();
    layout.write(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, layout.image_len());
    bytes
}

/// `fsck.erofs`, with all content, and `dump.erofs` on an image of 4096-byte blocks, where they are
/// installed.
pub fn check_with_utils(image: &Path, devices: &[PathBuf]) {
    // fsck.erofs reads where the attributes of an inode would begin, also of one that has none and ends the image
    let file = fs::OpenOptions::new().append(true).open(image).unwrap();
    file.set_len(file.metadata().unwrap().len() + 4096).unwrap();
    for (tool, arguments) in [("fsck.erofs", &["--extract"][..]), ("dump.erofs", &["-s", "-S"][..])]
    {
        let mut command = Command::new(tool);
        command.args(arguments);
        for device in devices {
            command.arg(format!("--device={}", device.display()));
        }
        match command.arg(image).output() {
            Ok(output) => assert!(
                output.status.success(),
                "{tool}: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{tool}"),
        }
    }
}

/// A layout's image and its devices as files in a directory below /var/tmp.
pub struct Files {
    pub dir: TempDir,
    pub image: PathBuf,
    pub devices: Vec<PathBuf>,
}

impl Files {
    pub fn new(layout: &Layout, devices: &[Vec<u8>]) -> Self {
        let dir = tempfile::Builder::new().prefix("erofs").tempdir_in("/var/tmp").unwrap();
        let image = dir.path().join("image");
        layout.write(fs::File::create(&image).unwrap()).unwrap();
        let mut paths = Vec::new();
        for (n, content) in devices.iter().enumerate() {
            let path = dir.path().join(format!("d{n}"));
            fs::write(&path, content).unwrap();
            paths.push(path);
        }
        Self { dir, image, devices: paths }
    }
}
