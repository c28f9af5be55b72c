//! Container images: how soon a container of one that nobody has says something, and what it costs to read all of it;
//! beside a pull of all of it by containerd, and beside other snapshotters.
//!
//! Each measurement is on a machine that has never had the image: containerd and snapshotter are new, and nothing is in the
//! page cache but what the registry serves.

mod host;
mod reads;
mod site;
mod soci;
mod stargz;
mod tls;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::host::Host;
use self::site::{Network, Site};
use super::table::{Table, bytes, ratio, time};
use super::timed;
use crate::process::Run;

/// What runs first, and what nobody knows of that runs then.
const A: &[&str] = &["/usr/bin/python3", "-c", "print('ok')"];
const B: &[&str] = &["/usr/bin/python3", "-c", "import numpy, pandas; print('ok')"];

const NAMESPACE: &str = "default";
const PATIENCE: Duration = Duration::from_secs(300);
/// Of a peer's snapshotter: longer than any measurement.
const LIFE: Duration = Duration::from_secs(3600);

/// What the image is run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct System {
    name: &'static str,
    snapshotter: Snapshotter,
    /// Which of the registry's: the image as it is, or made for this.
    repository: &'static str,
    /// Lines for the section `[images]` of Hydrant's configuration.
    configuration: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Snapshotter {
    Overlayfs,
    Hydrant,
    Soci,
    Stargz,
}

impl Snapshotter {
    fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Hydrant => "hydrant",
            Self::Soci => "soci",
            Self::Stargz => "stargz",
        }
    }
}

const FULL_PULL: System = System {
    name: "overlayfs, full pull",
    snapshotter: Snapshotter::Overlayfs,
    repository: site::PLAIN,
    configuration: "",
};
const WITH_INDEX: System = System {
    name: "Hydrant, index",
    snapshotter: Snapshotter::Hydrant,
    repository: site::INDEXED,
    configuration: "",
};

const WITH_TRACE: System =
    System { name: "Hydrant, index and trace of A", repository: site::TRACED, ..WITH_INDEX };
const WITH_TRACE_OF_BOTH: System = System {
    name: "Hydrant, index and trace of A and B",
    repository: site::TRACED_BOTH,
    ..WITH_INDEX
};

const SYSTEMS: &[System] = &[
    FULL_PULL,
    System {
        name: "Hydrant, first contact",
        snapshotter: Snapshotter::Hydrant,
        repository: site::PLAIN,
        configuration: "",
    },
    WITH_INDEX,
    WITH_TRACE,
    WITH_TRACE_OF_BOTH,
    System {
        name: "Hydrant, index, only what is read",
        configuration: "background_fill = false\n",
        ..WITH_INDEX
    },
    System {
        name: "Hydrant, eStargz image",
        snapshotter: Snapshotter::Hydrant,
        repository: site::ESTARGZ,
        configuration: "",
    },
    System {
        name: "Hydrant, image of stargz' client",
        snapshotter: Snapshotter::Hydrant,
        repository: site::STARGZ,
        configuration: "",
    },
    System {
        name: "stargz 0.14, optimised for A",
        snapshotter: Snapshotter::Stargz,
        repository: site::STARGZ,
        configuration: "",
    },
    System {
        name: "SOCI 0.4",
        snapshotter: Snapshotter::Soci,
        repository: site::SOCI,
        configuration: "",
    },
];

/// What can't be had from Debian.
const NOT_HERE: &[(&str, &str)] = &[("nydus", "Debian has its snapshotter and not `nydusd`")];

/// Makes what a peer needs.
type Make = fn(&mut Site) -> Result<()>;
const PEERS: &[(&str, &str, Make)] = &[
    ("SOCI", site::SOCI, Site::make_soci_index),
    ("stargz-snapshotter", site::STARGZ, Site::make_stargz_image),
];

/// Each measurement so many times, of the systems whose names contain one of the words, or of all.
pub fn run(runs: usize, words: &[String]) -> Result<Vec<Table>> {
    ensure!(runs > 0, "no runs");
    let mut left_out = Table::new("Left out", &["system", "why"]);
    let mut site = Site::new(words.to_vec())?;
    for (name, repository, make) in PEERS {
        if site.wants(repository)
            && let Err(error) = make(&mut site)
        {
            left_out.row([(*name).to_owned(), format!("{error:#}").replace('\n', " ")]);
        }
    }
    for (name, why) in NOT_HERE {
        left_out.row([(*name).to_owned(), (*why).to_owned()]);
    }
    let mut tables = vec![left_out];
    for network in Network::BOTH {
        tables.push(starts(&site, network, runs)?);
        tables.push(reads::everything(&site, network, runs)?);
    }
    tables.push(reads::hydrated(&site, runs)?);
    Ok(tables)
}

/// Time since the pull was begun, and the bytes that came until then.
#[derive(Debug, Clone, Copy)]
struct Reached {
    time: Duration,
    bytes: u64,
}

/// From the pull to the first output of A, then to that of B.
fn starts(site: &Site, network: Network, runs: usize) -> Result<Table> {
    let title = format!("From pull to output, {} (min / median of {runs})", network.name());
    let columns = ["system", "A", "A + B", "down at A", "down at A + B", "A + B / first row"];
    let mut table = Table::new(title, &columns);
    let mut full = None;
    for system in site.systems() {
        let mut found = Vec::new();
        for _ in 0..runs {
            found.push(start(site, network, system).context(system.name)?);
        }
        let column = |pick: fn(&[Reached; 2]) -> Reached| found.iter().map(pick).collect();
        let (a, b): (Vec<Reached>, Vec<Reached>) = (column(|both| both[0]), column(|both| both[1]));
        let median_time = Spread::of(b.iter().map(|at| at.time)).median.as_secs_f64();
        let full = *full.get_or_insert(median_time);
        table.row([
            system.name.to_owned(),
            Spread::of(a.iter().map(|at| at.time)).to_string(),
            Spread::of(b.iter().map(|at| at.time)).to_string(),
            bytes(median(a.iter().map(|at| at.bytes))),
            bytes(median(b.iter().map(|at| at.bytes))),
            ratio(median_time, full),
        ]);
    }
    Ok(table)
}

fn start(site: &Site, network: Network, system: &System) -> Result<[Reached; 2]> {
    let host = Host::fresh(site, system)?;
    let proxy = site.proxy(network);
    let before = proxy.traffic().down_bytes;
    let started = Instant::now();
    host.pull(&site.reference(network, system))?;
    let image = site.reference(network, system);
    let a = host.first_output(&image, "a", A, started)?;
    let a = Reached { time: a, bytes: proxy.traffic().down_bytes - before };
    // A's container is gone when this one starts: how long that takes is not B's
    let between = Instant::now();
    let b = host.first_output(&image, "b", B, between)?;
    let b = Reached { time: a.time + b, bytes: proxy.traffic().down_bytes - before };
    host.finish()?;
    Ok([a, b])
}

/// The least, and what half of them are not more than.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spread {
    min: Duration,
    median: Duration,
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration> + Clone) -> Self {
        Self { min: times.clone().min().unwrap_or_default(), median: median(times) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} / {}", time(self.min), time(self.median))
    }
}

/// Of an even number, the lower one.
fn median<T: Ord + Default>(values: impl Iterator<Item = T>) -> T {
    let mut values: Vec<T> = values.collect();
    values.sort();
    let middle = values.len().saturating_sub(1) / 2;
    values.into_iter().nth(middle).unwrap_or_default()
}

/// Writes back and lets go of all that is in the page cache.
fn drop_caches() -> Result<()> {
    Run::shell("sync; echo 3 >/proc/sys/vm/drop_caches", &[]).time_out(PATIENCE).check().map(drop)
}

/// Has all files below a directory in the page cache.
fn warm(directory: &Path) -> Result<()> {
    let mut command = Command::new("sh");
    command.args(["-euc", "find \"$1\" -type f -exec cat {} + >/dev/null", "sh"]).arg(directory);
    Run::new(command).time_out(PATIENCE).check().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_and_median() {
        let times = [5, 1, 4].map(Duration::from_secs);
        let spread = Spread::of(times.into_iter());
        assert_eq!(spread.to_string(), "1.00 s / 4.00 s");
        assert_eq!(median([4_u64, 1, 3, 2].into_iter()), 2);
        assert_eq!(median([7_u64].into_iter()), 7);
    }
}
