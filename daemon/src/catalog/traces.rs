//! What readers of layers wanted when these had just been mounted. It stays when a layer goes: it may come again.

use rusqlite::params;

use super::records::{object, signed};
use super::{Catalog, CatalogError};
use crate::ids::SegmentId;
use crate::object::ObjectId;

/// So many records are kept of all layers, the newest.
const MAX_RECORDS: u64 = 500_000;

impl Catalog {
    /// Readers of the layer with this segment wanted these records, after those that are known.
    pub async fn add_to_trace(
        &self,
        segment: SegmentId,
        records: Vec<u32>,
    ) -> Result<(), CatalogError> {
        self.run("keep what was read of a layer", move |t| {
            let mut insert = t.prepare(
                "INSERT OR IGNORE INTO traces (layer, record)
                 SELECT git_commit, ?2 FROM trees
                 WHERE id = (SELECT min(tree) FROM tree_segments WHERE segment = ?1)",
            )?;
            for record in records {
                insert.execute(params![signed(segment.0)?, record])?;
            }
            t.execute(
                "DELETE FROM traces WHERE id <= (SELECT max(id) FROM traces) - ?1",
                [signed(MAX_RECORDS)?],
            )?;
            Ok(())
        })
        .await
    }

    /// What readers of these layers wanted: the layer and the record, in order.
    pub async fn trace(&self, layers: Vec<ObjectId>) -> Result<Vec<(ObjectId, u32)>, CatalogError> {
        self.run("read what was read of layers", move |t| {
            let mut select = t.prepare("SELECT layer, record, id FROM traces WHERE layer = ?1")?;
            let mut found: Vec<(i64, ObjectId, u32)> = Vec::new();
            for layer in &layers {
                let rows = select.query_map([layer.as_bytes()], |row| {
                    Ok((row.get(2)?, object(row, 0)?, row.get(1)?))
                })?;
                found.extend(rows.collect::<Result<Vec<_>, _>>()?);
            }
            found.sort_unstable_by_key(|(id, ..)| *id);
            Ok(found.into_iter().map(|(_, layer, record)| (layer, record)).collect())
        })
        .await
    }
}
