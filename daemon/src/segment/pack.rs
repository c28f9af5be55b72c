//! The existence pack: a git pack whose every byte has a place before any content is known.
//!
//! Laid out as gitformat-pack(5) has it: a header, one entry for each blob, a trailer. The content
//! of an entry is a zlib stream (RFC 1950) of *stored* deflate blocks (RFC 1951, 3.2.4), so that
//! the length of an entry follows from the size of its object, and any part of it can be made out
//! of that object alone. An entry takes whole blocks: [padding](padded_len) is stored blocks of no
//! content, so that no page of the pack needs more than one object, and the pack is one to every
//! reader that there is, without gaps between its entries. The trailer of a real pack is the hash of all its bytes, which nobody
//! knows here: [`trailer`] is a stand-in, which git compares with the index and nothing else unless
//! it is asked to verify the pack.

use std::io;
use std::iter;

use crate::object::{HashKind, ObjectId};
use crate::range::{BLOCK, ByteRange};

/// The length in bytes of a pack's header, and so the offset of its first entry.
pub const HEADER_LEN: u64 = 12;
/// The most bytes of content in one stored block.
const STORED_MAX: u64 = 65535;
/// A stored block's own header: BFINAL and BTYPE in one byte, LEN, NLEN.
const STORED_HEADER: u64 = 5;
/// CMF and FLG: deflate with a window of 32 KiB, fastest level, no dictionary.
const ZLIB_HEADER: [u8; 2] = [0x78, 0x01];
/// The Adler-32 checksum behind the last block.
const ZLIB_TRAILER: u64 = 4;
/// A stored block of no content.
const EMPTY: [u8; 5] = [0, 0, 0, 0xff, 0xff];
/// The same, before it a block of fixed codes (RFC 1951, 3.2.6) with nothing but its end: BFINAL 0, BTYPE 01,
/// seven bits of 0. The stored block's BFINAL is bit 2 of the second byte.
const LONG_EMPTY: [u8; 6] = [2, 0, 0, 0, 0xff, 0xff];
/// Blobs are objects of type 3.
const BLOB: u8 = 3;

/// The header of a pack of `count` objects: `PACK`, version 2, the count.
#[must_use]
pub fn header(count: u32) -> [u8; HEADER_LEN as usize] {
    let mut header = *b"PACK\0\0\0\x02\0\0\0\0";
    header[8..].copy_from_slice(&count.to_be_bytes());
    header
}

/// What stands in for the pack's checksum, at its end and in its index: a hash of the ids of all
/// its objects in the order of their entries. Its bytes follow the last entry.
#[must_use]
pub fn trailer(hash: HashKind, keys: impl IntoIterator<Item = ObjectId>) -> ObjectId {
    let mut hasher = hash.hasher();
    hasher.update(b"hydrant existence pack\0");
    keys.into_iter().for_each(|key| hasher.update(key.as_bytes()));
    hasher.finish()
}

/// The header of an entry for a blob of `size` bytes: type and size, 1 to 10 bytes.
#[must_use]
pub fn entry_header(size: u64) -> Vec<u8> {
    #[expect(clippy::cast_possible_truncation, reason = "the low bits of the size")]
    let mut byte = BLOB << 4 | (size as u8 & 0x0f);
    let mut rest = size >> 4;
    let mut header = Vec::with_capacity(10);
    while rest > 0 {
        header.push(byte | 0x80);
        byte = (rest & 0x7f) as u8;
        rest >>= 7;
    }
    header.push(byte);
    header
}

/// The length in bytes of the whole entry for a blob of `size` bytes.
#[must_use]
pub fn entry_len(size: u64) -> u64 {
    let blocks = size.div_ceil(STORED_MAX).max(1);
    entry_header(size).len() as u64
        + ZLIB_HEADER.len() as u64
        + blocks * STORED_HEADER
        + size
        + ZLIB_TRAILER
}

/// The length in bytes of the entry for a blob of `size` bytes with what it takes to fill whole blocks.
#[must_use]
pub fn padded_len(size: u64) -> u64 {
    let len = entry_len(size);
    let padded = len.next_multiple_of(BLOCK);
    if can_pad(padded - len) { padded } else { padded + BLOCK }
}

/// Whether some [`EMPTY`] and [`LONG_EMPTY`] together are of this length.
fn can_pad(len: u64) -> bool {
    len % EMPTY.len() as u64 * LONG_EMPTY.len() as u64 <= len
}

/// Deflate blocks of no content, `len` bytes together.
fn padding(len: u64) -> Vec<u8> {
    let long = len % EMPTY.len() as u64;
    let short = len.saturating_sub(long * LONG_EMPTY.len() as u64) / EMPTY.len() as u64;
    let mut out = Vec::new();
    (0..long).for_each(|_| out.extend(LONG_EMPTY));
    (0..short).for_each(|_| out.extend(EMPTY));
    // BFINAL of the last block
    let last = out.len();
    if short > 0 {
        out[last - EMPTY.len()] |= 1;
    } else if long > 0 {
        out[last - LONG_EMPTY.len() + 1] |= 1 << 2;
    }
    out
}

/// Makes the bytes `range` of an entry of `len` bytes for a blob of `size` bytes: [`entry_len`], or
/// [`padded_len`]. `range` is cut to the entry. `read` fills a buffer with the blob's content from an
/// offset; where the range has a byte of the checksum, that is all of the content.
pub fn compose(
    size: u64,
    len: u64,
    range: ByteRange,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Vec<u8>> {
    let range = range.clamp(len);
    let padding = padding(len.saturating_sub(entry_len(size)));
    let checksum_at = entry_len(size) - ZLIB_TRAILER + padding.len() as u64;
    if checksum_at + ZLIB_TRAILER != len {
        return Err(io::Error::other(format!("no entry of {size} bytes is {len} bytes long")));
    }
    let len = usize::try_from(range.len()).map_err(io::Error::other)?;
    let mut out = vec![0; len];
    let mut at = 0;
    // Puts a piece of the entry that starts at `at` where the range has it.
    let mut copy = |at: u64, piece: &[u8]| {
        let common = piece_of(range, at, piece.len() as u64);
        if !common.is_empty() {
            let from = (common.offset() - at) as usize;
            let to = (common.offset() - range.offset()) as usize;
            let len = common.len() as usize;
            out[to..to + len].copy_from_slice(&piece[from..from + len]);
        }
        at + piece.len() as u64
    };
    at = copy(at, &entry_header(size));
    at = copy(at, &ZLIB_HEADER);

    // Blocks before the range are passed over by arithmetic.
    let full_block = STORED_HEADER + STORED_MAX;
    let last_block = size.div_ceil(STORED_MAX).max(1) - 1;
    let first_block = (range.offset().saturating_sub(at) / full_block).min(last_block);
    let blocks_at = at;
    for block in first_block..=last_block {
        let mut at = blocks_at + block * full_block;
        if at >= range.end() {
            break;
        }
        let content = block * STORED_MAX;
        let content_len = (size - content).min(STORED_MAX);
        let len = content_len as u16;
        let [low, high] = len.to_le_bytes();
        let is_final = block == last_block && padding.is_empty();
        at = copy(at, &[u8::from(is_final), low, high, !low, !high]);
        let common = piece_of(range, at, content_len);
        if !common.is_empty() {
            let mut piece = vec![0; common.len() as usize];
            read(content + (common.offset() - at), &mut piece)?;
            copy(common.offset(), &piece);
        }
    }

    copy(checksum_at - padding.len() as u64, &padding);
    if range.end() > checksum_at {
        copy(checksum_at, &adler32(size, &mut read)?.to_be_bytes());
    }
    Ok(out)
}

fn piece_of(range: ByteRange, at: u64, len: u64) -> ByteRange {
    ByteRange::between(range.offset().max(at), range.end().min(at + len))
}

fn adler32(size: u64, mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<u32> {
    let mut sum = adler2::Adler32::new();
    let mut buffer = vec![0; size.min(1 << 20) as usize];
    let step = buffer.len().max(1);
    for at in iter::successors(Some(0), |at| Some(at + step as u64)).take_while(|at| *at < size) {
        let piece = &mut buffer[..(size - at).min(step as u64) as usize];
        read(at, piece)?;
        sum.write_slice(piece);
    }
    Ok(sum.checksum())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    fn content(size: u64) -> Vec<u8> {
        let mut state = size | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..size).map(|_| next()).collect()
    }

    fn part(content: &[u8], len: u64, range: ByteRange) -> Vec<u8> {
        compose(content.len() as u64, len, range, |at, buffer| {
            let at = at as usize;
            buffer.copy_from_slice(&content[at..at + buffer.len()]);
            Ok(())
        })
        .unwrap()
    }

    fn entry(content: &[u8], len: u64) -> Vec<u8> {
        part(content, len, ByteRange::new(0, u64::MAX))
    }

    fn assert_is_entry(content: &[u8], len: u64) {
        let size = content.len() as u64;
        let entry = entry(content, len);
        assert_eq!(entry.len() as u64, len, "{size}");
        let stream = &entry[entry_header(size).len()..];
        let mut decoder = flate2::bufread::ZlibDecoder::new(stream);
        let mut back = Vec::new();
        decoder.read_to_end(&mut back).unwrap();
        assert_eq!(back, content, "{size}");
        assert!(decoder.into_inner().is_empty(), "{size}: nothing behind the stream");
    }

    const SIZES: [u64; 12] =
        [0, 1, 15, 16, 2047, 2048, 4096, 65534, 65535, 65536, 131_070, 300_000];

    #[test]
    fn an_entry_is_a_zlib_stream_of_the_length_foretold() {
        for size in SIZES {
            assert_is_entry(&content(size), entry_len(size));
        }
    }

    /// Whatever is left of the last block, also where it is too little for a block of no content.
    #[test]
    fn a_padded_entry_is_a_zlib_stream_of_whole_blocks() {
        for size in (4000..4200).chain(0..60).chain(SIZES) {
            let len = padded_len(size);
            assert_eq!(len % BLOCK, 0);
            assert!(len >= entry_len(size) && len < entry_len(size) + BLOCK + 20, "{size}");
            assert_is_entry(&content(size), len);
        }
    }

    #[test]
    fn an_entry_of_another_length_is_none() {
        for len in [entry_len(10) - 1, entry_len(10) + 1, entry_len(10) + 19] {
            compose(10, len, ByteRange::new(0, 5), |_, _| Ok(())).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn a_part_is_that_part_of_the_whole(
            size in 0..200_000u64, start in 0..210_000u64, len in 0..100_000u64, padded: bool,
        ) {
            let content = content(size);
            let range = ByteRange::new(start, len);
            let len = if padded { padded_len(size) } else { entry_len(size) };
            let cut = range.clamp(len);
            let whole = entry(&content, len);
            prop_assert_eq!(
                part(&content, len, range),
                &whole[cut.offset() as usize..cut.end() as usize]
            );
        }
    }

    #[test]
    fn reads_no_more_content_than_a_part_needs() {
        let size = 10 << 20;
        let mut asked = Vec::new();
        compose(size, padded_len(size), ByteRange::new(5 << 20, 4096), |at, buffer| {
            asked.push((at, buffer.len()));
            Ok(())
        })
        .unwrap();
        let sum = asked.iter().map(|(_, len)| len).sum::<usize>();
        assert!((4080..=4096).contains(&sum), "{asked:?}");
    }

    /// Real git takes a pack made this way (with its true checksum at the end), and gives back
    /// every object.
    #[test]
    fn git_reads_the_pack() {
        for kind in [HashKind::Sha1, HashKind::Sha256] {
            let contents: Vec<_> = SIZES.iter().map(|size| content(*size)).collect();
            let mut pack = header(contents.len() as u32).to_vec();
            for (n, content) in contents.iter().enumerate() {
                let len = [entry_len, padded_len][n % 2](content.len() as u64);
                pack.extend(entry(content, len));
            }
            let mut hasher = kind.hasher();
            hasher.update(&pack);
            pack.extend_from_slice(hasher.finish().as_bytes());

            let dir = tempfile::tempdir().unwrap();
            let git = |args: &[&str], input: &[u8]| {
                let mut child = Command::new("git")
                    .args(args)
                    .current_dir(dir.path())
                    .env("GIT_CONFIG_GLOBAL", "/dev/null")
                    .env("GIT_CONFIG_NOSYSTEM", "1")
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                child.stdin.take().unwrap().write_all(input).unwrap();
                let output = child.wait_with_output().unwrap();
                assert!(output.status.success(), "git {args:?}");
                output.stdout
            };
            git(&["init", "-q", "--bare", &format!("--object-format={}", kind.name())], b"");
            git(&["index-pack", "--strict", "--stdin"], &pack);
            git(&["fsck", "--strict"], b"");
            for content in &contents {
                let id = ObjectId::of_blob(kind, content).to_string();
                assert_eq!(&git(&["cat-file", "blob", &id], b""), content, "{id}");
            }
        }
    }

    #[test]
    fn trailer_depends_on_order() {
        let keys = [1, 2].map(|n| ObjectId::of_blob(HashKind::Sha1, &[n]));
        let swapped = [keys[1], keys[0]];
        assert_ne!(trailer(HashKind::Sha1, keys), trailer(HashKind::Sha1, swapped));
        assert_eq!(header(258), *b"PACK\0\0\0\x02\0\0\x01\x02");
    }
}
