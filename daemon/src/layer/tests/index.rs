//! Indexes: every span of every kind of layer gives its bytes again.

use std::sync::OnceLock;

use fs_err as fs;

use super::support::{index_by, noise, run, scratch};
use crate::layer::digest::Digest;
use crate::layer::index::{Head, Index, IndexError, VERSION};
use crate::layer::indexer::{Compression, Indexer, IndexerError};
use crate::layer::span::{Codec, Decoder, SpanError};
use crate::range::ByteRange;

/// A layer's plain bytes: text, zeros, and what does not compress.
fn plain() -> Vec<u8> {
    let mut bytes = noise(3_000_000, 1);
    bytes.resize(4_500_000, 0);
    bytes.extend((0..700_000u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8));
    bytes.extend(noise(1_000_003, 2));
    bytes
}

/// Makes compressed forms of [`plain`] with the programs that are there.
fn layers() -> &'static [(&'static str, Vec<u8>)] {
    static LAYERS: OnceLock<Vec<(&str, Vec<u8>)>> = OnceLock::new();
    LAYERS.get_or_init(make_layers)
}

fn make_layers() -> Vec<(&'static str, Vec<u8>)> {
    let dir = scratch();
    fs::write(dir.path().join("p"), plain()).unwrap();
    let make = |script: &str| {
        run(dir.path(), "sh", &["-c", &format!("{script} >out")]);
        fs::read(dir.path().join("out")).unwrap()
    };
    const GZIP: &str = r#"python3 -c "
import gzip, sys, zlib
data = open('p', 'rb').read()
def member(piece, level=6, strategy=0):
    c = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
    return c.compress(piece) + c.flush()
out = sys.stdout.buffer
kind = sys.argv[1]
if kind == 'members':
    for n in range(0, len(data), 70000): out.write(member(data[n:n + 70000]))
    out.write(member(b'') * 3)
elif kind == 'mixed':
    out.write(member(b'') + member(data[:2500000]) + member(data[2500000:2500001]) + member(data[2500001:], 1))
    out.write(b'\0' * 1000)
elif kind == 'fixed': out.write(member(data, 6, 4))
elif kind == 'huffman': out.write(member(data, 6, 2))
elif kind == 'flushed':
    c = zlib.compressobj(6, zlib.DEFLATED, 31)
    for n in range(0, len(data), 50000):
        out.write(c.compress(data[n:n + 50000]) + c.flush((zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH)[n // 50000 % 2]))
    out.write(c.flush())
elif kind == 'header':
    # extra field, name, comment and checksum of the header
    head = bytes([0x1f, 0x8b, 8, 30]) + b'\0' * 6 + b'\3\0abc' + b'name\0' + b'comment\0'
    out.write(head + (zlib.crc32(head) & 0xffff).to_bytes(2, 'little') + member(data)[10:])
elif kind == 'zero': out.write(member(data, 0))
""#;
    let mut layers = vec![
        ("plain", plain()),
        ("gzip -1", make("gzip -1 -c p")),
        ("gzip -9 with name", make("gzip -9 -N -c p")),
        ("zstd, one frame", make("zstd -q -c p")),
        (
            "zstd, frames",
            make(
                "for n in 0 1 2 3 4 5 6; do tail -c +$((n * 1000000 + 1)) p | head -c 1000000 | zstd -q -c; printf 'P*M\\030\\003\\000\\000\\000xyz'; done",
            ),
        ),
        ("zstd, skippable first", make("printf 'P*M\\030\\003\\000\\000\\000xyz'; zstd -q -c p")),
        ("zstd, small frames", make("split -b 20000 p s.; for s in s.*; do zstd -q -c $s; done")),
    ];
    for kind in ["members", "mixed", "fixed", "huffman", "flushed", "header", "zero"] {
        layers.push((kind, make(&format!("{GZIP} {kind}"))));
    }
    layers
}

/// Decodes every span by itself.
fn check_spans(name: &str, index: &Index, layer: &[u8], plain: &[u8]) {
    let mut at = 0;
    for (n, span) in index.spans().iter().enumerate() {
        assert_eq!(span.uncompressed.offset(), at, "{name}");
        at = span.uncompressed.end();
        let expected = &plain[span.uncompressed.offset() as usize..at as usize];
        let compressed = &layer[span.compressed.offset() as usize..span.compressed.end() as usize];
        let window = index.window(n).unwrap();
        // the same bytes are in the segment before it, and do as well
        let start = span.uncompressed.offset() as usize;
        let before = &plain[start - span.window_len()..start];
        for window in [&window, before] {
            let decoded = span.decode(compressed, window);
            assert!(decoded.as_deref() == Ok(expected), "{name}: span {n}, {:?}", span);
        }
    }
    assert_eq!(at, plain.len() as u64, "{name}");
}

#[test]
fn every_span_of_every_kind_of_layer() {
    let plain = plain();
    for (name, layer) in layers() {
        for span in [64 << 10, 1 << 20] {
            let (index, bytes) = index_by(Indexer::new(span), layer, 50_000)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(bytes == plain, "{name}: what comes out");
            assert_eq!(index.diff_id(), Digest::of(&plain), "{name}");
            assert_eq!(index.digest(), Digest::of(layer), "{name}");
            assert_eq!(index.uncompressed_len(), plain.len() as u64);
            assert_eq!(index.compressed_len(), layer.len() as u64);
            check_spans(name, &index, layer, &plain);
            let count = index.spans().len() as u64;
            match *name {
                "zstd, one frame" | "zstd, skippable first" => assert_eq!(count, 1),
                // frames of 1,000,000 bytes
                "zstd, frames" => assert_eq!(count, if span < 1_000_000 { 7 } else { 4 }),
                _ => assert!(count >= plain.len() as u64 / span / 8, "{name}: {count}"),
            }
            // as a file, and again
            let mut file = Vec::new();
            index.write(&mut file).unwrap();
            assert_eq!(Index::parse(&file).as_ref(), Ok(&index), "{name}");
            // without the windows
            let (head, windows) = file.split_at(index.windows_at() as usize);
            assert!(windows == index.windows());
            let known = Head::parse(head).unwrap();
            assert_eq!(known.windows_at(), head.len() as u64);
            let blob = known.windows.unwrap();
            assert_eq!((blob.digest, blob.len), (Digest::of(windows), windows.len() as u64));
            assert_eq!(index.windows_blob(), (blob.len > 0).then_some(blob));
            let read = Index::read(&file[..]).unwrap().unwrap();
            assert_eq!(Index::parse(head).as_ref(), Ok(&read), "{name}");
            assert!(read.windows().is_empty() && read.spans() == index.spans());
            let mut again = Vec::new();
            read.write_head(&mut again).unwrap();
            assert!(again == head, "{name}");
            for n in 0..read.spans().len() {
                let at = read.frames_at(n..n + 1);
                let frame = &windows[at.offset() as usize..at.end() as usize];
                assert_eq!(read.unpack_window(n, frame), index.window(n), "{name}");
                assert_eq!(read.window(n).is_err(), !frame.is_empty());
            }
            let count = read.spans().len();
            let all: u64 = (0..count).map(|n| read.frames_at(n..n + 1).len()).sum();
            assert_eq!((read.frames_at(0..count).len(), all), (blob.len, blob.len));
            assert!(read.frames_at(0..count + 1).is_empty() && read.frames_at(1..1).is_empty());
        }
    }
}

#[test]
fn the_pieces_that_come_make_no_difference() {
    for (name, layer) in layers() {
        let whole = index_by(Indexer::new(256 << 10), layer, layer.len()).unwrap();
        for chunk in [977, 1_000_001] {
            let pieces = index_by(Indexer::new(256 << 10), layer, chunk).unwrap();
            assert!(pieces == whole, "{name} in pieces of {chunk}");
        }
    }
    let small = run(std::path::Path::new("/"), "sh", &["-c", "printf hello | gzip -c"]);
    let (index, bytes) = index_by(Indexer::default(), &small, 1).unwrap();
    assert_eq!((&bytes[..], index.compression()), (&b"hello"[..], Compression::Gzip));
    check_spans("one byte each", &index, &small, b"hello");
}

#[test]
fn the_spans_for_a_range() {
    let plain = plain();
    let (index, _) = index_by(Indexer::new(1 << 20), &plain, 1 << 16).unwrap();
    assert_eq!(index.spans_for(ByteRange::new(0, 1)), 0..1);
    assert_eq!(index.spans_for(ByteRange::new((1 << 20) - 1, 2)), 0..2);
    assert_eq!(index.spans_for(ByteRange::new(1 << 20, 1)), 1..2);
    assert_eq!(index.spans_for(ByteRange::new(0, 0)), 0..0);
    assert_eq!(index.spans_for(ByteRange::new(0, u64::MAX)), 0..index.spans().len());
    assert_eq!(index.spans_for(ByteRange::new(1 << 40, 4096)), 0..0);
    let gzip = &layers()[1].1;
    let (index, _) = index_by(Indexer::new(64 << 10), gzip, 1 << 16).unwrap();
    for n in 0..1700 {
        let range = ByteRange::new(n * 4096, 4096).clamp(index.uncompressed_len());
        if range.is_empty() {
            break;
        }
        let spans = &index.spans()[index.spans_for(range)];
        let overlaps = index.spans().iter().filter(|span| span.uncompressed.overlaps(range));
        assert_eq!(spans.len(), overlaps.count(), "{range}");
        assert!(spans[0].uncompressed.offset() <= range.offset());
        assert!(spans[spans.len() - 1].uncompressed.end() >= range.end());
    }
}

#[test]
fn a_layer_cut_short_is_refused() {
    for (name, layer) in layers() {
        if *name == "plain" {
            continue;
        }
        for len in [1, 5, 11, layer.len() / 3, layer.len() - 2000] {
            let cut = index_by(Indexer::default(), &layer[..len], 4096);
            // between two frames or members nothing is missing
            match cut {
                Err(error) => {
                    assert!(matches!(error, IndexerError::Truncated(_)), "{name}, {len}: {error}");
                }
                Ok((_, bytes)) => assert!(len < 4 || bytes.len() < plain().len(), "{name}, {len}"),
            }
        }
    }
    let garbage = [&layers()[1].1[..], b"garbage"].concat();
    assert!(matches!(
        index_by(Indexer::default(), &garbage, 4096),
        Err(IndexerError::Damaged { what: "a gzip header is missing", .. })
    ));
    let (empty, bytes) = index_by(Indexer::default(), b"", 1).unwrap();
    assert_eq!((empty.spans().len(), bytes.len()), (0, 0));
    let mut file = Vec::new();
    empty.write(&mut file).unwrap();
    assert_eq!(Index::parse(&file), Ok(empty));
    assert!(Index::read(&file[..]).unwrap().unwrap().windows_blob().is_none());
}

/// The file as programs wrote it that had nothing about the windows in its head.
fn as_version_2(file: &[u8], index: &Index) -> Vec<u8> {
    let records = &file[144..index.windows_at() as usize];
    let mut head = file[..100].to_vec();
    head[8] = 2;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head);
    crc.update(records);
    head.extend_from_slice(&crc.finalize().to_le_bytes());
    [&head, records, index.windows()].concat()
}

#[test]
fn an_index_of_the_version_before() {
    for (name, layer) in layers() {
        let (index, _) = index_by(Indexer::new(256 << 10), layer, 1 << 16).unwrap();
        let mut file = Vec::new();
        index.write(&mut file).unwrap();
        let old = as_version_2(&file, &index);
        let read = Index::parse(&old).unwrap();
        assert!(read.spans() == index.spans() && read.windows() == index.windows(), "{name}");
        let windows_at = read.windows_at() as usize;
        assert!(&old[windows_at..] == index.windows(), "{name}");
        let mut again = Vec::new();
        read.write(&mut again).unwrap();
        assert!(again == file, "{name}: it says what its windows are");
        let head = Index::read(&old[..]).unwrap().unwrap();
        assert_eq!(head.windows_at() as usize, windows_at);
        let needs = !index.windows().is_empty();
        assert_eq!((head.windows_blob(), head.write_head(Vec::new()).is_err()), (None, needs));
        assert!(Index::parse(&old[..old.len() - 1]).is_err(), "{name}");
    }
    let (empty, _) = index_by(Indexer::default(), b"", 1).unwrap();
    let mut file = Vec::new();
    empty.write(&mut file).unwrap();
    let old = as_version_2(&file, &empty);
    assert!(old.len() < 144 && Index::read(&old[..]).unwrap() == Index::parse(&old));
}

#[test]
fn wrong_bytes_never_pass_for_a_span() {
    for (name, layer) in layers() {
        let (index, _) = index_by(Indexer::new(1 << 20), layer, 1 << 16).unwrap();
        let n = index.spans().len() / 2;
        let span = &index.spans()[n];
        let window = index.window(n).unwrap();
        let right = &layer[span.compressed.offset() as usize..span.compressed.end() as usize];
        for step in 0..60 {
            let at = right.len() / 60 * step + step % 7;
            let mut wrong = right.to_vec();
            wrong[at] ^= 1 << (step % 8);
            // bits that nothing depends on (a header's time) give the same bytes
            if let Ok(bytes) = span.decode(&wrong, &window) {
                assert_eq!(Digest::of(&bytes), span.digest, "{name}: byte {at}");
            }
            if step % 20 == 0 {
                assert!(span.decode(&right[..at], &window).is_err(), "{name}: {at} bytes of it");
            }
        }
        assert!(span.decode(&[right, &[0]].concat(), &window).is_err(), "{name}: a byte too much");
        if !window.is_empty() {
            assert!(matches!(span.codec, Codec::Deflate { .. }));
            let other = vec![b'!'; window.len()];
            match span.decode(right, &other) {
                Err(error) => assert_eq!(error, SpanError::Digest(span.uncompressed), "{name}"),
                // where nothing is repeated no window is needed
                Ok(bytes) => {
                    assert!(matches!(*name, "huffman" | "zero"), "{name}");
                    assert_eq!(Digest::of(&bytes), span.digest);
                }
            }
            assert!(span.decode(right, &window[1..]).is_err());
        }
        // in any pieces
        let mut decoder = Decoder::new(span, &window).unwrap();
        let mut bytes = Vec::new();
        for piece in right.chunks(777) {
            let mut sink = |piece: &[u8]| {
                bytes.extend_from_slice(piece);
                Ok::<_, SpanError>(())
            };
            decoder.push(piece, &mut sink).unwrap();
        }
        decoder.finish().unwrap();
        assert!(Ok(bytes) == span.decode(right, &window), "{name}");
    }
}

#[test]
fn a_flipped_bit_of_an_index_is_found() {
    let gzip = &layers()[1].1;
    let (index, _) = index_by(Indexer::new(512 << 10), gzip, 1 << 16).unwrap();
    let mut file = Vec::new();
    index.write(&mut file).unwrap();
    let head_len = index.windows_at() as usize;
    for at in 0..head_len {
        let mut wrong = file.clone();
        wrong[at] ^= 1 << (at % 8);
        assert!(Index::parse(&wrong).is_err(), "byte {at}");
    }
    let spans = index.spans().len();
    assert!(spans > 5);
    for at in (head_len..file.len()).step_by(101) {
        let mut wrong = file.clone();
        wrong[at] ^= 1 << (at % 8);
        let wrong = Index::parse(&wrong).unwrap();
        let bad = (0..spans).filter(|n| wrong.window(*n).is_err()).count();
        assert_eq!(bad, 1, "byte {at}");
    }
    let cut = Index::parse(&file[..file.len() - 1]);
    assert_eq!(cut, Err(IndexError::Damaged("it is cut short")));
    // the rest may have yet to come
    let head = Index::read(&file[..file.len() - 1]).unwrap().unwrap();
    assert!(head.spans() == index.spans());
    let mut newer = file;
    newer[8] = VERSION as u8 + 1;
    let error = Index::parse(&newer).unwrap_err().to_string();
    assert!(error.contains("is of version 4, and this hydrantd knows 2 and 3"), "{error}");
}
