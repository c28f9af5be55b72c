//! Control groups for workers and importers: how much they may use, and whether they used too much.

use std::path::Path;

use tracing::{debug, info, warn};

use crate::config::Config;
use crate::sys::cgroup::{Cgroup, Limits, Parent};
use crate::watch::Watcher;
use crate::watch::cgroup::{CgroupEvent, CgroupWatch};

/// Makes the groups. Where there can be none, processes run without: that is said once.
#[derive(Debug, Default)]
pub struct Cgroups {
    parent: Option<Parent>,
    watcher: Option<Watcher>,
    limits: Limits,
}

impl Cgroups {
    /// For the daemon of a state directory. Must be called in a tokio runtime.
    pub fn new(config: &Config, state: &Path) -> Self {
        let workers = &config.workers;
        if workers.cgroups == Some(false) {
            return Self::default();
        }
        let limits = config.worker_limits();
        let name = hydrant_api::cgroup_name(state);
        let parent = match Parent::find(workers.cgroup_parent.as_deref(), &name) {
            Ok(parent) => parent,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(error, "workers have no cgroups of their own, and no limits");
                return Self::default();
            }
        };
        let missing = |controller, limited: bool| limited && !parent.has(controller);
        let missing: Vec<&str> = [
            ("memory", limits.memory_max.or(limits.memory_high).is_some()),
            ("pids", limits.pids_max.is_some()),
            ("cpu", limits.cpu_weight.is_some()),
        ]
        .into_iter()
        .filter_map(|(controller, limited)| missing(controller, limited).then_some(controller))
        .collect();
        let directory = parent.directory().display();
        info!(%directory, memory_max = limits.memory_max, "workers have cgroups of their own");
        if !missing.is_empty() {
            warn!(%directory, ?missing, "no such controllers here: workers are not limited by these");
        }
        let watcher = Watcher::new().inspect_err(|error| {
            warn!(%error, "can't watch cgroups: processes that run out of memory are only seen to end");
        });
        Self { parent: Some(parent), watcher: watcher.ok(), limits }
    }

    /// A new group, its name beginning with `name`; `None` where there can be none.
    pub fn make(&self, name: &str) -> Option<Cgroup> {
        let group = self.parent.as_ref()?.make(name, self.limits).inspect_err(|error| {
            let error = error as &dyn std::error::Error;
            warn!(error, "can't make a cgroup: the process runs without limits");
        });
        let group = group.ok()?;
        if let Some(watcher) = &self.watcher {
            match CgroupWatch::new(watcher, group.directory()) {
                Ok(watch) => drop(tokio::spawn(follow(watch, group.directory().to_owned()))),
                Err(error) => warn!(%error, "can't watch a cgroup"),
            }
        }
        Some(group)
    }

    /// At the end of the daemon.
    pub fn close(&self) {
        if let Some(parent) = &self.parent {
            parent.close();
        }
    }
}

/// Says what happens in a group, to its end.
async fn follow(mut watch: CgroupWatch, directory: std::path::PathBuf) {
    let cgroup = directory.display();
    let mut killed = 0;
    loop {
        match watch.next().await {
            CgroupEvent::Memory(events) if events.oom_kill > killed => {
                killed = events.oom_kill;
                warn!(%cgroup, "out of memory: the kernel has killed the process");
            }
            CgroupEvent::Memory(_) => warn!(%cgroup, "out of memory"),
            CgroupEvent::Populated(populated) => debug!(%cgroup, populated, "cgroup"),
            CgroupEvent::Gone => break debug!(%cgroup, "cgroup removed"),
        }
    }
}

/// Why the kernel killed a process in `group`, if it did so for want of memory; and whether it was the
/// group's own limit.
pub fn out_of_memory(group: &Cgroup) -> Option<(String, bool)> {
    let events = group.memory_events().filter(|events| events.oom_kill > 0)?;
    // the group is charged with it where its own limit could not be kept; else the machine, or a group above, had
    // nothing left, and it was only the one to be killed
    if events.oom == 0 {
        return Some(("killed by the kernel: the machine is out of memory".into(), false));
    }
    let limit = group.memory_max().map(|limit| format!(" (limit {} MiB)", limit >> 20));
    Some((format!("killed by the kernel: out of memory{}", limit.unwrap_or_default()), true))
}
