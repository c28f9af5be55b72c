//! Memory that processes share.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Makes a memfd (memfd_create(2)) of `len` bytes, all zero, whose size nobody can change.
pub fn sealed_memory(name: &str, len: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let len = i64::try_from(len).map_err(io::Error::other)?;
    nix::unistd::ftruncate(&fd, len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}

/// A memfd as words that several processes read and write. Any of them may write anything at any
/// time: what is read here is outside input.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

impl SharedWords {
    /// Maps the whole memfd. Refuses one that could be made smaller under the mapping: touching what
    /// is gone would be a SIGBUS.
    pub fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
            let text = "memory that could shrink (no F_SEAL_SHRINK)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let size = nix::sys::stat::fstat(fd)?.st_size;
        let words = usize::try_from(size).unwrap_or(0) / size_of::<AtomicU64>();
        let Some(len) = NonZeroUsize::new(words * size_of::<AtomicU64>()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "memory of no size"));
        };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so no mapping of ours is replaced. It is of a memfd that
        // has at least `len` bytes and is sealed against shrinking.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, fd, 0)? };
        Ok(Self { start: start.cast(), words })
    }

    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `words` words, starts at a page, and is unmapped only in `drop`. Any
        // bits are an AtomicU64, and whoever else has the memory writes it through atomics or, at
        // worst, tears values, which the reader takes as outside input anyway.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, whole, and no borrow of it is left.
        let _ = unsafe { munmap(self.start.cast(), self.words * size_of::<AtomicU64>()) };
    }
}

// SAFETY: it is memory that no thread owns, reached through atomics only.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn two_mappings_are_one_memory() {
        let fd = sealed_memory("test", 8192).unwrap();
        let (a, b) = (SharedWords::map(fd.as_fd()).unwrap(), SharedWords::map(fd.as_fd()).unwrap());
        assert_eq!(a.words().len(), 1024);
        a.words()[1023].store(7, Ordering::Relaxed);
        assert_eq!(b.words()[1023].load(Ordering::Relaxed), 7);
        assert!(nix::unistd::ftruncate(&fd, 4096).is_err(), "sealed");
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let fd = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, 4096).unwrap();
        assert!(SharedWords::map(fd.as_fd()).is_err());
        let empty = sealed_memory("test", 0).unwrap();
        assert!(SharedWords::map(empty.as_fd()).is_err());
        let file = tempfile::tempfile().unwrap();
        assert!(SharedWords::map(file.as_fd()).is_err());
    }
}
