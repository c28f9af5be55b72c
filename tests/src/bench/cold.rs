//! Reads of 4 KiB whose page is not in memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::fuse;
use super::table::{Table, ratio, time};
use super::{hydrant_clone, setting, timed, world};
use crate::process::Run;
use crate::repository::{MAIN, OddOptions, Random, lonely, lonely_path, odd};
use crate::world::{Setting, World};

const READS: usize = 2_000;
const UNFETCHED: usize = 200;

/// Fetched files, against a FUSE file system with the same bytes; then files that are not fetched, against
/// git's own way to an object that is not there.
pub fn run(round_trips: &[Duration]) -> Result<Vec<Table>> {
    let mut tables = vec![against_fuse()?];
    for &round_trip in round_trips {
        tables.push(against_git(round_trip)?);
    }
    Ok(tables)
}

/// Pages of the tree are dropped, those of the file below it are in memory, for both: what is left is the
/// way of a read.
fn against_fuse() -> Result<Table> {
    let world = world("bench-cold", Duration::ZERO)?;
    let large = odd(OddOptions { large_bytes: 200 << 20, ..OddOptions::default() })?;
    world.serve(&large, "large")?;
    let tree = world.path("large");
    hydrant_clone(&world, "large", &tree)?;
    let lazy = tree.join("large.bin");
    let mut table = Table::new("4 KiB reads, page not in memory, bytes local", &COLUMNS);

    // With some of the segment still missing it has its mark: events, answered at once.
    Run::program("cp", &[&lazy.to_string_lossy(), "/dev/null"]).check()?;
    let marked = latencies(&lazy)?;
    world.daemon.check(&["prefetch", &tree.to_string_lossy()])?;
    let complete = latencies(&lazy)?;

    let copy = world.path("copy.bin");
    std::fs::copy(&lazy, &copy)?;
    let place = world.scratch.make("fuse")?;
    let fuse = fuse::mount(&copy, &place)?;
    let fused = latencies(&place.join("large.bin"))?;
    drop(fuse);
    let plain = latencies(&copy)?;
    for (name, values) in [
        ("lazy tree, other files of its segment missing", &marked),
        ("lazy tree, all fetched", &complete),
        ("FUSE, passed through", &fused),
        ("ext4, from disk", &plain),
    ] {
        table.row(row(name, values, &fused));
    }
    Ok(table)
}

const COLUMNS: [&str; 4] = ["file system", "median", "95 %", "median / peer"];

fn row(name: &str, values: &[Duration], peer: &[Duration]) -> [String; 4] {
    let at = |values: &[Duration], part: usize| values[values.len() * part / 100];
    let quotient = ratio(at(values, 50).as_secs_f64(), at(peer, 50).as_secs_f64());
    [name.to_owned(), time(at(values, 50)), time(at(values, 95)), quotient]
}

/// Sorted times of reads at different places.
fn latencies(path: &Path) -> Result<Vec<Duration>> {
    let file = File::open(path)?;
    let pages = usize::try_from(file.metadata()?.len())? / 4096;
    let mut buffer = vec![0; 1 << 20];
    let mut place = 0;
    loop {
        match file.read_at(&mut buffer, place)? {
            0 => break,
            count => place += count as u64,
        }
    }
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut random = Random::new(17);
    let mut times = Vec::with_capacity(READS);
    for n in 0..READS {
        // Each page once, in no order that a read-ahead could find.
        let page = (n * pages / READS + random.below(pages / READS)) as u64;
        let page = (page * 7_919) % pages as u64;
        let started = Instant::now();
        file.read_exact_at(&mut buffer[..4096], page * 4096)?;
        times.push(started.elapsed());
    }
    times.sort();
    Ok(times)
}

/// Files of 4 KiB one after the other, without read-ahead.
fn against_git(round_trip: Duration) -> Result<Table> {
    // Each has to wait for its own fetch.
    let configuration = "read_ahead = false\n";
    let world = World::with("bench-unfetched", Setting { configuration, ..setting(round_trip) })?;
    let repository = lonely(UNFETCHED, 4_096)?;
    world.serve(&repository, "repo")?;
    let tree = world.path("tree");
    hydrant_clone(&world, "repo", &tree)?;
    let mut lazy = Vec::new();
    for n in 0..UNFETCHED {
        lazy.push(timed(|| Ok(std::fs::read(tree.join(lonely_path(n)))?))?.0);
    }
    lazy.sort();
    let git = by_git(&world)?;
    let title =
        format!("4 KiB files that are not fetched, {} ms round trip", round_trip.as_millis());
    let mut table = Table::new(title, &COLUMNS);
    table.row(row("lazy tree", &lazy, &git));
    table.row(row("git cat-file in a blob:none clone", &git, &git));
    Ok(table)
}

fn by_git(world: &World) -> Result<Vec<Duration>> {
    let partial = ["--filter=blob:none", "--no-checkout"];
    let place = world.path("partial");
    let url = world.url("repo");
    let clone = [&["clone", "-q"], &partial[..], &[&url, place.to_str().context("a path")?]];
    world.git(Path::new("/"), &clone.concat()).check()?;
    let mut times = Vec::new();
    for n in 0..UNFETCHED / 4 {
        let object = format!("{MAIN}:{}", lonely_path(n));
        let run: Run = world.git(&place, &["cat-file", "blob", &object]);
        times.push(run.check()?.elapsed);
    }
    times.sort();
    Ok(times)
}
