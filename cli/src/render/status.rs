//! The daemon.

use hydrant_api::{Counters, Shard, Status};

use super::{bytes, images, mounts, number, or_dash, pairs, table, time, workers};
use crate::output::clean_line;

/// All of it.
pub fn status(status: &Status) -> String {
    let mut text = format!(
        "hydrantd {}, pid {}, {} queue, state in {}, socket in {}\n\n",
        clean_line(&status.version),
        status.pid,
        clean_line(&status.queue),
        clean_line(&status.state_dir),
        clean_line(&status.run_dir),
    );
    text.push_str(&mounts::overview(&status.mounts));
    for mount in &status.mounts {
        if let Some(trouble) = &mount.trouble {
            let (directory, trouble) = (clean_line(&mount.directory), clean_line(trouble));
            text.push_str(&format!("trouble: {directory}: {trouble}\n"));
        }
    }
    let fills = images::fills(&status.layers);
    if !fills.is_empty() {
        text.push('\n');
        text.push_str(&fills);
    }
    text.push('\n');
    text.push_str(&shards(&status.shards));
    text.push('\n');
    text.push_str(&counters(&status.counters));
    text
}

fn shards(shards: &[Shard]) -> String {
    let row = |shard: &Shard| {
        vec![
            shard.shard.to_string(),
            or_dash(shard.worker_pid),
            number(shard.waiting),
            number(shard.in_flight),
            time(shard.longest_wait_ms),
            number(shard.worker_deaths),
        ]
    };
    let headings = [">SHARD", ">WORKER", ">WAITING", ">IN FLIGHT", ">LONGEST WAIT", ">DEATHS"];
    let mut text = table(&headings, shards.iter().map(row));
    for shard in shards {
        text.push_str(&workers::last_death(shard.shard, shard.last_death.as_ref()));
    }
    text
}

fn counters(counters: &Counters) -> String {
    let c = counters;
    pairs(&[
        (
            "events",
            Some(format!(
                "{}: {} were there already, {} fetched, {} denied, {} given to another worker",
                number(c.events),
                number(c.answered_present),
                number(c.answered_fetched),
                number(c.denied),
                number(c.requeued),
            )),
        ),
        (
            "waiting now",
            Some(format!("{}, the longest wait {}", number(c.waiting), time(c.longest_wait_ms))),
        ),
        (
            "fetched",
            Some(format!(
                "{} objects ({} ahead of a reader), {} of content",
                number(c.objects),
                number(c.read_ahead_objects),
                bytes(c.content_bytes),
            )),
        ),
        (
            "requests",
            Some(format!(
                "{}, {} tried again; {} received, {} sent",
                number(c.requests),
                number(c.retries),
                bytes(c.received_bytes),
                bytes(c.sent_bytes),
            )),
        ),
        (
            "rejected",
            Some(format!(
                "{} objects that were not what they should be",
                number(c.rejected_objects)
            )),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::super::samples;

    #[test]
    fn all_of_it() {
        assert_eq!(
            super::status(&samples::status()),
            r"
hydrantd 0.1.0, pid 4700, brokered queue, state in /var/lib/hydrant, socket in /run/hydrant

DIRECTORY          STATE                 REVISION          FILES       SIZE           PRESENT  COMPLETE  HISTORY   SHARD
/srv/u-boot        mounted               main (1a2b3c4d)  38,512  264.0 MiB     3.0 MiB (1 %)       1/5  fetching      0
/home/a/with \xff  unmounted, read-only  v1.0 (1a2b3c4d)       3       10 B  12.0 KiB (100 %)       1/1  shallow       1
trouble: /home/a/with \xff: connection refused

SHARD  WORKER  WAITING  IN FLIGHT  LONGEST WAIT  DEATHS
    0    4711        2         12        812 ms       1
    1       -        2         12        812 ms       1
shard 0: worker 4690 ended 2 min 5 s ago: killed by the kernel: out of memory (limit 512 MiB)

events       12,345: 345 were there already, 11,985 fetched, 1 denied, 2 given to another worker
waiting now  14, the longest wait 1.24 s
fetched      11,000 objects (9,000 ahead of a reader), 200.0 MiB of content
requests     321, 3 tried again; 50.0 MiB received, 1.0 MiB sent
rejected     0 objects that were not what they should be
"
            .trim_start()
        );
    }
}
