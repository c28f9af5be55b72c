//! Archives with something odd in them.

use super::support::{Archive, Block, content, read, read_by, record};
use crate::layer::tar::{EntryKind, Fault, MAX_META, Piece, TarReader, Timestamp};

fn fault(archive: &[u8]) -> Fault {
    match read(archive) {
        Ok(entries) => panic!("it is read as {entries:?}"),
        Err(error) => error.fault,
    }
}

#[test]
fn an_archive_cut_short_is_refused_wherever_it_shows() {
    let mut archive = Archive::default();
    archive.pax(b'x', &[("mtime", b"5.5")]).file("a/b", &[1; 1000]).dir("c");
    let whole = archive.end();
    let ends = [0, 1024 + 512 + 1024, 1024 + 512 + 1024 + 512, 1024 + 512 + 1024 + 1024];
    for len in 0..whole.len() {
        let cut = read_by(TarReader::default(), &whole[..len], 700);
        // an archive may lack its end and the zeros behind the last file's data
        let complete = ends.contains(&len)
            || (1024 + 512 + 1000..1024 + 512 + 1024).contains(&len)
            || len == whole.len() - 512;
        match cut {
            Ok((_, summary)) => assert!(complete && !summary.ended, "{len}"),
            Err(error) => {
                assert!(!complete, "{len}: {error}");
                assert!(matches!(error.fault, Fault::Truncated(_)), "{len}: {error}");
                assert_eq!(error.offset, len as u64);
            }
        }
    }
    let error = read(&whole[..1700]).unwrap_err().to_string();
    assert!(error.contains("byte 1700") && error.contains("pull"), "{error}");
}

#[test]
fn what_is_no_archive_is_refused() {
    assert_eq!(fault(&[b'x'; 512]), Fault::Checksum);
    let mut archive = Archive::default();
    archive.file("a", b"data").file("b", b"more");
    for at in [0, 60, 99, 104, 130, 156, 300] {
        let mut bytes = archive.end();
        bytes[1024 + at] ^= 1;
        assert_eq!(fault(&bytes), Fault::Checksum, "{at}");
        assert_eq!(read(&bytes).unwrap_err().offset, 1024);
    }
    // a block of zeros, and then more
    let lone = [&archive.0[..], &[0; 512], &archive.0[..]].concat();
    assert_eq!(fault(&lone), Fault::LoneZeros);
    let behind = [&archive.end()[..], &archive.0[..], &[7; 100]].concat();
    assert_eq!(read(&behind).unwrap().len(), 2);
}

#[test]
fn headers_have_bounds() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let mut archive = Archive::default();
        archive.block(Block::new(b"meta", kind, 100 << 20), b"");
        assert_eq!(fault(&archive.0), Fault::LongMeta(100 << 20));
        // the largest that is taken, in a stream that ends early
        let mut archive = Archive::default();
        archive.block(Block::new(b"meta", kind, MAX_META), b"");
        assert!(matches!(fault(&archive.0), Fault::Truncated(_)));
    }
    let mut huge = Block::new(b"f", b'0', 0);
    huge.set(124, &[0xff; 12]);
    assert_eq!(fault(&huge.clone().done()), Fault::Number("size"));
    huge.set(124, &[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(fault(&huge.clone().done()), Fault::Truncated(_)));
    huge.set(124, b"77777777778\0");
    assert_eq!(fault(&huge.done()), Fault::Number("size"));
}

#[test]
fn paths_stay_in_the_tree() {
    for path in ["../x", "a/../b", "..", "/..", "a/.."] {
        let mut archive = Archive::default();
        archive.file(path, b"");
        assert!(matches!(fault(&archive.0), Fault::Path { .. }), "{path}");
        let mut archive = Archive::default();
        archive.link("l", b'1', path);
        assert!(matches!(fault(&archive.0), Fault::Path { .. }), "{path}");
    }
    let mut archive = Archive::default();
    archive.pax(b'x', &[("path", b"a/\xff/..x/...")]).file("short", b"");
    archive.file("./", b"").file("//.//x/./", b"").file("", b"");
    let paths: Vec<_> = read(&archive.end()).unwrap().into_iter().map(|e| e.path).collect();
    assert_eq!(paths, [&b"a/\xff/..x/..."[..], b"", b"x", b""]);
    let long = "n".repeat(256);
    let deep = "d/".repeat(2050);
    for path in [long, deep] {
        let mut archive = Archive::default();
        archive.pax(b'x', &[("path", path.as_bytes())]).file("x", b"");
        assert!(matches!(fault(&archive.0), Fault::Path { .. }));
    }
}

#[test]
fn pax_records_are_checked() {
    let wrong: [&[u8]; 11] = [
        b"x",
        b"5 a=b",
        b"6 a=bc",
        b"99 a=b\n",
        b"4 a=\nrest",
        b"5 =b\n",
        b"-5 a=b\n",
        b"99999999999999999999 a=b\n",
        b"8 a\0c=b\n",
        b"10 path=\0\n",
        b"13 mtime=1.x\n",
    ];
    for records in wrong {
        let mut archive = Archive::default();
        archive.add("x", b'x', records).file("f", b"");
        assert!(read(&archive.end()).is_err(), "{}", String::from_utf8_lossy(records));
    }
    // unknown keys, an empty value, a newline in a value, zeros at the end
    let mut records =
        [record("comment", b"a\nb"), record("path", b""), record("vendor.x", b"\0")].concat();
    records.extend([0; 7]);
    let mut archive = Archive::default();
    archive.add("x", b'x', &records).file("f", b"");
    assert_eq!(read(&archive.end()).unwrap()[0].path, b"f");
    for (text, secs, nanos) in
        [("1", 1, 0), ("-1.5", -2, 500_000_000), ("-0.25", -1, 750_000_000), ("2.0000000019", 2, 1)]
    {
        let mut archive = Archive::default();
        archive.pax(b'x', &[("mtime", text.as_bytes())]).file("f", b"");
        assert_eq!(read(&archive.end()).unwrap()[0].mtime, Timestamp { secs, nanos }, "{text}");
    }
}

#[test]
fn attributes_come_raw_or_encoded() {
    let mut archive = Archive::default();
    archive.pax(
        b'x',
        &[
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n="),
            ("LIBARCHIVE.xattr.user.%C3%A4%25", b"AAEC/w"),
            ("LIBARCHIVE.xattr.user.padded", b"AAE="),
            ("LIBARCHIVE.xattr.security.capability", b"b3RoZXI"),
        ],
    );
    archive.file("f", b"").file("g", b"");
    let entries = read(&archive.end()).unwrap();
    let expected: [(&[u8], &[u8]); 3] = [
        (b"security.capability", b"\x01\0\0\x02\n="),
        (b"user.padded", b"\0\x01"),
        ("user.ä%".as_bytes(), b"\0\x01\x02\xff"),
    ];
    let seen: Vec<_> = entries[0].xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    assert_eq!(seen, expected);
    assert!(entries[1].xattrs.is_empty(), "they are of one entry");
}

#[test]
fn global_headers_count_if_wanted() {
    let mut archive = Archive::default();
    archive.pax(b'g', &[("mtime", b"77"), ("uid", b"5"), ("path", b"nowhere")]);
    archive.file("a", b"").pax(b'x', &[("uid", b"6")]).file("b", b"");
    let bytes = archive.end();
    let seen = |reader| {
        let (entries, _) = read_by(reader, &bytes, 99).unwrap();
        entries.into_iter().map(|e| (e.path, e.uid, e.mtime.secs)).collect::<Vec<_>>()
    };
    let a = || b"a".to_vec();
    let b = || b"b".to_vec();
    let old = 0o14_000_000_000;
    assert_eq!(seen(TarReader::default()), [(a(), 1000, old), (b(), 6, old)]);
    assert_eq!(seen(TarReader::with_global_headers()), [(a(), 5, 77), (b(), 6, 77)]);
}

#[test]
fn old_headers() {
    // seventh edition: no magic, a directory by its slash, a signed checksum
    let mut archive = Archive::default();
    for (path, kind) in [(&b"d/"[..], 0), (b"f\xff", 0), (b"f/", b'0')] {
        let mut block = Block::new(path, kind, 0);
        block.set(257, &[0; 8]);
        let mut block = block.done();
        if path.contains(&0xff) {
            block[148..156].copy_from_slice(b"        ");
            let sum: i32 = block.iter().map(|byte| i32::from(byte.cast_signed())).sum();
            block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        }
        archive.0.extend(block);
    }
    let entries = read(&archive.end()).unwrap();
    assert_eq!(entries[0].kind, EntryKind::Directory);
    assert!(matches!(entries[1].kind, EntryKind::File(_)));
    assert!(matches!(entries[2].kind, EntryKind::File(_)));
    // star's prefix is shorter; GNU has times where others have the prefix, some Go had a prefix there
    let mut star = Block::new(b"f", b'0', 0);
    star.set(345, b"pre").set(476, b"14000000000").set(508, b"tar\0");
    let mut gnu = Block::new(b"g", b'0', 0).gnu();
    gnu.set(345, b"14000000000\0");
    let mut go = Block::new(b"h", b'0', 0).gnu();
    go.set(345, b"some/dir");
    let mut archive = Archive::default();
    archive.block(star, b"").block(gnu, b"").block(go, b"");
    let paths: Vec<_> = read(&archive.end()).unwrap().into_iter().map(|e| e.path).collect();
    assert_eq!(paths, [&b"pre/f"[..], b"g", b"some/dir/h"]);
}

#[test]
fn types_that_have_no_data_have_none() {
    let mut archive = Archive::default();
    for kind in *b"123456" {
        archive.block(Block::new(b"n", kind, 5000).link(b"t"), b"");
    }
    archive.file("last", b"x");
    assert_eq!(read(&archive.end()).unwrap().len(), 7);
    let mut archive = Archive::default();
    archive.add("volume", b'V', b"");
    assert_eq!(fault(&archive.0), Fault::Type(b'V'));
}

/// An old GNU sparse file of `real` bytes with these parts.
fn old_sparse(real: u64, parts: &[(u64, u64)], data: &[u8]) -> Archive {
    let mut block = Block::new(b"s", b'S', data.len() as u64).gnu();
    let field = |n: u64| format!("{n:011o}\0");
    for (n, (offset, len)) in parts.iter().take(4).enumerate() {
        block.set(386 + 24 * n, field(*offset).as_bytes());
        block.set(398 + 24 * n, field(*len).as_bytes());
    }
    block.set(483, field(real).as_bytes());
    block.0[482] = u8::from(parts.len() > 4);
    let mut archive = Archive::default();
    archive.0.extend(block.done());
    let more = parts.get(4..).unwrap_or_default();
    for (n, group) in more.chunks(21).enumerate() {
        let mut block = [0; 512];
        for (n, (offset, len)) in group.iter().enumerate() {
            block[24 * n..24 * n + 12].copy_from_slice(field(*offset).as_bytes());
            block[24 * n + 12..24 * n + 24].copy_from_slice(field(*len).as_bytes());
        }
        block[504] = u8::from((n + 1) * 21 < more.len());
        archive.0.extend(block);
    }
    archive.0.extend(data);
    archive.0.resize(archive.0.len().next_multiple_of(512), 0);
    archive
}

#[test]
fn sparse_maps_are_checked() {
    let parts: Vec<_> = (0..60).map(|n| (n * 8192, 512)).collect();
    let archive = old_sparse(1 << 20, &parts, &[7; 60 * 512]).end();
    let entries = read(&archive).unwrap();
    let EntryKind::File(data) = &entries[0].kind else { panic!("a file") };
    assert_eq!((data.size, data.pieces.len()), (1 << 20, 60));
    let at = 512 * 4;
    assert_eq!(data.pieces[59], Piece { offset: 59 * 8192, at: at + 59 * 512, len: 512 });
    assert_eq!(content(&archive, data).iter().filter(|b| **b == 7).count(), 60 * 512);

    let wrong = [
        old_sparse(1000, &[(0, 512), (256, 512)], &[7; 1024]),
        old_sparse(1000, &[(512, 512)], &[7; 512]),
        old_sparse(4096, &[(0, 512)], &[7; 1024]),
        old_sparse(4096, &[(0, 1024)], &[7; 512]),
        old_sparse(4096, &[(2048, 512), (0, 512)], &[7; 1024]),
    ];
    for archive in wrong {
        assert!(matches!(fault(&archive.end()), Fault::Sparse(_)));
    }
    // what would show in a hole behind the last part
    let mut dirty = old_sparse(4096, &[(0, 100)], &[7; 100]).0;
    assert!(read(&dirty).is_ok());
    dirty[512 + 100] = 1;
    assert!(matches!(fault(&dirty), Fault::Sparse(_)));
}

#[test]
fn a_sparse_map_in_the_data_ends_there() {
    let archive = |map: &str, stored: u64| {
        let mut data = map.as_bytes().to_vec();
        data.resize(data.len().next_multiple_of(512), 0);
        data.resize(data.len() + stored as usize, 9);
        let mut archive = Archive::default();
        let keys: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real/name"),
            ("GNU.sparse.realsize", b"100000"),
        ];
        archive.pax(b'x', &keys).file("GNUSparseFile.1/name", &data);
        archive.end()
    };
    let good = archive("2\n0\n512\n99328\n672\n", 512 + 672);
    let entries = read(&good).unwrap();
    let EntryKind::File(data) = &entries[0].kind else { panic!("a file") };
    assert_eq!(
        (&entries[0].path[..], data.size, data.pieces.len()),
        (&b"real/name"[..], 100_000, 2)
    );
    let bytes = content(&good, data);
    assert!(bytes[..512].iter().chain(&bytes[99_328..]).all(|b| *b == 9));
    assert!(bytes[512..99_328].iter().all(|b| *b == 0));
    for map in [
        "x\n",
        "2\n0\n512\n",
        "-1\n",
        "70000\n0\n",
        "1\n0\n-5\n",
        "1\n0\n5 5\n",
        "",
        "9".repeat(30).as_str(),
    ] {
        assert!(matches!(fault(&archive(map, 512)), Fault::Sparse(_)), "{map:?}");
    }
}
