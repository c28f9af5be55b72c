//! Every blocked reader ends with its bytes, however many there are, and each object is fetched once.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::guest;
use hydrant_tests::process::until;
use hydrant_tests::proxy::Quality;
use hydrant_tests::reader::Crowd;
use hydrant_tests::repository::{MAIN, Repository, lonely};
use hydrant_tests::world::{Setting, World};

fn readers() -> usize {
    guest::or(1_000, 60)
}

fn world(name: &str) -> Result<World> {
    World::with(name, Setting { proxy: Some(Quality::default()), ..Setting::default() })
}

fn each_fetched_once(world: &World, repository: &Repository) -> Result<usize> {
    let mut times = BTreeMap::<String, usize>::new();
    for id in world.fetched_blobs(repository, &[MAIN])? {
        *times.entry(id).or_default() += 1;
    }
    let again: Vec<_> = times.iter().filter(|(_, count)| **count > 1).collect();
    ensure!(again.is_empty(), "fetched more than once: {again:?}");
    Ok(times.len())
}

/// 1,000 readers blocked at once on different files: all end with right bytes, one fetch per object.
#[test]
#[ignore = "needs root"]
fn root_thousand_readers_of_different_files() -> Result<()> {
    let world = world("readers-different")?;
    let readers = readers();
    let repository = lonely(readers, 20_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..readers)?;
    world.proxy()?.hold();
    let mut crowd = Crowd::start(Kind::Read, &files)?;
    until("all readers wait", Duration::from_secs(60), || {
        let waiting = world.daemon.status().ok()?.counters.waiting;
        (waiting >= readers as u64).then_some(())
    })?;
    ensure!(world.daemon.admin().queue()?.len() == readers, "the queue shows all of them");
    ensure!(crowd.running() == readers, "a reader ended before its bytes were there");
    world.proxy()?.heal();
    crowd.expect_right()?;
    ensure!(each_fetched_once(&world, &repository)? == readers);
    ensure!(world.daemon.status()?.counters.waiting == 0, "somebody still waits");
    Ok(())
}

/// 1,000 readers blocked at once on the same file.
#[test]
#[ignore = "needs root"]
fn root_thousand_readers_of_the_same_file() -> Result<()> {
    let world = world("readers-same")?;
    let readers = readers();
    let repository = lonely(3, 400_000)?;
    let tree = world.quick(&repository)?;
    let files = world.lonely_files(&repository, &tree, 0..1)?;
    for kind in [Kind::Pread, Kind::MmapShared] {
        let file = if kind == Kind::Pread {
            files[0].clone()
        } else {
            world.lonely_files(&repository, &tree, 1..2)?[0].clone()
        };
        world.proxy()?.hold();
        let mut crowd = Crowd::start(kind, &vec![file; readers])?;
        until("somebody waits", Duration::from_secs(60), || {
            (world.daemon.status().ok()?.counters.waiting > 0).then_some(())
        })?;
        thread::sleep(Duration::from_secs(3));
        ensure!(crowd.running() == readers, "a reader ended before its bytes were there");
        world.proxy()?.heal();
        crowd.expect_right()?;
    }
    ensure!(each_fetched_once(&world, &repository)? == 2);
    Ok(())
}

/// A reader that is killed while it waits is gone at once, and harms nobody.
#[test]
#[ignore = "needs root"]
fn root_readers_can_be_killed() -> Result<()> {
    let world = world("readers-killed")?;
    let (_, files) = world.lonely_tree(3, 400_000)?;
    world.proxy()?.hold();
    let crowd = Crowd::start(Kind::MmapPrivate, &files)?;
    until("all readers wait", Duration::from_secs(60), || {
        (world.daemon.status().ok()?.counters.waiting >= 3).then_some(())
    })?;
    // Waits for each of them: a reader that can't be killed fails the test's time-out.
    drop(crowd);
    world.proxy()?.heal();
    Crowd::start(Kind::Read, &files)?.expect_right()
}
