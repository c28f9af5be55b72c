//! What it costs to read all of an image: first, and when all of it is here.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::host::Host;
use super::site::{Network, Site};
use super::{
    FULL_PULL, PATIENCE, Spread, System, Table, WITH_INDEX, bytes, drop_caches, median, ratio,
    timed,
};

/// Reads every file and says how long it took, in nanoseconds.
const READ: &str = "s=$(date +%s%N); find / -xdev -type f -exec cat {} + >/dev/null; e=$(date +%s%N); echo $((e - s))";
/// How often what is in memory is read.
const WARM_READS: usize = 5;

/// A pull and a container that reads every file, with nothing here before.
pub(super) fn everything(site: &Site, network: Network, runs: usize) -> Result<Table> {
    let title = format!("Pull and read every file, {} (min / median of {runs})", network.name());
    let mut table = Table::new(title, &["system", "time", "down", "time / first row"]);
    let mut full = None;
    for system in site.systems() {
        let mut times = Vec::new();
        let mut down = Vec::new();
        for _ in 0..runs {
            let host = Host::fresh(site, system)?;
            let before = site.proxy(network).traffic().down_bytes;
            let image = site.reference(network, system);
            let (time, ()) = timed(|| {
                host.pull(&image)?;
                read(&host, &image).map(drop)
            })
            .context(system.name)?;
            times.push(time);
            down.push(site.proxy(network).traffic().down_bytes - before);
            host.finish()?;
        }
        let spread = Spread::of(times.iter().copied());
        let median_time = spread.median.as_secs_f64();
        let full = *full.get_or_insert(median_time);
        table.row([
            system.name.to_owned(),
            spread.to_string(),
            bytes(median(down.into_iter())),
            ratio(median_time, full),
        ]);
    }
    Ok(table)
}

/// One reading of all files, as the container took the time.
fn read(host: &Host, image: &str) -> Result<Duration> {
    let found = read_often(host, image, 1)?;
    found.into_iter().next().context("nothing was read")
}

fn read_often(host: &Host, image: &str, times: usize) -> Result<Vec<Duration>> {
    let script = vec![READ; times].join("\n");
    let run = host.container(image, "reader", &["/bin/sh", "-euc", &script])?;
    let said = run.time_out(PATIENCE).check()?.text();
    let found = said.lines().map(|line| Ok(Duration::from_nanos(line.trim().parse()?)));
    let found = found.collect::<Result<Vec<_>>>()?;
    ensure!(found.len() == times, "{said}");
    Ok(found)
}

/// When all is here: from memory, and from the disk.
pub(super) fn hydrated(site: &Site, runs: usize) -> Result<Table> {
    let title = format!("Read every file of a complete image (min / median of {runs})");
    let columns = ["system", "in memory", "from disk", "speed in memory", "speed from disk"];
    let mut table = Table::new(title, &columns);
    let mut first = None;
    // in turn, as a disk may be slower at another time
    let systems = [FULL_PULL, WITH_INDEX];
    let mut found: Vec<(Vec<Duration>, Vec<Duration>)> = vec![Default::default(); systems.len()];
    for _ in 0..runs {
        for (system, (warm, cold)) in systems.iter().zip(&mut found) {
            let (in_memory, from_disk) = once(site, system).context(system.name)?;
            warm.push(in_memory);
            cold.push(from_disk);
        }
    }
    for (system, (warm, cold)) in systems.iter().zip(found) {
        let spreads = [warm, cold].map(|times| Spread::of(times.into_iter()));
        let base = *first.get_or_insert(spreads);
        let speed = |n: usize| {
            let of = |spreads: [Spread; 2]| spreads[n].min.as_secs_f64();
            ratio(of(base), of(spreads))
        };
        table.row([
            system.name.to_owned(),
            spreads[0].to_string(),
            spreads[1].to_string(),
            speed(0),
            speed(1),
        ]);
    }
    Ok(table)
}

/// The fastest of some reads from memory, and a read from the disk.
fn once(site: &Site, system: &System) -> Result<(Duration, Duration)> {
    let host = Host::fresh(site, system)?;
    let image = site.reference(Network::Lan, system);
    host.pull(&image)?;
    read(&host, &image)?;
    host.wait_until_complete()?;
    drop_caches()?;
    let from_disk = read(&host, &image)?;
    let warm = read_often(&host, &image, WARM_READS)?;
    let in_memory = warm.into_iter().min().context("nothing was read")?;
    host.finish()?;
    Ok((in_memory, from_disk))
}
