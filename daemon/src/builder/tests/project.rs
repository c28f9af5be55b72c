//! A repository with everything that can be in one, its import, and a partial clone of it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::builder::files::Made;
use crate::builder::{
    Builder, IndexJob, Job, Owner, PackJob, SegmentUse, build, place, write_index,
};
use crate::ids::SegmentId;
use crate::importer::testing::{Repository, TestOrigin, block_on, git, run, run_with};
use crate::object::{HashKind, ObjectId};
use crate::range::{BLOCK, ByteRange};
use crate::segment::extents::{Extents, Place};
use crate::segment::frame::Frame;
use crate::segment::{SegmentKind, pack};

/// A temporary directory with an origin, a pool and what was built last.
pub struct Project {
    dir: tempfile::TempDir,
    pub origin: Repository,
    known: Vec<SegmentId>,
    next: u64,
    pub builder: Option<Builder>,
}

impl Project {
    /// The origin's first commit has files of all kinds.
    pub fn new(hash: HashKind) -> Self {
        let dir = tempfile::Builder::new().prefix("hydrant-").tempdir_in("/var/tmp").unwrap();
        let origin = Repository::new(dir.path().join("origin"), hash);
        fs_err::create_dir(dir.path().join("pool")).unwrap();
        let project = Self { dir, origin, known: Vec::new(), next: 1, builder: None };
        project.write(b"README", b"read me\n");
        project.write(b"a/b.c", b"int x;\n");
        project.write(b"a.c", b"sorts before a/\n");
        project.write(b"a/sub/one", b"1\n");
        project.write(b"a/sub dir/with space", b"two\n");
        project.write(b"a/new\nline\t", b"three\n");
        project.write(b"bytes/\xff\xfe", b"not UTF-8\n");
        project.write(b"empty", b"");
        project.write(b"a/empty too", b"");
        project.write(b"copy", b"int x;\n");
        project.write(b".gitignore", b"*.o\n");
        project.write(b"a/sub/.gitignore", b"!x.o\n");
        project.write(b"exactly", &content(BLOCK as usize, 1));
        project.write(b"stored", &content(65535, 2));
        project.write(b"large", &content(3_000_000, 3));
        let deep = [&b"deep/"[..], &b"d/".repeat(60), b"file"].concat();
        project.write(&deep, b"deep\n");
        for n in 0..300 {
            let name = format!("many/{:03}/file-{n}", n % 7);
            project.write(name.as_bytes(), format!("number {n}\n").as_bytes());
        }
        project.write(b"bin/tool", b"#!/bin/sh\necho tool\n");
        let executable = std::fs::Permissions::from_mode(0o755);
        fs_err::set_permissions(project.origin.dir.join("bin/tool"), executable).unwrap();
        symlink("../README", project.origin.dir.join("a/link")).unwrap();
        symlink("nowhere", project.origin.dir.join("z-link")).unwrap();
        run(&project.origin.dir, &["add", "-A"]);
        let commit = ObjectId::of_blob(hash, b"a commit elsewhere");
        let module = format!("160000,{commit},a/module");
        run(&project.origin.dir, &["update-index", "--add", "--cacheinfo", &module]);
        run(&project.origin.dir, &["commit", "-qm", "first"]);
        // as in any tree with a submodule that was not fetched
        fs_err::create_dir_all(project.origin.dir.join("a/module")).unwrap();
        project
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, path: &[u8], content: &[u8]) {
        let path = self.origin.dir.join(OsStr::from_bytes(path));
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, content).unwrap();
    }

    /// Imports and builds the origin's `HEAD` with an existence pack. What the import gives the
    /// repository is in `name`, which is a partial clone without a working tree.
    pub fn build(&mut self, name: &str, converted: HashSet<Vec<u8>>) -> PathBuf {
        let clone = self.path(name);
        let url = format!("file://{}", self.origin.dir.display());
        let args = ["clone", "-q", "--no-checkout", "--depth=1", "--filter=blob:none", &url];
        run(self.dir.path(), &[&args[..], &[clone.to_str().unwrap()]].concat());

        let origin = TestOrigin::new(&self.origin.dir);
        let mut importer = self.origin.importer();
        let give = |pack: std::fs::File| {
            let mut bytes = vec![0; pack.metadata().unwrap().len() as usize];
            pack.read_exact_at(&mut bytes, 0).unwrap();
            if !bytes.is_empty() {
                let args = ["index-pack", "--stdin", "--promisor=hydrant"];
                run_with(git(&clone).args(args), &bytes);
            }
        };
        let mut pack = tempfile::tempfile().unwrap();
        block_on(importer.eager(&origin, &mut pack)).unwrap();
        give(pack);
        let mut pack = tempfile::tempfile().unwrap();
        block_on(importer.convert(&origin, converted, &mut pack)).unwrap();
        give(pack);
        block_on(importer.sizes(&origin)).unwrap();
        let ids = fs_err::File::create(self.path("ids")).unwrap();
        importer.write_in_repository(ids).unwrap();
        let manifest = fs_err::File::create(self.path("manifest")).unwrap();
        let contents = importer.write_manifest(&self.origin.revision(), manifest).unwrap();
        fs_err::write(self.path("contents"), contents).unwrap();

        let meta = fs_err::metadata(self.dir.path()).unwrap();
        let job = Job {
            manifest: self.path("manifest"),
            contents: Some(self.path("contents")),
            pool: self.path("pool"),
            segments: self.known.clone(),
            first_segment: SegmentId(self.next),
            image: self.path(&format!("{name}.erofs")),
            owner: Owner { uid: meta.uid(), gid: meta.gid() },
            pack: Some(PackJob {
                dir: clone.join(".git/objects/pack"),
                in_repository: Some(self.path("ids")),
            }),
            index: None,
        };
        let builder = build(&job).unwrap();
        let new = builder.built.segments.iter().filter(|s| s.new).map(|s| s.segment);
        self.known.extend(new);
        self.next = builder.built.next_segment.0;
        self.builder = Some(builder);
        clone
    }

    pub fn builder(&self) -> &Builder {
        self.builder.as_ref().unwrap()
    }

    /// Writes the git index of what was built last.
    pub fn write_index(&self, job: &IndexJob) {
        let meta = fs_err::metadata(self.dir.path()).unwrap();
        let owner = Owner { uid: meta.uid(), gid: meta.gid() };
        let mut made = Made::default();
        let Builder { tree, nids, .. } = self.builder();
        write_index(job, tree, nids, owner, &mut made).unwrap();
        made.keep();
    }

    pub fn segments(&self) -> &[SegmentUse] {
        &self.builder().built.segments
    }

    pub fn data_path(&self, segment: SegmentId) -> PathBuf {
        place::data_path(&self.path("pool"), segment)
    }

    pub fn extents(&self, segment: SegmentId) -> Extents {
        let path = place::extents_path(&self.path("pool"), segment);
        Extents::read(fs_err::File::open(path).unwrap()).unwrap()
    }

    /// Fetches everything, as a worker would: first the data, then the pack out of it.
    pub fn fill(&self) {
        let mut segments = self.segments().to_vec();
        segments.sort_by_key(|segment| segment.kind == SegmentKind::Pack);
        for SegmentUse { segment, kind, size, .. } in segments {
            let mut options = fs_err::OpenOptions::new();
            let file = options.write(true).open(self.data_path(segment)).unwrap();
            let file = file.file();
            let extents = self.extents(segment);
            for extent in extents.iter() {
                let bytes = match extent.place {
                    Place::File { .. } => self.blob(&extent.key),
                    Place::Repeats { segment, record } => {
                        let home = self.extents(segment).get(record as usize).unwrap();
                        assert_eq!((home.key, home.size), (extent.key, extent.size));
                        let data = std::fs::File::open(self.data_path(segment)).unwrap();
                        let whole = ByteRange::new(0, u64::MAX);
                        let read = |at, buffer: &mut [u8]| {
                            data.read_exact_at(buffer, home.range.offset() + at)
                        };
                        pack::compose(extent.size, extent.range.len(), whole, read).unwrap()
                    }
                };
                assert_eq!(bytes.len() as u64, extent.range.len());
                file.write_all_at(&bytes, extent.range.offset()).unwrap();
            }
            assert_eq!(file.metadata().unwrap().len(), size);
            if kind == SegmentKind::Pack {
                let frame = Frame::of(&extents).unwrap();
                file.write_all_at(&frame.head, 0).unwrap();
                file.write_all_at(&frame.tail, frame.tail_at).unwrap();
                assert_eq!(frame.size(), size);
            }
        }
    }

    fn blob(&self, key: &ObjectId) -> Vec<u8> {
        run_with(git(&self.origin.dir).args(["cat-file", "blob", &key.to_string()]), b"")
    }

    /// Puts the pack beside its index, as the mounted tree has it.
    pub fn install_pack(&self, clone: &Path) {
        let pack = self.builder().built.pack.as_ref().unwrap();
        let segment = self.segments()[pack.device as usize].segment;
        let path = clone.join(format!(".git/objects/pack/{}.pack", pack.name));
        let _ = fs_err::remove_file(&path);
        let mut copy = std::process::Command::new("cp");
        copy.arg("--sparse=always").arg(self.data_path(segment)).arg(path);
        assert!(copy.status().unwrap().success());
    }
}

/// Content that no compression makes smaller.
pub fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}
