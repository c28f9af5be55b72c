//! One process: the server of a FUSE file system with all trees.

use std::collections::HashSet;
use std::io;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::mount::{MntFlags, MsFlags, umount2};

use super::super::content::Content;
use super::PeerOrders;
use crate::fuse::{Files, attach, serve_files};

const THREADS: usize = 64;

const ROOT: u64 = 1;
/// A node is one of these, its tree's number, and a file's number or a mark of the directory's name.
const FILE: u64 = 1 << 62;
const DIRECTORY: u64 = 1 << 61;
const TREE: u32 = 40;
const REST: u64 = (1 << TREE) - 1;

#[derive(Debug)]
struct Trees {
    contents: Vec<Content>,
    round_trip: Duration,
    /// Fetched by this process.
    fetched: Mutex<HashSet<u64>>,
}

impl Trees {
    fn file(&self, node: u64) -> io::Result<(Content, u64)> {
        let tree = ((node & !(FILE | DIRECTORY)) >> TREE) as usize;
        let missing = || io::Error::from_raw_os_error(libc::ENOENT);
        Ok((*self.contents.get(tree).ok_or_else(missing)?, node & REST))
    }
}

impl Files for Trees {
    fn look_up(&self, parent: u64, name: &[u8]) -> Option<u64> {
        let name = str::from_utf8(name).ok()?;
        if parent == ROOT {
            let tree: u64 = name.strip_prefix('t')?.parse().ok()?;
            return Some(DIRECTORY | tree << TREE | 1);
        }
        let tree = parent & (REST ^ (FILE - 1)) & !(FILE | DIRECTORY);
        if let Some(stem) = name.strip_suffix(".bin") {
            return Some(FILE | tree | stem.rsplit('-').next()?.parse::<u64>().ok()?);
        }
        // different names get different numbers: that is all that is wanted
        let mark = name
            .bytes()
            .fold(parent & REST, |mark, byte| (mark.wrapping_mul(257) + u64::from(byte)) & REST);
        Some(DIRECTORY | tree | mark)
    }

    fn size(&self, node: u64) -> io::Result<Option<u64>> {
        if node & FILE == 0 {
            return Ok(None);
        }
        let (content, file) = self.file(node)?;
        Ok(Some(content.size(file)))
    }

    fn read(&self, node: u64, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        let (content, file) = self.file(node)?;
        let is_fetched = |node| self.fetched.lock().is_ok_and(|mut fetched| !fetched.insert(node));
        if !is_fetched(node) {
            thread::sleep(self.round_trip);
        }
        Ok(content.bytes(file, offset, u64::from(size)))
    }
}

/// Unmounts what a server before this one has left, mounts, serves.
pub fn serve(orders: &PeerOrders) -> Result<()> {
    let _ = umount2(&orders.trees, MntFlags::MNT_DETACH);
    let device = attach(&orders.trees, MsFlags::MS_RDONLY)?;
    let trees = Trees {
        contents: orders.contents.clone(),
        round_trip: orders.round_trip,
        fetched: Mutex::default(),
    };
    thread::scope(|scope| {
        for _ in 0..THREADS {
            // an error is the end of the mount
            scope.spawn(|| serve_files(&device, &trees));
        }
    });
    Ok(())
}
