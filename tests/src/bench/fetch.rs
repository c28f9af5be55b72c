//! Clone and first reads of a tree in u-boot's shape, against git.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::table::{Table, bytes, ratio, time};
use super::{Cost, git_clone, hydrant_clone, measured, shell, world};
use crate::repository::{CONFIGURE_FILES, u_boot_shape};
use crate::world::World;

/// What a configure step does with each file it reads: u-boot's `make sandbox_defconfig` takes 2.24 s
/// for 1,127 files on a full checkout.
const WORK_PER_FILE: Duration = Duration::from_micros(2_000);

const GREP: &str = r#"grep -r --exclude-dir=.git nothing-like-this "$1" || true"#;

/// At each round trip time: clone until a clean status; then reads, each in a fresh clone.
pub fn run(round_trips: &[Duration]) -> Result<Vec<Table>> {
    let repository = u_boot_shape(100)?;
    let mut tables = Vec::new();
    for &round_trip in round_trips {
        let world = world("bench-fetch", round_trip)?;
        world.serve(&repository, "repo")?;
        // The server's page cache, and git's own first start.
        git_clone(&world, "repo", &world.path("warm-up"), &["--depth=1"])?;
        let (table, depth_one) = clones(&world, round_trip)?;
        tables.push(table);
        tables.push(reads(&world, round_trip, depth_one)?);
    }
    Ok(tables)
}

fn fresh(world: &World, name: &str) -> Result<(PathBuf, Cost)> {
    let place = world.path(name);
    let cost = measured(world, || hydrant_clone(world, "repo", &place))?;
    Ok((place, cost))
}

/// Unmounts and forgets a lazy tree with all that was fetched for it.
fn forget(world: &World, place: &Path) -> Result<()> {
    let place = place.to_string_lossy().into_owned();
    world.daemon.check(&["rm", "--discard", &place]).map(drop)
}

fn clones(world: &World, round_trip: Duration) -> Result<(Table, Cost)> {
    let title =
        format!("Clone until a clean `git status`, {} ms round trip", round_trip.as_millis());
    let columns = ["clone", "time", "down", "up", "time / lazy", "bytes / lazy"];
    let mut table = Table::new(title, &columns);
    let mut lazy = None::<Cost>;
    for n in 0..3 {
        let (place, cost) = fresh(world, &format!("lazy-{n}"))?;
        forget(world, &place)?;
        lazy = lazy.filter(|best| best.time <= cost.time).or(Some(cost));
    }
    let lazy = lazy.context("no clone was measured")?;
    let row = |name: &str, cost: &Cost| {
        [
            name.to_owned(),
            time(cost.time),
            bytes(cost.traffic.down_bytes),
            bytes(cost.traffic.up_bytes),
            ratio(cost.time.as_secs_f64(), lazy.time.as_secs_f64()),
            ratio(cost.bytes() as f64, lazy.bytes() as f64),
        ]
    };
    table.row(row("hydrant clone", &lazy));
    let mut depth_one = None;
    for (n, arguments) in [&["--depth=1"][..], &["--filter=blob:none"], &[]].into_iter().enumerate()
    {
        let place = world.path(&format!("git-{n}"));
        let cost = measured(world, || git_clone(world, "repo", &place, arguments))?;
        depth_one.get_or_insert(cost);
        table.row(row(&format!("git clone {}", arguments.join(" ")), &cost));
        if n > 0 {
            fs_err::remove_dir_all(&place)?;
        }
    }
    Ok((table, depth_one.context("no clone was measured")?))
}

/// Each step in a fresh lazy tree, and on the plain checkout of depth 1, whose pages are in memory.
fn reads(world: &World, round_trip: Duration, depth_one: Cost) -> Result<Table> {
    let title = format!("First reads, {} ms round trip", round_trip.as_millis());
    let columns = ["step", "lazy", "plain checkout", "lazy / plain", "requests", "down"];
    let mut table = Table::new(title, &columns);
    let plain = world.path("git-0");
    let configure = |work: Duration| move |place: &Path| configure(place, work);
    let one_directory = |place: &Path| shell(GREP, &place.join("cmd"));
    let whole_tree = |place: &Path| shell(GREP, place);
    type Step<'a> = (&'a str, &'a dyn Fn(&Path) -> Result<()>);
    let steps: [Step<'_>; 4] = [
        ("grep -r of one directory", &one_directory),
        ("read 1,127 Kconfig files", &configure(Duration::ZERO)),
        ("configure: the same, 2 ms of work each", &configure(WORK_PER_FILE)),
        ("grep -r of the whole tree", &whole_tree),
    ];
    for (name, step) in steps {
        let (place, clone) = fresh(world, "lazy-reads")?;
        let lazy = measured(world, || step(&place))?;
        forget(world, &place)?;
        step(&plain)?;
        let native = measured(world, || step(&plain))?;
        let row = |name: &str, lazy: &Cost, native: &Cost| {
            [
                name.to_owned(),
                time(lazy.time),
                time(native.time),
                ratio(lazy.time.as_secs_f64(), native.time.as_secs_f64()),
                lazy.traffic.requests.to_string(),
                bytes(lazy.traffic.down_bytes),
            ]
        };
        table.row(row(name, &lazy, &native));
        if name.contains("whole") {
            let name = "clone + grep of the whole tree (plain: --depth=1)";
            table.row(row(name, &clone.and(lazy), &depth_one.and(native)));
        }
    }
    Ok(table)
}

/// Reads every `Kconfig` in the order in which each includes those below it, as kconfig does.
fn configure(place: &Path, work: Duration) -> Result<()> {
    let mut read = 0;
    let mut open = vec![place.to_owned()];
    while let Some(directory) = open.pop() {
        let file = directory.join("Kconfig");
        if let Ok(content) = std::fs::read(&file) {
            let until = Instant::now() + work;
            let mut sum = content.iter().fold(0_u64, |sum, byte| sum + u64::from(*byte));
            while Instant::now() < until {
                sum = std::hint::black_box(sum.wrapping_mul(3));
            }
            read += 1;
        }
        let mut below = Vec::new();
        for entry in fs_err::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() && entry.file_name() != ".git" {
                below.push(entry.path());
            }
        }
        below.sort();
        open.extend(below.into_iter().rev());
    }
    anyhow::ensure!(read == CONFIGURE_FILES, "{read} files read");
    Ok(())
}
