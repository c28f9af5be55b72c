//! The rules of containerd's snapshotters, over the snapshotter's socket: the cases of its own suite
//! (`core/snapshots/testsuite`), and what that does not ask.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_daemon::snapshotter::{REF, REMAP};
use hydrant_tests::grpc::Code;
use hydrant_tests::process::{Run, alive, until};
use hydrant_tests::registry::{Registry, listed, same_list};
use hydrant_tests::snapshots::{Connecting, Kind, Mounted, Snapshots, expect_refused, labels};
use hydrant_tests::world::World;

const PATIENCE: Duration = Duration::from_secs(60);

struct Suite {
    snapshots: Snapshots,
    world: World,
}

/// On all snapshots of the suite, as containerd's.
const ROOT: (&str, &str) = ("containerd.io/gc.root", "always");

impl Suite {
    fn new(name: &str) -> Result<Self> {
        let world = World::new(name)?;
        let snapshots = Snapshots::of(&world.daemon.directories().run);
        Ok(Self { snapshots, world })
    }

    /// What is said of a snapshot in one line: its parent and what it is.
    fn stat(&self, key: &str) -> Result<(String, Kind)> {
        let info = self.snapshots.stat(key)?;
        ensure!(info.name == key, "{key} is called {}", info.name);
        let kind = info.kind();
        Ok((info.parent, kind))
    }

    /// Makes an active snapshot and changes it; leaves it unmounted.
    fn change(
        &self,
        key: &str,
        parent: &str,
        change: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let mounts = self.snapshots.prepare(key, parent, &[ROOT])?;
        let mounted = Mounted::new(&mounts, &self.world.path("mounts").join(key))?;
        change(mounted.path())
    }

    /// As [`change`](Self::change), and commits it under the name `to`.
    fn layer(
        &self,
        to: &str,
        parent: &str,
        change: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let key = format!("{to}-preparing");
        self.change(&key, parent, change)?;
        self.snapshots.commit(to, &key, &[ROOT])
    }

    fn view(&self, key: &str, parent: &str) -> Result<Mounted> {
        let mounts = self.snapshots.view(key, parent, &[ROOT])?;
        Mounted::new(&mounts, &self.world.path("mounts").join(key))
    }

    /// Makes one layer of each change, and compares each with a plain directory that is changed the same way.
    fn compare(&self, changes: &[fn(&Path) -> Result<()>]) -> Result<()> {
        let flat = self.world.path("flat");
        fs_err::create_dir_all(&flat)?;
        let mut parent = String::new();
        for (number, change) in changes.iter().enumerate() {
            let name = format!("layer-{number}");
            self.layer(&name, &parent, |path| {
                same(&flat, path)?;
                change(path)?;
                change(&flat)?;
                same(&flat, path)
            })?;
            let view = format!("view-{number}");
            same(&flat, self.view(&view, &name)?.path())?;
            self.snapshots.remove(&view)?;
            parent = name;
        }
        Ok(())
    }
}

/// All but times and the root: who is copied up keeps the time, who is made has another.
fn same(expected: &Path, found: &Path) -> Result<()> {
    let shown = |path: &Path| -> Result<Vec<String>> {
        let listed = listed(path)?;
        // the second block has the times
        let lines = listed.lines().filter(|line| !line.starts_with(". ") && !has_time(line));
        Ok(lines.map(str::to_owned).collect())
    };
    let (expected, found) = (shown(expected)?, shown(found)?);
    ensure!(expected == found, "expected {expected:#?}, found {found:#?}");
    Ok(())
}

fn has_time(line: &str) -> bool {
    line.rsplit(' ').next().is_some_and(|word| word.len() > 15 && word.contains('.'))
}

fn file(directory: &Path, name: &str, content: &str, mode: u32) -> Result<()> {
    let path = directory.join(name);
    fs_err::write(&path, content)?;
    Ok(fs_err::set_permissions(path, PermissionsExt::from_mode(mode))?)
}

fn directory(parent: &Path, name: &str, mode: u32) -> Result<()> {
    let path = parent.join(name);
    fs_err::create_dir(&path)?;
    Ok(fs_err::set_permissions(path, PermissionsExt::from_mode(mode))?)
}

/// Basic: what is committed is seen in what is on top of it, and in views.
#[test]
#[ignore = "needs root"]
fn root_basic() -> Result<()> {
    let suite = Suite::new("snapshots-basic")?;
    let snapshots = &suite.snapshots;
    let first = |path: &Path| {
        file(path, "foo", "foo\n", 0o777)?;
        directory(path, "a", 0o755)?;
        directory(path, "a/b", 0o755)?;
        directory(path, "a/b/c", 0o755)
    };
    let second = |path: &Path| {
        file(path, "bar", "bar\n", 0o777)?;
        file(path, "foo", "bar\n", 0o777)?;
        Ok(fs_err::remove_dir_all(path.join("a/b"))?)
    };
    let flat = suite.world.path("flat");
    fs_err::create_dir(&flat)?;
    first(&flat)?;
    suite.layer("committed", "", first)?;
    ensure!(suite.stat("committed")? == (String::new(), Kind::Committed));
    expect_refused(snapshots.stat("committed-preparing"), Code::NotFound)?;
    suite.change("next", "committed", |path| {
        same(&flat, path)?;
        second(path)
    })?;
    ensure!(suite.stat("next")? == ("committed".into(), Kind::Active));
    snapshots.commit("next-committed", "next", &[ROOT])?;
    ensure!(suite.stat("next-committed")? == ("committed".into(), Kind::Committed));
    expect_refused(snapshots.stat("next"), Code::NotFound)?;
    let listed = snapshots.list(&[])?;
    for name in ["committed", "next-committed"] {
        ensure!(listed.contains(&snapshots.stat(name)?), "{name} is not listed: {listed:?}");
    }
    second(&flat)?;
    let view = suite.view("view", "next-committed")?;
    same(&flat, view.path())?;
    drop(view);
    snapshots.remove("view")?;
    expect_refused(snapshots.remove("committed"), Code::FailedPrecondition)?;
    snapshots.remove("next-committed")?;
    snapshots.remove("committed")?;
    ensure!(snapshots.list(&[])?.is_empty());
    let left = fs_err::read_dir(suite.world.daemon.directories().state.join("snapshots"))?.count();
    ensure!(left == 0, "{left} directories are left");
    Ok(())
}

/// StatActive, StatCommitted, Transitivity, RootPermission; commits and removals that are refused.
#[test]
#[ignore = "needs root"]
fn root_stat_and_kinds() -> Result<()> {
    let suite = Suite::new("snapshots-stat")?;
    let snapshots = &suite.snapshots;
    suite.change("preparing", "", |path| {
        let mode = fs_err::metadata(path)?.permissions().mode() & 0o7777;
        ensure!(mode == 0o755, "the root has mode {mode:o}");
        file(path, "foo", "foo\n", 0o644)
    })?;
    ensure!(suite.stat("preparing")? == (String::new(), Kind::Active));
    snapshots.commit("a", "preparing", &[ROOT])?;
    suite.layer("b", "a", |path| file(path, "foo", "foo bar\n", 0o644))?;
    ensure!(suite.stat("a")? == (String::new(), Kind::Committed));
    ensure!(suite.stat("b")? == ("a".into(), Kind::Committed));

    expect_refused(snapshots.stat("c"), Code::NotFound)?;
    expect_refused(snapshots.mounts("c"), Code::NotFound)?;
    expect_refused(snapshots.usage("c"), Code::NotFound)?;
    expect_refused(snapshots.remove("c"), Code::NotFound)?;
    expect_refused(snapshots.commit("d", "c", &[]), Code::NotFound)?;
    expect_refused(snapshots.prepare("d", "c", &[]), Code::NotFound)?;
    expect_refused(snapshots.prepare("", "", &[]), Code::InvalidArgument)?;
    expect_refused(snapshots.mounts("a"), Code::FailedPrecondition)?;
    expect_refused(snapshots.commit("d", "a", &[]), Code::FailedPrecondition)?;
    snapshots.prepare("active", "b", &[])?;
    snapshots.view("view", "b", &[])?;
    expect_refused(snapshots.commit("d", "view", &[]), Code::FailedPrecondition)?;
    expect_refused(snapshots.commit("a", "active", &[]), Code::AlreadyExists)?;
    expect_refused(snapshots.prepare("d", "active", &[]), Code::InvalidArgument)?;
    ensure!(snapshots.mounts("active")? == snapshots.mounts("active")?);
    expect_refused(snapshots.list(&["name~=a"]), Code::InvalidArgument)?;
    snapshots.cleanup()?;
    ensure!(snapshots.names(&[])? == ["a", "active", "b", "view"]);
    Ok(())
}

/// For user namespaces: what a snapshot is on top of has other owners there, and nowhere else.
#[test]
#[ignore = "needs root"]
fn root_user_namespaces() -> Result<()> {
    let mut suite = Suite::new("snapshots-remap")?;
    let snapshots = suite.snapshots.clone();
    let mount = |suite: &Suite, key: &str| {
        Mounted::new(&snapshots.mounts(key)?, &suite.world.path("mounts").join(key))
    };
    let owner = |path: &Path| {
        let found = fs_err::symlink_metadata(path)?;
        Ok::<_, anyhow::Error>((found.uid(), found.gid()))
    };
    let labels = [(REMAP[0], "0:100000:65536"), (REMAP[1], "0:200000:65536")];
    suite.layer("low", "", |path| {
        file(path, "theirs", "theirs\n", 0o644)?;
        file(path, "nobody's", "nobody's\n", 0o644)?;
        chown(path.join("theirs"), Some(33), Some(34))?;
        Ok(chown(path.join("nobody's"), Some(70_000), Some(34))?)
    })?;
    snapshots.prepare("layer-preparing", "low", &[])?;
    snapshots.commit("layer", "layer-preparing", &[(REF, "sha256:a")])?;
    for wrong in [&labels[..1], &[(REMAP[0], "0:1:1"), (REMAP[1], "1:1:1")]] {
        expect_refused(snapshots.prepare("wrong", "layer", wrong), Code::InvalidArgument)?;
    }
    let several = [(REMAP[0], "33:7:1,0:300000:1"), (REMAP[1], "0:400000:30,30:500000:10")];
    snapshots.prepare("one", "layer", &labels)?;
    snapshots.prepare("other", "layer", &several)?;
    snapshots.view("view", "low", &labels)?;
    snapshots.prepare("on-nothing", "", &labels)?;
    let expect = |suite: &Suite| {
        let one = mount(suite, "one")?;
        ensure!(owner(one.path())? == (100_000, 200_000));
        ensure!(owner(&one.path().join("theirs"))? == (100_033, 200_034));
        ensure!(owner(&one.path().join("nobody's"))? == (65_534, 200_034));
        let other = mount(suite, "other")?;
        ensure!(owner(other.path())? == (300_000, 400_000));
        ensure!(owner(&other.path().join("theirs"))? == (7, 500_004));
        let view = mount(suite, "view")?;
        ensure!(owner(view.path())? == (100_000, 200_000));
        ensure!(owner(&view.path().join("theirs"))? == (100_033, 200_034));
        let written = fs_err::write(view.path().join("theirs"), "x").unwrap_err();
        ensure!(written.kind() == std::io::ErrorKind::ReadOnlyFilesystem, "{written}");
        ensure!(owner(mount(suite, "on-nothing")?.path())? == (100_000, 200_000));
        Ok(())
    };
    let state = suite.world.daemon.directories().state.clone();
    let count = |name: &str| Ok::<_, anyhow::Error>(fs_err::read_dir(state.join(name))?.count());
    for all_at_once in [false, true] {
        expect(&suite)?;
        ensure!(count("mapped")? == 3);
        if all_at_once {
            suite.world.daemon.kill();
        } else {
            suite.world.daemon.stop()?;
            ensure!(count("mapped")? == 0, "something is mounted yet");
        }
        suite.world.daemon.start()?;
    }
    expect(&suite)?;
    {
        // who writes to a file makes it one of the snapshot's own: it keeps its owner
        let one = mount(&suite, "one")?;
        fs_err::write(one.path().join("theirs"), "ours\n")?;
        ensure!(owner(&one.path().join("theirs"))? == (100_033, 200_034));
    }
    let plain = suite.view("plain", "layer")?;
    ensure!(owner(&plain.path().join("theirs"))? == (33, 34), "it is changed in the layer");
    ensure!(fs_err::read(plain.path().join("theirs"))? == b"theirs\n");
    drop(plain);
    snapshots.commit("committed", "one", &[])?;
    for name in ["other", "view", "on-nothing", "plain", "committed"] {
        snapshots.remove(name)?;
    }
    ensure!(count("mapped")? == 0, "something is mounted yet");

    // what containerd does that does not know this
    let key = "default/1/layer-100000-200000-remap";
    let mounts = snapshots.prepare(key, "layer", &labels)?;
    let mounted = Mounted::new(&mounts, &suite.world.path("remap"))?;
    ensure!(owner(mounted.path())? == (0, 0));
    chown(mounted.path(), Some(100_000), Some(200_000))?;
    drop(mounted);
    snapshots.commit("remapped", key, &[])?;
    let mounts = snapshots.prepare("container", "remapped", &labels)?;
    let mounted = Mounted::new(&mounts, &suite.world.path("container"))?;
    ensure!(owner(mounted.path())? == (100_000, 200_000));
    drop(mounted);
    ensure!(snapshots.names(&[])? == ["container", "layer", "low", "remapped"]);
    ensure!(count("snapshots")? == 4 && count("mapped")? == 0);
    Ok(())
}

/// PrepareView: one name, one snapshot.
#[test]
#[ignore = "needs root"]
fn root_names_are_unique() -> Result<()> {
    let suite = Suite::new("snapshots-names")?;
    let snapshots = &suite.snapshots;
    suite.layer("a", "", |_| Ok(()))?;
    snapshots.prepare("new", "a", &[ROOT])?;
    expect_refused(snapshots.view("new", "a", &[ROOT]), Code::AlreadyExists)?;
    expect_refused(snapshots.prepare("new", "a", &[ROOT]), Code::AlreadyExists)?;
    snapshots.view("view", "a", &[ROOT])?;
    expect_refused(snapshots.view("view", "a", &[ROOT]), Code::AlreadyExists)?;
    // nothing is left of what was refused: "a", "new", "view"
    let left = fs_err::read_dir(suite.world.daemon.directories().state.join("snapshots"))?.count();
    ensure!(left == 3, "{left} directories");
    Ok(())
}

/// Update: labels can be changed, nothing else.
#[test]
#[ignore = "needs root"]
fn root_update() -> Result<()> {
    let suite = Suite::new("snapshots-update")?;
    let snapshots = &suite.snapshots;
    snapshots.prepare("c1-a", "", &[ROOT])?;
    snapshots.commit("c1", "c1-a", &[ROOT])?;
    snapshots.prepare("c2-a", "c1", &[ROOT])?;
    snapshots.commit("c2", "c2-a", &[ROOT])?;
    snapshots.prepare("a1", "c2", &[ROOT])?;
    snapshots.prepare("a2", "", &[ROOT])?;
    snapshots.view("v1", "c2", &[ROOT])?;
    snapshots.view("v2", "", &[ROOT])?;
    for (name, kind, parent) in [
        ("c1", Kind::Committed, ""),
        ("c2", Kind::Committed, "c1"),
        ("a1", Kind::Active, "c2"),
        ("a2", Kind::Active, ""),
        ("v1", Kind::View, "c2"),
        ("v2", Kind::View, ""),
    ] {
        let mut info = snapshots.stat(name)?;
        let made = info.created_at;
        ensure!(made.is_some() && info.updated_at == made, "{info:?}");
        info.parent = "doesnotexist".into();
        info.labels = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), ROOT]);
        let expected = info.labels.clone();
        let mut info = snapshots.update(info, &[])?;
        ensure!(info.created_at == made && info.updated_at >= made, "{info:?}");
        ensure!((info.kind(), info.parent.as_str(), info.name.as_str()) == (kind, parent, name));
        ensure!(info.labels == expected, "{info:?}");
        info.labels = labels(&[("l1", "updated"), ("l4", "v4")]);
        let mut info = snapshots.update(info, &["labels.l1", "labels.l2"])?;
        ensure!(info.labels == labels(&[("l1", "updated"), ("l3", "v3"), ROOT]), "{info:?}");
        info.labels = labels(&[("l4", "v4"), ROOT]);
        let expected = info.labels.clone();
        let info = snapshots.update(info, &["labels"])?;
        ensure!(info.labels == expected, "{info:?}");
        expect_refused(snapshots.update(info.clone(), &["parent"]), Code::InvalidArgument)?;
        ensure!(snapshots.stat(name)? == info);
    }
    Ok(())
}

/// Remove, RemoveIntermediateSnapshot: from the top only; a name is free again.
#[test]
#[ignore = "needs root"]
fn root_remove() -> Result<()> {
    let suite = Suite::new("snapshots-remove")?;
    let snapshots = &suite.snapshots;
    snapshots.prepare("committed-a", "", &[ROOT])?;
    snapshots.commit("committed-1", "committed-a", &[ROOT])?;
    snapshots.prepare("reuse-1", "committed-1", &[ROOT])?;
    snapshots.remove("reuse-1")?;
    snapshots.view("reuse-1", "committed-1", &[ROOT])?;
    snapshots.remove("reuse-1")?;
    snapshots.prepare("reuse-1", "", &[ROOT])?;
    snapshots.remove("committed-1")?;
    snapshots.commit("committed-1", "reuse-1", &[ROOT])?;

    snapshots.prepare("between", "committed-1", &[ROOT])?;
    snapshots.commit("committed-2", "between", &[ROOT])?;
    snapshots.prepare("top", "committed-2", &[ROOT])?;
    expect_refused(snapshots.remove("committed-2"), Code::FailedPrecondition)?;
    // what could not be removed is not removed at the next start either
    let mounts = snapshots.mounts("top")?;
    drop(Mounted::new(&mounts, &suite.world.path("top"))?);
    for name in ["top", "committed-2", "committed-1"] {
        snapshots.remove(name)?;
    }
    ensure!(snapshots.list(&[])?.is_empty());
    Ok(())
}

/// Walk, StatInWalk: filters.
#[test]
#[ignore = "needs root"]
fn root_list() -> Result<()> {
    let suite = Suite::new("snapshots-list")?;
    let snapshots = &suite.snapshots;
    let root = ("containerd.io/gc.root", "check-walk");
    snapshots.prepare("a-np", "", &[root])?;
    snapshots.prepare("p-tmp", "", &[root])?;
    snapshots.commit("p", "p-tmp", &[root])?;
    snapshots.prepare("a", "p", &[root])?;
    snapshots.view("v", "p", &[root])?;
    snapshots.prepare("p-wl-tmp", "", &[root])?;
    snapshots.commit("p-wl", "p-wl-tmp", &[("l", "1"), root])?;
    snapshots.prepare("a-wl", "p-wl", &[("l", "2"), root])?;
    snapshots.view("v-wl", "p-wl", &[("l", "3"), root])?;
    snapshots.prepare("a-np-wl", "", &[("l", "2"), root])?;
    let with_root = "labels.\"containerd.io/gc.root\"==check-walk";
    let and_root = |what: &str| format!("{what},{with_root}");
    let cases: [(&[&str], &[&str]); 10] = [
        (&[with_root], &["a", "a-np", "a-np-wl", "a-wl", "p", "p-wl", "v", "v-wl"]),
        (&[&and_root("kind==active")], &["a", "a-np", "a-np-wl", "a-wl"]),
        (&[&and_root("kind==view")], &["v", "v-wl"]),
        (&[&and_root("kind==committed")], &["p", "p-wl"]),
        (&["name==p", "name==a-np-wl"], &["a-np-wl", "p"]),
        (&["name==a-wl,labels.l"], &["a-wl"]),
        (&["parent==p"], &["a", "v"]),
        (&[&and_root("parent!=\"\"")], &["a", "a-wl", "v", "v-wl"]),
        (&["labels.l"], &["a-np-wl", "a-wl", "p-wl", "v-wl"]),
        (&["labels.l==2"], &["a-np-wl", "a-wl"]),
    ];
    for (filters, expected) in cases {
        let found = snapshots.names(filters)?;
        ensure!(found == expected, "{filters:?}: {found:?}");
    }
    for info in snapshots.list(&[])? {
        ensure!(snapshots.stat(&info.name)? == info, "{info:?}");
    }
    Ok(())
}

/// More than fit into one message of the answer.
#[test]
#[ignore = "needs root"]
fn root_long_list() -> Result<()> {
    let suite = Suite::new("snapshots-long-list")?;
    for number in 0..230 {
        suite.snapshots.view(&format!("v{number:03}"), "", &[ROOT])?;
    }
    let names = suite.snapshots.names(&[])?;
    ensure!(names.len() == 230 && names.last().is_some_and(|name| name == "v229"), "{names:?}");
    Ok(())
}

/// LayerFileUpdate, RemoveDirectoryInLowerLayer, DeletedFilesInChildSnapshot, MoveFileFromLowerLayer.
#[test]
#[ignore = "needs root"]
fn root_changes_of_lower_layers() -> Result<()> {
    let suite = Suite::new("snapshots-changes")?;
    suite.compare(&[
        |path| {
            for n in 0..20 {
                file(path, &format!("file-{n}"), &"x".repeat(n * 1000), 0o644)?;
            }
            file(path, "foobar", "foobar\n", 0o777)?;
            directory(path, "dir1", 0o700)?;
            file(path, "dir1/f1", "Hello", 0o644)?;
            directory(path, "dir2", 0o700)?;
            file(path, "dir2/f2", "...", 0o644)?;
            Ok(symlink("dir2/f2", path.join("link"))?)
        },
        |path| {
            for n in 0..20 {
                file(path, &format!("file-{n}"), &"y".repeat(n), 0o600)?;
            }
            fs_err::remove_file(path.join("foobar"))?;
            fs_err::remove_dir_all(path.join("dir1"))?;
            directory(path, "dir3", 0o700)?;
            file(path, "dir3/f1", "Hello", 0o644)?;
            fs_err::hard_link(path.join("dir2/f2"), path.join("dir3/f2"))?;
            Ok(fs_err::remove_file(path.join("dir2/f2"))?)
        },
        |path| {
            // there was one of that name
            directory(path, "dir1", 0o755)?;
            file(path, "dir1/f2", "other", 0o644)?;
            fs_err::remove_file(path.join("link"))?;
            directory(path, "link", 0o711)
        },
        |_| Ok(()),
    ])
}

/// Chown, DirectoryPermissionOnCommit: owners and modes go from layer to layer, the root's too.
#[test]
#[ignore = "needs root"]
fn root_owners_and_modes() -> Result<()> {
    let suite = Suite::new("snapshots-owners")?;
    suite.compare(&[
        |path| {
            for (name, mode) in
                [("opt", 0o755), ("opt/a", 0o755), ("dir2", 0o777), ("dir3", 0o1777)]
            {
                directory(path, name, mode)?;
            }
            file(path, "opt/a/b", "hello", 0o644)?;
            directory(path, "dir1", 0o700)?;
            Ok(chown(path.join("dir1"), Some(1), Some(2))?)
        },
        |path| {
            chown(path.join("opt"), Some(1), Some(1))?;
            chown(path.join("opt/a/b"), Some(3), Some(4))?;
            fs_err::set_permissions(path.join("dir2"), PermissionsExt::from_mode(0o2750))?;
            directory(path, "dir1/d", 0o711)
        },
        |path| Ok(chown(path.join("dir3"), Some(70_000), Some(3_000_000))?),
    ])?;
    suite.layer("owned", "layer-2", |path| Ok(chown(path, Some(5), Some(6))?))?;
    suite.change("on-top", "owned", |path| {
        let owner = fs_err::metadata(path)?.uid();
        ensure!(owner == 5, "the root belongs to {owner}");
        Ok(())
    })
}

/// ViewReadonly: whatever is below.
#[test]
#[ignore = "needs root"]
fn root_views_are_read_only() -> Result<()> {
    let suite = Suite::new("snapshots-views")?;
    suite.layer("one", "", |path| file(path, "a", "a", 0o644))?;
    suite.layer("two", "one", |path| file(path, "b", "b", 0o644))?;
    for parent in ["", "one", "two"] {
        let view = suite.view("view", parent)?;
        let written = std::fs::write(view.path().join("testfile"), b"x");
        let error = written.err().with_context(|| format!("a view of {parent:?} is writable"))?;
        ensure!(error.raw_os_error() == Some(libc::EROFS), "{error}");
        drop(view);
        suite.snapshots.remove("view")?;
    }
    Ok(())
}

/// 128LayersMount.
#[test]
#[ignore = "needs root"]
fn root_128_layers() -> Result<()> {
    let suite = Suite::new("snapshots-128")?;
    let flat = suite.world.path("flat");
    fs_err::create_dir(&flat)?;
    let mut parent = String::new();
    for n in 0..128 {
        let change = |path: &Path| {
            file(path, "overwriteme", &format!("{n} WAS HERE!\n"), 0o777)?;
            if n == 0 {
                file(path, "bottom", "way at the bottom\n", 0o777)?;
                directory(path, "addhere", 0o755)?;
            } else {
                file(path, &format!("addhere/file-{n}"), "same\n", 0o755)?;
                fs_err::remove_dir_all(path.join("onlyme"))?;
            }
            directory(path, "onlyme", 0o755)?;
            file(path, &format!("onlyme/file-{n}"), "only me!\n", 0o777)
        };
        let name = format!("c{n}");
        suite.layer(&name, &parent, change)?;
        change(&flat)?;
        parent = name;
    }
    same(&flat, suite.view("full", &parent)?.path())
}

/// Usage: of what is on top of the parent.
#[test]
#[ignore = "needs root"]
fn root_usage() -> Result<()> {
    let suite = Suite::new("snapshots-usage")?;
    let fill = |path: &Path| {
        fs_err::write(path.join("big"), vec![7; 1 << 20])?;
        fs_err::hard_link(path.join("big"), path.join("same"))?;
        Ok(fs_err::File::open(path.join("big"))?.sync_all()?)
    };
    suite.change("active", "", fill)?;
    let usage = suite.snapshots.usage("active")?;
    ensure!(usage.inodes == 2 && (1 << 20..(1 << 20) + 65536).contains(&usage.size), "{usage:?}");
    suite.snapshots.commit("committed", "active", &[])?;
    ensure!(suite.snapshots.usage("committed")? == usage);
    suite.snapshots.prepare("on-top", "committed", &[])?;
    let usage = suite.snapshots.usage("on-top")?;
    ensure!(usage.inodes == 1 && usage.size < 65536, "{usage:?}");
    Ok(())
}

/// A daemon that is killed and started again has them all; one that is stopped too.
#[test]
#[ignore = "needs root"]
fn root_snapshots_outlive_the_daemon() -> Result<()> {
    let mut suite = Suite::new("snapshots-restart")?;
    suite.layer("committed", "", |path| file(path, "a", "a", 0o644))?;
    suite.change("active", "committed", |path| file(path, "b", "b", 0o644))?;
    let before = suite.snapshots.list(&[])?;
    let mounts = suite.snapshots.mounts("active")?;
    for round in 0..2 {
        match round {
            0 => suite.world.daemon.stop()?,
            _ => suite.world.daemon.kill(),
        }
        suite.world.daemon.start()?;
        ensure!(suite.snapshots.list(&[])? == before);
        ensure!(suite.snapshots.mounts("active")? == mounts);
        let mounted = Mounted::new(&mounts, &suite.world.path("again"))?;
        ensure!(fs_err::read(mounted.path().join("a"))? == b"a");
        ensure!(fs_err::read(mounted.path().join("b"))? == b"b");
    }
    suite.snapshots.remove("active")?;
    suite.snapshots.remove("committed")
}

/// Whoever is killed or replaced, but for all at once: who calls waits.
#[test]
#[ignore = "needs root"]
fn root_the_socket_is_never_closed() -> Result<()> {
    let mut suite = Suite::new("snapshots-socket")?;
    suite.layer("committed", "", |_| Ok(()))?;
    let names = || suite.snapshots.names(&[]);
    let connecting = Connecting::to(suite.snapshots.socket());
    for round in 0..4 {
        if round % 2 == 0 {
            let killed = suite.world.daemon.kill_supervisor()?;
            until("it is dead", PATIENCE, || (!alive(killed)).then_some(()))?;
        } else {
            suite.world.daemon.check(&["reload"])?;
        }
        ensure!(names()? == ["committed"]);
    }
    connecting.finish()?;
    suite.world.daemon.stop()?;
    ensure!(suite.snapshots.cleanup().is_err(), "somebody answers");
    suite.world.daemon.start()?;
    suite.snapshots.remove("committed")
}

/// Layers that are here are snapshots without being unpacked: by chain IDs, whoever asks; whatever is not that layer is an
/// ordinary snapshot. They outlive the daemon.
#[test]
#[ignore = "needs root"]
fn root_layers_are_snapshots() -> Result<()> {
    let mut suite = Suite::new("snapshots-layers")?;
    let registry = Registry::start(&suite.world.path("registry"))?;
    registry.push("odd", "v1", "odd")?;
    let image = format!("127.0.0.1:{}/odd:v1", registry.port());
    suite.world.daemon.check(&["image", "pull", &image])?;
    let mut chains: Vec<String> = Vec::new();
    for layer in ["0.tar", "1.tar", "2.tar"] {
        let sum = "sha256sum <\"$1\" | cut -d' ' -f1";
        let diff_id = Run::shell(sum, &[&registry.layers("odd").join(layer)]).check()?.text();
        let below = chains.last().map(|below| format!("{below} "));
        let chain = match below {
            None => diff_id,
            Some(below) => {
                let both = format!("{below}sha256:{diff_id}");
                Run::shell("sha256sum | cut -d' ' -f1", &[]).input(both).check()?.text()
            }
        };
        chains.push(format!("sha256:{chain}"));
    }
    let state = suite.world.daemon.directories().state.clone();
    let mounted = || -> Result<usize> { Ok(fs_err::read_dir(state.join("layers"))?.count()) };
    let snapshots = suite.snapshots.clone();
    let mut parent = String::new();
    for (n, chain) in chains.iter().enumerate() {
        let prepare = || snapshots.prepare(&format!("extract-{n}"), &parent, &[(REF, chain)]);
        expect_refused(prepare(), Code::AlreadyExists)?;
        // for another namespace of containerd's
        expect_refused(prepare(), Code::AlreadyExists)?;
        let filter = format!("labels.{REF:?}=={chain},parent=={parent:?}");
        let found = snapshots.list(&[&filter])?;
        ensure!(found.len() == 1 && found[0].kind() == Kind::Committed, "{found:?}");
        ensure!(snapshots.usage(&found[0].name)?.size > 0);
        parent = found[0].name.clone();
        ensure!(mounted()? == n + 1);
    }
    let expected = registry.unpacked("odd")?;
    same_list(&expected, &listed(suite.view("view", &parent)?.path())?)?;
    snapshots.remove("view")?;

    // not a layer on top of that one
    snapshots.prepare("other", &chains[0], &[(REF, &chains[2])])?;
    // a layer, on top of what was unpacked of the same image
    snapshots.prepare("base-preparing", "", &[])?;
    snapshots.commit("base", "base-preparing", &[(REF, &chains[0])])?;
    expect_refused(snapshots.prepare("x", "base", &[(REF, &chains[1])]), Code::AlreadyExists)?;
    let found = snapshots.list(&["parent==base"])?;
    ensure!(found.len() == 1 && found[0].name.starts_with(&format!("{}#", chains[1])), "{found:?}");
    // on top of what is no image's
    suite.layer("plain", "", |_| Ok(()))?;
    snapshots.prepare("y", "plain", &[(REF, &chains[1])])?;
    snapshots.remove(&found[0].name)?;
    ensure!(mounted()? == 3, "a layer that another snapshot has is unmounted");

    let said = suite.world.daemon.hydrant(&["image", "evict", &image])?.check()?.text();
    ensure!(said.contains('3'), "layers that snapshots have are evicted: {said}");
    for all_at_once in [false, true] {
        if all_at_once {
            suite.world.daemon.kill();
        } else {
            suite.world.daemon.stop()?;
            ensure!(mounted()? == 0);
        }
        suite.world.daemon.start()?;
        ensure!(mounted()? == 0, "layers that nobody guarded are mounted");
        same_list(&expected, &listed(suite.view("view", &parent)?.path())?)?;
        snapshots.remove("view")?;
    }
    for name in ["other", "y", "plain", "base", &chains[2], &chains[1], &chains[0]] {
        snapshots.remove(name)?;
    }
    ensure!(mounted()? == 0 && snapshots.list(&[])?.is_empty());
    suite.world.daemon.check(&["image", "rm", &image])?;
    let left = fs_err::read_dir(state.join("trees"))?.count();
    ensure!(left == 0, "{left} images of layers are left");
    Ok(())
}

/// Nobody but root may ask.
#[test]
#[ignore = "needs root"]
fn root_only_root_may_connect() -> Result<()> {
    let suite = Suite::new("snapshots-root")?;
    let socket = suite.snapshots.socket();
    let mode = fs_err::metadata(socket)?.permissions().mode() & 0o7777;
    ensure!(mode == 0o600, "the socket has mode {mode:o}");
    // whatever its mode is
    fs_err::set_permissions(socket, PermissionsExt::from_mode(0o666))?;
    let place = suite.world.path("nobody");
    fs_err::create_dir(&place)?;
    chown(&place, Some(65534), Some(65534))?;
    let forwarded = place.join("containerd.sock");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args(["/usr/bin/python3", "-c", FORWARD]).arg(&forwarded).arg(socket);
    let _nobody = Run::new(command).time_out(Duration::from_secs(600)).start()?;
    let snapshots = Snapshots::of(&place);
    until("somebody connects for us", PATIENCE, || {
        UnixStream::connect(&forwarded).is_ok().then_some(())
    })?;
    expect_refused(snapshots.cleanup(), Code::PermissionDenied)?;
    expect_refused(snapshots.list(&[]), Code::PermissionDenied)
}

/// Listens at a path, and connects to another for who comes.
const FORWARD: &str = r#"
import socket, sys, threading

def copy(source, to):
    while data := source.recv(1 << 16):
        to.sendall(data)
    to.shutdown(socket.SHUT_WR)

server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
while True:
    client, upstream = server.accept()[0], socket.socket(socket.AF_UNIX)
    upstream.connect(sys.argv[2])
    for pair in [(client, upstream), (upstream, client)]:
        threading.Thread(target=copy, args=pair, daemon=True).start()
"#;
