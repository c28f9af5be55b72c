//! The different blobs of a tree's files and their sizes.

use crate::importer::listing::{Kind, Listing};
use crate::object::ObjectId;

const NONE: u32 = u32::MAX;

/// Blobs and sizes. What is asked for each of a million files is an array index or one search.
#[derive(Debug)]
pub struct Blobs {
    /// Sorted.
    keys: Vec<ObjectId>,
    /// Of each key, [`ObjectId::prefix`].
    prefixes: Vec<u64>,
    sizes: Vec<Option<u64>>,
    /// For each entry of the listing its blob's number; `NONE` for what is no file.
    of_entry: Vec<u32>,
}

impl Blobs {
    pub fn new(listing: &Listing) -> Self {
        let is_file = |kind| matches!(kind, Kind::File | Kind::Executable);
        let files = listing.iter().filter(|(_, entry)| is_file(entry.kind));
        let mut files: Vec<_> =
            files.map(|(number, entry)| (entry.key.prefix(), number, entry.key)).collect();
        files.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| a.2.cmp(&b.2)));
        let (mut keys, mut prefixes) = (Vec::<ObjectId>::new(), Vec::new());
        let mut of_entry = vec![NONE; listing.len() as usize];
        for (prefix, number, key) in files {
            if keys.last() != Some(&key) {
                keys.push(key);
                prefixes.push(prefix);
            }
            of_entry[number as usize - 1] = keys.len() as u32 - 1;
        }
        Self { sizes: vec![None; keys.len()], keys, prefixes, of_entry }
    }

    /// The number of different blobs.
    pub fn len(&self) -> u64 {
        self.keys.len() as u64
    }

    fn find(&self, key: &ObjectId) -> Option<usize> {
        let prefix = key.prefix();
        let first = self.prefixes.partition_point(|other| *other < prefix);
        let same = self.prefixes[first..].iter().take_while(|other| **other == prefix).count();
        self.keys[first..first + same].binary_search(key).ok().map(|at| first + at)
    }

    pub fn has(&self, key: &ObjectId) -> bool {
        self.find(key).is_some()
    }

    /// Notes a size; nothing happens when the blob is no file's.
    pub fn know(&mut self, key: &ObjectId, size: u64) {
        if let Some(at) = self.find(key) {
            self.sizes[at] = Some(size);
        }
    }

    pub fn size(&self, key: &ObjectId) -> Option<u64> {
        self.find(key).and_then(|at| self.sizes[at])
    }

    /// The size of an entry of the listing, if it is a file's and known.
    pub fn size_of_entry(&self, number: u32) -> Option<u64> {
        let blob = *self.of_entry.get(number.checked_sub(1)? as usize)?;
        self.sizes.get(blob as usize).copied().flatten()
    }

    /// The blobs without a size, each once, in the order of the listing.
    pub fn unknown(&self, listing: &Listing) -> Vec<ObjectId> {
        let mut wanted: Vec<bool> = self.sizes.iter().map(Option::is_none).collect();
        let blobs = listing.iter().zip(&self.of_entry);
        let first =
            blobs.filter(|(_, blob)| wanted.get_mut(**blob as usize).is_some_and(std::mem::take));
        first.map(|((_, entry), _)| entry.key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::HashKind;

    #[test]
    fn prefixes_need_not_be_different() {
        let id = |last: u8| {
            let mut bytes = [7; 20];
            bytes[19] = last;
            ObjectId::from_bytes(&bytes).unwrap()
        };
        let mut listing = Vec::new();
        for (n, last) in [3, 1, 2, 1].into_iter().enumerate() {
            listing.extend(format!("100644 blob {}\tf{n}\0", id(last)).into_bytes());
        }
        listing.extend(format!("120000 blob {}\tl\0", id(9)).into_bytes());
        let listing = Listing::read(HashKind::Sha1, &listing[..]).unwrap();
        let mut blobs = Blobs::new(&listing);
        assert_eq!((blobs.len(), blobs.has(&id(1)), blobs.has(&id(9))), (3, true, false));
        assert_eq!(blobs.unknown(&listing), [id(3), id(1), id(2)]);
        blobs.know(&id(1), 10);
        blobs.know(&id(9), 90);
        assert_eq!(blobs.unknown(&listing), [id(3), id(2)]);
        let sizes: Vec<_> = (0..6).map(|number| blobs.size_of_entry(number)).collect();
        assert_eq!(sizes, [None, None, Some(10), None, Some(10), None]);
        assert_eq!((blobs.size(&id(1)), blobs.size(&id(2))), (Some(10), None));
    }
}
