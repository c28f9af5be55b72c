//! The manifest's tree in memory: what the builder has to know of each name, packed tightly.
//!
//! Node 0 is the root, the others have the numbers of the manifest's entries. They are in git's
//! order, depth first: the order of the entries in an index.

use std::io::Read;

use crate::builder::BuildError;
use crate::manifest::{Entry, EntryKind, Header, Reader};
use crate::object::ObjectId;

/// The longest path in bytes, as the kernel takes it (`PATH_MAX` without its NUL).
const MAX_PATH: usize = 4095;

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    Executable,
    /// Not in the image: git writes it by its own rules once the tree is mounted.
    Converted,
    ConvertedExecutable,
    Symlink,
    Gitlink,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// A file's size; where a symbolic link's target starts in `targets`, and its length << 48.
    value: u64,
    name: u32,
    parent: u32,
    name_len: u8,
    kind: Kind,
}

/// A tree, checked.
#[derive(Debug)]
pub struct Tree {
    header: Header,
    nodes: Vec<Node>,
    names: Vec<u8>,
    /// The id of each node, one behind the other.
    ids: Vec<u8>,
    targets: Vec<u8>,
}

impl Tree {
    /// Reads a manifest to its end. Beside what [`Reader`] checks, entries have to come depth first
    /// and a directory can't have the name of a file beside it.
    pub fn read(input: impl Read) -> Result<Self, BuildError> {
        let mut reader = Reader::new(input)?;
        let mut tree = Self {
            header: reader.header().clone(),
            nodes: Vec::new(),
            names: Vec::new(),
            ids: Vec::new(),
            targets: Vec::new(),
        };
        let root = EntryKind::Directory;
        let root = Entry { parent: 0, name: Vec::new(), key: tree.header.tree, kind: root };
        tree.push(&root)?;
        let mut open = vec![OpenDirectory { number: 0, path_len: 0, files: Vec::new() }];
        while let Some((number, entry)) = reader.next_entry()? {
            let fail = |what: &str| {
                let name = String::from_utf8_lossy(&entry.name);
                BuildError::Tree(format!("entry {number}, {name:?}: {what}"))
            };
            let depth = open.iter().rposition(|directory| directory.number == entry.parent);
            open.truncate(depth.ok_or_else(|| fail("its directory is done with"))? + 1);
            let Some(directory) = open.last_mut() else { return Err(fail("it is nowhere")) };
            let path_len = directory.path_len + entry.name.len();
            if path_len > MAX_PATH {
                return Err(fail("its path is too long"));
            }
            if !directory.admits(&entry) {
                return Err(fail("a file and a directory have one name"));
            }
            if entry.kind == EntryKind::Directory {
                let path_len = path_len + 1;
                open.push(OpenDirectory { number, path_len, files: Vec::new() });
            }
            tree.push(&entry)?;
        }
        Ok(tree)
    }

    fn push(&mut self, entry: &Entry) -> Result<(), BuildError> {
        let too_large = |_| BuildError::Tree("the tree has too many names".into());
        let name = u32::try_from(self.names.len()).map_err(too_large)?;
        let name_len = u8::try_from(entry.name.len()).map_err(too_large)?;
        let (kind, value) = match &entry.kind {
            EntryKind::Directory => (Kind::Directory, 0),
            EntryKind::File { size, executable: false } => (Kind::File, *size),
            EntryKind::File { size, executable: true } => (Kind::Executable, *size),
            EntryKind::Converted { executable: false } => (Kind::Converted, 0),
            EntryKind::Converted { executable: true } => (Kind::ConvertedExecutable, 0),
            EntryKind::Symlink { target } => {
                let value = self.targets.len() as u64 | (target.len() as u64) << 48;
                self.targets.extend_from_slice(target);
                (Kind::Symlink, value)
            }
            EntryKind::Gitlink => (Kind::Gitlink, 0),
        };
        self.names.extend_from_slice(&entry.name);
        self.ids.extend_from_slice(entry.key.as_bytes());
        self.nodes.push(Node { value, name, parent: entry.parent, name_len, kind });
        Ok(())
    }

    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The number of nodes, root included.
    #[must_use]
    pub fn len(&self) -> u32 {
        u32::try_from(self.nodes.len()).unwrap_or(u32::MAX)
    }

    /// Always false: there is a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The numbers of all nodes but the root, in git's order.
    pub fn numbers(&self) -> std::ops::Range<u32> {
        1..self.len()
    }

    fn node(&self, number: u32) -> &Node {
        &self.nodes[number as usize]
    }

    #[must_use]
    pub fn kind(&self, number: u32) -> Kind {
        self.node(number).kind
    }

    #[must_use]
    pub fn parent(&self, number: u32) -> u32 {
        self.node(number).parent
    }

    /// The last component of the path; empty for the root.
    #[must_use]
    pub fn name(&self, number: u32) -> &[u8] {
        let node = self.node(number);
        &self.names[node.name as usize..][..usize::from(node.name_len)]
    }

    /// The bytes of its object's id.
    #[must_use]
    pub fn id_bytes(&self, number: u32) -> &[u8] {
        let len = self.header.hash.id_len();
        &self.ids[number as usize * len..][..len]
    }

    #[must_use]
    pub fn id(&self, number: u32) -> ObjectId {
        // Of the right length by construction, so the zero id is never made.
        ObjectId::from_bytes(self.id_bytes(number)).unwrap_or(self.header.tree)
    }

    /// `st_size` of the file or symbolic link, in bytes; 0 for anything else.
    #[must_use]
    pub fn size(&self, number: u32) -> u64 {
        let node = self.node(number);
        match node.kind {
            Kind::File | Kind::Executable => node.value,
            Kind::Symlink => node.value >> 48,
            _ => 0,
        }
    }

    /// Where a symbolic link leads; empty for anything else.
    #[must_use]
    pub fn target(&self, number: u32) -> &[u8] {
        let node = self.node(number);
        match node.kind {
            Kind::Symlink => {
                let start = (node.value & ((1 << 48) - 1)) as usize;
                &self.targets[start..start + (node.value >> 48) as usize]
            }
            _ => &[],
        }
    }

    /// Puts the path of a node into `path`, without a slash at its start or end.
    pub fn path(&self, number: u32, path: &mut Vec<u8>) {
        path.clear();
        let mut chain = Vec::new();
        let mut at = number;
        while at != 0 {
            chain.push(at);
            at = self.parent(at);
        }
        for (n, at) in chain.iter().rev().enumerate() {
            if n > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(self.name(*at));
        }
    }
}

/// A directory whose entries are being read.
#[derive(Debug)]
struct OpenDirectory {
    number: u32,
    path_len: usize,
    /// Names of files, each the start of the next, with which a directory still to come could
    /// clash: as its name counts as `name/`, others like `name.c` can lie between.
    files: Vec<Vec<u8>>,
}

impl OpenDirectory {
    /// Is the name still free? The entries come in git's order.
    fn admits(&mut self, entry: &Entry) -> bool {
        while self.files.last().is_some_and(|file| !entry.name.starts_with(file)) {
            self.files.pop();
        }
        if entry.kind == EntryKind::Directory {
            return self.files.last() != Some(&entry.name);
        }
        self.files.push(entry.name.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::testing::{Maker, blob};

    fn read(maker: &Maker) -> Result<Tree, BuildError> {
        Tree::read(&maker.manifest()[..])
    }

    #[test]
    fn gives_back_what_the_manifest_says() {
        let mut maker = Maker::default();
        maker.file(b"a.c", b"hello");
        let dir = maker.directory(0, b"a");
        let link = maker.add(dir, b"l", b"../x", EntryKind::Symlink { target: b"../x".to_vec() });
        let deep = maker.directory(dir, b"m");
        let tool =
            maker.add(deep, b"z\xff z", b"#!", EntryKind::File { size: 2, executable: true });
        let tree = read(&maker).unwrap();
        assert_eq!(tree.len(), 6);
        assert_eq!((tree.kind(1), tree.size(1), tree.id(1)), (Kind::File, 5, blob(b"hello")));
        assert_eq!((tree.target(link), tree.size(link)), (&b"../x"[..], 4));
        let mut path = Vec::new();
        tree.path(tool, &mut path);
        assert_eq!((path.as_slice(), tree.kind(tool)), (&b"a/m/z\xff z"[..], Kind::Executable));
        tree.path(0, &mut path);
        assert!(path.is_empty());
    }

    #[test]
    fn entries_come_depth_first() {
        let mut maker = Maker::default();
        let a = maker.directory(0, b"a");
        let b = maker.directory(0, b"b");
        maker.add(b, b"x", b"", EntryKind::File { size: 0, executable: false });
        maker.add(a, b"x", b"", EntryKind::File { size: 0, executable: false });
        assert!(matches!(read(&maker), Err(BuildError::Tree(_))));
    }

    #[test]
    fn a_name_is_one_thing() {
        let mut maker = Maker::default();
        maker.file(b"a", b"1");
        maker.file(b"a-b", b"1");
        maker.file(b"a.c", b"2");
        maker.directory(0, b"a");
        assert!(matches!(read(&maker), Err(BuildError::Tree(_))));
        let mut maker = Maker::default();
        maker.file(b"a", b"1");
        maker.file(b"a-b", b"1");
        maker.directory(0, b"a.");
        maker.directory(0, b"ab");
        assert!(read(&maker).is_ok());
    }

    #[test]
    fn paths_stay_within_what_the_kernel_takes() {
        let mut maker = Maker::default();
        let mut at = 0;
        for _ in 0..15 {
            at = maker.directory(at, &[b'd'; 255]);
        }
        let mut longer = maker.clone();
        maker.add(at, &[b'f'; 255], b"", EntryKind::File { size: 0, executable: false });
        assert!(read(&maker).is_ok());
        let at = longer.directory(at, &[b'd'; 255]);
        longer.add(at, b"f", b"", EntryKind::File { size: 0, executable: false });
        assert!(matches!(read(&longer), Err(BuildError::Tree(_))));
    }
}
