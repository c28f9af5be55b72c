//! Trees.

use std::collections::HashSet;

use hydrant_api::Owner;
use rusqlite::{OptionalExtension, Transaction, params};

use super::pools::{insert_segment, now};
use super::records::{signed, unsigned};
use super::{Catalog, CatalogError, NewSegment, NewTree, Tree};
use crate::ids::{PoolId, SegmentId, TreeId};
use crate::object::ObjectId;

impl Catalog {
    /// Puts a tree on record together with the segments that were laid out for it. All or nothing.
    pub async fn insert_tree(
        &self,
        tree: NewTree,
        segments: Vec<NewSegment>,
    ) -> Result<(), CatalogError> {
        self.run("put a tree on record", move |t| {
            for segment in segments {
                insert_segment(t, tree.pool, segment)?;
            }
            t.execute(
                "INSERT INTO trees (id, pool, git_commit, root, revision, image, files, bytes,
                                    owner_uid, owner_gid, created, implicit)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
                params![
                    signed(tree.id.0)?,
                    signed(tree.pool.0)?,
                    tree.commit.as_bytes(),
                    tree.root.as_bytes(),
                    tree.revision,
                    tree.image,
                    signed(tree.files)?,
                    signed(tree.bytes)?,
                    tree.owner.uid,
                    tree.owner.gid,
                    now(),
                    signed(tree.implicit)?,
                ],
            )?;
            let mut insert = t.prepare(
                "INSERT INTO tree_segments (tree, position, segment) VALUES (?1, ?2, ?3)",
            )?;
            for (position, segment) in tree.segments.iter().enumerate() {
                let position = signed(position as u64)?;
                insert.execute([signed(tree.id.0)?, position, signed(segment.0)?])?;
            }
            Ok(())
        })
        .await
    }

    pub async fn tree(&self, id: TreeId) -> Result<Option<Tree>, CatalogError> {
        self.run("read a tree", move |t| {
            let query = format!("SELECT {} FROM trees WHERE id = ?1", Tree::COLUMNS);
            let tree = t.query_row(&query, [signed(id.0)?], Tree::from_row).optional()?;
            tree.map(|tree| with_segments(t, tree)).transpose()
        })
        .await
    }

    /// The newest tree of this commit whose files belong to `owner`, to be shared by another mount.
    pub async fn tree_of(
        &self,
        pool: PoolId,
        commit: ObjectId,
        owner: Owner,
    ) -> Result<Option<Tree>, CatalogError> {
        self.run("find a tree", move |t| {
            let query = format!(
                "SELECT {} FROM trees
                 WHERE pool = ?1 AND git_commit = ?2 AND owner_uid = ?3 AND owner_gid = ?4
                 ORDER BY id DESC LIMIT 1",
                Tree::COLUMNS
            );
            let key = params![signed(pool.0)?, commit.as_bytes(), owner.uid, owner.gid];
            let tree = t.query_row(&query, key, Tree::from_row).optional()?;
            tree.map(|tree| with_segments(t, tree)).transpose()
        })
        .await
    }

    /// The newest tree of a pool: of a layer, there is no other.
    pub async fn tree_of_pool(&self, pool: PoolId) -> Result<Option<Tree>, CatalogError> {
        self.run("find a tree", move |t| {
            let query = format!(
                "SELECT {} FROM trees WHERE pool = ?1 ORDER BY id DESC LIMIT 1",
                Tree::COLUMNS
            );
            let tree = t.query_row(&query, [signed(pool.0)?], Tree::from_row).optional()?;
            tree.map(|tree| with_segments(t, tree)).transpose()
        })
        .await
    }

    /// The tree that shows this segment and was pulled by an index is what that says: its segment is complete.
    pub async fn set_proved(&self, segment: SegmentId) -> Result<(), CatalogError> {
        self.run("note that a layer is proved", move |t| {
            let segment = [signed(segment.0)?];
            t.execute("UPDATE segments SET complete = 1 WHERE id = ?1", segment)?;
            t.execute(
                "UPDATE trees SET proved = 1, refuted = NULL WHERE revision <> ''
                 AND id IN (SELECT tree FROM tree_segments WHERE segment = ?1)",
                segment,
            )?;
            Ok(())
        })
        .await
    }

    /// The tree that shows this segment is not what its index says. Gives the tree.
    pub async fn set_refuted(
        &self,
        segment: SegmentId,
        why: String,
    ) -> Result<Option<Tree>, CatalogError> {
        self.run("note that a layer is refuted", move |t| {
            let query = format!(
                "UPDATE trees SET proved = 0, refuted = ?2
                 WHERE id IN (SELECT tree FROM tree_segments WHERE segment = ?1) RETURNING {}",
                Tree::COLUMNS
            );
            let key = params![signed(segment.0)?, why];
            let tree = t.query_row(&query, key, Tree::from_row).optional()?;
            tree.map(|tree| with_segments(t, tree)).transpose()
        })
        .await
    }

    /// Those that are not what their indexes say, and those of the revision `unbelieved` that are not proved.
    pub async fn refuted_trees(
        &self,
        unbelieved: Option<&'static str>,
    ) -> Result<HashSet<TreeId>, CatalogError> {
        self.run("list the refuted trees", move |t| {
            t.prepare(
                "SELECT id FROM trees WHERE refuted IS NOT NULL OR revision = ?1 AND NOT proved",
            )?
            .query_map([unbelieved], |row| Ok(TreeId(unsigned(row, 0)?)))?
            .collect()
        })
        .await
    }

    pub async fn trees(&self) -> Result<Vec<Tree>, CatalogError> {
        self.run("list the trees", |t| {
            let query = format!("SELECT {} FROM trees ORDER BY id", Tree::COLUMNS);
            let trees: Vec<Tree> =
                t.prepare(&query)?.query_map([], Tree::from_row)?.collect::<Result<_, _>>()?;
            trees.into_iter().map(|tree| with_segments(t, tree)).collect()
        })
        .await
    }
}

fn with_segments(t: &Transaction<'_>, mut tree: Tree) -> rusqlite::Result<Tree> {
    tree.segments = t
        .prepare_cached("SELECT segment FROM tree_segments WHERE tree = ?1 ORDER BY position")?
        .query_map([signed(tree.id.0)?], |row| Ok(SegmentId(unsigned(row, 0)?)))?
        .collect::<Result<_, _>>()?;
    Ok(tree)
}
