use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use hydrant_api::Owner;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::ids::{PoolId, SegmentId, TreeId};
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::{GitOrigin, GitTransport};
use crate::segment::SegmentKind;

const ALICE: Owner = Owner { uid: 1000, gid: 100 };
const BOB: Owner = Owner { uid: 1001, gid: 100 };

struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("catalog.sqlite")
    }

    fn open(&self) -> Catalog {
        Catalog::open(&self.path()).unwrap()
    }

    fn put(&self, name: &str) {
        let path = self.root.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
}

fn pool_of(owner: Owner) -> NewPool {
    NewPool {
        url: "https://example.org/a.git".into(),
        owner,
        hash: HashKind::Sha1,
        origin: json!({ "transport": "pipe" }),
        environment: vec![("HOME".into(), "/home/a".into())],
    }
}

fn commit(text: &str) -> ObjectId {
    ObjectId::of_blob(HashKind::Sha1, text.as_bytes())
}

/// A tree with `new` segments of its own besides those in `old`.
async fn add_tree(catalog: &Catalog, pool: PoolId, old: &[SegmentId], new: u64) -> NewTree {
    let id = catalog.allocate_tree().await.unwrap();
    let fresh = catalog.allocate_segments(new).await.unwrap();
    let segments: Vec<NewSegment> =
        fresh.iter().map(|&id| NewSegment { id, kind: SegmentKind::Data, size: 8192 }).collect();
    let tree = NewTree {
        id,
        pool,
        commit: commit(&id.to_string()),
        root: commit("root"),
        revision: "main".into(),
        image: format!("{id}.erofs"),
        // Not in the order of their numbers.
        segments: fresh.iter().rev().chain(old).copied().collect(),
        files: 3,
        bytes: 1 << 40,
        implicit: 0,
        owner: ALICE,
    };
    catalog.insert_tree(tree.clone(), segments).await.unwrap();
    tree
}

async fn add_mount(catalog: &Catalog, tree: &NewTree, directory: &[u8]) -> NewMount {
    let mount = NewMount {
        id: catalog.allocate_mount().await.unwrap(),
        tree: tree.id,
        directory: OsStr::from_bytes(directory).into(),
        read_only: false,
        owner: ALICE,
        mounted: true,
        pack: Some("pack-1".into()),
        history: "fetching".into(),
        image: None,
    };
    catalog.insert_mount(mount.clone()).await.unwrap();
    mount
}

#[tokio::test]
async fn what_was_written_is_there_after_a_reopen() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap();
    let tree = add_tree(&catalog, pool.id, &[], 3).await;
    let mount = add_mount(&catalog, &tree, b"/srv/\xff").await;
    catalog.set_complete(tree.segments[0], true).await.unwrap();
    catalog.close().await;

    let catalog = place.open();
    assert_eq!(catalog.pools().await.unwrap(), std::slice::from_ref(&pool));
    assert_eq!(catalog.pool(pool.id).await.unwrap(), Some(pool.clone()));
    let read = catalog.tree(tree.id).await.unwrap().unwrap();
    assert_eq!(
        (read.segments.clone(), read.commit, read.bytes),
        (tree.segments, tree.commit, 1 << 40)
    );
    assert_eq!(catalog.trees().await.unwrap(), std::slice::from_ref(&read));
    let segments = catalog.segments(pool.id).await.unwrap();
    let complete: Vec<_> = segments.iter().filter(|s| s.complete).map(|s| s.id).collect();
    assert_eq!((segments.len(), complete), (3, vec![read.segments[0]]));
    let found = catalog.mount_by_directory(&mount.directory).await.unwrap().unwrap();
    assert_eq!((found.id, &found.directory, found.mounted), (mount.id, &mount.directory, true));
    assert_eq!(catalog.mounts().await.unwrap(), [found]);
}

#[tokio::test]
async fn the_files_are_nobody_elses_business() {
    let place = Place::new();
    place.put("catalog.sqlite");
    let catalog = place.open();
    catalog.allocate_tree().await.unwrap();
    for entry in std::fs::read_dir(place.root.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.file_name());
    }
}

#[tokio::test]
async fn a_pool_is_one_users() {
    let place = Place::new();
    let catalog = place.open();
    let alice = catalog.pool_for(pool_of(ALICE)).await.unwrap();
    let bob = catalog.pool_for(pool_of(BOB)).await.unwrap();
    assert_ne!(alice.id, bob.id);
    let environment = vec![("HOME".to_owned(), "/elsewhere".to_owned())];
    let again = NewPool { environment: environment.clone(), ..pool_of(ALICE) };
    let again = catalog.pool_for(again).await.unwrap();
    assert_eq!(again, Pool { environment, ..alice.clone() });
    let other = NewPool { hash: HashKind::Sha256, ..pool_of(ALICE) };
    let other = catalog.pool_for(other).await.unwrap();
    assert_ne!(other.id, alice.id);
    let find = |uid, hash| catalog.find_pool(alice.url.clone(), uid, hash);
    assert_eq!(find(ALICE.uid, HashKind::Sha1).await.unwrap().unwrap().id, alice.id);
    assert_eq!(find(ALICE.uid, HashKind::Sha256).await.unwrap().unwrap().id, other.id);
    assert_eq!(find(BOB.uid, HashKind::Sha1).await.unwrap().unwrap().id, bob.id);
    assert_eq!(find(BOB.uid, HashKind::Sha256).await.unwrap(), None);
}

#[tokio::test]
async fn a_tree_is_shared_by_those_it_belongs_to() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap().id;
    let tree = add_tree(&catalog, pool, &[], 1).await;
    let found = catalog.tree_of(pool, tree.commit, ALICE).await.unwrap();
    assert_eq!(found.map(|t| (t.id, t.segments)), Some((tree.id, tree.segments)));
    assert_eq!(catalog.tree_of(pool, tree.commit, BOB).await.unwrap(), None);
    assert_eq!(catalog.tree_of(pool, commit("other"), ALICE).await.unwrap(), None);
}

#[tokio::test]
async fn a_tree_is_recorded_whole_or_not_at_all() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap().id;
    let mut tree = add_tree(&catalog, pool, &[], 1).await;
    tree.id = catalog.allocate_tree().await.unwrap();
    let new = catalog.allocate_segments(1).await.unwrap()[0];
    tree.segments = vec![new, SegmentId(99)];
    let segment = NewSegment { id: new, kind: SegmentKind::Pack, size: 1 };
    catalog.insert_tree(tree.clone(), vec![segment]).await.unwrap_err();
    assert_eq!(catalog.tree(tree.id).await.unwrap(), None);
    assert_eq!(catalog.segments(pool).await.unwrap().len(), 1);
    tree.segments.pop();
    catalog.insert_tree(tree, vec![segment]).await.unwrap();
    assert_eq!(catalog.segments(pool).await.unwrap()[1].kind, SegmentKind::Pack);
}

#[tokio::test]
async fn mounts_change() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap().id;
    let tree = add_tree(&catalog, pool, &[], 1).await;
    let mount = add_mount(&catalog, &tree, b"/a").await;
    let twice = NewMount { id: catalog.allocate_mount().await.unwrap(), ..mount.clone() };
    catalog.insert_mount(twice).await.unwrap_err();
    catalog.set_mounted(mount.id, false).await.unwrap();
    catalog.set_history(mount.id, "complete").await.unwrap();
    let read = catalog.mount_by_directory(&mount.directory).await.unwrap().unwrap();
    assert_eq!((read.mounted, read.history.as_str()), (false, "complete"));
    catalog.remove_mount(mount.id).await.unwrap();
    assert_eq!(catalog.mounts().await.unwrap(), []);
}

#[tokio::test]
async fn garbage_is_what_nobody_refers_to() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap().id;
    let first = add_tree(&catalog, pool, &[], 2).await;
    let second = add_tree(&catalog, pool, &first.segments[..1], 1).await;
    let a = add_mount(&catalog, &first, b"/a").await;
    let b = add_mount(&catalog, &second, b"/b").await;
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap(), Garbage::default());

    catalog.remove_mount(a.id).await.unwrap();
    assert_eq!(
        catalog.take_garbage(move || HashSet::from([pool])).await.unwrap(),
        Garbage::default()
    );
    let expected = Garbage {
        trees: vec![(first.id, first.image.clone())],
        segments: vec![(pool, first.segments[1])],
        pools: vec![],
    };
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap(), expected);
    assert_eq!(catalog.tree(first.id).await.unwrap(), None);
    assert!(catalog.tree(second.id).await.unwrap().is_some());

    catalog.remove_mount(b.id).await.unwrap();
    let rest = catalog.take_garbage(HashSet::new).await.unwrap();
    assert_eq!((rest.trees.len(), rest.segments.len(), rest.pools), (1, 2, vec![pool]));
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap(), Garbage::default());
}

#[tokio::test]
async fn files_that_no_record_stands_for() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap().id;
    let tree = add_tree(&catalog, pool, &[], 1).await;
    let known = tree.segments[0];
    place.put(&format!("pools/{pool}/{known}.data"));
    place.put(&format!("pools/{pool}/77.data"));
    place.put("pools/9/1.data");
    place.put(&format!("trees/{}", tree.image));
    place.put("trees/5.erofs");
    place.put("mounts/44/upper/precious");
    let unknown = catalog.unknown_files().await.unwrap();
    let expected = [format!("pools/{pool}/77.data"), "pools/9".into(), "trees/5.erofs".into()];
    assert_eq!(unknown, expected.map(|name| place.root.path().join(name)));
}

#[tokio::test]
async fn how_the_last_run_ended() {
    let place = Place::new();
    let catalog = place.open();
    let first = catalog.begin_run("boot 1").await.unwrap();
    assert!(!first.may_have_lost_writes("boot 1"));
    assert_eq!(first, LastRun::default());
    catalog.close().await;
    let catalog = place.open();
    let crashed = catalog.begin_run("boot 1").await.unwrap();
    assert!(!crashed.clean && !crashed.may_have_lost_writes("boot 1"));
    assert!(crashed.may_have_lost_writes("boot 2"));
    catalog.end_run().await.unwrap();
    catalog.close().await;
    let stopped = place.open().begin_run("boot 2").await.unwrap();
    assert_eq!(stopped, LastRun { boot_id: Some("boot 1".into()), clean: true });
    assert!(!stopped.may_have_lost_writes("boot 2"));
    assert!(!place.open().begin_run("boot 2").await.unwrap().clean);
}

#[tokio::test]
async fn a_damaged_catalog_is_moved_aside_and_no_number_comes_twice() {
    let place = Place::new();
    let catalog = place.open();
    catalog.pool_for(pool_of(ALICE)).await.unwrap();
    catalog.close().await;
    place.put("mounts/44/upper/precious");
    place.put("pools/7/12.data");
    place.put("trees/3.erofs");
    let wrong = b"not a database, not at all".repeat(100);
    std::fs::write(place.path(), &wrong).unwrap();

    let catalog = place.open();
    assert_eq!(catalog.pools().await.unwrap(), []);
    assert_eq!(catalog.allocate_mount().await.unwrap().0, 45);
    assert_eq!(catalog.allocate_segments(2).await.unwrap(), [SegmentId(13), SegmentId(14)]);
    assert_eq!(catalog.allocate_tree().await.unwrap().0, 4);
    assert_eq!(catalog.pool_for(pool_of(ALICE)).await.unwrap().id, PoolId(8));
    let names = std::fs::read_dir(place.root.path()).unwrap();
    let aside = names
        .map(|e| e.unwrap().path())
        .find(|p| p.to_str().unwrap().contains("catalog.sqlite.damaged-"))
        .unwrap();
    assert_eq!(std::fs::read(aside).unwrap(), wrong);
    assert!(place.root.path().join("mounts/44/upper/precious").exists());
}

#[tokio::test]
async fn damage_in_the_middle_is_found() {
    let place = Place::new();
    let catalog = place.open();
    for number in 0..200 {
        let url = format!("https://example.org/{number}.git");
        catalog.pool_for(NewPool { url, ..pool_of(ALICE) }).await.unwrap();
    }
    let pages = catalog
        .run("count", |t| t.pragma_query_value(None, "page_count", |row| row.get::<_, u32>(0)))
        .await
        .unwrap();
    catalog.close().await;
    let mut bytes = std::fs::read(place.path()).unwrap();
    assert!(bytes.len() >= pages as usize * 4096);
    for byte in bytes.iter_mut().skip(4096) {
        *byte ^= 0x55;
    }
    std::fs::write(place.path(), bytes).unwrap();
    assert_eq!(place.open().pools().await.unwrap(), []);
}

#[tokio::test]
async fn a_newer_catalog_is_left_alone() {
    let place = Place::new();
    Catalog::check(&place.path()).unwrap();
    let catalog = place.open();
    Catalog::check(&place.path()).unwrap();
    assert_eq!(Catalog::directories(&place.path()).unwrap(), []);
    catalog.run("age", |t| t.pragma_update(None, "user_version", 99)).await.unwrap();
    catalog.close().await;
    for refused in [Catalog::check(&place.path()), Catalog::open(&place.path()).map(drop)] {
        let error = refused.unwrap_err();
        assert!(matches!(error, CatalogError::Newer { found: 99, .. }), "{error}");
        let said =
            format!("is of version 99, and this hydrantd knows none above {}", schema::VERSION);
        assert!(error.to_string().contains(&said), "{error}");
    }
}

/// What programs of the versions before have written: each a clone of a repository of one file.
#[tokio::test]
async fn catalogs_of_versions_before_are_migrated() {
    for (version, dump) in
        [(2, include_str!("versions/2.sql")), (3, include_str!("versions/3.sql"))]
    {
        let place = Place::new();
        let connection = Connection::open(place.path()).unwrap();
        connection.execute_batch(dump).unwrap();
        let found: i64 = connection.pragma_query_value(None, "user_version", |r| r.get(0)).unwrap();
        assert_eq!(found, version);
        drop(connection);
        Catalog::check(&place.path()).unwrap();
        let catalog = place.open();
        let [pool] = <[_; 1]>::try_from(catalog.pools().await.unwrap()).unwrap();
        let origin: GitOrigin = serde_json::from_value(pool.origin).unwrap();
        let GitTransport::Http(transport) = origin.transport else { panic!("{origin:?}") };
        assert_eq!(transport.url, pool.url);
        let segments = catalog.segments(pool.id).await.unwrap();
        let kinds: Vec<_> = segments.iter().map(|segment| segment.kind).collect();
        assert_eq!(kinds, [SegmentKind::Data, SegmentKind::Pack]);
        let [mount] = <[_; 1]>::try_from(catalog.mounts().await.unwrap()).unwrap();
        assert_eq!((mount.mounted, mount.image, mount.history.as_str()), (true, None, "shallow"));
        let tree = catalog.tree(mount.tree).await.unwrap().unwrap();
        let devices: Vec<_> = segments.iter().map(|segment| segment.id).collect();
        assert_eq!((tree.pool, tree.files, tree.segments), (pool.id, 1, devices));
        // and it is one of now
        assert!(catalog.allocate_snapshot().await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once() {
    let place = Place::new();
    let catalog = place.open();
    let tasks: Vec<_> = (0..40u32)
        .map(|number| {
            let catalog = catalog.clone();
            tokio::spawn(async move {
                let owner = Owner { uid: number % 4, gid: 0 };
                let pool = catalog.pool_for(pool_of(owner)).await.unwrap().id;
                let tree = add_tree(&catalog, pool, &[], 5).await;
                add_mount(&catalog, &tree, format!("/{number}").as_bytes()).await;
                tree.segments
            })
        })
        .collect();
    let mut segments = Vec::new();
    for task in tasks {
        segments.extend(task.await.unwrap());
    }
    segments.sort_unstable();
    segments.dedup();
    assert_eq!(segments.len(), 200);
    assert_eq!(catalog.pools().await.unwrap().len(), 4);
    assert_eq!(catalog.mounts().await.unwrap().len(), 40);
}

#[tokio::test]
async fn images_keep_their_layers() {
    let room = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(&room.path().join("catalog.sqlite")).unwrap();
    let id = |n: u8| ObjectId::of_blob(HashKind::Sha256, &[n]);
    let mut layers = Vec::new();
    for n in 1..=3 {
        let pool = NewPool {
            url: format!("oci-layer:{n}"),
            owner: Owner { uid: 0, gid: 0 },
            hash: HashKind::Sha256,
            origin: serde_json::json!({}),
            environment: Vec::new(),
        };
        let pool = catalog.pool_for(pool).await.unwrap().id;
        let tree = NewTree {
            id: catalog.allocate_tree().await.unwrap(),
            pool,
            commit: id(n),
            root: id(n),
            revision: String::new(),
            image: format!("{n}.erofs"),
            segments: Vec::new(),
            files: 1,
            bytes: 1,
            implicit: 0,
            owner: Owner { uid: 0, gid: 0 },
        };
        layers.push((tree.id, u64::from(n)));
        catalog.insert_tree(tree, Vec::new()).await.unwrap();
        assert_eq!(catalog.tree_of_pool(pool).await.unwrap().unwrap().commit, id(n));
    }
    let new = |name: &str, n: u8, layers: &[(TreeId, u64)]| NewImage {
        reference: name.into(),
        digest: id(n),
        manifest: id(n),
        config: id(n),
        layers: layers.to_vec(),
        held: true,
    };
    // one layer twice, one shared
    let first = [layers[0], layers[1], layers[0]];
    let image = catalog.insert_image(new("a", 10, &first)).await.unwrap();
    assert_eq!(image.layers, first);
    let again = catalog.insert_image(new("a", 10, &first)).await.unwrap();
    assert_eq!((again.id, again.layers.len()), (image.id, 3), "pulled anew");
    let by_pool = catalog.layers_by_pool().await.unwrap();
    let mut known: Vec<_> = by_pool.into_values().collect();
    known.sort_by_key(|layer| layer.layer != format!("sha256:{}", id(1)));
    assert_eq!(known[0].layer, format!("sha256:{}", id(1)));
    assert!(known.len() == 2 && known.iter().all(|layer| layer.images == ["a"]), "{known:?}");
    assert_eq!(
        catalog.take_garbage(HashSet::new).await.unwrap().trees,
        [(layers[2].0, "3.erofs".into())]
    );
    // the name goes to another image
    let other = catalog.insert_image(new("a", 11, &layers[1..2])).await.unwrap();
    assert_eq!(catalog.image_named("a").await.unwrap().unwrap().id, other.id);
    assert_eq!(
        catalog.take_garbage(HashSet::new).await.unwrap().trees,
        [(layers[0].0, "1.erofs".into())]
    );
    assert_eq!(catalog.image(image.id).await.unwrap(), None);
    catalog.forget_image(other.id).await.unwrap();
    assert_eq!(catalog.images().await.unwrap(), []);
    let garbage = catalog.take_garbage(HashSet::new).await.unwrap();
    assert_eq!(garbage.trees, [(layers[1].0, "2.erofs".into())]);
}

/// What is read here of a layer comes behind what somebody else has told of it.
#[tokio::test]
async fn traces_grow_at_their_end() {
    let place = Place::new();
    let catalog = place.open();
    let pool = catalog.pool_for(pool_of(ALICE)).await.unwrap().id;
    let tree = add_tree(&catalog, pool, &[], 1).await;
    catalog.add_to_trace(tree.segments[0], vec![9, 3]).await.unwrap();
    assert_eq!(
        catalog.trace(vec![tree.commit]).await.unwrap(),
        [(tree.commit, 9), (tree.commit, 3)]
    );
    catalog.forget_trace(vec![tree.commit]).await.unwrap();
    let other = commit("other");
    catalog.learn_trace(tree.commit, vec![(5, 0), (6, 2)]).await.unwrap();
    catalog.learn_trace(other, vec![(1, 1)]).await.unwrap();
    catalog.add_to_trace(tree.segments[0], vec![0, 6, 1]).await.unwrap();
    let found = catalog.trace(vec![tree.commit, other]).await.unwrap();
    let records: Vec<_> = found.iter().map(|(_, record)| *record).collect();
    assert_eq!(records, [5, 1, 6, 0, 1]);
}

/// What was read here counts more than what somebody else says; what is recorded anew is recorded of nothing.
#[tokio::test]
async fn traces_are_learnt_and_forgotten() {
    let room = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(&room.path().join("catalog.sqlite")).unwrap();
    let (a, b) = (commit("a"), commit("b"));
    catalog.learn_trace(a, vec![(5, 0), (1, 0), (5, 0)]).await.unwrap();
    catalog.learn_trace(a, vec![(7, 0)]).await.unwrap();
    catalog.learn_trace(b, vec![(2, 0)]).await.unwrap();
    assert_eq!(catalog.trace(vec![b, a]).await.unwrap(), [(a, 5), (a, 1), (b, 2)]);
    catalog.forget_trace(vec![a]).await.unwrap();
    assert_eq!(catalog.trace(vec![b, a]).await.unwrap(), [(b, 2)]);
    catalog.learn_trace(a, vec![(7, 0)]).await.unwrap();
    assert_eq!(catalog.trace(vec![a, a]).await.unwrap(), [(a, 7)]);
    // layer by layer, and read side by side
    catalog.forget_trace(vec![a, b]).await.unwrap();
    catalog.learn_trace(a, vec![(5, 0), (6, 0), (7, 3)]).await.unwrap();
    catalog.learn_trace(b, vec![(2, 2), (1, 4)]).await.unwrap();
    let order = [(a, 5), (a, 6), (b, 2), (a, 7), (b, 1)];
    assert_eq!(catalog.trace(vec![b, a]).await.unwrap(), order);
}

/// Layers that are mounted one after the other come in the order in which they were read.
#[tokio::test]
async fn traces_have_an_order_over_all_layers() {
    let room = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(&room.path().join("catalog.sqlite")).unwrap();
    let (a, b, c) = (commit("a"), commit("b"), commit("c"));
    for (layer, records) in [(b, vec![(7, 0), (8, 5)]), (a, vec![(3, 2)]), (c, vec![(0, 5)])] {
        catalog.learn_trace(layer, records).await.unwrap();
    }
    let mut one_by_one = Vec::new();
    for layer in [a, b, c] {
        one_by_one.extend(catalog.placed_trace(vec![layer]).await.unwrap());
    }
    one_by_one.sort_unstable();
    assert_eq!(one_by_one, catalog.placed_trace(vec![c, b, a, b]).await.unwrap());
    let order: Vec<_> = one_by_one.iter().map(|(_, layer, record)| (*layer, *record)).collect();
    assert_eq!(order, [(b, 7), (a, 3), (b, 8), (c, 0)]);
    assert_eq!(catalog.trace(vec![a, b, c]).await.unwrap(), order);
}

/// An image that was pulled for containerd stays as long as one of its layers is a snapshot's, or a pull goes on.
#[tokio::test]
async fn images_of_containerd_go_with_its_snapshots() {
    let room = tempfile::tempdir().unwrap();
    let catalog = Catalog::open(&room.path().join("catalog.sqlite")).unwrap();
    let wanted = NewPool { url: "oci-layer:1".into(), ..pool_of(ALICE) };
    let alice = catalog.pool_for(wanted).await.unwrap().id;
    let tree = add_tree(&catalog, alice, &[], 1).await;
    let image = |held| NewImage {
        reference: "a".into(),
        digest: commit("a"),
        manifest: commit("a"),
        config: commit("a"),
        layers: vec![(tree.id, 1)],
        held,
    };
    catalog.insert_image(image(false)).await.unwrap();
    let garbage = catalog.take_garbage(move || HashSet::from([alice])).await.unwrap();
    assert_eq!((garbage, catalog.images().await.unwrap().len()), (Garbage::default(), 1));
    let snapshot = NewSnapshot {
        id: catalog.allocate_snapshot().await.unwrap(),
        name: "s".into(),
        parent: None,
        kind: SnapshotKind::Committed,
        tree: Some(tree.id),
        labels: Labels::new(),
    };
    catalog.insert_snapshot(snapshot).await.unwrap().unwrap();
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap(), Garbage::default());
    assert_eq!(catalog.snapshot_trees().await.unwrap(), HashSet::from([tree.id]));
    let layers = catalog.trees_by_commit("oci-layer:").await.unwrap();
    assert_eq!(layers, [(tree.commit, tree.id)]);
    assert_eq!(catalog.names_of_tree(tree.id).await.unwrap(), ["a"]);
    assert!(catalog.trees_by_commit("oci-layer:2").await.unwrap().is_empty());
    // without a name, the layer stays nevertheless
    let named = catalog.image_named("a").await.unwrap().unwrap();
    catalog.forget_image(named.id).await.unwrap();
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap(), Garbage::default());
    assert_eq!(catalog.image(named.id).await.unwrap(), None);
    catalog.insert_image(image(false)).await.unwrap();
    catalog.remove_snapshot("s".into()).await.unwrap().unwrap();
    // by now somebody has pulled it by hand
    catalog.insert_image(image(true)).await.unwrap();
    catalog.insert_image(image(false)).await.unwrap();
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap(), Garbage::default());
    let named = catalog.image_named("a").await.unwrap().unwrap();
    catalog.forget_image(named.id).await.unwrap();
    assert_eq!(catalog.take_garbage(HashSet::new).await.unwrap().trees.len(), 1);
}
