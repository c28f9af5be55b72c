//! Mangled archives, layers and indexes: refused or read, never a panic, never outside the bounds.

use proptest::prelude::*;

use super::support::{Archive, index_by, noise, read_by, tree};
use crate::builder;
use crate::layer::index::Index;
use crate::layer::indexer::Indexer;
use crate::layer::span::Codec;
use crate::layer::tar::{EntryKind, TarReader};
use crate::manifest::layer::Reader;

/// An archive with something of everything.
fn zoo() -> Vec<u8> {
    let mut archive = Archive::default();
    archive.dir("./").dir("d").file("d/f", &noise(1500, 1)).link("h", b'1', "d/f");
    archive.link("s", b'2', "d").file("s/x", b"x").add("p", b'6', b"").add("c", b'3', b"");
    archive.pax(b'x', &[("SCHILY.xattr.user.a", b"v"), ("mtime", b"1.5"), ("path", b"long")]);
    archive.file("x", b"y").pax(b'g', &[("uid", b"7")]).add("L", b'L', b"a/long/name\0");
    archive.file("short", b"").file("d/.wh.gone", b"").file("d/.wh..wh..opq", b"");
    let sparse: [(&str, &[u8]); 3] = [
        ("GNU.sparse.map", b"0,512,4096,512"),
        ("GNU.sparse.size", b"8192"),
        ("GNU.sparse.name", b"sparse"),
    ];
    archive.pax(b'x', &sparse).file("s0", &[1; 1024]);
    let sparse: [(&str, &[u8]); 3] =
        [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9999")];
    let mut data = b"1\n4096\n512\n".to_vec();
    data.resize(1024, 0);
    archive.pax(b'x', &sparse).file("s1", &data);
    archive.end()
}

/// Changes to some bytes; checksums of headers may be put right again.
pub fn mangle(bytes: &mut Vec<u8>, changes: &[(usize, u8)], cut: usize, mend: bool) {
    for (at, byte) in changes {
        let at = at % bytes.len();
        bytes[at] = *byte;
    }
    bytes.truncate(bytes.len() - cut % bytes.len());
    if mend {
        for block in bytes.chunks_exact_mut(512).filter(|block| block.iter().any(|b| *b != 0)) {
            if block[257..262] == *b"ustar" {
                block[148..156].copy_from_slice(b"        ");
                let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
    }
}

pub fn changes() -> impl Strategy<Value = Vec<(usize, u8)>> {
    let byte = prop_oneof![
        any::<u8>(),
        Just(b'0'),
        Just(b'7'),
        Just(b'\n'),
        Just(b'/'),
        Just(0x80),
        Just(0)
    ];
    prop::collection::vec((any::<usize>(), byte), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_mangled_archive(changes in changes(), cut in 0usize..400, mend in any::<bool>(), chunk in 1usize..3000) {
        let mut bytes = zoo();
        mangle(&mut bytes, &changes, cut, mend);
        let by_pieces = read_by(TarReader::default(), &bytes, chunk);
        prop_assert_eq!(&by_pieces, &read_by(TarReader::default(), &bytes, bytes.len()));
        let Ok((entries, _)) = by_pieces else { return Ok(()) };
        for entry in entries {
            prop_assert!(!entry.path.starts_with(b"/") && entry.path.len() <= 4095);
            prop_assert!(entry.path.split(|b| *b == b'/').all(|name| name != b".." && name != b"."));
            if let EntryKind::File(data) = entry.kind {
                let mut end = 0;
                for piece in data.pieces {
                    prop_assert!(piece.len > 0 && piece.offset >= end);
                    end = piece.offset + piece.len;
                    prop_assert!(end <= data.size && piece.at + piece.len <= bytes.len() as u64);
                }
            }
        }
        if let Ok(made) = tree(&bytes) {
            // what the tree takes, manifest and image take
            let len = (bytes.len() as u64).next_multiple_of(512);
            let manifest = made.write(Vec::new(), len).unwrap();
            builder::layer::image(&manifest[..]).unwrap();
        }
    }

    #[test]
    fn a_mangled_manifest(changes in changes(), cut in 0usize..100) {
        let archive = zoo();
        let mut manifest = tree(&archive).unwrap().write(Vec::new(), archive.len() as u64).unwrap();
        mangle(&mut manifest, &changes, cut, false);
        // refused, or an image
        let _ = builder::layer::image(&manifest[..]);
        let Ok(mut reader) = Reader::new(&manifest[..]) else { return Ok(()) };
        while let Ok(Some((number, entry))) = reader.next_entry() {
            prop_assert!(entry.parent < number);
        }
    }

    #[test]
    fn bytes_that_are_nothing(bytes in prop::collection::vec(any::<u8>(), 0..2000), magic in 0..4) {
        let start: &[u8] = match magic {
            0 => &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0],
            1 => &[0x28, 0xb5, 0x2f, 0xfd],
            2 => b"hydrspan\x01\0\0\0",
            _ => b"",
        };
        let bytes = [start, &bytes].concat();
        let _ = read_by(TarReader::default(), &bytes, 100);
        prop_assert!(Index::parse(&bytes).is_err());
        let _ = index_by(Indexer::new(4096), &bytes, 300);
    }

    #[test]
    fn a_mangled_index(changes in changes(), cut in 0usize..3000, mend in any::<bool>()) {
        let layer = noise(30_000, 3);
        let gzip = {
            use std::io::Write;
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(1));
            out.write_all(&layer).unwrap();
            out.finish().unwrap()
        };
        let (index, _) = index_by(Indexer::new(4096), &gzip, 1000).unwrap();
        let mut file = Vec::new();
        index.write(&mut file).unwrap();
        let same = file.clone();
        mangle(&mut file, &changes, cut % 2 * cut, false);
        let head_len = index.windows_at() as usize;
        if mend && file.len() >= head_len {
            // somebody's own: the checksum is right
            let mut crc = crc32fast::Hasher::new();
            crc.update(&file[..140]);
            crc.update(&file[144..head_len]);
            file[140..144].copy_from_slice(&crc.finalize().to_le_bytes());
        }
        let _ = Index::read(&file[..]);
        let Ok(wrong) = Index::parse(&file) else { return Ok(()) };
        prop_assert!(mend || wrong.spans() == index.spans());
        if file == same {
            return Ok(());
        }
        for (n, span) in wrong.spans().iter().enumerate() {
            let Ok(window) = wrong.window(n) else { continue };
            let gzipped = matches!(span.codec, Codec::Gzip | Codec::Deflate { .. });
            prop_assert!(gzipped);
            let range = span.compressed.offset() as usize..span.compressed.end() as usize;
            let Some(compressed) = gzip.get(range) else { continue };
            let at = span.uncompressed.offset() as usize;
            match (span.decode(compressed, &window), layer.get(at..at + span.uncompressed.len() as usize)) {
                // with digests as they were, only right bytes come out, wherever the index says they go
                (Ok(bytes), _) if index.spans().iter().all(|known| known.digest != span.digest) => {
                    panic!("a digest of {} bytes was guessed", bytes.len());
                }
                (Ok(bytes), _) => prop_assert!(layer.windows(bytes.len()).any(|part| part == bytes)),
                (Err(_), _) => {}
            }
        }
    }
}
