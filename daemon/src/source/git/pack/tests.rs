//! Packs made by hand: every kind of entry in every order, and every kind of damage.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use proptest::prelude::*;

use super::*;
use crate::source::SPOOL_FROM;
use crate::source::git::tests::Collect;

/// How an object goes into a pack.
#[derive(Clone)]
enum Entry<'a> {
    Blob(&'a [u8]),
    Tree(&'a [u8]),
    /// A delta to the entry of this index.
    Ofs(usize, Vec<u8>),
    Ref(ObjectId, Vec<u8>),
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn entry_header(kind: u8, mut size: usize) -> Vec<u8> {
    let mut bytes = vec![kind << 4 | (size & 15) as u8];
    size >>= 4;
    while size > 0 {
        *bytes.last_mut().unwrap() |= 0x80;
        bytes.push((size & 0x7f) as u8);
        size >>= 7;
    }
    bytes
}

fn offset(mut back: u64) -> Vec<u8> {
    let mut bytes = vec![(back & 0x7f) as u8];
    while back >= 0x80 {
        back = (back >> 7) - 1;
        bytes.insert(0, 0x80 | (back & 0x7f) as u8);
    }
    bytes
}

fn varint(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}

/// Copies `keep` bytes of the base, then adds `more`.
fn delta(base: usize, keep: usize, more: &[u8]) -> Vec<u8> {
    let mut bytes = [varint(base), varint(keep + more.len())].concat();
    let mut at = 0;
    while at < keep {
        let n = (keep - at).min(0xff_ffff);
        bytes.push(0xff);
        bytes.extend_from_slice(&(at as u32).to_le_bytes());
        bytes.extend_from_slice(&(n as u32).to_le_bytes()[..3]);
        at += n;
    }
    for chunk in more.chunks(127) {
        bytes.push(chunk.len() as u8);
        bytes.extend_from_slice(chunk);
    }
    bytes
}

fn pack(hash: HashKind, entries: &[Entry<'_>]) -> Vec<u8> {
    let mut pack = b"PACK\0\0\0\x02".to_vec();
    pack.extend_from_slice(&(entries.len() as u32).to_be_bytes());
    let mut starts = Vec::new();
    for entry in entries {
        starts.push(pack.len() as u64);
        let content = match entry {
            Entry::Blob(content) => {
                pack.extend(entry_header(3, content.len()));
                content
            }
            Entry::Tree(content) => {
                pack.extend(entry_header(2, content.len()));
                content
            }
            Entry::Ofs(base, delta) => {
                let back = pack.len() as u64 - starts[*base];
                pack.extend(entry_header(6, delta.len()));
                pack.extend(offset(back));
                &delta[..]
            }
            Entry::Ref(id, delta) => {
                pack.extend(entry_header(7, delta.len()));
                pack.extend_from_slice(id.as_bytes());
                &delta[..]
            }
        };
        pack.extend(zlib(content));
    }
    seal(hash, pack)
}

fn seal(hash: HashKind, mut pack: Vec<u8>) -> Vec<u8> {
    let mut hasher = hash.hasher();
    hasher.update(&pack);
    pack.extend_from_slice(hasher.finish().as_bytes());
    pack
}

fn parse(
    hash: HashKind,
    wanted: &[ObjectId],
    bytes: &[u8],
    chunk: usize,
) -> (Collect, Result<Option<Content>, FetchError>) {
    let mut sink = Collect::default();
    let mut parser = Parser::new(hash, wanted, false);
    for chunk in bytes.chunks(chunk.max(1)) {
        parser.push(Bytes::copy_from_slice(chunk));
        loop {
            match parser.step(&mut sink) {
                Ok(Step::More) => {}
                Ok(Step::Hungry) => break,
                Err(e) => return (sink, Err(e)),
            }
        }
    }
    (sink, parser.finish())
}

fn blob(content: &[u8]) -> ObjectId {
    ObjectId::of_blob(HashKind::Sha1, content)
}

/// A parse that must give exactly these blobs.
fn gives(contents: &[&[u8]], entries: &[Entry<'_>]) {
    let wanted: Vec<_> = contents.iter().map(|content| blob(content)).collect();
    let bytes = pack(HashKind::Sha1, entries);
    for chunk in [1, 7, 4096, usize::MAX] {
        let (sink, result) = parse(HashKind::Sha1, &wanted, &bytes, chunk);
        result.unwrap();
        assert_eq!(sink.objects.len(), contents.len());
        for content in contents {
            assert_eq!(sink.objects[&blob(content)], *content);
        }
    }
}

fn wrong_with(entries: &[Entry<'_>], wanted: &[&[u8]], words: &str) {
    let wanted: Vec<_> = wanted.iter().map(|content| blob(content)).collect();
    let bytes = pack(HashKind::Sha1, entries);
    let (_, result) = parse(HashKind::Sha1, &wanted, &bytes, 1000);
    match result {
        Err(FetchError::Wrong { message }) => assert!(message.contains(words), "{message}"),
        other => panic!("{words:?} expected, but {other:?}"),
    }
}

#[test]
fn whole_objects_and_deltas() {
    let (a, b, c) = (&b"some content"[..], &b"some"[..], &b"some more"[..]);
    gives(&[a, b""], &[Entry::Blob(a), Entry::Blob(b"")]);
    // the base itself is not wanted
    gives(&[c], &[Entry::Blob(a), Entry::Ofs(0, delta(12, 4, b" more"))]);
    // a chain, and a base further back
    let chain = [
        Entry::Blob(a),
        Entry::Ofs(0, delta(12, 4, b"")),
        Entry::Ofs(1, delta(4, 4, b" more")),
        Entry::Ofs(0, delta(12, 12, b"!")),
    ];
    gives(&[a, b, c, b"some content!"], &chain);
    // by id: base before, base after, a chain that hangs on a base that comes last
    gives(&[a, b], &[Entry::Blob(a), Entry::Ref(blob(a), delta(12, 4, b""))]);
    gives(&[a, b], &[Entry::Ref(blob(a), delta(12, 4, b"")), Entry::Blob(a)]);
    let backwards = [
        Entry::Ofs(0, delta(0, 0, b"")),
        Entry::Ref(blob(b), delta(4, 4, b" more")),
        Entry::Ref(blob(a), delta(12, 4, b"")),
        Entry::Ofs(1, delta(9, 9, b" and more")),
        Entry::Blob(a),
    ];
    gives(
        &[a, b, c, b"some more and more"],
        &backwards[1..].iter().cloned().map(shift).collect::<Vec<_>>(),
    );
    // the same object twice is given once
    gives(&[a], &[Entry::Blob(a), Entry::Blob(a)]);
}

/// As in a pack of which the first entry was left out.
fn shift(entry: Entry<'_>) -> Entry<'_> {
    match entry {
        Entry::Ofs(base, delta) => Entry::Ofs(base - 1, delta),
        other => other,
    }
}

#[test]
fn objects_that_were_not_asked_for_are_dropped() {
    let bytes = pack(HashKind::Sha1, &[Entry::Blob(b"one"), Entry::Tree(b""), Entry::Blob(b"two")]);
    let (sink, result) = parse(HashKind::Sha1, &[blob(b"two")], &bytes, 5);
    result.unwrap();
    assert_eq!(sink.objects.keys().collect::<Vec<_>>(), [&blob(b"two")]);
}

#[test]
fn sha256() {
    let hash = HashKind::Sha256;
    let id = |content| ObjectId::of_blob(hash, content);
    let entries =
        [Entry::Blob(b"some content"), Entry::Ref(id(b"some content"), delta(12, 4, b""))];
    let bytes = pack(hash, &entries);
    let (sink, result) = parse(hash, &[id(b"some")], &bytes, 3);
    result.unwrap();
    assert_eq!(sink.objects[&id(b"some")], b"some");
}

#[test]
fn damage_is_named() {
    let a = &b"some content"[..];
    wrong_with(&[Entry::Blob(a)], &[b"other"], "which was asked for");
    wrong_with(&[], &[a], "which was asked for");
    wrong_with(&[Entry::Ref(blob(b"?"), delta(1, 1, b""))], &[a], "base is not in the pack");
    wrong_with(&[Entry::Blob(a), Entry::Ofs(0, delta(13, 4, b""))], &[a], "base of another size");
    wrong_with(&[Entry::Blob(a), Entry::Ofs(0, delta(12, 13, b""))], &[a], "outside its base");
    let reserved = [varint(12), varint(1), vec![0]].concat();
    wrong_with(&[Entry::Blob(a), Entry::Ofs(0, reserved)], &[a], "reserved");
    let cut = [varint(12), varint(9), vec![9, 1]].concat();
    wrong_with(&[Entry::Blob(a), Entry::Ofs(0, cut)], &[a], "cut short");
    let long = [varint(12), varint(1), vec![2, 1, 1]].concat();
    wrong_with(&[Entry::Blob(a), Entry::Ofs(0, long)], &[a], "longer");
    let short = [varint(12), varint(3), vec![2, 1, 1]].concat();
    wrong_with(&[Entry::Blob(a), Entry::Ofs(0, short)], &[a], "shorter");
    // an object with a wanted id that is no blob
    let tree = {
        let mut hasher = HashKind::Sha1.hasher();
        hasher.update(b"tree 0\0");
        hasher.finish()
    };
    let (_, result) = parse(HashKind::Sha1, &[tree], &pack(HashKind::Sha1, &[Entry::Tree(b"")]), 9);
    assert!(result.unwrap_err().to_string().contains("is a tree"));
    // more after the end
    let mut more = pack(HashKind::Sha1, &[Entry::Blob(a)]);
    more.push(0);
    let (_, result) = parse(HashKind::Sha1, &[blob(a)], &more, 9);
    assert!(result.unwrap_err().to_string().contains("after the end"));
}

#[test]
fn a_zip_bomb_is_stopped_at_the_declared_size() {
    for declared in [0, 10, SPOOL_FROM as usize + 1] {
        let mut bytes = b"PACK\0\0\0\x02\0\0\0\x01".to_vec();
        bytes.extend(entry_header(3, declared));
        bytes.extend(zlib(&vec![0; SPOOL_FROM as usize + 2]));
        let bytes = seal(HashKind::Sha1, bytes);
        let (sink, result) = parse(HashKind::Sha1, &[blob(b"")], &bytes, 4096);
        assert!(matches!(result, Err(FetchError::Wrong { .. })), "{result:?}");
        assert!(sink.objects.is_empty());
    }
}

#[test]
fn a_delta_bomb_is_stopped() {
    // each result is 4 MiB from a few bytes, again and again
    let base = vec![7; 1 << 20];
    let mut bomb = [varint(base.len()), varint(4 << 20)].concat();
    bomb.extend([0xc0, 0x10].repeat(4));
    let mut entries = vec![Entry::Blob(&base[..])];
    entries.extend((0..1000).map(|_| Entry::Ofs(0, bomb.clone())));
    wrong_with(&entries, &[b"x"], "far more than it should");
}

#[test]
fn large_objects_and_bases_go_through_spool_files() {
    let mut large = vec![0u8; SPOOL_FROM as usize + 100_000];
    let mut x = 1u32;
    for byte in &mut large {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (x >> 24) as u8;
    }
    let n = large.len();
    let longer = [&large[..], b"!"].concat();
    let twice = [&longer[..n], b"?"].concat();
    let inserts = delta(n + 1, 0, &large);
    let entries = [
        Entry::Blob(&large),
        Entry::Ofs(0, delta(n, n, b"!")),
        Entry::Ofs(1, delta(n + 1, n, b"?")),
        // a delta that is too large for memory itself
        Entry::Ofs(1, inserts),
        Entry::Ofs(0, delta(n, 5, b"")),
    ];
    let bytes = pack(HashKind::Sha1, &entries);
    let wanted = [blob(&longer), blob(&twice), blob(&large), blob(&large[..5])];
    let (sink, result) = parse(HashKind::Sha1, &wanted, &bytes, 65_515);
    result.unwrap();
    assert!(sink.objects[&wanted[0]] == longer);
    assert!(sink.objects[&wanted[1]] == twice);
    assert!(sink.objects[&wanted[2]] == large);
    assert_eq!(sink.objects[&wanted[3]], large[..5]);
    assert_eq!(sink.spooled, 3);
    assert!(sink.spools > 3, "the raw pack needs a file too");
}

#[test]
fn every_truncation_is_an_error() {
    let a = &b"some content"[..];
    let entries = [
        Entry::Ref(blob(a), delta(12, 4, b" more")),
        Entry::Blob(a),
        Entry::Ofs(1, delta(12, 12, b"!")),
    ];
    let bytes = pack(HashKind::Sha1, &entries);
    let wanted = [blob(a), blob(b"some more"), blob(b"some content!")];
    for end in 0..bytes.len() {
        let (sink, result) = parse(HashKind::Sha1, &wanted, &bytes[..end], 11);
        assert!(matches!(result, Err(FetchError::Retry { .. })), "{end}: {result:?}");
        right(&sink, &wanted);
    }
    assert!(parse(HashKind::Sha1, &wanted, &bytes, 11).1.is_ok());
}

/// Whatever came of it: nothing but what was asked for, and that only right.
fn right(sink: &Collect, wanted: &[ObjectId]) {
    for (id, content) in &sink.objects {
        assert!(wanted.contains(id));
        assert_eq!(*id, ObjectId::of_blob(id.kind(), content));
    }
}

#[test]
fn the_raw_pack_is_kept_to_the_byte() {
    let bytes = pack(HashKind::Sha1, &[Entry::Blob(b"one"), Entry::Blob(b"two")]);
    let mut parser = Parser::new(HashKind::Sha1, &[blob(b"two")], true);
    let mut sink = Collect::default();
    parser.push(bytes.clone().into());
    while parser.step(&mut sink).unwrap() == Step::More {}
    match parser.finish().unwrap() {
        Some(Content::Memory(raw)) => assert_eq!(raw, bytes),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sink_that_fails_ends_it() {
    struct Full;
    impl Sink for Full {
        fn object(&mut self, _: ObjectId, _: Content) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn spool(&mut self) -> io::Result<File> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn received(&mut self, _: u64) {}
    }
    let large = vec![0; SPOOL_FROM as usize + 1];
    for content in [&b"small"[..], &large] {
        let mut parser = Parser::new(HashKind::Sha1, &[blob(content)], false);
        parser.push(pack(HashKind::Sha1, &[Entry::Blob(content)]).into());
        let error = loop {
            match parser.step(&mut Full) {
                Ok(step) => assert_eq!(step, Step::More, "it must fail"),
                Err(e) => break e,
            }
        };
        assert!(matches!(error, FetchError::Sink(e) if e.kind() == io::ErrorKind::StorageFull));
    }
}

/// A pack with deltas of both kinds, and what it holds.
fn sample() -> (Vec<u8>, HashMap<ObjectId, Vec<u8>>) {
    let base: Vec<u8> = (0..2000u32).flat_map(|i| i.to_le_bytes()).collect();
    let mut contents = vec![base.clone()];
    let mut entries = vec![Entry::Blob(&base)];
    for i in 1..8usize {
        let more = format!("version {i}").into_bytes();
        let (from, keep) = (contents[i - 1].len(), 5000 - 500 * i);
        contents.push([&contents[i - 1][..keep], &more].concat());
        let delta = delta(from, keep, &more);
        entries.push(match i % 2 {
            0 => Entry::Ofs(i - 1, delta),
            _ => Entry::Ref(blob(&contents[i - 1]), delta),
        });
    }
    let bytes = pack(HashKind::Sha1, &entries);
    (bytes, contents.into_iter().map(|content| (blob(&content), content)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes: Vec<u8>, count in 0u32..20, chunk in 1usize..100) {
        let wanted = [blob(b"")];
        let _ = parse(HashKind::Sha1, &wanted, &bytes, chunk);
        let mut headed = b"PACK\0\0\0\x02".to_vec();
        headed.extend_from_slice(&count.to_be_bytes());
        headed.extend_from_slice(&bytes);
        let _ = parse(HashKind::Sha256, &wanted, &headed, chunk);
        right(&parse(HashKind::Sha1, &wanted, &headed, chunk).0, &wanted);
    }

    #[test]
    fn arbitrary_deltas_never_panic(base: Vec<u8>, mut script: Vec<u8>, sizes: bool) {
        if sizes {
            script = [varint(base.len()), varint(script.len()), script].concat();
        }
        let entries = [Entry::Blob(&base), Entry::Ofs(0, script)];
        let wanted = [blob(&base)];
        let (sink, _) = parse(HashKind::Sha1, &wanted, &pack(HashKind::Sha1, &entries), 4096);
        prop_assert_eq!(&sink.objects[&wanted[0]], &base);
    }

    #[test]
    fn mutated_packs_give_nothing_wrong(
        places: Vec<(prop::sample::Index, u8)>,
        cut in prop::option::of(any::<prop::sample::Index>()),
        resealed: bool,
        chunk in 1usize..500,
    ) {
        let (mut bytes, contents) = sample();
        for (place, byte) in places {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if resealed && bytes.len() > 20 {
            bytes.truncate(bytes.len() - 20);
            bytes = seal(HashKind::Sha1, bytes);
        }
        let wanted: Vec<_> = contents.keys().copied().collect();
        let (sink, result) = parse(HashKind::Sha1, &wanted, &bytes, chunk);
        right(&sink, &wanted);
        if result.is_ok() {
            prop_assert_eq!(sink.objects.len(), wanted.len());
        }
    }
}

/// `cargo test --release … -- --ignored --nocapture speed_of_parsing`
#[test]
#[ignore = "a measurement"]
fn speed_of_parsing() {
    let text: Vec<u8> =
        (0..5000u32).flat_map(|i| format!("line {} of it\n", i * 7919).into_bytes()).collect();
    let contents: Vec<Vec<u8>> =
        (0..20_000).map(|i| [&text[i..i + 6000], i.to_string().as_bytes()].concat()).collect();
    let entries: Vec<_> = contents.iter().map(|content| Entry::Blob(content)).collect();
    let bytes = pack(HashKind::Sha1, &entries);
    let wanted: Vec<_> = contents.iter().map(|content| blob(content)).collect();
    let start = std::time::Instant::now();
    let (sink, result) = parse(HashKind::Sha1, &wanted, &bytes, 65_515);
    result.unwrap();
    let secs = start.elapsed().as_secs_f64();
    let content: usize = sink.objects.values().map(Vec::len).sum();
    println!(
        "{} objects, {:.1} MB packed, {:.1} MB content: {:.0} MB/s of content, {:.0} objects/s",
        wanted.len(),
        bytes.len() as f64 / 1e6,
        content as f64 / 1e6,
        content as f64 / 1e6 / secs,
        wanted.len() as f64 / secs
    );
}
