//! Blobs with an index, made here: the index gives the same tree and the same archive as streaming the blob does.

mod blobs;
mod property;

use super::*;
use crate::layer::digest::Hasher;
use crate::layer::index::Head;
use crate::layer::span::{Proof, Span};
use crate::manifest::layer::{Content, Kind, Node, Reader};

use self::blobs::{Blob, archive, estargz, gzip_with_ztoc, zstd_chunked};
pub use self::blobs::{gzip, large_archive};

/// The segment that all spans make, and the archive in it.
pub fn filled(index: &Index, blob: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut segment, mut archive) = (Vec::new(), Vec::new());
    for (number, span) in index.spans().iter().enumerate() {
        let (from, to) = (span.compressed.offset() as usize, span.compressed.end() as usize);
        let bytes = span.decode(&blob[from..to], &index.window(number).unwrap()).unwrap();
        archive.extend_from_slice(&bytes[..span.archived(&bytes).unwrap()]);
        segment.extend_from_slice(&bytes);
    }
    (segment, archive)
}

fn decoded(span: &Span, blob: &[u8]) -> Vec<u8> {
    let (from, to) = (span.compressed.offset() as usize, span.compressed.end() as usize);
    span.decode(&blob[from..to], &[]).unwrap()
}

/// Blobs of each kind, and what their indexes say.
pub fn all() -> Vec<(Vec<u8>, Pinned)> {
    let mut all = Vec::new();
    for chunk in [1000, 1 << 20] {
        let blob = estargz(&archive(), chunk);
        let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
        let read = estargz::read(&blob.bytes[at as usize..], at, blob.toc, &blob.layer());
        all.push((blob.bytes, read.unwrap()));
        let (blob, places) = zstd_chunked(&archive(), chunk);
        let both = places.both(blob.bytes.len() as u64).unwrap();
        let bytes = &blob.bytes[both.offset() as usize..both.end() as usize];
        let read = zstd_chunked::read(bytes, &places, &blob.layer());
        all.push((blob.bytes, read.unwrap()));
    }
    let (blob, ztoc) = gzip_with_ztoc(&large_archive(), false, 0);
    let read = soci::read(&ztoc, blob.toc, None, &blob.layer());
    all.push((blob.bytes, read.unwrap()));
    all
}

/// What a tree shows: for each name what it is, and its content.
fn shown(tree: &Tree, segment: &[u8]) -> Vec<String> {
    let manifest = tree.write(Vec::new(), segment.len() as u64).unwrap();
    let mut reader = Reader::new(&manifest[..]).unwrap();
    let mut shown = Vec::new();
    while let Some((number, entry)) = reader.next_entry().unwrap() {
        let (parent, name) = (entry.parent, String::from_utf8_lossy(&entry.name).into_owned());
        let what = match entry.node {
            Node::Inode(attributes, Kind::File(Content::At { offset, size, .. })) => {
                let content = &segment[offset as usize..(offset + size) as usize];
                format!("{attributes:?} {}", Digest::of(content))
            }
            other => format!("{other:?}"),
        };
        shown.push(format!("{number} in {parent}: {name} {what}"));
    }
    shown
}

fn same(blob: &Blob, pinned: &Pinned) {
    let mut file = Vec::new();
    pinned.index.write(&mut file).unwrap();
    let index = Index::parse(&file).unwrap();
    assert!(index.is_pinned() && Head::parse(&file).unwrap().pinned);
    assert_eq!(index, pinned.index);
    let (segment, found) = filled(&index, &blob.bytes);
    assert_eq!(segment.len() as u64, index.uncompressed_len());
    assert!(found == blob.archive, "the archive is another");
    let truth = crate::layer::tests::tree(&blob.archive).unwrap();
    assert_eq!(shown(&pinned.tree, &segment), shown(&truth, &blob.archive));
}

#[test]
fn an_estargz_layer() {
    for chunk in [1000, 4096, 1 << 20] {
        let blob = estargz(&archive(), chunk);
        let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
        let pinned =
            estargz::read(&blob.bytes[at as usize..], at, blob.toc, &blob.layer()).unwrap();
        same(&blob, &pinned);
        let other = Digest::of(b"other");
        let refused = estargz::read(&blob.bytes[at as usize..], at, other, &blob.layer());
        assert_eq!(refused.unwrap_err(), Unusable::Digest);
    }
    // nothing but directories
    let mut empty = crate::layer::tests::Archive::default();
    let blob = estargz(&empty.dir("a/").dir("b/").end(), 4096);
    let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
    same(&blob, &estargz::read(&blob.bytes[at as usize..], at, blob.toc, &blob.layer()).unwrap());
}

#[test]
fn what_is_to_be_fetched_first() {
    let made = |name: &str| {
        let mut archive = crate::layer::tests::Archive::default();
        archive.file("a", &crate::layer::tests::noise(5000, 1)).file("b", b"x").file(name, &[0xf]);
        archive.file("c", &crate::layer::tests::noise(700, 2)).end()
    };
    let firsts = |archive: &[u8]| {
        let blob = estargz(archive, 4096);
        let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
        let read = estargz::read(&blob.bytes[at as usize..], at, blob.toc, &blob.layer());
        let (blob, places) = zstd_chunked(archive, 4096);
        let both = places.both(blob.bytes.len() as u64).unwrap();
        let bytes = &blob.bytes[both.offset() as usize..both.end() as usize];
        let other = zstd_chunked::read(bytes, &places, &blob.layer());
        [read.unwrap().first, other.unwrap().first]
    };
    // up to the landmark's content: headers of 512 bytes, two files of 10 and 1 blocks
    let first = 3 * 512 + 10 * 512 + 512;
    let [estargz, zstd] = firsts(&made(".prefetch.landmark"));
    assert_eq!(zstd, first);
    assert!((first..2 * first).contains(&estargz), "{estargz}: with room for headers");
    assert_eq!(firsts(&made(".no.prefetch.landmark")), [0; 2]);
    assert_eq!(firsts(&made("d/.prefetch.landmark")), [0; 2]);
}

#[test]
fn headers_that_need_more_room_are_cut() {
    // a comment that no table of contents tells of
    let mut long = crate::layer::tests::Archive::default();
    long.file("a", b"first").pax(b'x', &[("comment", &[b'c'; 50_000])]).file("b", b"second");
    let blob = estargz(&long.end(), 4096);
    let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
    let pinned = estargz::read(&blob.bytes[at as usize..], at, blob.toc, &blob.layer()).unwrap();
    let spans = pinned.index.spans();
    assert_eq!(decoded(&spans[0], &blob.bytes).len() as u64, spans[0].uncompressed.len());
    let cut = decoded(&spans[1], &blob.bytes);
    assert_eq!(cut.len() as u64, spans[1].uncompressed.len());
    assert!(cut.starts_with(b"first") && spans[1].archived(&cut).is_none());
    assert!(decoded(&spans[2], &blob.bytes).starts_with(b"second"));
}

#[test]
fn a_wrong_chunk_is_refused() {
    let blob = estargz(&archive(), 4096);
    let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
    let pinned = estargz::read(&blob.bytes[at as usize..], at, blob.toc, &blob.layer()).unwrap();
    let span = &pinned.index.spans()[1];
    let mut other = archive();
    // of the first file's content
    other[1536] ^= 1;
    let other = estargz(&other, 4096);
    let (from, to) = (span.compressed.offset() as usize, span.compressed.end() as usize);
    assert!(span.decode(&other.bytes[from..to], &[]).is_err());
    // with headers behind the file's end
    let span = &pinned.index.spans()[3];
    assert!(matches!(span.proof, Proof::Start(808)), "{span:?}");
    let (from, to) = (span.compressed.offset() as usize, span.compressed.end() as usize);
    assert!(span.decode(&blob.bytes[from..to], &[]).is_ok());
    assert!(span.decode(&blob.bytes[from..to - 9], &[]).is_err(), "a member without its end");
}

#[test]
fn a_zstd_chunked_layer() {
    for chunk in [1000, 1 << 20] {
        let (blob, places) = zstd_chunked(&archive(), chunk);
        let both = places.both(blob.bytes.len() as u64).unwrap();
        let bytes = &blob.bytes[both.offset() as usize..both.end() as usize];
        let pinned = zstd_chunked::read(bytes, &places, &blob.layer()).unwrap();
        same(&blob, &pinned);
        let (segment, _) = filled(&pinned.index, &blob.bytes);
        assert_eq!(Digest::of(&segment), blob.layer().diff_id, "the segment is the archive");
        let other = zstd_chunked::Places { toc_digest: Digest::of(b""), ..places };
        assert!(zstd_chunked::read(bytes, &other, &blob.layer()).is_err());
    }
}

/// As SOCI's own program writes it of what `tar` has written, in records of 20 blocks.
#[test]
fn a_ztoc_that_does_not_count_what_fills_the_last_record() {
    let archive = [&large_archive()[..], &[0; 13 * 512]].concat();
    let (blob, ztoc) = gzip_with_ztoc(&archive, false, 13 * 512);
    let read = |len| soci::read(&ztoc, blob.toc, len, &blob.layer());
    let said = read(None).unwrap().index;
    let ends: Vec<_> = soci::samples(said.spans())
        .into_iter()
        .map(|number| {
            let (span, window) = (&said.spans()[number], said.window(number).unwrap());
            let at = span.compressed;
            let compressed = &blob.bytes[at.offset() as usize..at.end() as usize];
            assert!(soci::end(span, &window, &compressed[1..]).is_err());
            soci::end(span, &window, compressed).unwrap()
        })
        .collect();
    assert_eq!(
        ends,
        [said.spans()[soci::samples(said.spans())[0]].uncompressed.end(), archive.len() as u64]
    );
    let pinned = read(ends.last().copied()).unwrap();
    same(&blob, &pinned);
    let (segment, _) = filled(&pinned.index, &blob.bytes);
    assert!(segment == archive);
    assert!(read(Some(ends[0])).is_err(), "no other than the last");
}

#[test]
fn a_layer_with_a_ztoc() {
    for implied in [false, true] {
        let (blob, ztoc) = gzip_with_ztoc(&large_archive(), implied, 0);
        let pinned = soci::read(&ztoc, blob.toc, None, &blob.layer()).unwrap();
        same(&blob, &pinned);
        let samples = soci::samples(pinned.index.spans());
        assert_eq!(samples.len(), 2);
        let span = &pinned.index.spans()[samples[0]];
        let (from, to) = (span.compressed.offset() as usize, span.compressed.end() as usize);
        let mut wrong = blob.bytes[from..to].to_vec();
        wrong[100] ^= 1;
        assert!(span.decode(&wrong, &pinned.index.window(samples[0]).unwrap()).is_err());
        let other = soci::read(&ztoc, Digest::of(b""), None, &blob.layer());
        assert_eq!(other.unwrap_err(), Unusable::Digest);
        let other = soci::read(&ztoc, blob.toc, None, &Layer { size: 1, ..blob.layer() });
        assert!(other.is_err());
    }
}

#[test]
fn what_annotations_pin() {
    let digest = Digest::of(b"x").to_string();
    let pin = |pairs: &[(&str, &str)]| {
        Pin::of(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    };
    let toc = Digest::of(b"x");
    assert_eq!(pin(&[]), None);
    assert_eq!(pin(&[(estargz::TOC_DIGEST, &digest)]), Some(Pin::Estargz { toc }));
    assert_eq!(pin(&[(estargz::TOC_DIGEST, "sha256:1")]), None);
    let name = |name: &str| format!("io.github.containers.zstd-chunked.{name}");
    let (sum, at, split) =
        (name("manifest-checksum"), name("manifest-position"), name("tarsplit-position"));
    let all = [
        (sum.as_str(), digest.as_str()),
        (at.as_str(), "100:20:50:1"),
        (split.as_str(), "128:30:60"),
    ];
    let Some(Pin::ZstdChunked(places)) = pin(&all) else { panic!("it is pinned") };
    assert_eq!((places.toc.compressed.end(), places.tar_split.len), (120, 60));
    assert!(places.both(158).is_ok() && places.both(157).is_err());
    for wrong in ["", "1:2", "1:-2:3", "18446744073709551615:2:3", "1:0:3", "1:2:99999999999"] {
        assert_eq!(pin(&[all[0], (&at, wrong), all[2]]), None, "{wrong}");
    }
    let mut whole = Hasher::default();
    whole.update(b"x");
    assert_eq!(whole.finish(), toc);
}
