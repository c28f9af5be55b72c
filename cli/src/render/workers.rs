//! Workers.

use hydrant_api::{Worker, WorkerDeath};

use super::{bytes, number, or_dash, table, time};
use crate::output::clean_line;

/// One line each, then how the last of each shard ended.
pub fn workers(workers: &[Worker]) -> String {
    let row = |worker: &Worker| {
        vec![
            worker.shard.to_string(),
            or_dash(worker.pid),
            worker.state.clone(),
            or_dash(worker.spare_pid),
            or_dash(worker.age_ms.map(time)),
            or_dash(worker.memory_bytes.map(bytes)),
            or_dash(worker.memory_max_bytes.map(bytes)),
            number(worker.deaths),
            or_dash(worker.cgroup.as_ref()),
        ]
    };
    let headings =
        [">SHARD", ">WORKER", "STATE", ">SPARE", ">AGE", ">MEMORY", ">LIMIT", ">DEATHS", "CGROUP"];
    let mut text = table(&headings, workers.iter().map(row));
    for worker in workers {
        text.push_str(&last_death(worker.shard, worker.last_death.as_ref()));
    }
    text
}

/// A line, if there was one.
pub fn last_death(shard: u16, death: Option<&WorkerDeath>) -> String {
    let Some(WorkerDeath { pid, ago_ms, end }) = death else { return String::new() };
    format!("shard {shard}: worker {pid} ended {} ago: {}\n", time(*ago_ms), clean_line(end))
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn all_of_them() {
        let worker = Worker {
            shard: 0,
            pid: Some(4711),
            state: "running".into(),
            spare_pid: Some(4712),
            age_ms: Some(125_000),
            memory_bytes: Some(12 << 20),
            memory_max_bytes: Some(512 << 20),
            cgroup: Some("/sys/fs/cgroup/hydrant/worker-0-2".into()),
            deaths: 1,
            last_death: samples::status().shards[0].last_death.clone(),
        };
        let none = Worker {
            shard: 1,
            pid: None,
            state: "none".into(),
            spare_pid: None,
            age_ms: None,
            memory_bytes: None,
            memory_max_bytes: None,
            cgroup: None,
            deaths: 0,
            last_death: None,
        };
        assert_eq!(
            workers(&[worker, none]),
            "\
SHARD  WORKER  STATE    SPARE        AGE    MEMORY      LIMIT  DEATHS  CGROUP
    0    4711  running   4712  2 min 5 s  12.0 MiB  512.0 MiB       1  /sys/fs/cgroup/hydrant/worker-0-2
    1       -  none         -          -         -          -       0  -
shard 0: worker 4690 ended 2 min 5 s ago: killed by the kernel: out of memory (limit 512 MiB)
"
        );
    }
}
