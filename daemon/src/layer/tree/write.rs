//! A tree as a manifest.

use std::collections::HashMap;
use std::io::{self, Write};

use super::{ROOT, Summary, Tree, What, opaque_xattr};
use crate::manifest::layer::{Attributes, Content, Entry, Header, Kind, Node, VERSION, Writer};

impl Tree {
    /// Writes the manifest, for a segment of `len` bytes. `out` should be buffered.
    pub fn write<W: Write>(&self, out: W, len: u64) -> io::Result<W> {
        let root = self.attributes(ROOT);
        let mtime = self.common_time();
        let header = Header { version: VERSION, segments: vec![len], mtime, root };
        let mut writer = Writer::new(out, &header)?;
        self.visit(|number, parent, name, node| {
            debug_assert!(number > 0);
            writer.entry(&Entry { parent, name: name.to_vec(), node })
        })?;
        writer.finish()
    }

    /// Counts what there is.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary =
            Summary { dropped_xattrs: self.dropped_xattrs, directories: 1, ..Summary::default() };
        summary.opaque += u64::from(self.is_opaque());
        let counted = self.visit(|_, _, _, node| {
            match node {
                Node::Link(_) => summary.hard_links += 1,
                Node::Inode(attributes, Kind::Directory) => {
                    summary.directories += 1;
                    summary.opaque += u64::from(attributes.xattrs.contains(&opaque_xattr()));
                }
                Node::Inode(_, Kind::File(content)) => {
                    summary.files += 1;
                    let (Content::At { size, .. } | Content::Sparse { size, .. }) = content else {
                        return Ok(());
                    };
                    summary.bytes = summary.bytes.saturating_add(size);
                }
                Node::Inode(_, Kind::Symlink(_)) => summary.symlinks += 1,
                Node::Inode(_, kind) if kind == Kind::WHITEOUT => summary.whiteouts += 1,
                Node::Inode(..) => summary.special += 1,
            }
            Ok(())
        });
        debug_assert!(counted.is_ok(), "there is nothing that could fail");
        summary
    }

    /// Gives every name but the root's in the manifest's order: its number, its directory's, the name, what it is.
    fn visit(
        &self,
        mut each: impl FnMut(u32, u32, &[u8], Node) -> io::Result<()>,
    ) -> io::Result<()> {
        // for each inode the number of the entry that has it
        let mut entry_of = vec![0u32; self.inodes.len()];
        let mut next = 1u32;
        // directories that are begun: their numbers and what is still to come of them
        let mut open = Vec::new();
        let children = |inode: u32| match &self.inodes[inode as usize].what {
            What::Directory { children, .. } => Some(children.iter()),
            _ => None,
        };
        open.extend(children(ROOT).map(|children| (0, children)));
        while let Some((parent, rest)) = open.last_mut() {
            let Some((name, inode)) = rest.next() else {
                open.pop();
                continue;
            };
            let known = entry_of[*inode as usize];
            let node = if known > 0 { Node::Link(known) } else { self.node(*inode) };
            each(next, *parent, name, node)?;
            if known == 0 {
                entry_of[*inode as usize] = next;
                if let Some(children) = children(*inode) {
                    open.push((next, children));
                }
            }
            next = next.checked_add(1).ok_or_else(|| io::Error::other("too many names"))?;
        }
        Ok(())
    }

    fn node(&self, inode: u32) -> Node {
        let kind = match &self.inodes[inode as usize].what {
            What::Directory { .. } => Kind::Directory,
            What::Other(kind) => kind.clone(),
            What::Whiteout => Kind::WHITEOUT,
        };
        Node::Inode(self.attributes(inode), kind)
    }

    /// With what overlayfs is to know.
    fn attributes(&self, inode: u32) -> Attributes {
        let inode = &self.inodes[inode as usize];
        let mut attributes = inode.attributes.clone();
        match inode.what {
            What::Directory { opaque: true, .. } => attributes.xattrs.push(opaque_xattr()),
            What::Whiteout => attributes.xattrs.clear(),
            _ => {}
        }
        attributes
    }

    /// The time that most inodes have, in whole seconds: the image keeps it once.
    fn common_time(&self) -> i64 {
        let mut counts = HashMap::<i64, u64>::new();
        for (secs, nanos) in self.inodes.iter().map(|inode| inode.attributes.mtime) {
            if nanos == 0 {
                *counts.entry(secs).or_default() += 1;
            }
        }
        // of equally many the latest, so that it is always the same
        counts.into_iter().max_by_key(|(secs, count)| (*count, *secs)).map_or(0, |(secs, _)| secs)
    }
}
