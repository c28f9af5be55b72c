//! Reading k files fetches those blobs and the documented read-ahead, no more; counted at the server.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::process::Run;
use hydrant_tests::reader::{expect_right, start};
use hydrant_tests::repository::{MAIN, lonely, lonely_path, u_boot_shape};
use hydrant_tests::server::GitCommand;
use hydrant_tests::world::World;

/// Files that have nothing to do with each other: those blobs, each once, and no others.
#[test]
#[ignore = "needs root"]
fn root_unrelated_files() -> Result<()> {
    let world = World::new("counts-unrelated")?;
    let repository = lonely(200, 30_000)?;
    let tree = world.quick(&repository)?;
    let blobs = repository.blobs(MAIN)?;
    let mut expected = BTreeSet::new();
    for n in [3, 77, 150, 199] {
        let path = lonely_path(n);
        expect_right(Kind::Pread, &tree.join(&path), &world.truth(&repository, &path)?)?;
        expected
            .extend(blobs.iter().filter(|(_, p)| p == path.as_bytes()).map(|(id, _)| id.clone()));
    }
    let fetched = world.fetched_blobs(&repository, &[MAIN])?;
    ensure!(fetched.len() == 4, "{} fetches", fetched.len());
    ensure!(fetched.into_iter().collect::<BTreeSet<_>>() == expected);
    Ok(())
}

/// A byte in the middle of a large file fetches that file, and what is there is not asked for again.
#[test]
#[ignore = "needs root"]
fn root_read_again_fetches_nothing() -> Result<()> {
    let world = World::new("counts-again")?;
    let repository = lonely(2, 5_000_000)?;
    let tree = world.quick(&repository)?;
    let path = lonely_path(0);
    let (file, truth) = (tree.join(&path), world.truth(&repository, &path)?);
    for kind in [Kind::Pread, Kind::Read, Kind::MmapShared] {
        ensure!(start(kind, &file, &truth)?.wait()?.status.success());
    }
    Run::shell("sync; echo 3 > /proc/sys/vm/drop_caches", &[]).check()?;
    expect_right(Kind::Read, &file, &truth)?;
    let fetched = world.fetched_blobs(&repository, &[MAIN])?;
    ensure!(fetched.len() == 1, "fetched {fetched:?}");
    Ok(())
}

/// That no object was fetched more than twice, and hardly any twice: one that somebody waits for goes out
/// alone, also when a batch that has it is under way.
fn hardly_any_twice(wants: &[String]) -> Result<BTreeSet<&String>> {
    let mut times = BTreeMap::<&String, usize>::new();
    for id in wants {
        *times.entry(id).or_default() += 1;
    }
    let again = wants.len() - times.len();
    ensure!(times.values().all(|times| *times <= 2), "an object was fetched three times");
    ensure!(again <= times.len() / 50, "{again} of {} objects were fetched twice", times.len());
    Ok(times.into_keys().collect())
}

/// All files of one directory: its blobs, in far fewer requests than files, and beyond it no more than the
/// read-ahead that the README grants to a walk: twice what it has read, and 64 MiB.
#[test]
#[ignore = "needs root"]
fn root_a_directory() -> Result<()> {
    let world = World::new("counts-directory")?;
    let repository = u_boot_shape(100)?;
    let tree = world.quick(&repository)?;
    let blobs = repository.blobs(MAIN)?;
    Run::shell(r#"grep -r nothing-like-this "$1"/cmd || true"#, &[&tree]).check()?;
    let requests = world.server.new_requests()?;
    let wants: Vec<String> = requests.iter().flat_map(|request| request.wants()).cloned().collect();
    let unique = hardly_any_twice(&wants)?;
    let inside = blobs.iter().filter(|(_, path)| path.starts_with(b"cmd/"));
    let inside: BTreeSet<&String> = inside.map(|(id, _)| id).collect();
    let fetches = requests.iter().filter(|r| matches!(r.command, GitCommand::Fetch { .. })).count();
    println!("{} files, {} fetched, {fetches} requests", inside.len(), unique.len());
    ensure!(unique.is_superset(&inside));
    let sizes = repository.git(&["ls-tree", "-r", "--format=%(objectname) %(objectsize)", MAIN])?;
    let sizes = String::from_utf8(sizes)?;
    let beyond: BTreeMap<&str, u64> = sizes
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(id, _)| unique.contains(&id.to_string()) && !inside.contains(&id.to_string()))
        .map(|(id, size)| (id, size.trim().parse().unwrap_or(0)))
        .collect();
    let bytes: u64 = beyond.values().sum();
    println!("beyond it {} files, {bytes} bytes", beyond.len());
    let enough = 2 * inside.len();
    ensure!(beyond.len() <= enough && bytes <= 64 << 20, "{} files, {bytes} bytes", beyond.len());
    ensure!(fetches * 4 <= inside.len(), "{fetches} requests for {} files", inside.len());
    Ok(())
}

/// The whole tree: every blob, hardly any twice.
#[test]
#[ignore = "needs root"]
fn root_the_whole_tree() -> Result<()> {
    let world = World::new("counts-tree")?;
    let repository = u_boot_shape(100)?;
    let tree = world.quick(&repository)?;
    Run::shell(r#"grep -r nothing-like-this "$1" --exclude-dir=.git || true"#, &[&tree])
        .time_out(std::time::Duration::from_secs(300))
        .check()?;
    let wants = world.fetched_blobs(&repository, &[MAIN])?;
    let unique = hardly_any_twice(&wants)?;
    let all: BTreeSet<String> = repository.blobs(MAIN)?.into_iter().map(|(id, _)| id).collect();
    // Empty files need no fetch, nor does what came with the metadata.
    ensure!(all.len() - unique.len() <= 100, "{} of {} fetched", unique.len(), all.len());
    Ok(())
}
