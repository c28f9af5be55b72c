//! Extended attributes: sets of them kept once, and what becomes of them in the image.
//!
//! An entry that one inode has lies behind that inode, an entry that several have lies in the
//! shared area and inodes have its number (`fs/erofs/xattr.c`).

use std::collections::HashMap;

use super::error::{ErofsError, shown};
use super::ondisk::{MAX_XATTR_LEN, NAME_MAX, XATTR_HEADER_SIZE};

/// A set of extended attributes of one image. The default is the empty set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct XattrSetId(u32);

/// The prefixes that the format knows, with their numbers. Those without a dot at the end are whole names.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
/// Numbers of shared entries that an inode has room for.
const MAX_SHARED: usize = 255;

/// One attribute: the entry's bytes as in the image, padded to four bytes.
type Entry = Box<[u8]>;

/// All attributes of an image.
#[derive(Debug, Default)]
pub struct XattrTable {
    entries: Vec<Entry>,
    entry_numbers: HashMap<Entry, u32>,
    /// Each set as sorted numbers of entries; number 0 is missing here, it is the empty set.
    sets: Vec<Box<[u32]>>,
    set_numbers: HashMap<Box<[u32]>, XattrSetId>,
}

impl XattrTable {
    /// The set of these attributes, in any order.
    pub fn intern(&mut self, xattrs: &[(&[u8], &[u8])]) -> Result<XattrSetId, ErofsError> {
        let mut sorted = xattrs.to_vec();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ErofsError::Xattr { name: shown(pair[0].0), reason: "it is there twice" });
        }
        let mut len = XATTR_HEADER_SIZE;
        let mut set = Vec::with_capacity(sorted.len());
        for (name, value) in sorted {
            let entry = encode(name, value)?;
            len += entry.len() as u64;
            if len > MAX_XATTR_LEN {
                let reason = "an inode has no room for so many";
                return Err(ErofsError::Xattr { name: shown(name), reason });
            }
            set.push(self.entry_number(entry)?);
        }
        if set.is_empty() {
            return Ok(XattrSetId::default());
        }
        let set: Box<[u32]> = set.into();
        if let Some(id) = self.set_numbers.get(&set) {
            return Ok(*id);
        }
        let id =
            u32::try_from(self.sets.len() + 1).map_err(|_| ErofsError::TooLarge("attributes"))?;
        self.sets.push(set.clone());
        self.set_numbers.insert(set, XattrSetId(id));
        Ok(XattrSetId(id))
    }

    /// Is it a set of this table?
    pub fn has(&self, id: XattrSetId) -> bool {
        id.0 as usize <= self.sets.len()
    }

    fn entry_number(&mut self, entry: Entry) -> Result<u32, ErofsError> {
        if let Some(number) = self.entry_numbers.get(&entry) {
            return Ok(*number);
        }
        let number =
            u32::try_from(self.entries.len()).map_err(|_| ErofsError::TooLarge("attributes"))?;
        self.entries.push(entry.clone());
        self.entry_numbers.insert(entry, number);
        Ok(number)
    }

    /// Decides what is shared, given the set of each inode.
    pub fn plan(&self, inodes: impl Iterator<Item = XattrSetId>) -> Result<XattrPlan, ErofsError> {
        let mut set_uses = vec![0u64; self.sets.len()];
        for id in inodes {
            let set = (id.0 as usize).checked_sub(1).and_then(|n| set_uses.get_mut(n));
            if let Some(uses) = set {
                *uses += 1;
            }
        }
        let mut uses = vec![0u64; self.entries.len()];
        for (set, set_uses) in self.sets.iter().zip(set_uses) {
            set.iter().for_each(|entry| uses[*entry as usize] += set_uses);
        }
        let mut shared = Vec::new();
        let mut shared_ids = vec![None; self.entries.len()];
        for ((entry, uses), id) in self.entries.iter().zip(uses).zip(&mut shared_ids) {
            if uses > 1 {
                let at = u32::try_from(shared.len() / 4);
                *id = Some(at.map_err(|_| ErofsError::TooLarge("shared attributes"))?);
                shared.extend_from_slice(entry);
            }
        }
        let bodies = self.sets.iter().map(|set| self.body(set, &shared_ids)).collect();
        Ok(XattrPlan { shared, bodies })
    }

    fn body(&self, set: &[u32], shared_ids: &[Option<u32>]) -> Box<[u8]> {
        let mut ids: Vec<u32> = Vec::new();
        let mut inline: Vec<u8> = Vec::new();
        for entry in set.iter().map(|entry| *entry as usize) {
            match shared_ids[entry] {
                Some(id) if ids.len() < MAX_SHARED => ids.push(id),
                _ => inline.extend_from_slice(&self.entries[entry]),
            }
        }
        // the name filter, unused without its feature; the count; reserved
        let mut body = vec![0, 0, 0, 0, ids.len() as u8, 0, 0, 0, 0, 0, 0, 0];
        ids.iter().for_each(|id| body.extend(id.to_le_bytes()));
        body.extend(inline);
        body.into()
    }
}

/// How the attributes lie in the image.
#[derive(Debug)]
pub struct XattrPlan {
    /// The shared area.
    pub shared: Vec<u8>,
    bodies: Vec<Box<[u8]>>,
}

impl XattrPlan {
    /// What lies behind an inode with these attributes.
    pub fn body(&self, id: XattrSetId) -> &[u8] {
        let body = (id.0 as usize).checked_sub(1).and_then(|n| self.bodies.get(n));
        body.map_or(&[], |body| body)
    }
}

fn encode(name: &[u8], value: &[u8]) -> Result<Entry, ErofsError> {
    let fail = |reason| ErofsError::Xattr { name: shown(name), reason };
    let (rest, index) = PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)))
        .ok_or_else(|| fail("EROFS has no such namespace"))?;
    if matches!(index, 2 | 3) != rest.is_empty() {
        return Err(fail("it is not a whole name"));
    }
    if name.len() > NAME_MAX || name.contains(&0) {
        return Err(fail("a name has at most 255 bytes, none of them NUL"));
    }
    let value_len =
        u16::try_from(value.len()).map_err(|_| fail("a value has at most 65535 bytes"))?;
    let mut entry = vec![rest.len() as u8, index];
    entry.extend(value_len.to_le_bytes());
    entry.extend(rest);
    entry.extend(value);
    entry.resize(entry.len().next_multiple_of(4), 0);
    Ok(entry.into())
}
