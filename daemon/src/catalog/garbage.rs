//! What nobody refers to any more.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::Transaction;

use super::records::{signed, unsigned};
use super::sequence::numbered;
use super::{Catalog, CatalogError};
use crate::ids::{PoolId, SegmentId, TreeId};

/// Records that are gone from the catalog, and whose files are to go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Garbage {
    /// With the names of their images in `trees/`.
    pub trees: Vec<(TreeId, String)>,
    pub segments: Vec<(PoolId, SegmentId)>,
    /// Pools that have no segment left.
    pub pools: Vec<PoolId>,
}

impl Catalog {
    /// Takes off record the images that have neither name nor mount, and those of containerd of which it has no
    /// snapshot; the trees that no mount, no image and no snapshot has, the segments that no tree has, and the pools
    /// that have neither. Pools that are `busy` stay as they are: clones into them are under way, which
    /// may refer to what is there without a record of it yet. `busy` is asked between the catalog's
    /// operations, so that who becomes busy and then asks the catalog is not shown what goes.
    ///
    /// The files go after the records, so that no clone finds a record of what is being removed.
    /// Where that is interrupted, [`unknown_files`](Self::unknown_files) has them.
    pub async fn take_garbage(
        &self,
        busy: impl FnOnce() -> HashSet<PoolId> + Send + 'static,
    ) -> Result<Garbage, CatalogError> {
        self.run("take out what is not used", move |t| {
            let busy = busy();
            t.execute(
                "DELETE FROM images WHERE named = 0
                     AND id NOT IN (SELECT image FROM mounts WHERE image IS NOT NULL)",
                [],
            )?;
            forget_images(t, &busy)?;
            let trees = select(
                t,
                "SELECT id, pool, image FROM trees
                 WHERE id NOT IN (SELECT tree FROM mounts)
                   AND id NOT IN (SELECT tree FROM image_layers)
                   AND id NOT IN (SELECT tree FROM snapshots WHERE tree IS NOT NULL)",
                |row| Ok((TreeId(unsigned(row, 0)?), PoolId(unsigned(row, 1)?), row.get(2)?)),
            )?;
            let trees: Vec<(TreeId, String)> = trees
                .into_iter()
                .filter(|(_, pool, _)| !busy.contains(pool))
                .map(|(id, _, image)| (id, image))
                .collect();
            delete(t, "DELETE FROM trees WHERE id = ?1", trees.iter().map(|(id, _)| id.0))?;

            let mut segments = select(
                t,
                "SELECT pool, id FROM segments WHERE id NOT IN (SELECT segment FROM tree_segments)",
                |row| Ok((PoolId(unsigned(row, 0)?), SegmentId(unsigned(row, 1)?))),
            )?;
            segments.retain(|(pool, _)| !busy.contains(pool));
            delete(t, "DELETE FROM segments WHERE id = ?1", segments.iter().map(|(_, id)| id.0))?;

            let mut pools = select(
                t,
                "SELECT id FROM pools WHERE id NOT IN (SELECT pool FROM trees)
                                        AND id NOT IN (SELECT pool FROM segments)",
                |row| Ok(PoolId(unsigned(row, 0)?)),
            )?;
            pools.retain(|pool| !busy.contains(pool));
            delete(t, "DELETE FROM pools WHERE id = ?1", pools.iter().map(|id| id.0))?;
            Ok(Garbage { trees, segments, pools })
        })
        .await
    }

    /// Files and directories in `pools/` and `trees/` of the state directory that no record stands
    /// for: what a crash left behind, or the files of a catalog that was lost. To be called at start,
    /// before any clone: what a clone lays down has no record until it is complete. What is in
    /// `mounts/` is the users' and never among them.
    pub async fn unknown_files(&self) -> Result<Vec<PathBuf>, CatalogError> {
        let known = self
            .run("list what is known", |t| {
                let ids = |query| {
                    let ids = select(t, query, |row| unsigned(row, 0))?;
                    Ok::<HashSet<u64>, rusqlite::Error>(ids.into_iter().collect())
                };
                Ok(Known {
                    pools: ids("SELECT id FROM pools")?,
                    segments: ids("SELECT id FROM segments")?,
                    trees: ids("SELECT id FROM trees")?,
                })
            })
            .await?;
        Ok(known.strangers(&self.state)?)
    }
}

/// The numbers that are on record.
struct Known {
    pools: HashSet<u64>,
    segments: HashSet<u64>,
    trees: HashSet<u64>,
}

impl Known {
    fn strangers(&self, state: &Path) -> io::Result<Vec<PathBuf>> {
        let mut unknown = Vec::new();
        for (pool, name) in numbered(&state.join("pools"))? {
            let directory = state.join("pools").join(name);
            if !self.pools.contains(&pool) {
                unknown.push(directory);
                continue;
            }
            let files = numbered(&directory)?.into_iter();
            let files = files.filter(|(segment, _)| !self.segments.contains(segment));
            unknown.extend(files.map(|(_, name)| directory.join(name)));
        }
        let images = numbered(&state.join("trees"))?.into_iter();
        let images = images.filter(|(tree, _)| !self.trees.contains(tree));
        unknown.extend(images.map(|(_, name)| state.join("trees").join(name)));
        unknown.sort();
        Ok(unknown)
    }
}

/// Those that were pulled for containerd, which has no snapshot of them.
fn forget_images(t: &Transaction<'_>, busy: &HashSet<PoolId>) -> rusqlite::Result<()> {
    let images = select(
        t,
        "SELECT id FROM images
         WHERE held = 0 AND id NOT IN (SELECT image FROM mounts WHERE image IS NOT NULL)
           AND id NOT IN (SELECT image FROM image_layers JOIN snapshots USING (tree))",
        |row| unsigned(row, 0),
    )?;
    let mut pools = t.prepare(
        "SELECT pool FROM image_layers JOIN trees ON trees.id = image_layers.tree
         WHERE image_layers.image = ?1",
    )?;
    for image in images {
        let pools: Vec<_> = pools
            .query_map([signed(image)?], |row| Ok(PoolId(unsigned(row, 0)?)))?
            .collect::<rusqlite::Result<_>>()?;
        if !pools.iter().any(|pool| busy.contains(pool)) {
            delete(t, "DELETE FROM images WHERE id = ?1", [image].into_iter())?;
        }
    }
    Ok(())
}

fn select<T>(
    t: &Transaction<'_>,
    query: &str,
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    t.prepare(query)?.query_map([], read)?.collect()
}

fn delete(
    t: &Transaction<'_>,
    query: &str,
    ids: impl Iterator<Item = u64>,
) -> rusqlite::Result<()> {
    let mut statement = t.prepare(query)?;
    for id in ids {
        statement.execute([signed(id)?])?;
    }
    Ok(())
}
