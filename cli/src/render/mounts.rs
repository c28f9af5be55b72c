//! Mounts.

use hydrant_api::Mount;

use super::{bytes, number, pairs, percent, table};

/// One line each.
pub fn list(mounts: &[Mount]) -> String {
    if mounts.is_empty() {
        return "no trees\n".into();
    }
    let row = |mount: &Mount| {
        vec![mount.directory.clone(), state(mount), revision(mount), mount.url.clone()]
    };
    table(&["DIRECTORY", "STATE", "REVISION", "URL"], mounts.iter().map(row))
}

/// One line each, with how much is there.
pub(super) fn overview(mounts: &[Mount]) -> String {
    if mounts.is_empty() {
        return "no trees\n".into();
    }
    let row = |mount: &Mount| {
        vec![
            mount.directory.clone(),
            state(mount),
            revision(mount),
            number(mount.files),
            bytes(mount.tree_bytes),
            present(mount),
            format!("{}/{}", mount.complete_segments, mount.segments),
            mount.history.clone(),
            mount.shard.to_string(),
        ]
    };
    let headings = [
        "DIRECTORY",
        "STATE",
        "REVISION",
        ">FILES",
        ">SIZE",
        ">PRESENT",
        ">COMPLETE",
        "HISTORY",
        ">SHARD",
    ];
    table(&headings, mounts.iter().map(row))
}

/// Everything about one.
pub fn mount(mount: &Mount) -> String {
    pairs(&[
        ("directory", Some(mount.directory.clone())),
        ("state", Some(state(mount))),
        ("origin", Some(mount.url.clone())),
        ("revision", Some(mount.revision.clone())),
        ("commit", Some(mount.commit.clone())),
        ("owner", Some(format!("{}:{}", mount.owner.uid, mount.owner.gid))),
        ("files", Some(number(mount.files))),
        ("size", Some(bytes(mount.tree_bytes))),
        ("present", Some(format!("{} of {}", present(mount), bytes(mount.segment_bytes)))),
        ("segments", Some(format!("{}, complete: {}", mount.segments, mount.complete_segments))),
        ("history", Some(mount.history.clone())),
        ("pool", Some(mount.pool.to_string())),
        ("shard", Some(mount.shard.to_string())),
        ("trouble", mount.trouble.clone()),
    ])
}

fn state(mount: &Mount) -> String {
    let mounted = if mount.mounted { "mounted" } else { "unmounted" };
    format!("{mounted}{}", if mount.read_only { ", read-only" } else { "" })
}

/// `main (1a2b3c4d)`, or only the commit where that is its name.
fn revision(mount: &Mount) -> String {
    let short = mount.commit.get(..8).unwrap_or(&mount.commit);
    if mount.commit.starts_with(&mount.revision) {
        return short.to_owned();
    }
    format!("{} ({short})", mount.revision)
}

fn present(mount: &Mount) -> String {
    let percent = percent(mount.present_bytes, mount.segment_bytes);
    format!("{} ({percent})", bytes(mount.present_bytes))
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn a_list() {
        assert_eq!(
            list(&[samples::mount(), samples::other_mount()]),
            r"
DIRECTORY          STATE                 REVISION         URL
/srv/u-boot        mounted               main (1a2b3c4d)  https://example.org/u-boot.git
/home/a/with \xff  unmounted, read-only  v1.0 (1a2b3c4d)  /srv/git/a.git
"
            .trim_start()
        );
        assert_eq!(list(&[]), "no trees\n");
    }

    #[test]
    fn one() {
        assert_eq!(
            mount(&samples::other_mount()),
            r"
directory  /home/a/with \xff
state      unmounted, read-only
origin     /srv/git/a.git
revision   v1.0
commit     1a2b3c4d5e6f7a8b9c0d1a2b3c4d5e6f7a8b9c0d
owner      1000:100
files      3
size       10 B
present    12.0 KiB (100 %) of 12.0 KiB
segments   1, complete: 1
history    shallow
pool       2
shard      1
trouble    connection refused
"
            .trim_start()
        );
    }

    #[test]
    fn a_commit_is_its_own_name() {
        let commit = samples::mount().commit;
        let detached = Mount { revision: commit[..12].into(), ..samples::mount() };
        assert_eq!(revision(&detached), "1a2b3c4d");
    }

    #[test]
    fn a_url_can_do_nothing_to_the_terminal() {
        let evil = Mount { url: "x\x1b]0;\x07\ny".into(), ..samples::mount() };
        assert!(list(&[evil]).contains(r"x\x1b]0;\x07 y"));
    }
}
