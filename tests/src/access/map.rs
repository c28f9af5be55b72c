//! Reads through mappings.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use super::Kind;

const PAGE: u64 = 4096;

/// Maps the range and copies it out, touching its pages in order.
pub(super) fn read(kind: Kind, file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let start = offset / PAGE * PAGE;
    let before = (offset - start) as usize;
    let Some(size) = NonZeroUsize::new(before + length).filter(|_| length > 0) else {
        return Ok(Vec::new());
    };
    let place = i64::try_from(start).map_err(io::Error::other)?;
    advise_file(kind, file, offset, length)?;
    let (protection, flags) = match kind {
        Kind::MmapPrivate => (ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE),
        Kind::MmapExec => (ProtFlags::PROT_READ | ProtFlags::PROT_EXEC, MapFlags::MAP_PRIVATE),
        Kind::MmapPopulate => (ProtFlags::PROT_READ, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE),
        _ => (ProtFlags::PROT_READ, MapFlags::MAP_SHARED),
    };
    // SAFETY: a new mapping where the kernel wants it; nothing else knows of it.
    let address = unsafe { mmap(None, size, protection, flags, file, place)? };
    let mapped = Mapping { address, size };
    let advice = match kind {
        Kind::MadviseWillneed => Some(MmapAdvise::MADV_WILLNEED),
        Kind::MadvisePopulateRead => Some(MmapAdvise::MADV_POPULATE_READ),
        _ => None,
    };
    if let Some(advice) = advice {
        // SAFETY: the range is the mapping just made; neither advice discards anything.
        unsafe { madvise(mapped.address, size.get(), advice)? };
    }
    // SAFETY: the mapping is readable and lives until the end of this function. Nobody writes to
    // the file meanwhile; were it truncated, the SIGBUS is what the caller wants to see.
    let bytes = unsafe {
        std::slice::from_raw_parts(mapped.address.as_ptr().cast::<u8>().add(before), length)
    };
    Ok(bytes.to_vec())
}

fn advise_file(kind: Kind, file: &File, offset: u64, length: usize) -> io::Result<()> {
    let place = i64::try_from(offset).map_err(io::Error::other)?;
    match kind {
        Kind::Fadvise => {
            let room = i64::try_from(length).map_err(io::Error::other)?;
            posix_fadvise(file, place, room, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
        }
        // SAFETY: a descriptor and two numbers.
        Kind::Readahead if unsafe { libc::readahead(file.as_raw_fd(), place, length) } != 0 => {
            return Err(io::Error::last_os_error());
        }
        _ => {}
    }
    Ok(())
}

struct Mapping {
    address: NonNull<libc::c_void>,
    size: NonZeroUsize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `read`, and no reference into it is left.
        let _ = unsafe { munmap(self.address, self.size.get()) };
    }
}
