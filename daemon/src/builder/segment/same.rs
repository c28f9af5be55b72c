//! Whether two manifests of a layer show the same tree.

use std::io::Read;

use crate::builder::BuildError;
use crate::manifest::layer::{Attributes, Entry, Node, Reader};

/// How what an index says of a layer (`said`) differs from what its archive says (`truth`); `None` if it does not. An index
/// may have times in whole seconds.
pub fn difference(said: impl Read, truth: impl Read) -> Result<Option<String>, BuildError> {
    let (mut said, mut truth) = (Reader::new(said)?, Reader::new(truth)?);
    if said.header().segments != truth.header().segments {
        return Ok(Some("their lengths".into()));
    }
    if !same_attributes(&said.header().root, &truth.header().root) {
        return Ok(Some("the root directory".into()));
    }
    loop {
        let shown = |entry: Entry| format!("{:?}", String::from_utf8_lossy(&entry.name));
        match (said.next_entry()?, truth.next_entry()?) {
            (None, None) => return Ok(None),
            (Some((_, said)), Some((_, truth))) if same(&said, &truth) => {}
            (Some((_, said)), Some((_, truth))) if said.name == truth.name => {
                return Ok(Some(shown(said)));
            }
            (Some((_, said)), Some((_, truth))) => {
                return Ok(Some(format!("{} or {}", shown(said), shown(truth))));
            }
            (Some((_, only)), None) | (None, Some((_, only))) => return Ok(Some(shown(only))),
        }
    }
}

fn same(said: &Entry, truth: &Entry) -> bool {
    let nodes = match (&said.node, &truth.node) {
        (Node::Link(said), Node::Link(truth)) => said == truth,
        (Node::Inode(said, kind), Node::Inode(truth, truly)) => {
            kind == truly && same_attributes(said, truth)
        }
        _ => false,
    };
    nodes && said.parent == truth.parent && said.name == truth.name
}

fn same_attributes(said: &Attributes, truth: &Attributes) -> bool {
    let sorted = |attributes: &Attributes| {
        let mut xattrs = attributes.xattrs.clone();
        xattrs.sort();
        xattrs
    };
    // cut off, or rounded
    let (secs, nanos) = truth.mtime;
    let rounded = if nanos >= 500_000_000 { secs.saturating_add(1) } else { secs };
    let time = said.mtime == truth.mtime
        || said.mtime.1 == 0 && (said.mtime.0 == secs || said.mtime.0 == rounded);
    time && (said.mode, said.uid, said.gid) == (truth.mode, truth.uid, truth.gid)
        && sorted(said) == sorted(truth)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::tests::{Archive, tree};

    fn manifest(archive: &[u8]) -> Vec<u8> {
        tree(archive).unwrap().write(Vec::new(), archive.len() as u64).unwrap()
    }

    fn differ(said: &[u8], truth: &[u8]) -> Option<String> {
        difference(&manifest(said)[..], &manifest(truth)[..]).unwrap()
    }

    #[test]
    fn every_difference_is_found() {
        let archive = |name: &str, content: &[u8], link: &str| {
            let mut archive = Archive::default();
            archive.dir("a/").file("a/f", b"content").file(name, content);
            archive.link("a/l", b'2', link).end()
        };
        let truth = archive("a/g", b"other", "f");
        assert_eq!(differ(&truth, &truth), None);
        for (said, found) in [
            (archive("a/h", b"other", "f"), Some("\"h\" or \"g\"")),
            (archive("g", b"other", "f"), Some("\"l\" or \"g\"")),
            (archive("a/g", b"longer", "f"), Some("\"g\"")),
            (archive("a/g", b"other", "g"), Some("\"l\"")),
            // that is for the archive's digest to tell
            (archive("a/g", b"OTHER", "f"), None),
        ] {
            assert_eq!(differ(&said, &truth).as_deref(), found);
        }
    }

    #[test]
    fn owners_modes_and_attributes_count() {
        let xattr = |name: &str| (name.as_bytes().to_vec(), b"v".to_vec());
        let truth = Attributes {
            mode: 0o644,
            xattrs: vec![xattr("user.a"), xattr("user.b")],
            ..Attributes::default()
        };
        let other = |change: fn(&mut Attributes)| {
            let mut other = truth.clone();
            change(&mut other);
            same_attributes(&other, &truth)
        };
        assert!(other(|_| ()) && other(|a| a.xattrs.reverse()));
        assert!(!other(|a| a.mode = 0o4644) && !other(|a| a.uid = 1) && !other(|a| a.gid = 1));
        assert!(!other(|a| a.xattrs.truncate(1)) && !other(|a| a.mtime.0 = 1));
    }

    #[test]
    fn times_may_be_whole_seconds() {
        let at = |mtime| Attributes { mtime, ..Attributes::default() };
        let truth = at((7, 600_000_000));
        for (said, same) in [((7, 0), true), ((8, 0), true), ((9, 0), false), ((7, 1), false)] {
            assert_eq!(same_attributes(&at(said), &truth), same, "{said:?}");
        }
        assert!(!same_attributes(&at((8, 0)), &at((7, 400_000_000))));
    }
}
