//! A file passed through FUSE: what a lazy FUSE file system can't be faster than.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::Result;
use nix::mount::MsFlags;

use crate::fuse::{Content, Fuse};

struct PassThrough {
    file: File,
    size: u64,
}

impl Content for PassThrough {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn cached(&self) -> bool {
        true
    }
}

/// Shows `file` as any name in the directory `place`.
pub fn mount(file: &Path, place: &Path) -> Result<Fuse> {
    let file = File::open(file)?;
    let size = file.metadata()?.size();
    Fuse::mount(PassThrough { file, size }, place, MsFlags::MS_RDONLY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    #[ignore = "needs root"]
    fn root_passes_a_file_through() {
        let scratch = Scratch::new("fuse").unwrap();
        let content = crate::repository::Random::new(5).bytes(1_000_001);
        let file = scratch.path().join("file");
        fs_err::write(&file, &content).unwrap();
        let place = scratch.make("mount").unwrap();
        let fuse = mount(&file, &place).unwrap();
        assert!(fs_err::read(place.join("any")).unwrap() == content);
        drop(fuse);
        assert!(fs_err::read_dir(&place).unwrap().next().is_none());
    }
}
