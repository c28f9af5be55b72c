//! `hydrant workers`: the workers, and new ones in their place.

use std::path::Path;

use hydrant_api as api;
use hydrant_api::path_to_text;

use super::Supervisor;
use super::queue::milliseconds;
use super::shard::{Command, LastDeath, Snapshot};
use crate::admin::ApiError;
use crate::sys::cgroup;

impl Supervisor {
    /// All workers, by shard.
    pub(super) async fn list_workers(&self) -> Vec<api::Worker> {
        self.snapshots().await.iter().map(describe).collect()
    }

    /// Has the worker of one shard, or of each in turn, hand back what it has, and waits until its successor
    /// has taken over.
    pub(super) async fn replace_workers(
        &self,
        request: &api::RestartRequest,
    ) -> Result<Vec<api::Worker>, ApiError> {
        let wanted = |shard: u16| request.shard.is_none_or(|wanted| wanted == shard);
        let shards: Vec<_> = self.shards.iter().filter(|shard| wanted(shard.id.0)).collect();
        if let (Some(shard), true) = (request.shard, shards.is_empty()) {
            return Err(ApiError::not_found(format!("there is no shard {shard}"))
                .with_hint("`hydrant workers` lists them"));
        }
        for shard in shards {
            let restarted = shard.ask(|reply| Command::Recycle { reply }).await;
            restarted
                .ok_or_else(|| ApiError::internal("the shard has ended"))?
                .map_err(|why| ApiError::internal(format!("shard {}: {why}", shard.id)))?;
        }
        let workers = self.list_workers().await;
        Ok(workers.into_iter().filter(|worker| wanted(worker.shard)).collect())
    }
}

fn describe(snapshot: &Snapshot) -> api::Worker {
    let worker = snapshot.worker.as_ref();
    let cgroup = worker.and_then(|worker| worker.cgroup.as_deref());
    let number = |file| cgroup.and_then(|cgroup| cgroup::number(cgroup, file));
    let memory = number("memory.current").or_else(|| resident(worker?.pid));
    api::Worker {
        shard: snapshot.shard.0,
        pid: worker.map(|worker| worker.pid),
        state: worker.map_or("none", |worker| worker.state).into(),
        spare_pid: snapshot.spare_pid,
        age_ms: worker.map(|worker| milliseconds(worker.age)),
        memory_bytes: memory,
        memory_max_bytes: number("memory.max"),
        cgroup: cgroup.map(|cgroup: &Path| path_to_text(cgroup)),
        deaths: snapshot.worker_deaths,
        last_death: snapshot.last_death.as_ref().map(death),
    }
}

pub(super) fn death(death: &LastDeath) -> api::WorkerDeath {
    api::WorkerDeath {
        pid: death.pid,
        ago_ms: milliseconds(death.at.elapsed()),
        end: death.end.clone(),
    }
}

/// What a process has in memory, in bytes.
fn resident(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_has_something_in_memory() {
        let own = super::resident(std::process::id() as i32).unwrap();
        assert!(own > 100_000, "{own}");
        assert_eq!(super::resident(-1), None);
    }
}
