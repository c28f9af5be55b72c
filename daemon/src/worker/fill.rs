//! Writes what was fetched into segments.
//!
//! Only whole blocks are written, the last of an object filled up with zeros, so that a block is
//! absent or right at every moment. The caller has verified the content.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statvfs::fstatvfs;

use super::ObjectNo;
use crate::fanotify::DenyErrno;
use crate::ids::SegmentId;
use crate::range::{BLOCK, ByteRange};
use crate::segment::presence;
use crate::source::Content;

/// Content that is not in memory is copied in pieces of so many bytes.
const PIECE: usize = 1 << 20;

/// With so much room on the disk, in bytes, a write does not fail for want of it.
const PLENTY: u64 = 64 << 20;

/// Where an object belongs. Shared by all requests that may bring it.
#[derive(Debug)]
pub struct Target {
    pub no: ObjectNo,
    pub segment: SegmentId,
    pub data: Arc<File>,
    /// Of the object, in bytes.
    pub range: ByteRange,
    /// The size of the segment in bytes; nothing is written behind it.
    pub segment_size: u64,
    /// It has been written. Held while that is done: what a write that fails takes away is its own.
    pub done: Mutex<bool>,
}

impl Target {
    /// Writes the object. `false`: it was there already, from another request.
    pub fn write(&self, content: Content) -> io::Result<bool> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if *done {
            return Ok(false);
        }
        let len = match &content {
            Content::Memory(bytes) => bytes.len() as u64,
            Content::Spooled { len, .. } => *len,
        };
        if len != self.range.len() {
            let what = format!("the object has {len} bytes, {} were expected", self.range.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let blocks = self.range.to_blocks().clamp(self.segment_size).len();
        match content {
            Content::Memory(mut bytes) => {
                bytes.resize(usize::try_from(blocks).map_err(io::Error::other)?, 0);
                write(&self.data, &bytes, self.range.offset())?;
            }
            Content::Spooled { file, .. } => {
                let mut piece = vec![0; PIECE];
                let mut at = 0;
                while at < blocks {
                    let piece = &mut piece[..(blocks - at).min(PIECE as u64) as usize];
                    let content = (len.saturating_sub(at)).min(piece.len() as u64) as usize;
                    file.read_exact_at(&mut piece[..content], at)?;
                    piece[content..].fill(0);
                    write(&self.data, piece, self.range.offset() + at)?;
                    at += piece.len() as u64;
                }
            }
        }
        *done = true;
        Ok(true)
    }
}

/// There seemed to be room for a write that failed: statvfs(3) knows nothing of a user's quota.
static SHORT: AtomicBool = AtomicBool::new(false);

/// Writes whole blocks into a segment. On an error, what was not written is absent.
///
/// That takes some care. A write that finds the disk full may leave blocks of zeros behind that count as data: ext4 prepares
/// a large folio block by block, and fills up what it had got when there was no more (`folio_zero_new_buffers` in
/// `fs/buffer.c`).
pub fn write(data: &File, blocks: &[u8], offset: u64) -> io::Result<()> {
    // a single block is there or not
    if blocks.len() as u64 <= BLOCK {
        return data.write_all_at(blocks, offset);
    }
    let room = fstatvfs(data)?;
    let room = room.blocks_available().saturating_mul(room.fragment_size());
    if room < PLENTY + blocks.len() as u64 || SHORT.load(Ordering::Relaxed) {
        return write_by_blocks(data, blocks, offset);
    }
    write_or_undo(data, blocks, offset).inspect_err(|_| SHORT.store(true, Ordering::Relaxed))
}

/// One block after the other, of which each is there or not. A call for each, so not the way for every write.
///
/// Room can't be made before (fallocate(2)): of blocks that have room and were not written, `SEEK_DATA` says what the page
/// cache says (`mapping_seek_hole_data` in `mm/filemap.c`), where reading ahead has left zeros for them.
pub fn write_by_blocks(data: &File, blocks: &[u8], offset: u64) -> io::Result<()> {
    let places = (offset..).step_by(BLOCK as usize);
    blocks
        .chunks(BLOCK as usize)
        .zip(places)
        .try_for_each(|(block, at)| data.write_all_at(block, at))
}

/// Takes away what a write that fails may have left behind, and nothing that was there. (A process that is killed in
/// between can't.)
pub fn write_or_undo(data: &File, blocks: &[u8], offset: u64) -> io::Result<()> {
    let range = ByteRange::new(offset, blocks.len() as u64);
    let absent: Vec<_> = presence::holes(data, range).collect::<Result<_, _>>()?;
    let mut written = 0;
    while let Some(rest) = blocks.get(written..).filter(|rest| !rest.is_empty()) {
        let error = match data.write_at(rest, offset + written as u64) {
            Ok(0) => io::ErrorKind::WriteZero.into(),
            Ok(more) => {
                written += more;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => error,
        };
        let rest = offset + written as u64 / BLOCK * BLOCK;
        for absent in absent.iter().filter(|absent| absent.end() > rest) {
            presence::punch(data, ByteRange::between(absent.offset().max(rest), absent.end()))?;
        }
        return Err(error);
    }
    Ok(())
}

/// Writes zeros into a range that belongs to no object.
pub fn zero(data: &File, range: ByteRange) -> io::Result<()> {
    let zeros = vec![0; PIECE];
    let mut at = range.offset();
    while at < range.end() {
        let len = (range.end() - at).min(PIECE as u64);
        data.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// What a reader is told when its bytes could not be written.
#[must_use]
pub fn deny_errno(error: &io::Error) -> DenyErrno {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => DenyErrno::Enospc,
        Some(libc::EDQUOT) => DenyErrno::Edquot,
        _ => DenyErrno::Eio,
    }
}

/// Gives back the page cache of segments that have been written to: readers have a cache of their
/// own, that of the mounted tree.
///
/// `POSIX_FADV_DONTNEED` starts the write-back of dirty pages and drops clean ones
/// (`mm/fadvise.c`), so a file gets it twice, the second time when what was dirty is clean.
#[derive(Debug, Default)]
pub struct CacheDrop {
    /// How often each file is still to be done.
    files: HashMap<SegmentId, (Arc<File>, u8)>,
}

impl CacheDrop {
    /// The segment has been written to.
    pub fn written(&mut self, segment: SegmentId, data: &Arc<File>) {
        self.files.entry(segment).or_insert_with(|| (Arc::clone(data), 2)).1 = 2;
    }

    pub fn forget(&mut self, segment: SegmentId) {
        self.files.remove(&segment);
    }

    /// The files to be done now, with [`drop_cache`]. To be asked every few seconds.
    pub fn due(&mut self) -> Vec<Arc<File>> {
        let due = self.files.values().map(|(file, _)| Arc::clone(file)).collect();
        self.files.retain(|_, (_, times)| {
            *times -= 1;
            *times > 0
        });
        due
    }
}

/// May wait for the disk.
pub fn drop_cache(files: &[Arc<File>]) {
    for file in files {
        if let Err(error) = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED) {
            tracing::debug!(%error, "can't drop a segment's page cache");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn target(data: &File, range: ByteRange) -> Target {
        Target {
            no: ObjectNo(0),
            segment: SegmentId(1),
            data: Arc::new(data.try_clone().unwrap()),
            range,
            segment_size: data.metadata().unwrap().len(),
            done: Mutex::default(),
        }
    }

    fn spooled(bytes: &[u8]) -> Content {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Content::Spooled { file, len: bytes.len() as u64 }
    }

    #[test]
    fn writes_whole_blocks_and_not_beyond_the_end() {
        for len in [1, 4095, 4096, 4097, PIECE - 1, PIECE, 3 * PIECE + 5] {
            let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8 + 1).collect();
            for content in [Content::Memory(bytes.clone()), spooled(&bytes)] {
                let data = tempfile::tempfile().unwrap();
                let size = (len as u64).next_multiple_of(4096) + 8192;
                data.set_len(size).unwrap();
                let target = target(&data, ByteRange::new(4096, len as u64));
                assert!(target.write(content).unwrap());
                let mut back = vec![7; size as usize];
                data.read_exact_at(&mut back, 0).unwrap();
                assert_eq!(back[4096..4096 + len], bytes);
                assert!(back[..4096].iter().chain(&back[4096 + len..]).all(|b| *b == 0));
                let holes = super::super::pool::holes(&data, ByteRange::new(0, size)).unwrap();
                assert_eq!(
                    holes,
                    [ByteRange::new(0, 4096), ByteRange::new(size - 4096, 4096)],
                    "{len}"
                );
                assert!(!target.write(Content::Memory(bytes.clone())).unwrap(), "written once");
                assert_eq!(data.metadata().unwrap().len(), size);
            }
        }
    }

    #[test]
    fn refuses_another_length() {
        let data = tempfile::tempfile().unwrap();
        data.set_len(4096).unwrap();
        let target = target(&data, ByteRange::new(0, 10));
        assert!(target.write(Content::Memory(vec![1; 11])).is_err());
        assert_eq!(super::super::pool::first_hole(&data).unwrap(), 0, "nothing was written");
    }

    #[test]
    fn a_file_is_dropped_twice_after_its_last_write() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut cache = CacheDrop::default();
        cache.written(SegmentId(1), &file);
        assert_eq!(cache.due().len(), 1);
        cache.written(SegmentId(1), &file);
        assert_eq!([cache.due().len(), cache.due().len(), cache.due().len()], [1, 1, 0]);
        drop_cache(&[file]);
    }
}
