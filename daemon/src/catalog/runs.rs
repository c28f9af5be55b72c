//! How the last run of the daemon ended.

use std::collections::HashMap;

use super::{Catalog, CatalogError};

/// The run before this one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastRun {
    /// `/proc/sys/kernel/random/boot_id` then; `None` where there was no run.
    pub boot_id: Option<String>,
    /// It was stopped and synced what it had written.
    pub clean: bool,
}

impl LastRun {
    /// Whether blocks that were written may be lost or half there: the machine went down under a
    /// daemon that had not synced. After a mere crash of the daemon the page cache has them.
    #[must_use]
    pub fn may_have_lost_writes(&self, boot_id: &str) -> bool {
        !self.clean && self.boot_id.as_deref().is_some_and(|last| last != boot_id)
    }
}

impl Catalog {
    /// Begins a run in this boot; gives the one before. From now on the stop is not clean.
    pub async fn begin_run(&self, boot_id: &str) -> Result<LastRun, CatalogError> {
        let boot_id = boot_id.to_owned();
        self.run("begin a run", move |t| {
            let mut meta: HashMap<String, String> = t
                .prepare("SELECT name, value FROM meta WHERE name IN ('boot_id', 'clean')")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<Result<_, _>>()?;
            let last =
                LastRun { boot_id: meta.remove("boot_id"), clean: meta.contains_key("clean") };
            if !last.may_have_lost_writes(&boot_id) {
                set_boot(t, &boot_id)?;
            }
            t.execute("DELETE FROM meta WHERE name = 'clean'", [])?;
            Ok(last)
        })
        .await
    }

    /// What may have been lost has been seen to. Until then every start sees to it anew.
    pub async fn recovered(&self, boot_id: &str) -> Result<(), CatalogError> {
        let boot_id = boot_id.to_owned();
        self.run("note the recovery", move |t| set_boot(t, &boot_id)).await
    }

    /// Ends the run: everything that was written to segments is synced.
    pub async fn end_run(&self) -> Result<(), CatalogError> {
        self.run("end the run", |t| {
            t.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('clean', 'yes')", [])?;
            Ok(())
        })
        .await
    }
}

fn set_boot(t: &rusqlite::Transaction<'_>, boot_id: &str) -> rusqlite::Result<()> {
    t.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('boot_id', ?1)", [boot_id])?;
    Ok(())
}
