//! What one call costs, warm: to tell the shares of EROFS, of overlayfs and of Hydrant.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::table::Table;
use super::{hydrant_clone, shell, timed, world};
use crate::bare::{self, Mounted};
use crate::repository::{Random, u_boot_shape};

/// Each is measured so often, in turns; the best counts.
const ROUNDS: usize = 7;

/// Mounts an overlay with nothing in its upper directory.
fn overlay(lower: &Path, place: &Path) -> Result<Mounted> {
    let (upper, work) = (place.with_extension("upper"), place.with_extension("work"));
    [place, &upper, &work].into_iter().try_for_each(fs_err::create_dir)?;
    let mut options = OsString::from("lowerdir=");
    for (name, path) in [("", lower), (",upperdir=", &upper), (",workdir=", &work)] {
        options.push(name);
        options.push(path);
    }
    let kind = Some("overlay");
    mount(kind, place, kind, MsFlags::empty(), Some(&*options))
        .with_context(|| format!("can't mount an overlay on {}", place.display()))?;
    Ok(Mounted::at(place))
}

/// The same files in five places: nanoseconds a call, all in memory.
pub fn run() -> Result<Vec<Table>> {
    let world = world("bench-calls", Duration::ZERO)?;
    world.serve(&u_boot_shape(100)?, "small")?;
    let tree = world.path("tree");
    hydrant_clone(&world, "small", &tree)?;
    world.daemon.check(&["prefetch", &tree.to_string_lossy()])?;
    let copy = world.path("copy");
    shell(r#"cp -a "$1" "${1%/*}/copy" && rm -rf "${1%/*}/copy/.git""#, &tree)?;
    let image = world.scratch.make("image")?;
    let _image = bare::mount(&world.daemon.directories().state, &image)?;
    let (on_copy, on_image) = (world.path("on-copy"), world.path("on-image"));
    let _overlays = (overlay(&copy, &on_copy)?, overlay(&image, &on_image)?);
    let places = [&copy, &on_copy, &image, &on_image, &tree];

    let mut names = Vec::new();
    list(&copy, Path::new(""), &mut names)?;
    let largest = names.iter().max_by_key(|(_, size)| *size).context("there are no files")?;
    let names: Vec<&PathBuf> = names.iter().map(|(name, _)| name).collect();

    let columns =
        ["call", "ext4", "overlay on ext4", "EROFS", "overlay on EROFS", "Hydrant's tree"];
    let mut table = Table::new("Nanoseconds a call, in memory", &columns);
    let stat = |place: &Path| -> Result<usize> {
        names.iter().try_for_each(|name| fs_err::metadata(place.join(name)).map(drop))?;
        Ok(names.len())
    };
    let open = |place: &Path| -> Result<usize> {
        names.iter().try_for_each(|name| File::open(place.join(name)).map(drop))?;
        Ok(names.len())
    };
    let read = |place: &Path| -> Result<usize> {
        let file = File::open(place.join(&largest.0))?;
        let pages = usize::try_from(largest.1)? / 4096;
        let (mut random, mut buffer) = (Random::new(4096), [0; 4096]);
        for _ in 0..100_000 {
            file.read_exact_at(&mut buffer, random.below(pages) as u64 * 4096)?;
        }
        Ok(100_000)
    };
    let small = |place: &Path| -> Result<usize> {
        let mut buffer = vec![0; 1 << 20];
        for name in &names {
            let file = File::open(place.join(name))?;
            while std::io::Read::read(&mut &file, &mut buffer)? > 0 {}
        }
        Ok(names.len())
    };
    type Call<'a> = (&'a str, &'a dyn Fn(&Path) -> Result<usize>);
    let calls: [Call<'_>; 4] = [
        ("stat", &stat),
        ("open and close", &open),
        ("read 4 KiB", &read),
        ("open, read all, close", &small),
    ];
    for (name, call) in calls {
        let mut best = [f64::MAX; 5];
        for round in 0..=ROUNDS {
            for (place, best) in places.into_iter().zip(&mut best) {
                let (time, count) = timed(|| call(place))?;
                // the first round brings everything into memory
                if round > 0 {
                    *best = best.min(time.as_secs_f64() * 1e9 / count as f64);
                }
            }
        }
        let cells = best.map(|nanoseconds| format!("{nanoseconds:.0}"));
        table.row([name.to_owned()].into_iter().chain(cells));
    }
    Ok(vec![table])
}

/// All files below `root`, and their sizes.
fn list(root: &Path, below: &Path, names: &mut Vec<(PathBuf, u64)>) -> Result<()> {
    for entry in fs_err::read_dir(root.join(below))? {
        let entry = entry?;
        let name = below.join(entry.file_name());
        match entry.metadata()? {
            directory if directory.is_dir() => list(root, &name, names)?,
            file if file.is_file() => names.push((name, file.len())),
            _ => {}
        }
    }
    Ok(())
}
