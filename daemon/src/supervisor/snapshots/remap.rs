//! User namespaces: snapshots whose files have other owners than in their layers.
//!
//! containerd makes one by itself, of a snapshot on top of which it changes all owners, if it does not hear that we can do it
//! (the capability `remap-ids` in its configuration). With the same labels as for who can do it, it then asks for a container's
//! snapshot on top of that; before version 2 also for the one that it is going to change.
//!
//! We can't: containerd would map the owners of what is below when it mounts that, but from version 2.1 it does so by one
//! mount of the directory that all have in common (`core/mount/mount_linux.go`), in which our layers are not: they are mounts themselves.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::catalog::{Labels, Snapshot};
use crate::snapshotter::{Error, REF, REMAP};

/// Refuses a snapshot `name` that wants other owners than what is `below` it, at `place`.
pub fn check(
    name: &str,
    labels: &Labels,
    below: Option<&Snapshot>,
    place: Option<&Path>,
) -> Result<(), Error> {
    let [uids, gids] = match REMAP.map(|label| labels.get(label)) {
        [None, None] => return Ok(()),
        [Some(uids), Some(gids)] => [root(uids)?, root(gids)?],
        _ => return Err(Error::Invalid(format!("of {REMAP:?} one is missing"))),
    };
    if name.ends_with(&format!("-{uids}-{gids}-remap")) {
        return Ok(()); // it is about to be changed
    }
    let is_layer = below.is_some_and(|below| below.labels.contains_key(REF));
    if let Some(place) = place.filter(|_| !is_layer) {
        let found = std::fs::symlink_metadata(place);
        let found = found.map_err(|error| Error::Internal(error.to_string()))?;
        if (found.uid(), found.gid()) == (uids, gids) {
            return Ok(());
        }
    }
    let message = "owners can't be mapped: the capability \"remap-ids\" is not ours";
    Err(Error::Unimplemented(message.into()))
}

/// What 0 becomes: `container:host:size`, several with commas.
fn root(mappings: &str) -> Result<u32, Error> {
    let invalid = || Error::Invalid(format!("{mappings:?} does not say which IDs a namespace has"));
    let mut root = None;
    for mapping in mappings.split(',') {
        let numbers: Result<Vec<u32>, _> = mapping.split(':').map(str::parse).collect();
        let Ok(&[inside, outside, size]) = numbers.as_deref() else { return Err(invalid()) };
        if size == 0 {
            return Err(invalid());
        }
        if inside == 0 {
            root = Some(outside);
        }
    }
    root.ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings() {
        assert_eq!(root("0:100000:65536").unwrap(), 100_000);
        assert_eq!(root("1:5:1,0:7:1").unwrap(), 7);
        for wrong in ["", "0", "0:1", "0:1:0", "0:1:2:3", "1:1:1", "0:-1:1", "0:1:1,"] {
            assert!(root(wrong).is_err(), "{wrong}");
        }
    }
}
