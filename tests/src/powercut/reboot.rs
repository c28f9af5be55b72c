//! A machine that is turned off as it should be, and on again.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::book::{Figures, Report, Work};
use super::guest::{Guest, PATIENCE};
use super::origins::{branch, origin};
use super::{Fs, Options, Rig};
use crate::process::Run;

const NAME: &str = "tree";

/// Clones, reads some of the tree, turns the machine off; then on again: the tree is mounted, what was fetched
/// is still there, and `git status` fetches nothing.
pub fn reboot(fs: Fs) -> Result<Figures> {
    let options = Options { fs, cuts: 0, seed: 1, load: Duration::ZERO };
    let mut rig = Rig::new(options)?;
    for work in [Work::Clone, Work::Status] {
        let guest = rig.boot(work)?;
        rig.watch(guest, false, true)?;
    }
    ensure!(rig.outcome.checked.trees == 1, "{:?}", rig.outcome);
    Ok(rig.outcome.checked)
}

/// The first boot, in the guest.
pub(super) fn clone(guest: &Guest) -> Result<()> {
    let place = guest.tree(NAME);
    guest.tell(&Report::Cloning { name: NAME.into(), origin: 0, revision: 0 })?;
    let url = origin(&guest.plan.origins, 0);
    let (url, directory) = (url.to_string_lossy(), place.to_string_lossy());
    let revision = format!("--rev={}", branch(0));
    guest.hydrant(&["clone", "--history=none", &revision, &url, &directory])?;
    guest.tell(&Report::Cloned { name: NAME.into() })?;
    let read = r#"cat "$1"/dir-0/*.bin >/dev/null"#;
    Run::shell(read, &[&place]).time_out(PATIENCE).check()?;
    git_status(guest)
}

/// The second boot, in the guest.
pub(super) fn status(guest: &Guest) -> Result<()> {
    git_status(guest)?;
    let status = guest.daemon.status()?;
    let counters = status.counters;
    let fetched = (counters.objects, counters.content_bytes, counters.requests);
    ensure!(fetched == (0, 0, 0), "git status has fetched something: {counters:?}");
    let [mount] = &status.mounts[..] else { anyhow::bail!("not one tree: {status:?}") };
    ensure!(mount.mounted && mount.present_bytes > 20_000, "{mount:?}");
    Ok(())
}

fn git_status(guest: &Guest) -> Result<()> {
    let place = guest.tree(NAME);
    let status = ["status", "--porcelain", "--untracked-files=all", "--ignored"];
    let output = Run::program("git", &status).current_dir(&place).time_out(PATIENCE).check()?;
    ensure!(output.stdout.is_empty(), "git status says {}", output.text());
    Ok(())
}
