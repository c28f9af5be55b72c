//! Mangled indexes: refused, or read within their bounds, never a panic; and whatever an index says, only bytes with the
//! digests that it names come out.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::blobs::{Blob, archive, estargz, gzip_with_ztoc, large_archive, zstd_chunked};
use super::*;
use crate::builder;
use crate::layer::pinned::toc::Toc;
use crate::layer::pinned::zstd_chunked::Places;
use crate::layer::tests::{changes, mangle};

static ESTARGZ: LazyLock<Blob> = LazyLock::new(|| estargz(&archive(), 4096));
static SOCI: LazyLock<(Blob, Vec<u8>)> =
    LazyLock::new(|| gzip_with_ztoc(&large_archive(), false, 0));
static CHUNKED: LazyLock<(Blob, Places)> = LazyLock::new(|| zstd_chunked(&archive(), 4096));

/// What was taken has to hold together: the index can be kept, the tree can be built.
fn sound(pinned: &Pinned, blob: &[u8]) -> Result<(), TestCaseError> {
    let mut file = Vec::new();
    pinned.index.write(&mut file).unwrap();
    prop_assert_eq!(&Index::parse(&file).unwrap(), &pinned.index);
    let manifest = pinned.tree.write(Vec::new(), pinned.index.uncompressed_len()).unwrap();
    builder::layer::image(&manifest[..]).map_err(|e| TestCaseError::fail(format!("{e}")))?;
    for (number, span) in pinned.index.spans().iter().enumerate() {
        let range = span.compressed.offset() as usize..span.compressed.end() as usize;
        let Some(compressed) = blob.get(range) else { continue };
        let window = pinned.index.window(number).unwrap();
        let Ok(bytes) = span.decode(compressed, &window) else { continue };
        prop_assert_eq!(bytes.len() as u64, span.uncompressed.len());
        if span.proof == Proof::Compressed {
            prop_assert_eq!(Digest::of(compressed), span.digest);
            continue;
        }
        let proved = match span.proof {
            Proof::Start(proved) => proved as usize,
            _ => bytes.len(),
        };
        prop_assert_eq!(Digest::of(&bytes[..proved]), span.digest);
    }
    Ok(())
}

/// Swaps one number or word of JSON for another.
fn reword(json: &[u8], at: usize, by: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(json).into_owned();
    let colons: Vec<_> = text.match_indices(':').map(|(n, _)| n + 1).collect();
    let from = colons[at % colons.len()];
    let rest = &text[from..];
    let end = match rest.strip_prefix('"') {
        Some(word) => word.find('"').map_or(rest.len(), |n| n + 2),
        None => rest.find([',', '}', ']']).unwrap_or(rest.len()),
    };
    format!("{}{by}{}", &text[..from], &rest[end..]).into_bytes()
}

fn values() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u64>().prop_map(|n| n.to_string()),
        (0u64..20_000).prop_map(|n| n.to_string()),
        Just("-1".to_owned()),
        Just("18446744073709551615".to_owned()),
        Just("4294967296".to_owned()),
        Just("\"\"".to_owned()),
        Just("null".to_owned()),
        Just("[]".to_owned()),
        prop::sample::select(vec![
            "reg", "dir", "chunk", "hardlink", "symlink", "../x", "a/b", "d", "."
        ])
        .prop_map(|word| format!("{word:?}")),
    ]
}

/// The table of contents of an eStargz blob put in the place of the right one, with its digest pinned.
fn with_toc(blob: &Blob, toc: &[u8]) -> (Vec<u8>, u64, Digest) {
    let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
    let tail = crate::layer::tests::Archive::default().file("stargz.index.json", toc).end();
    let mut end = Vec::new();
    {
        use std::io::Write;
        let mut out = flate2::write::GzEncoder::new(&mut end, flate2::Compression::new(1));
        out.write_all(&tail).unwrap();
        out.finish().unwrap();
    }
    (end, at, Digest::of(toc))
}

fn toc_of(blob: &Blob) -> Vec<u8> {
    let at = estargz::toc_at(&blob.bytes, blob.bytes.len() as u64).unwrap();
    let tail = gunzip(&blob.bytes[at as usize..], MAX_TOC).unwrap();
    let end = tail.iter().rposition(|byte| *byte == b'}').unwrap();
    tail[512..=end].to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_toc_that_says_something_else(edits in prop::collection::vec((any::<usize>(), values()), 1..4)) {
        let blob = &*ESTARGZ;
        let mut toc = toc_of(blob);
        for (at, by) in &edits {
            toc = reword(&toc, *at, by);
        }
        let (end, at, digest) = with_toc(blob, &toc);
        let bytes = [&blob.bytes[..at as usize], &end].concat();
        let layer = Layer { digest: Digest::of(&bytes), size: bytes.len() as u64, diff_id: blob.layer().diff_id };
        if let Ok(pinned) = estargz::read(&end, at, digest, &layer) {
            sound(&pinned, &bytes)?;
        }
    }

    #[test]
    fn a_mangled_toc(changes in changes(), cut in 0usize..200) {
        let mut toc = toc_of(&ESTARGZ);
        mangle(&mut toc, &changes, cut % 3 * cut, false);
        // refused, or a list
        let _ = Toc::parse(&toc);
        let (end, at, digest) = with_toc(&ESTARGZ, &toc);
        let layer = Layer { size: at + end.len() as u64, ..ESTARGZ.layer() };
        if let Ok(pinned) = estargz::read(&end, at, digest, &layer) {
            sound(&pinned, &ESTARGZ.bytes)?;
        }
    }

    #[test]
    fn the_mangled_end_of_a_blob(changes in changes(), cut in 0usize..60) {
        let blob = &*ESTARGZ;
        let mut bytes = blob.bytes.clone();
        let at = estargz::toc_at(&bytes, bytes.len() as u64).unwrap() as usize;
        let mut end = bytes.split_off(at);
        mangle(&mut end, &changes, cut % 2 * cut, false);
        bytes.extend(end);
        let Ok(at) = estargz::toc_at(&bytes, bytes.len() as u64) else { return Ok(()) };
        prop_assert!(at < bytes.len() as u64);
        let layer = Layer { size: bytes.len() as u64, ..blob.layer() };
        if let Ok(pinned) = estargz::read(&bytes[at as usize..], at, blob.toc, &layer) {
            sound(&pinned, &bytes)?;
        }
    }

    #[test]
    fn mangled_parts_of_zstd_chunked(
        edits in prop::collection::vec((any::<usize>(), values()), 0..3),
        in_split in prop::collection::vec((any::<usize>(), values()), 0..3),
        changes in changes(),
    ) {
        let (blob, places) = &*CHUNKED;
        let part = |range: crate::range::ByteRange| {
            &blob.bytes[range.offset() as usize..range.end() as usize]
        };
        let unpack = |place: &zstd_chunked::Place| {
            zstd::bulk::decompress(part(place.compressed), place.len as usize).unwrap()
        };
        let (mut toc, mut split) = (unpack(&places.toc), unpack(&places.tar_split));
        for (at, by) in &in_split {
            split = reword(&split, *at, by);
        }
        if edits.is_empty() {
            mangle(&mut split, &changes, 0, false);
        }
        let packed = zstd::bulk::compress(&split, 1).unwrap();
        let text = String::from_utf8(toc).unwrap();
        let old = Digest::of(part(places.tar_split.compressed)).to_string();
        toc = text.replace(&old, &Digest::of(&packed).to_string()).into_bytes();
        for (at, by) in &edits {
            toc = reword(&toc, *at, by);
        }
        let frame = zstd::bulk::compress(&toc, 1).unwrap();
        let from = places.toc.compressed.offset();
        let at = |offset: u64, frame: &[u8], len: usize| zstd_chunked::Place {
            compressed: crate::range::ByteRange::new(offset, frame.len() as u64),
            len: len as u64,
        };
        let places = Places {
            toc: at(from, &frame, toc.len()),
            toc_digest: Digest::of(&frame),
            tar_split: at(from + frame.len() as u64, &packed, split.len()),
        };
        let both = [&frame[..], &packed].concat();
        let layer = Layer { size: from + both.len() as u64, ..blob.layer() };
        if let Ok(pinned) = zstd_chunked::read(&both, &places, &layer) {
            sound(&pinned, &blob.bytes)?;
        }
    }

    #[test]
    fn a_mangled_ztoc(
        changes in changes(),
        // references, lengths and numbers stand at the start; windows are most of it
        early in prop::collection::vec((0usize..2000, any::<u8>()), 0..6),
        late in prop::collection::vec((0usize..8000, any::<u8>()), 0..6),
        cut in 0usize..50,
    ) {
        let (blob, ztoc) = &*SOCI;
        let mut ztoc = ztoc.clone();
        let len = ztoc.len();
        mangle(&mut ztoc, &changes, cut % 2 * cut, false);
        for (at, byte) in early {
            ztoc[at] = byte;
        }
        for (at, byte) in late {
            let at = (len - 8000 + at) % ztoc.len();
            ztoc[at] = byte;
        }
        if let Ok(pinned) = soci::read(&ztoc, Digest::of(&ztoc), None, &blob.layer()) {
            sound(&pinned, &blob.bytes)?;
            prop_assert!(soci::samples(pinned.index.spans()).len() <= 2);
        }
    }

    #[test]
    fn annotations(pairs in prop::collection::btree_map(
        prop::sample::select(vec![
            estargz::TOC_DIGEST,
            "io.github.containers.zstd-chunked.manifest-checksum",
            "io.github.containers.zstd-chunked.manifest-position",
            "io.github.containers.zstd-chunked.tarsplit-position",
        ]).prop_map(str::to_owned),
        prop_oneof!["[0-9:+-]{0,40}", "sha256:[0-9a-f]{62,66}", ".{0,20}"],
        0..5,
    ), size in any::<u64>()) {
        if let Some(Pin::ZstdChunked(places)) = Pin::of(&pairs)
            && let Ok(both) = places.both(size)
        {
            prop_assert!(both.end() <= size && both.len() <= 2 * MAX_TOC);
        }
    }
}
