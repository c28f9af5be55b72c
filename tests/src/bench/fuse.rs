//! The smallest FUSE file system there is: one file, passed through. What a lazy FUSE file system can't
//! be faster than. And the protocol, for others ([`Files`]).
//!
//! Speaks the protocol of `include/uapi/linux/fuse.h`, version 7.31, over `/dev/fuse`.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const ROOT: u64 = 1;
const THE_FILE: u64 = 2;
const IN_HEADER: usize = 40;
const MAX_WRITE: u32 = 128 << 10;
/// For how long the kernel may keep names and attributes, in seconds.
const VALID: u64 = 3600;

/// A mounted FUSE file system; unmounted when dropped.
#[derive(Debug)]
pub struct Fuse {
    place: PathBuf,
}

impl Fuse {
    /// Shows `file` as any name in the directory `place`.
    pub fn mount(file: &Path, place: &Path) -> Result<Self> {
        let device = attach(place)?;
        let file = PassThrough(File::open(file)?);
        thread::spawn(move || serve(&device, &file));
        Ok(Self { place: place.to_owned() })
    }
}

/// Mounts a FUSE file system; gives the fd that its requests come from.
pub fn attach(place: &Path) -> Result<File> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.context("can't open /dev/fuse")?;
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = CString::new(options)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
    mount(Some("fuse"), place, Some("fuse"), flags, Some(options.as_c_str()))
        .context("can't mount a FUSE file system")?;
    Ok(device)
}

/// What a file system shows. Nodes are numbers; the root's is 1.
pub trait Files {
    /// The node of a name in a directory.
    fn look_up(&self, parent: u64, name: &[u8]) -> Option<u64>;
    /// Of a file, in bytes; `None` for a directory.
    fn size(&self, node: u64) -> io::Result<Option<u64>>;
    fn read(&self, node: u64, offset: u64, size: u32) -> io::Result<Vec<u8>>;
}

/// One file, as any name.
struct PassThrough(File);

impl Files for PassThrough {
    fn look_up(&self, _: u64, _: &[u8]) -> Option<u64> {
        Some(THE_FILE)
    }

    fn size(&self, node: u64) -> io::Result<Option<u64>> {
        if node == ROOT { Ok(None) } else { Ok(Some(self.0.metadata()?.size())) }
    }

    fn read(&self, _: u64, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        let mut data = vec![0; size as usize];
        let count = self.0.read_at(&mut data, offset)?;
        data.truncate(count);
        Ok(data)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = umount2(&self.place, MntFlags::MNT_DETACH);
    }
}

fn number<const N: usize>(request: &[u8], place: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(from) = request.get(place..place + N) {
        bytes.copy_from_slice(from);
    }
    bytes
}

/// Answers until the file system is unmounted (`ENODEV`).
/// Several threads can do so for the same file system.
pub fn serve(mut device: &File, files: &impl Files) -> io::Result<()> {
    let mut buffer = vec![0; MAX_WRITE as usize + 4096];
    loop {
        let count = match device.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        let request = &buffer[..count];
        let opcode = u32::from_ne_bytes(number(request, 4));
        let unique = u64::from_ne_bytes(number(request, 8));
        let node = u64::from_ne_bytes(number(request, 16));
        if [FORGET, BATCH_FORGET, INTERRUPT].contains(&opcode) {
            continue;
        }
        let answer = match opcode {
            INIT => Ok(init(request)),
            LOOKUP => {
                let name = request.get(IN_HEADER..).unwrap_or_default();
                entry(files, node, name.split(|byte| *byte == 0).next().unwrap_or_default())
            }
            GETATTR => attributes(files, node),
            OPEN | OPENDIR => Ok(opened()),
            READ => {
                let offset = u64::from_ne_bytes(number(request, IN_HEADER + 8));
                let size = u32::from_ne_bytes(number(request, IN_HEADER + 16)).min(MAX_WRITE);
                files.read(node, offset, size)
            }
            RELEASE | RELEASEDIR | FLUSH => Ok(Vec::new()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
        };
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
        message.extend_from_slice(&error.to_ne_bytes());
        message.extend_from_slice(&unique.to_ne_bytes());
        message.extend_from_slice(&body);
        match device.write_all(&message) {
            // The reader has gone meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            other => other?,
        }
    }
}

/// `struct fuse_init_out`, 64 bytes.
fn init(request: &[u8]) -> Vec<u8> {
    let read_ahead: [u8; 4] = number(request, IN_HEADER + 8);
    let mut out = Vec::new();
    out.extend_from_slice(&7_u32.to_ne_bytes());
    out.extend_from_slice(&31_u32.to_ne_bytes());
    out.extend_from_slice(&read_ahead);
    out.extend_from_slice(&0_u32.to_ne_bytes());
    out.extend_from_slice(&16_u16.to_ne_bytes());
    out.extend_from_slice(&12_u16.to_ne_bytes());
    out.extend_from_slice(&MAX_WRITE.to_ne_bytes());
    out.extend_from_slice(&1_u32.to_ne_bytes());
    out.resize(64, 0);
    out
}

/// `struct fuse_open_out`. `FOPEN_KEEP_CACHE`: an open does not drop the pages.
fn opened() -> Vec<u8> {
    const KEEP_CACHE: u32 = 2;
    let mut out = 0_u64.to_ne_bytes().to_vec();
    out.extend_from_slice(&KEEP_CACHE.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out
}

/// `struct fuse_entry_out`
fn entry(files: &impl Files, parent: u64, name: &[u8]) -> io::Result<Vec<u8>> {
    let missing = || io::Error::from_raw_os_error(libc::ENOENT);
    let node = files.look_up(parent, name).ok_or_else(missing)?;
    let mut out = Vec::new();
    for value in [node, 0, VALID, VALID, 0] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    out.extend_from_slice(&attribute(files, node)?);
    Ok(out)
}

/// `struct fuse_attr_out`
fn attributes(files: &impl Files, node: u64) -> io::Result<Vec<u8>> {
    let mut out = VALID.to_ne_bytes().to_vec();
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&attribute(files, node)?);
    Ok(out)
}

/// `struct fuse_attr`, 88 bytes.
fn attribute(files: &impl Files, node: u64) -> io::Result<Vec<u8>> {
    let (size, mode) = match files.size(node)? {
        Some(size) => (size, libc::S_IFREG | 0o644),
        None => (0, libc::S_IFDIR | 0o755),
    };
    let mut out = Vec::new();
    for value in [node, size, size.div_ceil(512), 0, 0, 0] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    for value in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0_u32] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    Ok(out)
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
        let fuse = Fuse::mount(&file, &place).unwrap();
        assert!(fs_err::read(place.join("any")).unwrap() == content);
        drop(fuse);
        assert!(fs_err::read_dir(&place).unwrap().next().is_none());
    }
}
