//! Readers that wait.

use hydrant_api::QueueEvent;

use super::{or_dash, pairs, table, time};
use crate::output::clean_line;

/// One line each, then what keeps them.
pub fn events(events: &[QueueEvent]) -> String {
    if events.is_empty() {
        return "nobody waits\n".into();
    }
    let row = |event: &QueueEvent| {
        vec![
            event.id.to_string(),
            state(event),
            time(event.age_ms),
            event.process.pid.to_string(),
            or_dash(event.process.comm.as_ref()),
            or_dash(event.process.uid),
            or_dash(event.worker_pid),
            event.attempts.to_string(),
            or_dash(event.path.as_ref()),
            range(event),
            or_dash(event.images.first().or(event.origin.as_ref())),
            container(event),
        ]
    };
    let headings = [
        ">ID", "STATE", ">AGE", ">PID", "COMMAND", ">UID", ">WORKER", ">TRIES", "PATH", "RANGE",
        "ORIGIN", "CGROUP",
    ];
    let mut text = table(&headings, events.iter().map(row));
    for event in events {
        if let Some(reason) = &event.reason {
            text.push_str(&format!("{}: {}\n", event.id, clean_line(reason)));
        }
    }
    text
}

/// Everything about one.
pub fn event(event: &QueueEvent) -> String {
    pairs(&[
        ("id", Some(event.id.to_string())),
        ("state", Some(state(event))),
        ("age", Some(time(event.age_ms))),
        ("tree", event.directory.clone()),
        ("image", Some(event.images.join(", ")).filter(|images| !images.is_empty())),
        ("layer", event.layer.clone()),
        ("path", event.path.clone()),
        ("segment", Some(event.segment.to_string())),
        ("range", Some(range(event))),
        ("pid", Some(event.process.pid.to_string())),
        ("command", event.process.comm.clone()),
        ("uid", event.process.uid.map(|uid| uid.to_string())),
        ("cgroup", event.process.cgroup.clone()),
        ("container", event.process.container.clone()),
        ("shard", Some(event.shard.to_string())),
        ("worker", event.worker_pid.map(|pid| pid.to_string())),
        ("tries", Some(event.attempts.to_string())),
        ("origin", event.origin.clone()),
        ("reason", event.reason.clone()),
    ])
}

/// The container, as those who run containers show it, or the cgroup.
fn container(event: &QueueEvent) -> String {
    match event.process.container.as_deref() {
        Some(id) => format!("container {}", id.get(..12).unwrap_or(id)),
        None => or_dash(event.process.cgroup.as_ref()),
    }
}

fn state(event: &QueueEvent) -> String {
    event.state.replace('_', " ")
}

/// Bytes of the segment.
fn range(event: &QueueEvent) -> String {
    format!("{}+{}", event.offset, event.count)
}

#[cfg(test)]
mod tests {
    use super::super::samples;

    #[test]
    fn the_queue() {
        assert_eq!(
            super::events(&[samples::event(), samples::bare_event(), samples::event_of_image()]),
            "\
ID  STATE         AGE  PID  COMMAND   UID  WORKER  TRIES  PATH              RANGE      ORIGIN                          CGROUP
 7  in flight  1.24 s  812  make     1000    4711      2  common/board_f.c  4096+8192  https://example.org/u-boot.git  /user.slice/a.scope
12  waiting      5 ms  900  -           -       -      0  -                 4096+8192  -                               -
14  in flight  1.24 s  812  sh       1000    4711      2  usr/bin/python3   4096+8192  docker.io/library/a:1           container 0123456789ab
7: connection refused, trying again
"
        );
        assert_eq!(super::events(&[]), "nobody waits\n");
    }

    #[test]
    fn one_event() {
        assert_eq!(
            super::event(&samples::event()),
            "\
id         7
state      in flight
age        1.24 s
tree       /srv/u-boot
path       common/board_f.c
segment    5
range      4096+8192
pid        812
command    make
uid        1000
cgroup     /user.slice/a.scope
shard      0
worker     4711
tries      2
origin     https://example.org/u-boot.git
reason     connection refused, trying again
"
        );
        assert!(!super::event(&samples::bare_event()).contains("cgroup"));
        let of_image = super::event(&samples::event_of_image());
        for line in [
            "image      docker.io/library/a:1, docker.io/library/b:1\n",
            "layer      sha256:fedcba987654",
            "path       usr/bin/python3\n",
            "container  0123456789ab",
        ] {
            assert!(of_image.contains(line), "{of_image}");
        }
    }
}
