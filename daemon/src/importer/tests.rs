//! Whole imports from real repositories.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use super::attributes::{ATTRIBUTES, Config, converted, needs_attributes};
use super::testing::{Repository, TestOrigin, block_on, git, run, run_with};
use super::*;
use crate::manifest::Reader;
use crate::object::HashKind;

fn repository(dir: &tempfile::TempDir, hash: HashKind) -> Repository {
    let repository = Repository::new(dir.path().join("origin"), hash);
    let path = |name: &[u8]| repository.dir.join(std::ffi::OsStr::from_bytes(name));
    fs_err::create_dir_all(path(b"a/deep")).unwrap();
    fs_err::write(path(b"a/deep/file"), "content").unwrap();
    fs_err::write(path(b"a.c"), "content").unwrap();
    fs_err::write(path(b"a/odd \n\xff name"), "odd").unwrap();
    fs_err::write(path(b"tool"), "#!/bin/sh\n").unwrap();
    let executable = std::fs::Permissions::from_mode(0o755);
    fs_err::set_permissions(path(b"tool"), executable).unwrap();
    symlink("deep/file", path(b"a/link")).unwrap();
    fs_err::write(path(b"empty"), "").unwrap();
    fs_err::write(path(b".gitignore"), "*.o\n").unwrap();
    fs_err::write(path(b".gitattributes"), "*.bat eol=crlf\n").unwrap();
    fs_err::write(path(b"a/run.bat"), "echo\n").unwrap();
    fs_err::write(path(b"large"), vec![b'x'; 3 << 20]).unwrap();
    repository.commit();
    repository
}

/// The manifest as text, one line for each entry, and the contents by id.
fn imported(
    repository: &Repository,
    importer: Importer<Vec<u8>>,
) -> (Vec<String>, HashMap<ObjectId, Vec<u8>>) {
    let mut manifest = Vec::new();
    let stream = importer.write_manifest(&repository.revision(), &mut manifest).unwrap();
    let mut reader = Reader::new(&manifest[..]).unwrap();
    assert_eq!(reader.header().mtime, 1_700_000_000);
    let mut entries = Vec::new();
    while let Some((_, entry)) = reader.next_entry().unwrap() {
        let name = String::from_utf8_lossy(&entry.name);
        entries.push(format!("{} {name:?} {:?}", entry.parent, entry.kind));
    }
    let mut contents = HashMap::new();
    let mut reader = contents::Reader::new(&stream[..], repository.hash);
    while let Some((key, len)) = reader.next_object().unwrap() {
        let mut content = Vec::new();
        let sink = |_, piece: &[u8]| {
            content.extend_from_slice(piece);
            Ok(())
        };
        reader.content(&key, len, &mut vec![0; 1 << 16], sink).unwrap();
        contents.insert(key, content);
    }
    (entries, contents)
}

fn check_attributes(repository: &Repository) -> HashSet<Vec<u8>> {
    let mut list = git(&repository.dir);
    let paths = run_with(list.args(["ls-tree", "-r", "-z", "--name-only", "HEAD"]), b"");
    let mut check = git(&repository.dir);
    check.args(["check-attr", "-z", "--stdin"]).args(ATTRIBUTES);
    converted(&run_with(&mut check, &paths)[..], &Config::default()).unwrap()
}

#[test]
fn imports_a_repository() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let dir = tempfile::tempdir().unwrap();
        let repository = repository(&dir, hash);
        let commit = repository.id("HEAD");
        let link = format!("160000,{commit},module");
        run(&repository.dir, &["update-index", "--add", "--cacheinfo", &link]);
        run(&repository.dir, &["commit", "-qm", "a submodule"]);

        let origin = TestOrigin::new(&repository.dir);
        let mut importer = repository.importer();
        let mut pack = tempfile::tempfile().unwrap();
        let attributes = block_on(importer.eager(&origin, &mut pack)).unwrap();
        assert_eq!(attributes, [b"*.bat eol=crlf\n"]);
        assert!(needs_attributes(attributes.iter().map(Vec::as_slice), &Config::default()));
        // the pack is one that git takes
        let other = Repository::new(dir.path().join("other"), hash);
        take_pack(&other, pack);
        assert_eq!(run(&other.dir, &["cat-file", "blob", &blob(hash, b"deep/file")]), "deep/file");

        let paths = check_attributes(&repository);
        assert_eq!(paths, HashSet::from([b"a/run.bat".to_vec()]));
        let mut pack = tempfile::tempfile().unwrap();
        block_on(importer.convert(&origin, paths, &mut pack)).unwrap();
        take_pack(&other, pack);
        assert_eq!(run(&other.dir, &["cat-file", "blob", &blob(hash, b"echo\n")]), "echo");

        let sizes = block_on(importer.sizes(&origin)).unwrap();
        assert_eq!((sizes.blobs, sizes.told, sizes.known, sizes.fetched), (8, 5, 3, 0));
        let mut in_repository = Vec::new();
        importer.write_in_repository(&mut in_repository).unwrap();
        assert_eq!(in_repository.iter().filter(|b| **b == b'\n').count(), 4);

        let (entries, contents) = imported(&repository, importer);
        let file = |size: u64| format!("File {{ size: {size}, executable: false }}");
        assert_eq!(
            entries,
            [
                format!("0 \".gitattributes\" {}", file(15)),
                format!("0 \".gitignore\" {}", file(4)),
                format!("0 \"a.c\" {}", file(7)),
                "0 \"a\" Directory".to_owned(),
                "4 \"deep\" Directory".to_owned(),
                format!("5 \"file\" {}", file(7)),
                format!("4 \"link\" Symlink {{ target: {:?} }}", b"deep/file"),
                format!("4 \"odd \\n\u{fffd} name\" {}", file(3)),
                "4 \"run.bat\" Converted { executable: false }".to_owned(),
                format!("0 \"empty\" {}", file(0)),
                format!("0 \"large\" {}", file(3 << 20)),
                "0 \"module\" Gitlink".to_owned(),
                "0 \"tool\" File { size: 10, executable: true }".to_owned(),
            ]
        );
        let mut given: Vec<_> = contents.values().map(Vec::as_slice).collect();
        given.sort_unstable();
        assert_eq!(given, [&b"*.bat eol=crlf\n"[..], b"*.o\n", b"echo\n"]);
    }
}

fn blob(hash: HashKind, content: &[u8]) -> String {
    ObjectId::of_blob(hash, content).to_string()
}

fn take_pack(repository: &Repository, mut pack: File) {
    let mut bytes = Vec::new();
    pack.rewind().unwrap();
    pack.read_to_end(&mut bytes).unwrap();
    run_with(git(&repository.dir).args(["index-pack", "--stdin"]), &bytes);
}

#[test]
fn fetches_what_has_no_size_and_tries_again() {
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir, HashKind::Sha1);
    let mut origin = TestOrigin::new(&repository.dir);
    origin.object_info = false;
    let retry = |after| FetchError::Retry { message: "busy".into(), after };
    let wrong = || FetchError::Wrong { message: "a damaged pack".into() };
    let after = Some(Duration::from_millis(7));
    origin.faults = vec![retry(after), wrong()].into();
    let mut importer = repository.importer();
    block_on(importer.eager(&origin, &mut tempfile::tempfile().unwrap())).unwrap();
    origin.fetched.lock().unwrap().clear();
    let known = ObjectId::of_blob(HashKind::Sha1, b"odd");
    importer.know(&known, 3);
    // the last is the first answer: to the question for sizes; the next comes after an object
    origin.faults = vec![retry(after)].into();
    let sizes = block_on(importer.sizes(&origin)).unwrap();
    assert_eq!((sizes.told, sizes.fetched, sizes.known), (0, 5, 3));
    assert_eq!(sizes.fetched_bytes, 7 + 10 + 5 + (3 << 20));
    assert_eq!(origin.fetched.lock().unwrap().len(), 5);
    let (entries, contents) = imported(&repository, importer);
    assert_eq!(entries.len(), 12);
    assert_eq!(contents[&ObjectId::of_blob(HashKind::Sha1, &vec![b'x'; 3 << 20])].len(), 3 << 20);
    assert!(!contents.contains_key(&known));

    // what came before a fault is not asked for again
    let mut importer = repository.importer();
    origin.fetched.lock().unwrap().clear();
    let batch: Vec<_> = importer.unknown().into_iter().collect();
    origin.faults = vec![retry(after), retry(after)].into();
    block_on(importer.fetch_unknown(&origin, &batch)).unwrap();
    assert_eq!(origin.fetched.lock().unwrap().len(), 8 + 7 + 6);
}

#[test]
fn gives_up_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir, HashKind::Sha1);
    let origin = TestOrigin::new(&repository.dir);
    let refused = FetchError::Refused { message: "no".into() };
    origin.faults.lock().unwrap().push(refused);
    let mut importer = repository.importer();
    let error = block_on(importer.sizes(&origin)).unwrap_err();
    assert!(matches!(error, ImportError::Fetch { source: FetchError::Refused { .. }, .. }));
    let after = Some(Duration::from_millis(1));
    let busy = || FetchError::Retry { message: "busy".into(), after };
    origin.faults.lock().unwrap().extend((0..ATTEMPTS).map(|_| busy()));
    let error = block_on(importer.sizes(&origin)).unwrap_err();
    assert!(matches!(error, ImportError::Fetch { source: FetchError::Retry { .. }, .. }));
    assert!(origin.faults.lock().unwrap().is_empty());
}

/// Who withholds files is known before there is a tree that can't be read, also where nothing has to be
/// fetched for it.
#[test]
fn an_origin_that_withholds_files_is_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let plain = Repository::new(dir.path().join("plain"), HashKind::Sha1);
    fs_err::write(plain.dir.join("a"), "").unwrap();
    fs_err::write(plain.dir.join("b"), "content").unwrap();
    plain.commit();
    let with_eager_files = repository(&dir, HashKind::Sha1);
    let cases = [(plain, "HEAD:b", false), (with_eager_files, "HEAD:a.c", true)];
    for (repository, file, fetches) in cases {
        let origin = TestOrigin::new(&repository.dir);
        let eager = || {
            let mut pack = tempfile::tempfile().unwrap();
            block_on(repository.importer().eager(&origin, &mut pack))
        };
        eager().unwrap();
        let probed = std::mem::take(&mut *origin.probed.lock().unwrap());
        let file = repository.id(file);
        assert_eq!(probed, if fetches { vec![] } else { vec![file] });
        assert_ne!(origin.fetched.lock().unwrap().is_empty(), fetches);
        let missing = FetchError::Missing { key: file, message: "not our ref".into() };
        origin.faults.lock().unwrap().push(missing);
        let why = eager().unwrap_err().withheld().unwrap();
        assert!(why.contains("not our ref") && why.contains("allowAnySHA1InWant"), "{why}");
        let broken = FetchError::Refused { message: "no".into() };
        origin.faults.lock().unwrap().push(broken);
        let error = eager().map_err(|error| error.withheld().is_none());
        assert_eq!(error.map(drop), if fetches { Err(true) } else { Ok(()) });
    }
}

#[test]
fn a_link_that_can_t_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let repository = repository(&dir, HashKind::Sha1);
    let mut store = git(&repository.dir);
    let id = run_with(store.args(["hash-object", "-w", "--stdin"]), b"a\0b");
    let id = String::from_utf8(id).unwrap();
    let link = format!("120000,{},a/bad", id.trim_end());
    run(&repository.dir, &["update-index", "--add", "--cacheinfo", &link]);
    run(&repository.dir, &["commit", "-qm", "a bad link"]);
    let origin = TestOrigin::new(&repository.dir);
    let mut pack = tempfile::tempfile().unwrap();
    let error = block_on(repository.importer().eager(&origin, &mut pack)).unwrap_err();
    assert!(error.to_string().starts_with("\"a/bad\" can't be made"), "{error}");
}

/// What [`converted`] says against what git really writes.
#[test]
fn converts_what_git_converts() {
    let dir = tempfile::tempdir().unwrap();
    let repository = Repository::new(dir.path().join("origin"), HashKind::Sha1);
    let rules = [
        "text",
        "-text",
        "text=auto",
        "eol=lf",
        "eol=crlf",
        "text eol=crlf",
        "text=auto eol=crlf",
        "-text eol=crlf",
        "ident",
        "-ident",
        "filter=there",
        "filter=nowhere",
        "!text",
        "crlf",
        "-crlf",
        "crlf=input",
        "text=input",
        "working-tree-encoding=UTF-16LE",
        "working-tree-encoding=UTF-8",
        "binary",
        "text=input eol=crlf",
        "text=odd eol=crlf",
    ];
    let mut attributes = String::new();
    for (n, rule) in rules.iter().enumerate() {
        attributes += &format!("f{n} {rule}\n");
        fs_err::write(repository.dir.join(format!("f{n}")), "$Id$ line\nline\n").unwrap();
    }
    // stored as they are, before the attributes are there
    fs_err::write(repository.dir.join("other"), "$Id$ line\nline\n").unwrap();
    repository.commit();
    fs_err::write(repository.dir.join(".gitattributes"), &attributes).unwrap();
    run(&repository.dir, &["add", ".gitattributes"]);
    run(&repository.dir, &["commit", "-qm", "attributes"]);

    let configs: [(&[&str], Config); 6] = [
        (&[], Config::default()),
        (&["core.eol=crlf"], Config { eol_crlf: true, ..Config::default() }),
        (&["core.eol=lf"], Config::default()),
        (&["core.autocrlf=true"], Config { autocrlf: true, ..Config::default() }),
        (
            &["core.autocrlf=input", "core.eol=crlf"],
            Config { autocrlf_input: true, eol_crlf: true, ..Config::default() },
        ),
        (
            &["filter.there.smudge=tr a-z A-Z"],
            Config { filters: HashSet::from([b"there".to_vec()]), ..Config::default() },
        ),
    ];
    for (settings, config) in configs {
        let out = dir.path().join("out");
        let _ = fs_err::remove_dir_all(&out);
        fs_err::create_dir(&out).unwrap();
        let mut command = git(&repository.dir);
        settings.iter().for_each(|setting| _ = command.args(["-c", setting]));
        command.arg("--work-tree").arg(&out).args(["checkout", "-qf", "HEAD", "--", "."]);
        run_with(&mut command, b"");
        let mut check = git(&repository.dir);
        check.args(["check-attr", "-z", "--stdin"]).args(ATTRIBUTES);
        let paths = run(&repository.dir, &["ls-files", "-z"]);
        let said = converted(&run_with(&mut check, paths.as_bytes())[..], &config).unwrap();
        for name in paths.split_terminator('\0').filter(|name| *name != ".gitattributes") {
            let written = fs_err::read(out.join(name)).unwrap();
            let changed = written != b"$Id$ line\nline\n";
            let rule = name[1..].parse().map_or("(none)", |n: usize| rules[n]);
            assert_eq!(said.contains(name.as_bytes()), changed, "{rule} with {settings:?}");
            let needed = needs_attributes([attributes.as_bytes()], &config);
            assert!(needed || !changed, "{rule} with {settings:?}");
        }
    }
}

#[test]
fn files_are_in_the_past() {
    assert_eq!(file_time(100, 1000), 100);
    assert_eq!(file_time(999, 1000), 998);
    assert_eq!(file_time(5000, 1000), 998);
    assert_eq!(file_time(-5, 1000), 0);
}
