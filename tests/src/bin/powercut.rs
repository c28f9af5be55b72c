//! Cuts the power of a machine that uses Hydrant, and looks at what is left. As root, with the guest kernel:
//!
//!     cargo build --workspace --bins && target/debug/hydrant-powercut ext4 xfs btrfs

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Parser, Subcommand};
use hydrant_tests::powercut::{Fs, Options, cut_power, run_in_guest};

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    /// One after the other; all by default.
    file_systems: Vec<Fs>,
    /// On each.
    #[arg(long, default_value_t = 100)]
    cuts: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A cut comes at the latest after so long.
    #[arg(long, default_value_t = 10)]
    load_secs: u64,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// What runs in the guest.
    #[command(hide = true)]
    Guest { plan: PathBuf },
}

fn main() -> Result<()> {
    let Arguments { mut file_systems, cuts, seed, load_secs, role } = Arguments::parse();
    if let Some(Role::Guest { plan }) = role {
        return run_in_guest(&plan);
    }
    if file_systems.is_empty() {
        file_systems = vec![Fs::Ext4, Fs::Xfs, Fs::Btrfs, Fs::Ext4Writeback];
    }
    let load = Duration::from_secs(load_secs);
    for fs in file_systems {
        let begun = Instant::now();
        let outcome = cut_power(Options { fs, cuts, seed, load }, |line| println!("{line}"))?;
        println!("{fs}: {outcome}. {:.0} s", begun.elapsed().as_secs_f32());
    }
    Ok(())
}
