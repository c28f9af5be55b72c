//! The process that parses bytes from the network has no privileges.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::process::{Run, until};
use hydrant_tests::repository::lonely;
use hydrant_tests::world::World;
use nix::unistd::Pid;

/// Every worker, and every spare one, has a uid of its own kind (not 0), empty capability sets, `no_new_privs`, a seccomp filter,
/// and neither an open file of the catalog nor the right to open it.
#[test]
#[ignore = "needs root"]
fn root_workers_have_none() -> Result<()> {
    let world = World::new("privileges")?;
    let tree = world.quick(&lonely(3, 20_000)?)?;
    fs_err::read(tree.join("dir-0000/file-0000.bin"))?;
    let mut workers = world.daemon.workers()?;
    ensure!(!workers.is_empty(), "there are no workers");
    let spares = until("there are spare ones", Duration::from_secs(60), || {
        let output = world.daemon.check(&["workers", "--json"]).ok()?;
        let all: Vec<hydrant_api::Worker> = serde_json::from_slice(&output.stdout).ok()?;
        all.iter().map(|worker| worker.spare_pid.map(Pid::from_raw)).collect::<Option<Vec<_>>>()
    })?;
    workers.extend(spares);
    for pid in workers {
        let text = fs_err::read_to_string(format!("/proc/{pid}/status"))?;
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let status: BTreeMap<&str, &str> = lines.map(|(k, v)| (k, v.trim())).collect();
        let of = |key: &str| status.get(key).copied().with_context(|| format!("no {key}"));
        for key in ["Uid", "Gid"] {
            ensure!(of(key)?.split_whitespace().all(|id| id != "0"), "{key}: {}", of(key)?);
        }
        ensure!(of("Groups")?.split_whitespace().all(|id| id != "0"), "groups: {}", of("Groups")?);
        for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure!(of(key)?.trim_start_matches('0').is_empty(), "{key}: {}", of(key)?);
        }
        ensure!(of("NoNewPrivs")? == "1", "no_new_privs is off");
        ensure!(of("Seccomp")? == "2", "seccomp mode {}", of("Seccomp")?);

        let state = world.daemon.directories().state.clone();
        for entry in fs_err::read_dir(format!("/proc/{pid}/fd"))? {
            let Ok(target) = fs_err::read_link(entry?.path()) else { continue };
            ensure!(!target.starts_with(state.join("catalog.sqlite")), "has {target:?} open");
            ensure!(!target.starts_with(state.join("mounts")), "has {target:?} open");
        }
        let uid = of("Uid")?.split_whitespace().next().unwrap_or_default().to_owned();
        let script =
            r#"! setpriv --reuid="$1" --regid="$1" --clear-groups cat "$2" >/dev/null 2>&1"#;
        let catalog = state.join("catalog.sqlite");
        ensure!(catalog.exists(), "no catalog at {}", catalog.display());
        Run::shell(script, &[uid.as_ref(), &catalog])
            .check()
            .context("uid of the worker can read the catalog")?;
    }
    Ok(())
}
