//! Import of many files: how long until they are there, and how much memory it takes.

use std::time::Duration;

use anyhow::Result;

use super::memory::{Watch, of};
use super::table::{Table, bytes, time};
use super::{hydrant_clone, timed, world};
use crate::repository::generated;

/// For each number of files: time of `hydrant clone` and `git status`, peak memory of every process that
/// took part, and what stays resident.
pub fn run(counts: &[usize]) -> Result<Vec<Table>> {
    let mut table =
        Table::new("Import of generated files", &["files", "process", "time", "peak", "stays"]);
    for &count in counts {
        let repository = generated(count)?;
        let world = world("bench-import", Duration::ZERO)?;
        world.serve(&repository, "repo")?;
        let watch = Watch::start(&world.daemon);
        let place = world.path("tree");
        let (elapsed, ()) = timed(|| hydrant_clone(&world, "repo", &place))?;
        table.row([count.to_string(), "all".to_owned(), time(elapsed)]);
        let stays = of(&world.daemon);
        for (name, peak) in watch.peaks() {
            let role = name.split(' ').nth(1).unwrap_or_default();
            let stay = stays.iter().filter(|(other, _)| other == role || role.is_empty());
            let stay = if name.starts_with("hydrantd") {
                stay.map(|(_, resident)| resident.own_bytes).max().map_or(String::new(), bytes)
            } else {
                String::new()
            };
            table.row([String::new(), name, String::new(), bytes(peak.own_bytes), stay]);
        }
        let sum = stays.iter().map(|(_, resident)| resident.own_bytes).sum();
        let own = stays.iter().map(|(_, resident)| resident.all_bytes).sum();
        table.row([
            String::new(),
            "all that stay, own memory (with shared)".to_owned(),
            String::new(),
            String::new(),
            format!("{} ({})", bytes(sum), bytes(own)),
        ]);
    }
    Ok(vec![table])
}
