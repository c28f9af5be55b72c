//! Reads of what is fetched, against a copy on the file system below.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::table::{Table, ratio, time};
use super::{best_of, hydrant_clone, shell, world};
use crate::repository::{OddOptions, Random, odd, u_boot_shape};

const RUNS: usize = 5;

/// Sequential and random reads of a file of 200 MB, all small files, all metadata: in memory, and from the
/// disk after the page cache was dropped.
pub fn run() -> Result<Vec<Table>> {
    let world = world("bench-warm", Duration::ZERO)?;
    let large = odd(OddOptions { large_bytes: 200 << 20, ..OddOptions::default() })?;
    world.serve(&large, "large")?;
    world.serve(&u_boot_shape(100)?, "small")?;
    let (large, small) = (world.path("large"), world.path("small"));
    for (name, place) in [("large", &large), ("small", &small)] {
        hydrant_clone(&world, name, place)?;
        world.daemon.check(&["prefetch", &place.to_string_lossy()])?;
        shell(r#"mkdir -p "$1.copy" && cp -a "$1/." "$1.copy/" && rm -rf "$1.copy/.git""#, place)?;
    }
    let file = |place: &Path| place.join("large.bin");
    let sequential = move |place: &Path| read_all(&file(place));
    let random = move |place: &Path| read_random(&file(place));
    let files = |place: &Path| {
        shell(r#"find "$1" -name .git -prune -o -type f -print0 | xargs -0 cat >/dev/null"#, place)
    };
    let metadata = |place: &Path| {
        shell(r#"find "$1" -name .git -prune -o -printf '%s %m %T@ %l' >/dev/null"#, place)
    };
    type Step<'a> = (&'a str, &'a Path, &'a dyn Fn(&Path) -> Result<()>);
    let steps: [Step<'_>; 4] = [
        ("sequential, 200 MB", &large, &sequential),
        ("random 4 KiB, 50,000 times in 200 MB", &large, &random),
        ("38,571 files with cat", &small, &files),
        ("38,571 files with find and stat", &small, &metadata),
    ];
    let columns = ["read", "pages", "lazy tree", "ext4 copy", "speed / ext4"];
    let mut table = Table::new("Reads of fetched files", &columns);
    for (name, tree, step) in steps {
        let copy = tree.with_extension("copy");
        for cold in [false, true] {
            let measure = |place: &Path| -> Result<Duration> {
                step(place)?;
                let mut best = Duration::MAX;
                for _ in 0..RUNS {
                    if cold {
                        shell("sync; echo 3 > /proc/sys/vm/drop_caches", place)?;
                    }
                    best = best.min(best_of(1, || step(place))?);
                }
                Ok(best)
            };
            let (lazy, plain) = (measure(tree)?, measure(&copy)?);
            let pages = if cold { "from disk" } else { "in memory" };
            let speed = ratio(plain.as_secs_f64(), lazy.as_secs_f64());
            table.row([name.to_owned(), pages.to_owned(), time(lazy), time(plain), speed]);
        }
    }
    Ok(vec![table])
}

fn read_all(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut place = 0;
    loop {
        match file.read_at(&mut buffer, place).context("read")? {
            0 => return Ok(()),
            count => place += count as u64,
        }
    }
}

fn read_random(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    let pages = usize::try_from(file.metadata()?.len())? / 4096;
    let mut random = Random::new(4096);
    let mut buffer = [0; 4096];
    for _ in 0..50_000 {
        file.read_exact_at(&mut buffer, random.below(pages) as u64 * 4096)?;
    }
    Ok(())
}
