//! Files whose bytes follow from a seed, their numbers and the places of the bytes.

use anyhow::Result;

use crate::repository::{Change, Import, MAIN, Repository, cached};

/// The files of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    pub seed: u64,
    pub files: u64,
}

/// How many of the files that don't lie alone share a directory.
const TOGETHER: u64 = 16;

/// A prime that is no factor of any number of files that is asked for.
const STEP: u64 = 1_000_003;

/// The finalizer of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Content {
    fn base(&self, file: u64) -> u64 {
        mix(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mix(file + 1))
    }

    /// Of a file, in bytes: most have a few blocks, one of 200 has a megabyte.
    #[must_use]
    pub fn size(&self, file: u64) -> u64 {
        let random = mix(self.base(file));
        let within = |from: u64, to: u64| from + (random >> 16) % (to - from);
        match random % 200 {
            0 => within(700_000, 1_300_000),
            1..=9 => within(48 << 10, 256 << 10),
            10..=59 => within(8 << 10, 48 << 10),
            _ => within(1, 8 << 10),
        }
    }

    /// Half of the files have a directory and a name of their own, so that reading one is no reason to
    /// fetch another ahead. The others have neighbours.
    #[must_use]
    pub fn path(&self, file: u64) -> String {
        if file.is_multiple_of(2) {
            format!("alone/{:02}/{file:06}/only-{file:06}.bin", file % 100)
        } else {
            format!("together/{:05}/file-{file:06}.bin", file / 2 / TOGETHER)
        }
    }

    /// The file that is read as the `n`th.
    #[must_use]
    pub fn nth(&self, n: u64) -> u64 {
        (n * STEP + self.seed) % self.files
    }

    /// `length` bytes of a file from `offset` on, less where it ends before. None of them is zero.
    #[must_use]
    pub fn bytes(&self, file: u64, offset: u64, length: u64) -> Vec<u8> {
        let end = self.size(file).min(offset.saturating_add(length));
        let start = offset.min(end);
        let base = self.base(file);
        let first = start / 8;
        let mut bytes = Vec::with_capacity((end - start) as usize + 16);
        for word in first..end.div_ceil(8) {
            let random = mix(base.wrapping_add(word.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            bytes.extend_from_slice(&(random | 0x0101_0101_0101_0101).to_le_bytes());
        }
        bytes.truncate((end - first * 8) as usize);
        bytes.drain(..(start - first * 8) as usize);
        bytes
    }

    /// A repository with these files.
    pub fn repository(&self) -> Result<Repository> {
        cached(&format!("chaos-{}-{}-1", self.seed, self.files), "sha1", |path| {
            let mut import = Import::start(path)?;
            let mut changes = Vec::new();
            for file in 0..self.files {
                let blob = import.blob(&self.bytes(file, 0, u64::MAX))?;
                changes.push(Change::file(self.path(file), blob));
            }
            import.commit(MAIN, None, &changes)?;
            import.finish()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_parts_of_the_whole() {
        let content = Content { seed: 3, files: 500 };
        for file in 0..50 {
            let whole = content.bytes(file, 0, u64::MAX);
            assert_eq!(whole.len() as u64, content.size(file));
            assert!(!whole.contains(&0));
            for (offset, length) in [(0, 1), (1, 7), (7, 10), (4096, 4096), (5000, 1 << 40)] {
                let start = whole.len().min(offset as usize);
                let end = whole.len().min((offset as usize).saturating_add(length as usize));
                assert_eq!(content.bytes(file, offset, length), &whole[start..end]);
            }
        }
        let other = Content { seed: 4, ..content };
        assert_ne!(content.bytes(9, 0, 1), other.bytes(9, 0, 1));
    }

    #[test]
    fn every_file_has_its_turn() {
        let content = Content { seed: 3, files: 500 };
        let all: std::collections::BTreeSet<u64> = (0..500).map(|n| content.nth(n)).collect();
        assert_eq!(all.len(), 500);
        let paths: std::collections::BTreeSet<String> =
            all.iter().map(|n| content.path(*n)).collect();
        assert_eq!(paths.len(), 500);
        let bytes: u64 = (0..10_000).map(|file| content.size(file)).sum();
        assert!((15_000..30_000).contains(&(bytes / 10_000)), "{}", bytes / 10_000);
    }
}
