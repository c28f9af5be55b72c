//! Trees that nothing guards, or that were read while nothing did.

use std::path::{Path, PathBuf};

use super::{Finding, Problem};
use crate::admin::is_state_locked;
use crate::catalog::Catalog;
use crate::mount::{self, Layers, MountPoint};

/// Looks at the trees of a state directory. Those of a daemon that runs are guarded.
pub fn guarded(state: &Path) -> Finding {
    let directories = state.join("mounts");
    let Ok(entries) = fs_err::read_dir(&directories) else {
        return Ok("there are no trees".to_owned());
    };
    let cant = |error: &dyn std::error::Error| {
        Problem::step("look at the trees", error, "Run `sudo hydrant doctor`.")
    };
    let table = mount::mounts().map_err(|error| cant(&error))?;
    let known = Catalog::directories(&state.join("catalog.sqlite")).unwrap_or_default();
    let running = is_state_locked(state);
    let (mut bare, mut suspect, mut count) = (Vec::new(), Vec::new(), 0);
    for entry in entries.flatten() {
        let (upper, work) = (entry.path().join("owner/upper"), entry.path().join("work"));
        if !upper.is_dir() {
            continue;
        }
        count += 1;
        let name = entry.file_name().to_string_lossy().into_owned();
        let place = known.iter().find(|(id, _)| *id == name).map(|(_, place)| place.clone());
        match mounted(&table, &upper) {
            Some(_) if running => {}
            Some(place) => bare.push(place),
            // of a clone that goes on, of no tree that is known
            None if place.is_none() => {}
            None => {
                let layers = Layers { upper: &upper, work: &work };
                if mount::in_use(layers).map_err(|error| cant(&error))? {
                    suspect.extend(place);
                }
            }
        }
    }
    if !bare.is_empty() {
        return Err(Problem::new(
            format!("nothing guards {}: what is not fetched is read as zeros there", list(&bare)),
            "Start the daemon, which mounts these trees anew; restart what has read them meanwhile.",
        ));
    }
    if !suspect.is_empty() {
        return Err(Problem::new(
            format!(
                "{} is not mounted, but in use: by processes that have used it since before a daemon \
                 was killed with all that could guard it, and may have read zeros; or by another mount \
                 namespace",
                list(&suspect)
            ),
            "End these processes (the daemon's log has named them), then `hydrant mount` it.",
        ));
    }
    Ok(format!("{count} trees"))
}

fn mounted(table: &[MountPoint], upper: &Path) -> Option<PathBuf> {
    // as the kernel shows it
    let upper = fs_err::canonicalize(upper).ok()?;
    let ours = |mount: &&MountPoint| mount.is_hydrant() && mount.upper.as_ref() == Some(&upper);
    table.iter().find(ours).map(|mount| mount.path.clone())
}

fn list(places: &[PathBuf]) -> String {
    let shown: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
    shown.join(", ")
}
