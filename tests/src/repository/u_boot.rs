//! A repository in the shape of u-boot's: the reference of the benchmarks.

use std::collections::BTreeSet;

use anyhow::Result;

use super::random::Prose;
use super::{Change, Import, MAIN, Random, Repository, TOPIC, cached};

const FILES: usize = 38_571;
const DIRECTORIES: usize = 2_400;
/// Files over 64 KiB.
const LARGE: usize = 425;
/// Files named `Kconfig` or `Makefile` that a configure step reads: see [`u_boot_shape`].
pub const CONFIGURE_FILES: usize = 1_127;

/// 38,571 files in 2,400 directories, 264 MB of text, 70 % of the files at most 4 KiB and 425 over
/// 64 KiB; `Kconfig` in 1,127 directories (those that a configure step reads) and `Makefile` in
/// nearly all; ten commits on [`MAIN`], and [`TOPIC`], which differs from it in `differ` files.
pub fn u_boot_shape(differ: usize) -> Result<Repository> {
    cached(&format!("u-boot-shape-{differ}-1"), "sha1", |path| {
        let mut random = Random::new(38_571);
        let mut prose = Prose::new(264);
        let mut import = Import::start(path)?;
        let names = paths(&mut random);
        let mut changes = Vec::with_capacity(FILES);
        for (n, name) in names.iter().enumerate() {
            let mut content = prose.text(size(&mut random, n));
            // No two alike, as long as there is room for a number.
            let mark = format!("/* {n} */");
            let place = mark.len().min(content.len());
            content[..place].copy_from_slice(&mark.as_bytes()[..place]);
            let mode = if n % 97 == 0 { "100755" } else { "100644" };
            let blob = import.blob(&content)?;
            changes.push(Change::File { path: name.clone().into(), mode, blob });
        }
        let mut last = import.commit(MAIN, None, &changes)?;
        for _ in 0..9 {
            let changes = edits(&mut import, &mut random, &mut prose, &names, 40)?;
            last = import.commit(MAIN, None, &changes)?;
        }
        let changes = edits(&mut import, &mut random, &mut prose, &names, differ)?;
        import.commit(TOPIC, Some(last), &changes)?;
        import.finish()
    })
}

/// New content for `count` files.
fn edits(
    import: &mut Import,
    random: &mut Random,
    prose: &mut Prose,
    names: &[String],
    count: usize,
) -> Result<Vec<Change>> {
    let mut chosen = BTreeSet::new();
    while chosen.len() < count.min(names.len()) {
        chosen.insert(random.below(names.len()));
    }
    let mut changes = Vec::with_capacity(count);
    for n in chosen {
        let blob = import.blob(&prose.text(200 + random.below(6000)))?;
        let mode = if n % 97 == 0 { "100755" } else { "100644" };
        changes.push(Change::File { path: names[n].clone().into(), mode, blob });
    }
    Ok(changes)
}

fn paths(random: &mut Random) -> Vec<String> {
    const TOP: [&str; 16] = [
        "arch", "board", "boot", "cmd", "common", "configs", "doc", "drivers", "dts", "env", "fs",
        "include", "lib", "net", "test", "tools",
    ];
    let mut directories: Vec<String> = TOP.iter().map(|&name| name.to_owned()).collect();
    while directories.len() < DIRECTORIES {
        let parent = &directories[random.below(directories.len())];
        if parent.matches('/').count() < 6 {
            directories.push(format!("{parent}/{}{}", TOP[random.below(16)], directories.len()));
        }
    }
    let mut names = BTreeSet::new();
    for (n, directory) in directories.iter().enumerate() {
        if n < CONFIGURE_FILES {
            names.insert(format!("{directory}/Kconfig"));
        }
        if n % 12 != 5 {
            names.insert(format!("{directory}/Makefile"));
        }
    }
    let endings = ["c", "c", "c", "h", "h", "dts", "dtsi", "rst", "S", "py", "env", "yaml"];
    while names.len() < FILES {
        // Some directories have a thousand files, most have a few.
        let place = (random.unit().powi(2) * directories.len() as f64) as usize;
        let directory = &directories[place.min(directories.len() - 1)];
        let ending = endings[random.below(endings.len())];
        names.insert(format!("{directory}/{}{}.{ending}", TOP[random.below(16)], names.len()));
    }
    names.into_iter().collect()
}

/// The size of file `n` in bytes: spread evenly over the logarithm, in three classes.
fn size(random: &mut Random, n: usize) -> usize {
    let between = |random: &mut Random, from: f64, to: f64, skew: f64| {
        (from * (to / from).powf(random.unit().powf(skew))) as usize
    };
    let every = FILES / LARGE;
    if n.is_multiple_of(every) && n / every < LARGE {
        between(random, 65_537.0, 400_000.0, 1.4)
    } else if random.unit() < 0.708 {
        between(random, 40.0, 4_096.0, 0.7)
    } else {
        between(random, 4_097.0, 65_536.0, 2.06)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_the_shape() {
        let mut random = Random::new(38_571);
        let names = paths(&mut random);
        assert_eq!(names.len(), FILES);
        let configure = names.iter().filter(|name| name.ends_with("/Kconfig")).count();
        assert_eq!(configure, CONFIGURE_FILES);
        let sizes: Vec<usize> = (0..FILES).map(|n| size(&mut random, n)).collect();
        let total: usize = sizes.iter().sum();
        let small = sizes.iter().filter(|&&size| size <= 4096).count();
        let large = sizes.iter().filter(|&&size| size > 65_536).count();
        assert!((255..273).contains(&(total / 1_000_000)), "{total} bytes");
        assert!((69..72).contains(&(small * 100 / FILES)), "{small} of {FILES}");
        assert_eq!(large, LARGE);
    }
}
