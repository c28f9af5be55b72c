//! A disk with a cache: what was written since the last flush may be lost, in any selection.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use nix::mount::MsFlags;

use crate::fuse::{Content, Fuse};
use crate::repository::Random;

const SECTOR: u64 = 512;
/// What is written whole or not at all, at a multiple of it.
const PIECE: u64 = 4096;

/// A file that loses what was not synced when its power is cut. It is shown through FUSE, as the kernel would
/// keep what is written to any other.
#[derive(Debug)]
pub struct Disk {
    _fuse: Fuse,
    path: PathBuf,
    cache: Arc<Mutex<Cache>>,
}

/// What was in the cache at a cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// Writes of up to `PIECE` bytes that were not yet flushed, and how many of them are lost.
    pub cached: usize,
    pub lost: usize,
}

#[derive(Debug)]
struct Cache {
    file: File,
    size: u64,
    /// In the order in which they were written.
    pieces: Vec<Piece>,
    /// For each sector the last piece that has it.
    last: HashMap<u64, usize>,
    operations: u64,
    cut_at: Option<u64>,
    off: bool,
}

/// At most [`PIECE`] bytes, none before and behind a multiple of it.
#[derive(Debug)]
struct Piece {
    offset: u64,
    data: Vec<u8>,
}

impl Disk {
    /// Shows `image` in the directory `place`.
    pub fn new(image: &Path, place: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(image)?;
        let size = file.metadata()?.len();
        let cache = Cache {
            file,
            size,
            pieces: Vec::new(),
            last: HashMap::new(),
            operations: 0,
            cut_at: None,
            off: false,
        };
        let cache = Arc::new(Mutex::new(cache));
        let fuse = Fuse::mount(Shown(Arc::clone(&cache)), place, MsFlags::empty())?;
        Ok(Self { _fuse: fuse, path: place.join("disk"), cache })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power at the operation (write or flush) with this number from now on.
    pub fn cut_after(&self, operations: u64) {
        let mut cache = self.cache();
        cache.cut_at = Some(cache.operations + operations);
    }

    /// Cuts the power now: nothing is written, flushed or read any more.
    pub fn cut(&self) {
        self.cache().off = true;
    }

    #[must_use]
    pub fn is_off(&self) -> bool {
        self.cache().off
    }

    /// Writes and flushes so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.cache().operations
    }

    /// Once nobody has the disk open: decides what of the cache is lost, and lets the disk be used again.
    pub fn power_on(&self, random: &mut Random) -> io::Result<Lost> {
        let mut cache = self.cache();
        let cached = cache.pieces.len();
        // nothing, the last ones, or here and there
        let (first, chance) = match random.below(8) {
            0 => (cached, 1.0),
            1 => (0, 1.0),
            2 | 3 => (random.below(cached + 1), 1.0),
            4 => (0, 0.1),
            5 => (0, 0.9),
            _ => (0, 0.5),
        };
        let mut lost = 0;
        for number in 0..cached {
            if number >= first && random.unit() < chance {
                lost += 1;
                continue;
            }
            let piece = &cache.pieces[number];
            cache.file.write_all_at(&piece.data, piece.offset)?;
        }
        cache.pieces.clear();
        cache.last.clear();
        (cache.off, cache.cut_at) = (false, None);
        Ok(Lost { cached, lost })
    }
}

impl Cache {
    fn operation(&mut self) -> io::Result<()> {
        self.operations += 1;
        self.off |= self.cut_at.is_some_and(|at| self.operations >= at);
        self.power()
    }

    fn power(&self) -> io::Result<()> {
        if self.off { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.power()?;
        let count = self.file.read_at(buffer, offset)?;
        let buffer = &mut buffer[..count];
        if self.pieces.is_empty() {
            return Ok(count);
        }
        let end = offset + count as u64;
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let Some(piece) = self.last.get(&sector).map(|number| &self.pieces[*number]) else {
                continue;
            };
            let piece_end = piece.offset + piece.data.len() as u64;
            let from = offset.max(sector * SECTOR).max(piece.offset);
            let to = end.min((sector + 1) * SECTOR).min(piece_end);
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(
                &piece.data[(from - piece.offset) as usize..(to - piece.offset) as usize],
            );
        }
        Ok(count)
    }

    fn write(&mut self, offset: u64, len: u64, data: Option<&[u8]>) -> io::Result<()> {
        self.operation()?;
        let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        if !whole || offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut at = offset;
        while at < offset + len {
            let end = (at / PIECE + 1) * PIECE;
            let end = end.min(offset + len);
            let data = match data {
                Some(data) => data[(at - offset) as usize..(end - offset) as usize].to_vec(),
                None => vec![0; (end - at) as usize],
            };
            for sector in at / SECTOR..end / SECTOR {
                self.last.insert(sector, self.pieces.len());
            }
            self.pieces.push(Piece { offset: at, data });
            at = end;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.operation()?;
        for piece in &self.pieces {
            self.file.write_all_at(&piece.data, piece.offset)?;
        }
        self.pieces.clear();
        self.last.clear();
        Ok(())
    }
}

/// The FUSE server's share.
struct Shown(Arc<Mutex<Cache>>);

impl Shown {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content for Shown {
    fn size(&self) -> u64 {
        self.cache().size
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.cache().read(offset, buffer)
    }

    fn write(&mut self, offset: u64, len: u64, data: Option<&[u8]>) -> io::Result<()> {
        self.cache().write(offset, len, data)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.cache().flush()
    }

    fn cached(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    #[ignore = "needs root"]
    fn root_a_disk_loses_what_was_not_flushed() {
        let scratch = Scratch::new("disk").unwrap();
        let image = scratch.path().join("image");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let disk = Disk::new(&image, &scratch.make("place").unwrap()).unwrap();
        let (mut none, mut some) = (false, false);
        for seed in 0..40 {
            let file = File::options().read(true).write(true).open(disk.path()).unwrap();
            let byte = seed as u8 + 1;
            file.write_all_at(&vec![byte; 64 << 10], 4096).unwrap();
            file.sync_data().unwrap();
            file.write_all_at(&vec![100 + byte; 64 << 10], 4096).unwrap();
            file.write_all_at(&[200; 512], 5120).unwrap();
            let mut back = vec![0; 6144];
            file.read_exact_at(&mut back, 4000).unwrap();
            assert_eq!(back[96..][..1024], [100 + byte; 1024]);
            assert_eq!(back[1120..][..512], [200; 512]);
            assert_eq!(back[1632], 100 + byte);
            disk.cut_after(1);
            assert!(file.write_all_at(&[0; 4096], 0).is_err());
            assert!(disk.is_off() && file.sync_data().is_err());
            drop(file);
            let lost = disk.power_on(&mut Random::new(seed)).unwrap();
            assert_eq!(lost.cached, 17);
            let now = fs_err::read(&image).unwrap();
            let pieces: Vec<_> = now[4096..][..64 << 10].chunks(4096).map(|c| c[0]).collect();
            assert!(pieces.iter().all(|b| *b == byte || *b == 100 + byte), "{pieces:?}");
            let kept = pieces.iter().filter(|b| **b != byte).count();
            none |= kept == 0;
            some |= kept > 0 && kept < 16;
            assert!(now[68 << 10..].iter().all(|b| *b == 0) && now[0] == 0);
        }
        assert!(none && some);
    }
}
