//! Placing, filling and the whole of a job.

mod index;
mod million;
mod mount;
mod pack;
mod project;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::testing::{Maker, blob};
use super::*;
use crate::importer::testing::{Repository, git, run, run_with};
use crate::range::ByteRange;
use crate::segment::MAX_PACKED_SIZE;
use crate::segment::extents::{Extents, Place};
use crate::segment::frame::FIRST_ENTRY;

struct State {
    dir: tempfile::TempDir,
    known: Vec<SegmentId>,
    next: u64,
}

impl State {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir(dir.path().join("pool")).unwrap();
        fs_err::create_dir(dir.path().join("pack")).unwrap();
        Self { dir, known: Vec::new(), next: 1 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn job(&self, maker: &Maker) -> Job {
        fs_err::write(self.path("manifest"), maker.manifest()).unwrap();
        self.job_for(self.path("manifest"))
    }

    fn job_for(&self, manifest: PathBuf) -> Job {
        let meta = fs_err::metadata(self.dir.path()).unwrap();
        Job {
            manifest,
            contents: None,
            pool: self.path("pool"),
            segments: self.known.clone(),
            first_segment: SegmentId(self.next),
            image: self.path("tree.erofs"),
            owner: Owner { uid: meta.uid(), gid: meta.gid() },
            pack: None,
            index: None,
        }
    }

    fn build(&mut self, job: &Job) -> Built {
        let built = build(job).unwrap().built;
        let new = built.segments.iter().filter(|s| s.new);
        self.known.extend(new.map(|s| s.segment));
        self.next = built.next_segment.0;
        built
    }

    fn extents(&self, segment: u64) -> Extents {
        let path = place::extents_path(&self.path("pool"), SegmentId(segment));
        Extents::read(fs_err::File::open(path).unwrap()).unwrap()
    }

    /// The paths of a segment's objects with their offsets in blocks.
    fn paths(&self, segment: u64) -> Vec<(String, u64)> {
        let extents = self.extents(segment);
        let path = |e: &_| String::from_utf8_lossy(extents.path(e)).into_owned();
        extents.iter().map(|e| (path(&e), e.range.offset() / 4096)).collect()
    }
}

fn listing(dir: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_directory_s_files_come_before_its_subdirectories() {
    let mut state = State::new();
    let mut maker = Maker::default();
    let a = maker.directory(0, b"a");
    let deep = maker.directory(a, b"b");
    maker.sized(deep, b"one", b"1", 1);
    maker.sized(a, b"two", b"2", 5000);
    maker.sized(0, b"three", b"3", 4096);
    maker.sized(0, b"two-again", b"2", 5000);
    maker.file(b"zero", b"");
    let built = state.build(&state.job(&maker));
    assert_eq!(
        state.paths(1),
        [("three", 0), ("two-again", 1), ("a/b/one", 3)].map(|(p, o)| (p.to_owned(), o))
    );
    assert_eq!(built.segments.len(), 1);
    assert_eq!((built.files, built.directories, built.objects), (5, 2, 3));
    assert_eq!(built.tree_bytes, 1 + 5000 + 4096 + 5000);
    let data = fs_err::metadata(state.path("pool/1.data")).unwrap();
    assert_eq!((data.len(), data.blocks(), data.mode() & 0o777), (4 * 4096, 0, 0o600));
    assert_eq!(listing(&state.path("pool")), ["1.data", "1.extents"]);
}

#[test]
fn a_second_tree_adds_only_what_is_new() {
    let mut state = State::new();
    let mut maker = Maker::default();
    maker.sized(0, b"a", b"1", 10);
    maker.sized(0, b"b", b"2", 20);
    state.build(&state.job(&maker));
    maker.sized(0, b"c", b"3", 30);
    let built = state.build(&state.job(&maker));
    let size = 8192;
    let use_of = |segment, size, new| SegmentUse {
        segment: SegmentId(segment),
        kind: SegmentKind::Data,
        size,
        new,
    };
    assert_eq!(built.segments, [use_of(1, size, false), use_of(2, 4096, true)]);
    assert_eq!(state.paths(2), [("c".to_owned(), 0)]);

    // nothing new at all, and a segment that this tree doesn't refer to
    let mut maker = Maker::default();
    maker.sized(0, b"x", b"3", 30);
    let built = state.build(&state.job(&maker));
    assert_eq!(built.segments, [use_of(2, 4096, false)]);
    assert_eq!(built.next_segment, SegmentId(3));
}

#[test]
fn segments_have_a_largest_size() {
    let mut state = State::new();
    let mut maker = Maker::default();
    maker.sized(0, b"a", b"1", MAX_PACKED_SIZE - 4096);
    maker.sized(0, b"b", b"2", MAX_PACKED_SIZE + 1);
    maker.sized(0, b"c", b"3", 1);
    maker.sized(0, b"d", b"4", 1);
    maker.sized(0, b"e", b"5", MAX_PACKED_SIZE);
    let built = state.build(&state.job(&maker));
    let sizes: Vec<_> = built.segments.iter().map(|s| s.size).collect();
    assert_eq!(sizes, [MAX_PACKED_SIZE, MAX_PACKED_SIZE + 4096, 4096, MAX_PACKED_SIZE]);
    assert_eq!(state.paths(1), [("a".to_owned(), 0), ("c".to_owned(), (64 << 8) - 1)]);
}

#[test]
fn an_origin_can_t_change_a_size() {
    let mut state = State::new();
    let mut maker = Maker::default();
    maker.sized(0, b"a", b"1", 10);
    state.build(&state.job(&maker));
    let mut maker = Maker::default();
    maker.sized(0, b"z", b"1", 11);
    maker.sized(0, b"zz", b"0", 1);
    let error = build(&state.job(&maker)).unwrap_err();
    assert!(matches!(error, BuildError::Sizes { sizes: [10, 11], .. }), "{error}");
    let mut maker = Maker::default();
    maker.sized(0, b"y", b"2", 1);
    maker.sized(0, b"z", b"2", 2);
    let error = build(&state.job(&maker)).unwrap_err();
    assert!(matches!(error, BuildError::Sizes { sizes: [1, 2], .. }), "{error}");
    assert_eq!(listing(&state.path("pool")), ["1.data", "1.extents"], "nothing is left");
}

#[test]
fn takes_in_content_that_is_here() {
    let state = State::new();
    let long = vec![7; (2 << 20) + 5];
    let mut maker = Maker::default();
    maker.file(b"a", b"unknown yet");
    maker.file(b"b", &long);
    maker.file(b"c", b"short");
    let give = |contents: &[(&[u8], &[u8])]| {
        let mut writer = contents::Writer::new(Vec::new());
        for (content, named) in contents {
            writer.object(&blob(named), content.len() as u64, *content).unwrap();
        }
        fs_err::write(state.path("contents"), writer.finish().unwrap()).unwrap();
    };
    give(&[(b"short", b"short"), (b"a link's", b"a link's"), (&long, &long)]);
    let mut job = state.job(&maker);
    job.contents = Some(state.path("contents"));
    let built = build(&job).unwrap().built;
    assert_eq!(built.filled_bytes, long.len() as u64 + 5);
    let data = fs_err::File::open(state.path("pool/1.data")).unwrap();
    let read = |offset, len| {
        let mut bytes = vec![0; len];
        data.file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    };
    let c = state.extents(1).get(2).unwrap().range.offset();
    assert_eq!(read(c, 7), b"short\0\0");
    assert_eq!(read(4096, long.len()), long);
    assert_eq!(read(0, 11), [0; 11]);
    // SEEK_DATA of the hole at the start finds the second file
    let at = nix::unistd::lseek(data.file(), 0, nix::unistd::Whence::SeekData).unwrap();
    assert_eq!(at, 4096);

    for wrong in [&b"shore"[..], b"shorter"] {
        give(&[(wrong, b"short")]);
        assert!(build(&job).is_err());
        assert_eq!(listing(&state.path("pool")), [""; 0], "nothing is left");
    }
}

#[test]
fn the_process_answers_line_by_line() {
    let state = State::new();
    let mut maker = Maker::default();
    maker.file(b"a", b"1");
    let mut job = state.job(&maker);
    job.index = Some(IndexJob { index: state.path("index"), ino_or: 0 });
    let job = serde_json::to_string(&job).unwrap();
    let mut output = Vec::new();
    super::run(format!("{job}\n{{}}\n{job}\n").as_bytes(), &mut output).unwrap();
    let output = String::from_utf8(output).unwrap();
    let replies: Vec<Reply> = output.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(matches!(&replies[0], Reply::Built(built) if built.files == 1), "{output}");
    assert!(matches!(&replies[1], Reply::Failed(_)), "{output}");
    assert!(matches!(&replies[2], Reply::Built(_)), "{output}");
    assert!(fs_err::read(state.path("index")).unwrap().starts_with(b"DIRC"));
}

#[test]
fn the_same_job_gives_the_same_bytes() {
    let mut images = Vec::new();
    for _ in 0..2 {
        let state = State::new();
        let mut maker = Maker::default();
        let a = maker.directory(0, b"a");
        maker.file_in(a, b"f", b"1");
        maker.file(b"z", b"2");
        let mut job = state.job(&maker);
        job.pack = Some(PackJob { dir: state.path("pack"), in_repository: None });
        let pack = build(&job).unwrap().built.pack.unwrap();
        let idx = fs_err::read(state.path("pack").join(pack.name + ".idx")).unwrap();
        images.push((fs_err::read(&job.image).unwrap(), idx));
    }
    assert_eq!(images[0], images[1]);
}

#[test]
fn the_pack_repeats_the_data() {
    let mut state = State::new();
    let mut maker = Maker::default();
    maker.sized(0, b"a", b"1", 10);
    state.build(&state.job(&maker));
    let dir = maker.directory(0, b"d");
    maker.sized(dir, b"big", b"2", 100_000);
    maker.sized(0, b"e", b"1", 10);
    maker.sized(0, b"f", b"3", 1);
    maker.sized(0, b"g", b"4", 1);
    let mut job = state.job(&maker);
    fs_err::write(state.path("eager"), format!("{}\n", blob(b"3"))).unwrap();
    let in_repository = Some(state.path("eager"));
    job.pack = Some(PackJob { dir: state.path("pack"), in_repository });
    let built = state.build(&job);
    let pack = built.pack.unwrap();
    assert_eq!((pack.objects, pack.device), (3, 2));
    assert_eq!(built.segments[2].kind, SegmentKind::Pack);
    let extents = state.extents(3);
    let homes: Vec<_> = extents
        .iter()
        .map(|e| match e.place {
            Place::Repeats { segment, record } => (segment.0, record, e.range, e.size),
            Place::File { .. } => panic!("not in a pack"),
        })
        .collect();
    let entry = |at, size| ByteRange::new(at, crate::segment::pack::padded_len(size));
    let second = FIRST_ENTRY + entry(0, 10).len();
    let third = second + entry(0, 1).len();
    assert_eq!(
        homes,
        [
            (1, 0, entry(FIRST_ENTRY, 10), 10),
            (2, 1, entry(second, 1), 1),
            (2, 2, entry(third, 100_000), 100_000),
        ]
    );
    let home = state.extents(2);
    assert_eq!(home.get(2).unwrap().key, extents.get(2).unwrap().key);
    // the head and the tail are there, nothing else is
    let data = fs_err::metadata(state.path("pool/3.data")).unwrap();
    assert_eq!((data.len(), data.blocks()), (pack.size, 2 * (64 + 32)));
    assert_eq!(
        listing(&state.path("pack")),
        [format!("{}.idx", pack.name), format!("{}.keep", pack.name)]
    );
}

/// Offsets of more than 32 bits: git reads them from the index's table of 64-bit offsets.
#[test]
fn a_pack_can_be_larger_than_4_gib() {
    let state = State::new();
    let mut maker = Maker::default();
    maker.sized(0, b"a", b"1", 10);
    maker.sized(0, b"b", b"2", 3 << 30);
    maker.sized(0, b"c", b"3", 3 << 30);
    maker.sized(0, b"d", b"4", 10);
    let mut job = state.job(&maker);
    job.pack = Some(PackJob { dir: state.path("pack"), in_repository: None });
    let built = build(&job).unwrap().built;
    let pack = built.pack.unwrap();
    let index = fs_err::read(state.path("pack").join(format!("{}.idx", pack.name))).unwrap();
    assert!(index.starts_with(b"\xfftOc"));
    let repository = Repository::new(state.path("repository"), HashKind::Sha1);
    let shown = run_with(git(&repository.dir).arg("show-index"), &index);
    let shown = String::from_utf8(shown).unwrap();
    let segment = built.segments.last().unwrap().segment;
    let extents = state.extents(segment.0);
    assert_eq!((extents.len(), shown.lines().count()), (4, 7));
    for extent in extents.iter() {
        let line = format!("{} {} (00000000)", extent.range.offset(), extent.key);
        assert!(shown.lines().any(|l| l == line), "{line} in {shown}");
    }
    let data = place::data_path(&state.path("pool"), segment);
    let index = state.path("pack").join(format!("{}.idx", pack.name));
    for (from, to) in [(data, "pack"), (index, "idx")] {
        let to = repository.dir.join(format!(".git/objects/pack/{}.{to}", pack.name));
        fs_err::rename(from, to).unwrap();
    }
    for extent in extents.iter() {
        run(&repository.dir, &["cat-file", "-e", &extent.key.to_string()]);
    }
}
