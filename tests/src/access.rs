//! Every way of getting at the bytes of a file: what `hydrant-access` does, one kind per process.

mod change;
mod map;
mod read;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

/// A kind of access. The first group reads and compares; the second changes the file, which makes
/// overlayfs copy it up, and then compares all of it with what it has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Read,
    Pread,
    Direct,
    Sendfile,
    Splice,
    CopyFileRange,
    MmapShared,
    MmapPrivate,
    MmapExec,
    MmapPopulate,
    MadviseWillneed,
    MadvisePopulateRead,
    Fadvise,
    Readahead,
    IoUring,
    Chmod,
    Rename,
    Append,
    Truncate,
    /// `O_TRUNC`, and something else written.
    Replace,
    Write,
    Setxattr,
    Link,
}

impl Kind {
    /// Those that leave the file as it is and see its bytes on any file system.
    pub const READS: [Self; 13] = [
        Self::Read,
        Self::Pread,
        Self::Sendfile,
        Self::Splice,
        Self::MmapShared,
        Self::MmapPrivate,
        Self::MmapExec,
        Self::MmapPopulate,
        Self::MadviseWillneed,
        Self::MadvisePopulateRead,
        Self::Fadvise,
        Self::Readahead,
        Self::IoUring,
    ];
    /// Those that make overlayfs copy the file up.
    pub const CHANGES: [Self; 8] = [
        Self::Chmod,
        Self::Rename,
        Self::Append,
        Self::Truncate,
        Self::Replace,
        Self::Write,
        Self::Setxattr,
        Self::Link,
    ];
}

/// One access.
#[derive(Debug, Clone)]
pub struct Access {
    pub kind: Kind,
    pub file: PathBuf,
    /// What the whole file has to contain.
    pub truth: Vec<u8>,
    /// Where to read; changes look at all of it.
    pub offset: u64,
    pub length: usize,
    /// A directory on another file system, for [`Kind::CopyFileRange`].
    pub other: PathBuf,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Right,
    /// The first byte that is wrong, counted from the start of the file.
    WrongAt(u64),
    /// So many bytes instead of those asked for.
    Short(usize),
}

/// Does it.
pub fn perform(access: &Access) -> io::Result<Verdict> {
    let Access { kind, file, truth, offset, length, other } = access;
    let (offset, length) = (*offset, *length);
    let start = usize::try_from(offset).map_err(io::Error::other)?.min(truth.len());
    let expected = &truth[start..truth.len().min(start + length)];
    let length = expected.len();
    if Kind::CHANGES.contains(kind) {
        let (now, expected) = change::change(*kind, file, truth)?;
        return Ok(compare(&fs_err::read(now)?, &expected, 0));
    }
    let got = content(*kind, file, offset, length, other)?;
    Ok(compare(&got, expected, offset))
}

/// The bytes of a range that is within `file`. `other`: a directory on another file system, for
/// [`Kind::CopyFileRange`].
pub fn content(
    kind: Kind,
    file: &Path,
    offset: u64,
    length: usize,
    other: &Path,
) -> io::Result<Vec<u8>> {
    let open = || File::open(file);
    match kind {
        Kind::Read => read::read(open()?, offset, length),
        Kind::Pread => read::pread(&open()?, offset, length),
        Kind::Direct => read::direct(file, offset, length),
        Kind::Sendfile => read::sendfile(&open()?, offset, length),
        Kind::Splice => read::splice(&open()?, offset, length),
        Kind::CopyFileRange => read::copy_file_range(&open()?, other, offset, length),
        Kind::IoUring => read::io_uring(&open()?, offset, length),
        Kind::MmapShared
        | Kind::MmapPrivate
        | Kind::MmapExec
        | Kind::MmapPopulate
        | Kind::MadviseWillneed
        | Kind::MadvisePopulateRead
        | Kind::Fadvise
        | Kind::Readahead => map::read(kind, &open()?, offset, length),
        Kind::Chmod
        | Kind::Rename
        | Kind::Append
        | Kind::Truncate
        | Kind::Replace
        | Kind::Write
        | Kind::Setxattr
        | Kind::Link => Err(io::Error::other("not a read")),
    }
}

fn compare(got: &[u8], expected: &[u8], offset: u64) -> Verdict {
    match got.iter().zip(expected).position(|(a, b)| a != b) {
        Some(place) => Verdict::WrongAt(offset + place as u64),
        None if got.len() != expected.len() => Verdict::Short(got.len()),
        None => Verdict::Right,
    }
}

/// A fresh file name in `directory` that nobody else uses.
fn scratch_name(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}-{}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::Random;

    #[test]
    fn all_kinds_see_an_ordinary_file_as_it_is() {
        let scratch = crate::scratch::Scratch::new("access").unwrap();
        let truth = Random::new(3).bytes(300_001);
        for kind in Kind::READS.into_iter().chain(Kind::CHANGES).chain([Kind::Direct]) {
            let file = scratch.path().join(format!("{kind:?}"));
            fs_err::write(&file, &truth).unwrap();
            let (other, truth) = (PathBuf::from("/dev/shm"), truth.clone());
            let access = Access { kind, file, truth, offset: 0, length: usize::MAX >> 1, other };
            assert_eq!(perform(&access).unwrap(), Verdict::Right, "{kind:?}");
            let middle = Access { offset: 8192, length: 4096, ..access };
            if !Kind::CHANGES.contains(&kind) {
                assert_eq!(perform(&middle).unwrap(), Verdict::Right, "{kind:?}");
                let mut truth = middle.truth.clone();
                truth[9000] ^= 1;
                let wrong = perform(&Access { truth, ..middle }).unwrap();
                assert_eq!(wrong, Verdict::WrongAt(9000), "{kind:?}");
            }
        }
    }
}
