//! Runs the benchmarks and prints tables in Markdown. As root, with optimised programs:
//!
//!     cargo build --release --workspace && target/release/hydrant-bench

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use hydrant_tests::bench::{calls, cold, fetch, images, import, warm};
use hydrant_tests::repository::{generated, u_boot_shape};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Only makes the repositories.
    Prepare,
    Fetch,
    Warm,
    /// What one call costs, on each of the layers.
    Calls,
    Cold,
    Import,
    /// Container images, beside other ways to run them. Not among the default ones: it fetches programs.
    Images,
}

#[derive(Parser)]
struct Arguments {
    /// Which parts; all by default.
    parts: Vec<Part>,
    /// Round trip times in milliseconds.
    #[arg(long, value_delimiter = ',', default_value = "0,20")]
    round_trips_ms: Vec<u64>,
    /// Numbers of files to import.
    #[arg(long, value_delimiter = ',', default_value = "100000,1000000")]
    files: Vec<usize>,
    /// How often each start of a container is measured.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Only these ways to run images: words of their names in the tables.
    #[arg(long, value_delimiter = ',')]
    systems: Vec<String>,
    /// A file for the tables, beside standard output.
    #[arg(long)]
    output: Option<PathBuf>,
}

fn main() -> Result<()> {
    let Arguments { mut parts, round_trips_ms, files, runs, systems, output } = Arguments::parse();
    let mut file = output.map(File::create).transpose().context("can't write the tables")?;
    if parts.is_empty() {
        parts = vec![Part::Fetch, Part::Warm, Part::Calls, Part::Cold, Part::Import];
    }
    let round_trips: Vec<Duration> =
        round_trips_ms.into_iter().map(Duration::from_millis).collect();
    for part in parts {
        let tables = match part {
            Part::Prepare => {
                u_boot_shape(100)?;
                files.iter().try_for_each(|&count| generated(count).map(drop))?;
                continue;
            }
            Part::Fetch => fetch::run(&round_trips)?,
            Part::Warm => warm::run()?,
            Part::Calls => calls::run()?,
            Part::Cold => cold::run(&round_trips)?,
            Part::Import => import::run(&files)?,
            Part::Images => images::run(runs, &systems)?,
        };
        for table in tables {
            print!("{table}");
            if let Some(file) = &mut file {
                write!(file, "{table}")?;
            }
        }
    }
    Ok(())
}
