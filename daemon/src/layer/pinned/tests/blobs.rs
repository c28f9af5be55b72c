//! Writers of these formats, as far as the tests need them.

use std::io::Write;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::layer::digest::Digest;
use crate::layer::indexer::Indexer;
use crate::layer::pinned::zstd_chunked::{Place, Places};
use crate::layer::pinned::{Layer, estargz};
use crate::layer::span::Codec;
use crate::layer::tar::{Entry, EntryKind, TarReader};
use crate::layer::tests::{Archive, noise};
use crate::range::ByteRange;

pub struct Blob {
    pub bytes: Vec<u8>,
    /// All that is in it, uncompressed.
    pub archive: Vec<u8>,
    pub toc: Digest,
}

impl Blob {
    pub fn layer(&self) -> Layer {
        Layer {
            digest: Digest::of(&self.bytes),
            size: self.bytes.len() as u64,
            diff_id: Digest::of(&self.archive),
        }
    }
}

/// One that is compressed to several deflate blocks.
pub fn large_archive() -> Vec<u8> {
    let small = archive();
    let mut large = Archive(small[..small.len() - 1024].to_vec());
    for n in 0..10 {
        let half = [noise(40_000, 20 + n), vec![b'a'; 10_000]].concat();
        large.file(&format!("d/large{n}"), &half);
    }
    large.end()
}

/// An archive with something of everything that these formats can tell of.
pub fn archive() -> Vec<u8> {
    let mut archive = Archive::default();
    archive.dir("./").dir("d").file("d/big", &noise(9000, 1)).file("d/even", &noise(4096, 2));
    archive.file("d/empty", b"").link("hard", b'1', "d/big").link("soft", b'2', "d/big");
    archive.add("pipe", b'6', b"").add("null", b'3', b"").add("loop", b'4', b"");
    archive.pax(b'x', &[("SCHILY.xattr.user.a", b"v"), ("path", b"renamed")]).file("x", b"value");
    archive.add("L", b'L', format!("{}\0", "n".repeat(150)).as_bytes()).file("short", b"long");
    archive.file("d/.wh.gone", b"").dir("o").file("o/.wh..wh..opq", b"");
    archive.file("twice", b"first").file("twice", &noise(2500, 3)).dir("last");
    archive.end()
}

fn entries(archive: &[u8]) -> Vec<Entry> {
    let (mut entries, mut reader) = (Vec::new(), TarReader::default());
    let push = reader.push(archive, &mut |entry| {
        entries.push(entry);
        Ok::<_, crate::layer::tar::TarError>(())
    });
    push.unwrap();
    entries
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::new(3));
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

/// An entry of the table of contents, without its chunks.
fn described(entry: &Entry) -> Value {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut described = json!({
        "name": text(&entry.path), "mode": entry.mode, "uid": entry.uid, "gid": entry.gid,
        "modtime": rfc3339(entry.mtime.secs), "NumLink": 0,
    });
    let xattrs =
        entry.xattrs.iter().map(|(name, value)| (text(name), json!(STANDARD.encode(value))));
    let xattrs: serde_json::Map<_, _> = xattrs.collect();
    if !xattrs.is_empty() {
        described["xattrs"] = xattrs.into();
    }
    let (kind, link) = match &entry.kind {
        EntryKind::File(_) => ("reg", None),
        EntryKind::Directory => ("dir", None),
        EntryKind::Symlink(to) => ("symlink", Some(text(to))),
        EntryKind::HardLink(to) => ("hardlink", Some(text(to))),
        EntryKind::CharDevice { .. } => ("char", None),
        EntryKind::BlockDevice { .. } => ("block", None),
        EntryKind::Fifo => ("fifo", None),
    };
    described["type"] = kind.into();
    if let Some(link) = link {
        described["linkName"] = link.into();
    }
    described
}

/// The archives here are all of one year.
fn rfc3339(secs: i64) -> String {
    let mut command = std::process::Command::new("date");
    let date = command.args(["-u", "+%Y-%m-%dT%H:%M:%SZ", "-d"]).arg(format!("@{secs}"));
    String::from_utf8(date.output().unwrap().stdout).unwrap().trim().to_owned()
}

/// Compresses an archive in pieces and describes what is in it. `rest` is told of all that is no file's content, `file` of
/// the length of what is; both say where in the blob it begins.
fn compressed(
    archive: &[u8],
    chunk: usize,
    separate: bool,
    compress: impl Fn(&[u8]) -> Vec<u8>,
) -> (Vec<u8>, Vec<Value>, Vec<Value>) {
    let (mut blob, mut toc, mut split) = (Vec::new(), Vec::new(), Vec::new());
    let (mut from, mut at) = (0, 0);
    let segment = |bytes: &[u8]| json!({"type": 2, "payload": STANDARD.encode(bytes)});
    for entry in entries(archive) {
        let EntryKind::File(data) = &entry.kind else {
            toc.push(described(&entry));
            continue;
        };
        let mut first = described(&entry);
        let Some(piece) = data.pieces.first() else {
            toc.push(first);
            continue;
        };
        let content = &archive[piece.at as usize..(piece.at + piece.len) as usize];
        // what comes before it: with the last chunk before, or for itself
        split.push(segment(&archive[from.max(at)..piece.at as usize]));
        split.push(json!({"type": 1, "size": content.len(), "name": "a"}));
        if from < piece.at as usize {
            blob.extend(compress(&archive[from..piece.at as usize]));
        }
        first["size"] = content.len().into();
        first["digest"] = Digest::of(content).to_string().into();
        let mut described = vec![first];
        let count = content.len().div_ceil(chunk);
        for (n, bytes) in content.chunks(chunk).enumerate() {
            if n > 0 {
                described.push(json!({"name": "it", "type": "chunk"}));
            }
            let last = described.last_mut().unwrap();
            last["offset"] = blob.len().into();
            last["chunkOffset"] = (n * chunk).into();
            last["chunkDigest"] = Digest::of(bytes).to_string().into();
            if n + 1 < count {
                last["chunkSize"] = bytes.len().into();
            }
            if separate || n + 1 < count {
                blob.extend(compress(bytes));
            }
            // where the last chunk begins, which is not compressed yet
            from = piece.at as usize + n * chunk;
        }
        at = (piece.at + piece.len) as usize;
        if separate {
            from = at;
            described[0]["endOffset"] = blob.len().into();
        }
        toc.append(&mut described);
    }
    let end = if separate { archive.len() } else { archive.len() - 1024 };
    split.push(segment(&archive[from.max(at)..]));
    if from < end {
        blob.extend(compress(&archive[from..end]));
    }
    (blob, toc, split)
}

pub fn estargz(archive: &[u8], chunk: usize) -> Blob {
    let (mut bytes, entries, _) = compressed(archive, chunk, false, gzip);
    let toc = json!({"version": 1, "entries": entries}).to_string();
    let tail = Archive::default().file("stargz.index.json", toc.as_bytes()).end();
    let at = bytes.len();
    bytes.extend(gzip(&tail));
    bytes.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0]);
    bytes.extend(format!("{at:016x}STARGZ").bytes());
    bytes.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(estargz::toc_at(&bytes, bytes.len() as u64), Ok(at as u64));
    let archive = [&archive[..archive.len() - 1024], &tail].concat();
    Blob { bytes, archive, toc: Digest::of(toc.as_bytes()) }
}

pub fn zstd_chunked(archive: &[u8], chunk: usize) -> (Blob, Places) {
    let (mut bytes, entries, split) = compressed(archive, chunk, true, zstd);
    let split: Vec<u8> = split.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect();
    let packed = zstd(&split);
    let toc = json!({"version": 1, "entries": entries, "tarSplitDigest": Digest::of(&packed).to_string()});
    let toc = toc.to_string().into_bytes();
    let mut skipped = |frame: &[u8], len: usize| {
        bytes.extend([0x50, 0x2a, 0x4d, 0x18]);
        bytes.extend((frame.len() as u32).to_le_bytes());
        let compressed = ByteRange::new(bytes.len() as u64, frame.len() as u64);
        bytes.extend(frame);
        Place { compressed, len: len as u64 }
    };
    let frame = zstd(&toc);
    let place = skipped(&frame, toc.len());
    let tar_split = skipped(&packed, split.len());
    skipped(&[0; 64], 64);
    let toc_digest = Digest::of(&frame);
    let blob = Blob { bytes, archive: archive.to_vec(), toc: toc_digest };
    (blob, Places { toc: place, toc_digest, tar_split })
}

/// What a FlatBuffer is made of.
pub enum Flat {
    Long(i64),
    Int(u32),
    Byte(u8),
    Bytes(Vec<u8>),
    Table(Vec<Flat>),
    Vector(Vec<Flat>),
}

impl Flat {
    fn text(text: impl Into<String>) -> Self {
        Self::Bytes(text.into().into_bytes())
    }

    /// What stands in a table or vector; 0 for a reference.
    fn inline(&self) -> Vec<u8> {
        match self {
            Self::Long(number) => number.to_le_bytes().to_vec(),
            Self::Int(number) => number.to_le_bytes().to_vec(),
            Self::Byte(byte) => vec![*byte],
            _ => vec![0; 4],
        }
    }

    /// Writes what is referred to, and where that is.
    fn refer(&self, out: &mut Vec<u8>, from: usize) {
        let to = match self {
            Self::Long(_) | Self::Int(_) | Self::Byte(_) => return,
            Self::Bytes(bytes) => {
                let at = out.len();
                out.extend((bytes.len() as u32).to_le_bytes());
                out.extend(bytes);
                at
            }
            Self::Vector(elements) => {
                let at = out.len();
                out.extend((elements.len() as u32).to_le_bytes());
                out.extend(elements.iter().flat_map(Self::inline));
                for (n, element) in elements.iter().enumerate() {
                    element.refer(out, at + 4 + n * 4);
                }
                at
            }
            Self::Table(fields) => {
                let inlines: Vec<_> = fields.iter().map(Self::inline).collect();
                let vtable = out.len();
                let len = 4 + fields.len() * 2;
                let mut places = vec![4];
                for inline in &inlines {
                    places.push(places.last().unwrap() + inline.len());
                }
                out.extend((len as u16).to_le_bytes());
                out.extend((*places.last().unwrap() as u16).to_le_bytes());
                out.extend(places[..fields.len()].iter().flat_map(|at| (*at as u16).to_le_bytes()));
                let at = out.len();
                out.extend(((at - vtable) as i32).to_le_bytes());
                out.extend(inlines.concat());
                for (field, place) in fields.iter().zip(places) {
                    field.refer(out, at + place);
                }
                at
            }
        };
        let distance = (to - from) as u32;
        out[from..from + 4].copy_from_slice(&distance.to_le_bytes());
    }
}

/// A gzip layer and its zTOC. `implied`: without the first checkpoint; the last bytes are `not_counted`.
pub fn gzip_with_ztoc(archive: &[u8], implied: bool, not_counted: usize) -> (Blob, Vec<u8>) {
    let bytes = gzip(archive);
    let (index, _) = crate::layer::tests::index_by(Indexer::new(4096), &bytes, 1 << 16).unwrap();
    let spans = index.spans();
    let mut records = Vec::new();
    let mut starts = Vec::new();
    for (number, span) in spans.iter().enumerate() {
        let (from, bits) = match span.codec {
            Codec::Deflate { bits, .. } => (span.compressed.offset() + u64::from(bits > 0), bits),
            _ => (10, 0),
        };
        starts.push((from - u64::from(bits > 0), from));
        if number > 0 || !implied {
            records.extend(from.to_le_bytes());
            records.extend(span.uncompressed.offset().to_le_bytes());
            records.push(bits);
            let window = index.window(number).unwrap();
            records.resize(records.len() + 32768 - window.len(), 0);
            records.extend(window);
        }
    }
    let ends = starts.iter().skip(1).map(|(_, from)| *from).chain([bytes.len() as u64]);
    let digests = starts.iter().zip(ends).map(|((from, _), to)| {
        Flat::text(Digest::of(&bytes[*from as usize..to as usize]).to_string())
    });
    let checkpoints =
        [&(spans.len() as u32).to_le_bytes()[..], &4096u64.to_le_bytes(), &records].concat();
    let info = Flat::Table(vec![
        Flat::Byte(1),
        Flat::Int(spans.len() as u32 - 1),
        Flat::Vector(digests.collect()),
        Flat::Bytes(checkpoints),
    ]);
    let metadata = entries(archive).into_iter().map(|entry| {
        let (kind, link, at, size) = match &entry.kind {
            EntryKind::File(data) => {
                ("reg", Vec::new(), data.pieces.first().map_or(0, |piece| piece.at), data.size)
            }
            EntryKind::Directory => ("dir", Vec::new(), 0, 0),
            EntryKind::Symlink(to) => ("symlink", to.clone(), 0, 0),
            EntryKind::HardLink(to) => ("hardlink", to.clone(), 0, 0),
            EntryKind::CharDevice { .. } => ("char", Vec::new(), 0, 0),
            EntryKind::BlockDevice { .. } => ("block", Vec::new(), 0, 0),
            EntryKind::Fifo => ("fifo", Vec::new(), 0, 0),
        };
        let xattrs = entry.xattrs.iter().map(|(name, value)| {
            let key = [&b"SCHILY.xattr."[..], name].concat();
            Flat::Table(vec![Flat::Bytes(key), Flat::Bytes(value.clone())])
        });
        Flat::Table(vec![
            Flat::Bytes(entry.path.clone()),
            Flat::text(kind),
            Flat::Long(at as i64),
            Flat::Long(size as i64),
            Flat::Bytes(link),
            Flat::Long(entry.mode.into()),
            Flat::Int(entry.uid),
            Flat::Int(entry.gid),
            Flat::text("root"),
            Flat::text("root"),
            Flat::text(rfc3339(entry.mtime.secs)),
            Flat::Long(0),
            Flat::Long(0),
            Flat::Vector(xattrs.collect()),
        ])
    });
    let ztoc = Flat::Table(vec![
        Flat::text("1.0"),
        Flat::text("a test"),
        Flat::Long(bytes.len() as i64),
        Flat::Long((archive.len() - not_counted) as i64),
        Flat::Table(vec![Flat::Vector(metadata.collect())]),
        info,
    ]);
    let mut out = vec![0; 4];
    ztoc.refer(&mut out, 0);
    let toc = Digest::of(&out);
    (Blob { bytes, archive: archive.to_vec(), toc }, out)
}
