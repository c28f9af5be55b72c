//! Power cuts and reboots of a machine that uses Hydrant: a few of what `hydrant-powercut` does by the hundred.
//!
//! The machine is the guest kernel (`tests/guest`), so these run outside of it, as root, with
//! `HYDRANT_GUEST_KERNEL`.

use std::time::Duration;

use anyhow::{Result, ensure};
use hydrant_tests::powercut::{Fs, Options, Outcome, cut_power, reboot};

fn cut(fs: Fs, seed: u64) -> Result<Outcome> {
    let options = Options { fs, cuts: 2, seed, load: Duration::from_secs(5) };
    let outcome = cut_power(options, |line| println!("{line}"))?;
    println!("{fs}: {outcome}");
    ensure!(outcome.cuts == 2 && outcome.checks >= 2, "{outcome:?}");
    Ok(outcome)
}

#[test]
#[ignore = "needs root and the guest kernel outside"]
fn power_cuts_on_ext4() -> Result<()> {
    cut(Fs::Ext4, 11)?;
    Ok(())
}

#[test]
#[ignore = "needs root and the guest kernel outside"]
fn power_cuts_on_xfs() -> Result<()> {
    cut(Fs::Xfs, 12)?;
    Ok(())
}

#[test]
#[ignore = "needs root and the guest kernel outside"]
fn power_cuts_on_btrfs() -> Result<()> {
    cut(Fs::Btrfs, 13)?;
    Ok(())
}

/// The tree is back after a reboot, and `git status` reads no content.
#[test]
#[ignore = "needs root and the guest kernel outside"]
fn power_off_and_on_again() -> Result<()> {
    let checked = reboot(Fs::Ext4)?;
    ensure!(checked.files > 50, "{checked:?}");
    Ok(())
}
