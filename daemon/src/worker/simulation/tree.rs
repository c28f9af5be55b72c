//! A tree of files and the orders in which programs read it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::segment::extents::name_hash;
use crate::worker::readahead::Info;

#[derive(Debug, Default)]
struct Directory {
    /// Names of files, then of directories; with their numbers. Sorted, as readdir gives them.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    File(u32),
    Directory(usize),
}

#[derive(Debug)]
pub(super) struct Tree {
    /// In the pool's order: the files of a directory, then its subdirectories.
    pub(super) files: Vec<Info>,
    directories: Vec<Directory>,
}

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) % limit.max(1)
    }
}

impl Tree {
    /// 38,571 files in some 2,000 directories, 70 % of them of at most 4 KiB, about 1,100 `Kconfig`.
    pub(super) fn like_u_boot() -> Self {
        let mut tree = Self { files: Vec::new(), directories: Vec::new() };
        let mut random = Random(42);
        tree.directory(0, &mut random);
        // One large flat directory, as arch/arm/dts is.
        let large = tree.directories.len();
        tree.directories.push(Directory::default());
        let names = (tree.files.len()..38_571).map(|n| format!("board{n:05}.dts")).collect();
        tree.add_files(large, names, &mut random);
        tree.directories[0].entries.insert("zz".to_owned(), Entry::Directory(large));
        tree
    }

    /// Files get their numbers in the order of their names.
    fn add_files(&mut self, directory: usize, names: BTreeSet<String>, random: &mut Random) {
        for name in names {
            let no = self.files.len() as u32;
            let size = match random.below(100) {
                0..70 => 100 + random.below(4000),
                70..99 => 4096 + random.below(30_000),
                _ => 100_000 + random.below(400_000),
            };
            let hash = name_hash(name.as_bytes());
            self.files.push(Info { size, directory: directory as u64, name: hash });
            self.directories[directory].entries.insert(name, Entry::File(no));
        }
    }

    fn directory(&mut self, depth: usize, random: &mut Random) -> usize {
        let number = self.directories.len();
        self.directories.push(Directory::default());
        let mut names = BTreeSet::new();
        if random.below(100) < 55 {
            names.insert("Kconfig".to_owned());
        }
        if random.below(100) < 90 {
            names.insert("Makefile".to_owned());
        }
        let files = if number == 50 { 255 } else { 2 + random.below(26) };
        names.extend((0..files).map(|n| format!("f{:03}-{n}.c", random.below(900))));
        self.add_files(number, names, random);
        let subdirectories = match depth {
            0 => 26,
            1 => 4 + random.below(10),
            2 => random.below(9),
            3 => random.below(3),
            _ => 0,
        };
        // Their names sort before, between and after those of the files.
        let names: BTreeSet<_> = (0..subdirectories)
            .map(|n| format!("{}{n:02}", ["a", "d", "g", "k", "z"][random.below(5) as usize]))
            .collect();
        for name in names {
            let entry = Entry::Directory(self.directory(depth + 1, random));
            self.directories[number].entries.insert(name, entry);
        }
        number
    }

    fn files_of(&self, directory: usize) -> Vec<u32> {
        let file = |entry: &Entry| match entry {
            Entry::File(no) => Some(*no),
            Entry::Directory(_) => None,
        };
        self.directories[directory].entries.values().filter_map(file).collect()
    }

    /// A directory with about so many files, in readdir's order.
    pub(super) fn directory_of(&self, files: usize) -> Vec<u32> {
        (0..self.directories.len())
            .map(|directory| self.files_of(directory))
            .min_by_key(|list| list.len().abs_diff(files))
            .unwrap()
    }

    /// As `grep -r` goes: by name, files and directories mixed.
    pub(super) fn depth_first(&self) -> Vec<u32> {
        let mut reads = Vec::new();
        self.descend(0, &mut |entries| {
            reads.extend(entries);
        });
        reads
    }

    fn descend(&self, directory: usize, visit: &mut impl FnMut(Option<u32>)) {
        for entry in self.directories[directory].entries.values() {
            match entry {
                Entry::File(no) => visit(Some(*no)),
                Entry::Directory(below) => self.descend(*below, visit),
            }
        }
    }

    /// All files of a name, in the pool's order.
    pub(super) fn named(&self, name: &str) -> Vec<u32> {
        let hash = name_hash(name.as_bytes());
        (0..).zip(&self.files).filter(|(_, f)| f.name == hash).map(|(no, _)| no).collect()
    }

    /// All files of a name, as one file names others to be read: not quite in order.
    pub(super) fn source_order(&self, name: &str) -> Vec<u32> {
        let mut order = self.named(name);
        let mut random = Random(7);
        // top-level parts in another order
        let mut parts: Vec<Vec<u32>> = order.chunks(90).map(<[u32]>::to_vec).collect();
        for at in (1..parts.len()).rev() {
            parts.swap(at, random.below(at as u64 + 1) as usize);
        }
        order = parts.concat();
        order
    }

    /// As threads go that take a directory each: a file of one, a file of the next, in turn.
    pub(super) fn by_directories(&self, threads: usize) -> Vec<u32> {
        let mut all = (0..self.directories.len()).map(|d| self.files_of(d).into_iter());
        let mut hands: Vec<_> = all.by_ref().take(threads).collect();
        let mut reads = Vec::new();
        while !hands.is_empty() {
            hands.retain_mut(|hand| {
                while hand.len() == 0 {
                    match all.next() {
                        Some(next) => *hand = next,
                        None => return false,
                    }
                }
                reads.extend(hand.next());
                true
            });
        }
        reads
    }

    /// `count` different files, in no order.
    pub(super) fn random(&self, count: usize, seed: u64) -> Vec<u32> {
        let mut random = Random(seed);
        let (mut seen, mut reads) = (HashSet::new(), Vec::new());
        while reads.len() < count {
            let no = random.below(self.files.len() as u64) as u32;
            if seen.insert(no) {
                reads.push(no);
            }
        }
        reads
    }

    /// The first so many `.c` files of every directory, directories in no order.
    pub(super) fn some_of_each_directory(&self, count: usize) -> Vec<u32> {
        let mut random = Random(3);
        let mut order: Vec<usize> = (0..self.directories.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at as u64 + 1) as usize);
        }
        let some = |directory: usize| {
            let files = self.files_of(directory);
            files.into_iter().rev().take(count).collect::<Vec<_>>()
        };
        order.into_iter().flat_map(some).collect()
    }

    /// As make goes: Makefiles of some directories, then half of their sources, headers between.
    pub(super) fn build(&self, count: usize, seed: u64) -> Vec<u32> {
        let mut random = Random(seed);
        let headers = self.directory_of(257);
        let (mut seen, mut reads) = (HashSet::new(), Vec::new());
        while reads.len() < count {
            let directory = random.below(self.directories.len() as u64) as usize;
            for no in self.files_of(directory).into_iter().take(300) {
                if random.below(100) < 60 && seen.insert(no) {
                    reads.push(no);
                }
                let header = headers[random.below(headers.len() as u64 / 2) as usize];
                if random.below(100) < 20 && seen.insert(header) {
                    reads.push(header);
                }
            }
        }
        reads
    }
}
