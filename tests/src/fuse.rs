//! The smallest FUSE file system there is: one file, under any name ([`Content`]); or files ([`Files`]).
//!
//! Speaks the protocol of `include/uapi/linux/fuse.h`, version 7.31, over `/dev/fuse`.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

const ROOT: u64 = 1;
const THE_FILE: u64 = 2;
const IN_HEADER: usize = 40;
/// `struct fuse_write_in`
const WRITE_IN: usize = 40;
const MAX_WRITE: u32 = 128 << 10;
/// For how long the kernel may keep names and attributes, in seconds.
const VALID: u64 = 3600;

/// The file's content.
pub trait Content: Send + 'static {
    /// In bytes; never changes.
    fn size(&self) -> u64;

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// `None`: zeros.
    fn write(&mut self, _offset: u64, _len: u64, _data: Option<&[u8]>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EROFS))
    }

    /// fsync(2) and fdatasync(2).
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Whether the kernel may keep pages of it.
    fn cached(&self) -> bool;
}

/// A mounted FUSE file system; unmounted when dropped.
#[derive(Debug)]
pub struct Fuse {
    place: PathBuf,
}

impl Fuse {
    /// Shows the file as any name in the directory `place`.
    pub fn mount(content: impl Content, place: &Path, flags: MsFlags) -> Result<Self> {
        let device = attach(place, flags)?;
        thread::spawn(move || serve(&device, content));
        Ok(Self { place: place.to_owned() })
    }
}

/// Mounts a FUSE file system; gives the fd that its requests come from.
pub fn attach(place: &Path, flags: MsFlags) -> Result<File> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.context("can't open /dev/fuse")?;
    let options =
        format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = CString::new(options)?;
    let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("fuse"), place, Some("fuse"), flags, Some(options.as_c_str()))
        .context("can't mount a FUSE file system")?;
    Ok(device)
}

/// Files and directories that can be read. Nodes are numbers; the root's is 1.
pub trait Files {
    /// The node of a name in a directory.
    fn look_up(&self, parent: u64, name: &[u8]) -> Option<u64>;
    /// Of a file, in bytes; `None` for a directory.
    fn size(&self, node: u64) -> io::Result<Option<u64>>;
    fn read(&self, node: u64, offset: u64, size: u32) -> io::Result<Vec<u8>>;
}

/// Answers until the file system is unmounted (`ENODEV`). Several threads can do so at once.
pub fn serve_files(mut device: &File, files: &impl Files) -> io::Result<()> {
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
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                let missing = || io::Error::from_raw_os_error(libc::ENOENT);
                let found = files.look_up(node, name).ok_or_else(missing);
                found.and_then(|node| Ok(entry(node, files.size(node)?)))
            }
            GETATTR => files.size(node).map(|size| attributes(node, size)),
            OPEN | OPENDIR => Ok(opened(true)),
            READ => {
                let offset = u64::from_ne_bytes(number(request, IN_HEADER + 8));
                let size = u32::from_ne_bytes(number(request, IN_HEADER + 16)).min(MAX_WRITE);
                files.read(node, offset, size)
            }
            RELEASE | RELEASEDIR | FLUSH => Ok(Vec::new()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        };
        reply(device, unique, answer)?;
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
fn serve(mut device: &File, mut content: impl Content) -> io::Result<()> {
    let mut buffer = vec![0; MAX_WRITE as usize + 4096];
    let mut data = vec![0; MAX_WRITE as usize];
    loop {
        let count = match device.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        let request = &buffer[..count];
        let opcode = u32::from_ne_bytes(number(request, 4));
        let unique = u64::from_ne_bytes(number(request, 8));
        let node = u64::from_ne_bytes(number(request, 16));
        let u64_at = |place| u64::from_ne_bytes(number(request, IN_HEADER + place));
        let u32_at = |place| u32::from_ne_bytes(number(request, IN_HEADER + place));
        if [FORGET, BATCH_FORGET, INTERRUPT].contains(&opcode) {
            continue;
        }
        let answer = match opcode {
            INIT => Ok(init(request)),
            LOOKUP => Ok(entry(THE_FILE, Some(content.size()))),
            GETATTR => Ok(attributes(node, (node != ROOT).then(|| content.size()))),
            OPEN | OPENDIR => Ok(opened(content.cached())),
            READ => {
                let size = u32_at(16).min(MAX_WRITE) as usize;
                content.read(u64_at(8), &mut data[..size]).map(|count| data[..count].to_vec())
            }
            WRITE => {
                let size = u32_at(16);
                let from = (IN_HEADER + WRITE_IN).min(count);
                let bytes = &request[from..(from + size as usize).min(count)];
                let written = content.write(u64_at(8), bytes.len() as u64, Some(bytes));
                written.map(|()| [size.to_ne_bytes(), [0; 4]].concat())
            }
            FSYNC => content.sync().map(|()| Vec::new()),
            FALLOCATE => {
                let zeros = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
                if u32_at(24).cast_signed() & zeros == 0 {
                    Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
                } else {
                    content.write(u64_at(8), u64_at(16), None).map(|()| Vec::new())
                }
            }
            RELEASE | RELEASEDIR | FLUSH => Ok(Vec::new()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        };
        reply(device, unique, answer)?;
    }
}

/// Sends `struct fuse_out_header` and what follows it.
fn reply(mut device: &File, unique: u64, answer: io::Result<Vec<u8>>) -> io::Result<()> {
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
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// `struct fuse_init_out`, 64 bytes.
fn init(request: &[u8]) -> Vec<u8> {
    const BIG_WRITES: u32 = 1 << 5;
    let read_ahead: [u8; 4] = number(request, IN_HEADER + 8);
    let mut out = Vec::new();
    out.extend_from_slice(&7_u32.to_ne_bytes());
    out.extend_from_slice(&31_u32.to_ne_bytes());
    out.extend_from_slice(&read_ahead);
    out.extend_from_slice(&BIG_WRITES.to_ne_bytes());
    out.extend_from_slice(&16_u16.to_ne_bytes());
    out.extend_from_slice(&12_u16.to_ne_bytes());
    out.extend_from_slice(&MAX_WRITE.to_ne_bytes());
    out.extend_from_slice(&1_u32.to_ne_bytes());
    out.resize(64, 0);
    out
}

/// `struct fuse_open_out`. `FOPEN_KEEP_CACHE`: an open does not drop the pages.
fn opened(cached: bool) -> Vec<u8> {
    const DIRECT_IO: u32 = 1;
    const KEEP_CACHE: u32 = 2;
    let mut out = 0_u64.to_ne_bytes().to_vec();
    out.extend_from_slice(&if cached { KEEP_CACHE } else { DIRECT_IO }.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out
}

/// `struct fuse_entry_out`
fn entry(node: u64, size: Option<u64>) -> Vec<u8> {
    let mut out = Vec::new();
    for value in [node, 0, VALID, VALID, 0] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    out.extend_from_slice(&attribute(node, size));
    out
}

/// `struct fuse_attr_out`
fn attributes(node: u64, size: Option<u64>) -> Vec<u8> {
    let mut out = VALID.to_ne_bytes().to_vec();
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&attribute(node, size));
    out
}

/// `struct fuse_attr`, 88 bytes.
fn attribute(node: u64, size: Option<u64>) -> Vec<u8> {
    let mode = size.map_or(libc::S_IFDIR | 0o755, |_| libc::S_IFREG | 0o644);
    let size = size.unwrap_or(0);
    let mut out = Vec::new();
    for value in [node, size, size.div_ceil(512), 0, 0, 0] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    for value in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0_u32] {
        out.extend_from_slice(&value.to_ne_bytes());
    }
    out
}
