//! Reads through system calls.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::scratch_name;

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn as_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(io::Error::other)
}

pub(super) fn read(mut file: File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(length as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Backwards, in pieces of odd sizes.
pub(super) fn pread(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(77_777);
        file.read_exact_at(&mut bytes[start..end], offset + start as u64)?;
        end = start;
    }
    Ok(bytes)
}

pub(super) fn direct(path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    const ALIGN: usize = 4096;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
    let room = length.next_multiple_of(ALIGN);
    let mut buffer = vec![0_u8; room + ALIGN];
    let start = buffer.as_ptr().align_offset(ALIGN);
    let mut done = 0;
    while done < length {
        let part = &mut buffer[start + done..start + room];
        let count = file.read_at(part, offset + done as u64)?;
        if count == 0 {
            break;
        }
        done += count;
    }
    Ok(buffer[start..start + done.min(length)].to_vec())
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create(c"sink", MFdFlags::MFD_CLOEXEC)?))
}

pub(super) fn sendfile(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let sink = memory_file()?;
    let mut place = as_offset(offset)?;
    let mut done = 0;
    while done < length {
        // SAFETY: both descriptors are open, `place` is a valid in-out argument for the call.
        let sent = unsafe {
            libc::sendfile(sink.as_raw_fd(), file.as_raw_fd(), &raw mut place, length - done)
        };
        match check(sent)? {
            0 => break,
            count => done += count,
        }
    }
    read(sink, 0, done)
}

pub(super) fn splice(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let (reader, writer) = nix::unistd::pipe()?;
    let mut reader = File::from(reader);
    let mut place = as_offset(offset)?;
    let mut bytes = vec![0; length];
    let mut done = 0;
    while done < length {
        let room = (length - done).min(32 << 10);
        // SAFETY: both descriptors are open, `place` is a valid in-out argument, and a null offset
        // is what a pipe has to have.
        let moved = unsafe {
            libc::splice(
                file.as_raw_fd(),
                &raw mut place,
                writer.as_raw_fd(),
                std::ptr::null_mut(),
                room,
                0,
            )
        };
        let count = check(moved)?;
        if count == 0 {
            break;
        }
        reader.read_exact(&mut bytes[done..done + count])?;
        done += count;
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Into a file in the directory `other`. To another file system that is `EXDEV`.
pub(super) fn copy_file_range(
    file: &File,
    other: &Path,
    offset: u64,
    length: usize,
) -> io::Result<Vec<u8>> {
    let path = scratch_name(other, "copy");
    let sink = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    let mut place = as_offset(offset)?;
    let mut done = 0;
    while done < length {
        // SAFETY: both descriptors are open, `place` is a valid in-out argument, and a null offset
        // means the file's own.
        let copied = unsafe {
            libc::copy_file_range(
                file.as_raw_fd(),
                &raw mut place,
                sink.as_raw_fd(),
                std::ptr::null_mut(),
                length - done,
                0,
            )
        };
        match check(copied)? {
            0 => break,
            count => done += count,
        }
    }
    read(sink, 0, done)
}

/// Eight reads at a time, completed in any order.
pub(super) fn io_uring(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    const PIECE: usize = 64 << 10;
    let mut ring = io_uring::IoUring::new(8)?;
    let mut bytes = vec![0; length];
    let mut pieces: Vec<(u64, &mut [u8])> = bytes
        .chunks_mut(PIECE)
        .enumerate()
        .map(|(n, piece)| (offset + (n * PIECE) as u64, piece))
        .collect();
    for batch in pieces.chunks_mut(8) {
        for (n, (place, piece)) in batch.iter_mut().enumerate() {
            let room = u32::try_from(piece.len()).map_err(io::Error::other)?;
            let fd = io_uring::types::Fd(file.as_raw_fd());
            let entry = io_uring::opcode::Read::new(fd, piece.as_mut_ptr(), room)
                .offset(*place)
                .build()
                .user_data(n as u64);
            // SAFETY: the buffer and the file live until the completions below are all there.
            unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        ring.submit_and_wait(batch.len())?;
        let completions: Vec<_> = ring.completion().collect();
        for completion in completions {
            let count = completion.result();
            if count < 0 {
                return Err(io::Error::from_raw_os_error(-count));
            }
            let (place, piece) = &mut batch[completion.user_data() as usize];
            let count = count.unsigned_abs() as usize;
            // The rest of a short read.
            file.read_exact_at(&mut piece[count..], *place + count as u64)?;
        }
    }
    Ok(bytes)
}
