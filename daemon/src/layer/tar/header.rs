//! A block that is a header.

use super::{Fault, Timestamp};

/// The unit of an archive in bytes.
pub const BLOCK: usize = 512;

/// What a header stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
    OldSparse,
    LongName,
    LongLink,
    Pax,
    GlobalPax,
    Other(u8),
}

/// What a header says.
#[derive(Debug, Clone)]
pub struct Header {
    pub kind: Kind,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u16,
    pub uid: i64,
    pub gid: i64,
    /// Of the data in the archive, in bytes.
    pub size: u64,
    /// Of a sparse file.
    pub real_size: Option<u64>,
    pub mtime: Timestamp,
    pub major: u32,
    pub minor: u32,
    pub is_gnu: bool,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a type that was written before there were types for directories.
    old: bool,
}

impl Header {
    /// Reads a block of [`BLOCK`] bytes that are not all zero.
    pub fn parse(block: &[u8]) -> Result<Self, Fault> {
        let Ok(block) = <&[u8; BLOCK]>::try_from(block) else { return Err(Fault::Checksum) };
        check(block)?;
        let is_gnu = &block[257..265] == b"ustar  \0";
        let is_posix = &block[257..263] == b"ustar\0";
        let is_star = is_posix && &block[508..512] == b"tar\0";
        let mut path = text(&block[..100]).to_vec();
        let prefix = match () {
            () if is_star => text(&block[345..476]),
            () if is_posix => text(&block[345..500]),
            // Old versions of Go wrote a prefix where GNU has times.
            () if is_gnu && number(&block[345..357], "time").is_err() => {
                Some(text(&block[345..500])).filter(|prefix| prefix.is_ascii()).unwrap_or_default()
            }
            () => &[],
        };
        if !prefix.is_empty() {
            path.splice(0..0, prefix.iter().copied().chain([b'/']));
        }
        let kind = match block[156] {
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => Kind::OldSparse,
            b'L' => Kind::LongName,
            b'K' => Kind::LongLink,
            b'x' => Kind::Pax,
            b'g' => Kind::GlobalPax,
            other => Kind::Other(other),
        };
        let size = number(&block[124..136], "size")?;
        let is_device = matches!(kind, Kind::Char | Kind::Block) && (is_gnu || is_posix);
        let device = |field| match is_device {
            true => number(field, "device number")
                .and_then(|n| u32::try_from(n).map_err(|_| Fault::Number("device number"))),
            false => Ok(0),
        };
        let mode = number(&block[100..108], "mode")?;
        Ok(Self {
            kind,
            path,
            link: text(&block[157..257]).to_vec(),
            mode: (mode & 0o7777) as u16,
            uid: number(&block[108..116], "uid")?,
            gid: number(&block[116..124], "gid")?,
            size: u64::try_from(size).map_err(|_| Fault::Number("size"))?,
            real_size: None,
            mtime: Timestamp { secs: number(&block[136..148], "time")?, nanos: 0 },
            major: device(&block[329..337])?,
            minor: device(&block[337..345])?,
            is_gnu,
            xattrs: Vec::new(),
            old: block[156] == 0,
        })
    }

    /// To be called once the path is known.
    pub fn settle(&mut self) {
        if self.old && self.path.ends_with(b"/") {
            self.kind = Kind::Directory;
        }
    }
}

/// A field's bytes up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// A number: octal digits between spaces and NULs, or, with the highest bit set, in base 256.
pub fn number(field: &[u8], what: &'static str) -> Result<i64, Fault> {
    let wrong = || Fault::Number(what);
    if let Some(first) = field.first().filter(|first| **first & 0x80 != 0) {
        let negative = first & 0x40 != 0;
        let mut value = if negative { -1i64 } else { 0 };
        for (n, byte) in field.iter().enumerate() {
            // the highest bit is a mark; the next one is the sign
            let byte = if n == 0 && !negative { *byte & 0x7f } else { *byte };
            let shifted = value.checked_mul(256).ok_or_else(wrong)?;
            value = shifted | i64::from(byte);
        }
        return Ok(value);
    }
    let pad = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !pad(byte)).unwrap_or(field.len());
    let digits = text(&field[start..]);
    let end = digits.iter().rposition(|byte| !pad(byte)).map_or(0, |last| last + 1);
    digits[..end].iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => {
            let value = value.checked_mul(8).ok_or_else(wrong)?;
            Ok(value | i64::from(digit - b'0'))
        }
        _ => Err(wrong()),
    })
}

/// The sum of all bytes, with spaces for the sum itself. Some have taken bytes to be signed.
fn check(block: &[u8; BLOCK]) -> Result<(), Fault> {
    let said = number(&block[148..156], "checksum").map_err(|_| Fault::Checksum)?;
    let counted = |n: usize, byte: u8| if (148..156).contains(&n) { b' ' } else { byte };
    let bytes = || block.iter().enumerate().map(|(n, byte)| counted(n, *byte));
    let unsigned: i64 = bytes().map(i64::from).sum();
    let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
    if said == unsigned || said == signed { Ok(()) } else { Err(Fault::Checksum) }
}
