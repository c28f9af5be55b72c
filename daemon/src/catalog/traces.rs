//! What readers of layers wanted when these had just been mounted. It stays when a layer goes: it may come again.

use rusqlite::{OptionalExtension, Transaction, params};

use super::records::{object, signed};
use super::{Catalog, CatalogError};
use crate::ids::SegmentId;
use crate::object::ObjectId;

/// So many records are kept of all layers, the newest.
const MAX_RECORDS: u64 = 2_000_000;

/// Adds records of a layer, each with its place, and lets go of what is too old of all layers.
fn insert(
    t: &Transaction<'_>,
    layer: &[u8],
    records: impl IntoIterator<Item = (u32, u32)>,
) -> rusqlite::Result<()> {
    let insert = "INSERT OR IGNORE INTO traces (layer, record, place) VALUES (?1, ?2, ?3)";
    let mut insert = t.prepare(insert)?;
    for (record, place) in records {
        insert.execute(params![layer, record, place])?;
    }
    t.execute(
        "DELETE FROM traces WHERE id <= (SELECT max(id) FROM traces) - ?1",
        [signed(MAX_RECORDS)?],
    )?;
    Ok(())
}

/// Where something is in what was read of all layers: the least was read first. Of a trace that was shared, the place in the
/// whole image's; then when it became known here.
pub type Place = (u32, i64);

impl Catalog {
    /// Readers of the layer with this segment wanted these records, after those that are known.
    pub async fn add_to_trace(
        &self,
        segment: SegmentId,
        records: Vec<u32>,
    ) -> Result<(), CatalogError> {
        self.run("keep what was read of a layer", move |t| {
            let last = "SELECT git_commit,
                     (SELECT coalesce(max(place), 0) FROM traces WHERE layer = git_commit)
                 FROM trees
                 WHERE id = (SELECT min(tree) FROM tree_segments WHERE segment = ?1)";
            let last = t
                .query_row(last, [signed(segment.0)?], |row| {
                    Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, u32>(1)?))
                })
                .optional()?;
            // it has been removed
            let Some((layer, place)) = last else { return Ok(()) };
            let records = records.into_iter().map(|record| (record, place));
            insert(t, &layer, records)
        })
        .await
    }

    /// What readers of a layer want, as somebody else says: records, each with its place in the trace of all layers of an image.
    /// What is known already counts more.
    pub async fn learn_trace(
        &self,
        layer: ObjectId,
        records: Vec<(u32, u32)>,
    ) -> Result<(), CatalogError> {
        self.run("keep what is to be read of a layer", move |t| {
            let layer = layer.as_bytes();
            let known = "SELECT EXISTS (SELECT 1 FROM traces WHERE layer = ?1)";
            if t.query_row(known, [layer], |row| row.get(0))? {
                return Ok(());
            }
            insert(t, layer, records)
        })
        .await
    }

    /// Forgets what readers of these layers wanted.
    pub async fn forget_trace(&self, layers: Vec<ObjectId>) -> Result<(), CatalogError> {
        self.run("forget what was read of layers", move |t| {
            let mut delete = t.prepare("DELETE FROM traces WHERE layer = ?1")?;
            for layer in &layers {
                delete.execute([layer.as_bytes()])?;
            }
            Ok(())
        })
        .await
    }

    /// What readers of these layers wanted: the layer and the record, in order.
    pub async fn trace(&self, layers: Vec<ObjectId>) -> Result<Vec<(ObjectId, u32)>, CatalogError> {
        let found = self.placed_trace(layers).await?;
        Ok(found.into_iter().map(|(_, layer, record)| (layer, record)).collect())
    }

    /// The same, each with its place, which tells the order of what is of different calls.
    pub async fn placed_trace(
        &self,
        layers: Vec<ObjectId>,
    ) -> Result<Vec<(Place, ObjectId, u32)>, CatalogError> {
        self.run("read what was read of layers", move |t| {
            let select = "SELECT layer, record, place, id FROM traces WHERE layer = ?1";
            let mut select = t.prepare(select)?;
            let mut found: Vec<(Place, ObjectId, u32)> = Vec::new();
            for layer in &layers {
                let rows = select.query_map([layer.as_bytes()], |row| {
                    Ok(((row.get(2)?, row.get(3)?), object(row, 0)?, row.get(1)?))
                })?;
                found.extend(rows.collect::<Result<Vec<_>, _>>()?);
            }
            found.sort_unstable_by_key(|(place, ..)| *place);
            // a layer that is asked for twice
            found.dedup();
            Ok(found)
        })
        .await
    }
}
