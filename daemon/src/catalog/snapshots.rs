//! containerd's snapshots.

use std::collections::{BTreeMap, HashSet};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::types::Type;
use rusqlite::{Error, OptionalExtension, Row, Transaction, params};

use super::records::{signed, unsigned};
use super::{Catalog, CatalogError};
use crate::ids::{SnapshotId, TreeId};
use crate::object::ObjectId;

pub type Labels = BTreeMap<String, String>;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    /// Mounted read-only.
    View,
    /// Somebody writes to it.
    Active,
    /// Others are made on top of it.
    Committed,
}

/// A snapshot, under a number from [`allocate_snapshot`](Catalog::allocate_snapshot).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    pub id: SnapshotId,
    pub name: String,
    /// By name.
    pub parent: Option<String>,
    pub kind: SnapshotKind,
    /// What it shows on top of its parent, where that is not in a directory of its own.
    pub tree: Option<TreeId>,
    pub labels: Labels,
}

/// A snapshot. Times are in nanoseconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub name: String,
    pub parent: Option<String>,
    pub kind: SnapshotKind,
    pub tree: Option<TreeId>,
    pub labels: Labels,
    pub created: i64,
    pub updated: i64,
    /// Bytes on the disk when it was committed.
    pub size: u64,
    pub inodes: u64,
}

/// What the rules of snapshots don't allow. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// There is none of that name.
    Missing,
    ParentMissing,
    ParentNotCommitted,
    /// There is one of that name already.
    Exists,
    NotActive,
    /// Others are on top of it.
    HasChildren,
}

/// A snapshot after a change, if it was allowed.
pub type Outcome = Result<Result<Snapshot, Refused>, CatalogError>;

impl SnapshotKind {
    fn text(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

impl Snapshot {
    const SELECT: &str = "SELECT s.id, s.name, p.name, s.kind, s.tree, s.labels, s.created, s.updated, s.size, s.inodes
                          FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent";

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let kind: String = row.get(3)?;
        let kinds = [SnapshotKind::View, SnapshotKind::Active, SnapshotKind::Committed];
        let kind = kinds.into_iter().find(|k| k.text() == kind).ok_or_else(|| {
            Error::FromSqlConversionFailure(3, Type::Text, format!("{kind:?} is not known").into())
        })?;
        let tree = match row.get::<_, Option<i64>>(4)? {
            Some(_) => Some(TreeId(unsigned(row, 4)?)),
            None => None,
        };
        let labels: String = row.get(5)?;
        let labels = serde_json::from_str(&labels)
            .map_err(|e| Error::FromSqlConversionFailure(5, Type::Text, Box::new(e)))?;
        Ok(Self {
            id: SnapshotId(unsigned(row, 0)?),
            name: row.get(1)?,
            parent: row.get(2)?,
            kind,
            tree,
            labels,
            created: row.get(6)?,
            updated: row.get(7)?,
            size: unsigned(row, 8)?,
            inodes: unsigned(row, 9)?,
        })
    }
}

impl Catalog {
    /// Puts a snapshot on record. Its parent has to be committed, its name new.
    pub async fn insert_snapshot(&self, new: NewSnapshot) -> Outcome {
        self.run("put a snapshot on record", move |t| {
            let parent = match &new.parent {
                None => None,
                Some(name) => match find(t, name)? {
                    None => return Ok(Err(Refused::ParentMissing)),
                    Some(parent) if parent.kind != SnapshotKind::Committed => {
                        return Ok(Err(Refused::ParentNotCommitted));
                    }
                    Some(parent) => Some(signed(parent.id.0)?),
                },
            };
            if find(t, &new.name)?.is_some() {
                return Ok(Err(Refused::Exists));
            }
            t.execute(
                "INSERT INTO snapshots
                     (id, name, parent, kind, tree, labels, created, updated, size, inodes)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7, 0, 0)",
                params![
                    signed(new.id.0)?,
                    new.name,
                    parent,
                    new.kind.text(),
                    new.tree.map(|tree| signed(tree.0)).transpose()?,
                    json(&new.labels)?,
                    nanoseconds(),
                ],
            )?;
            found(t, &new.name)
        })
        .await
    }

    /// Makes an active snapshot a committed one of another name, with these labels and no others.
    pub async fn commit_snapshot(
        &self,
        key: String,
        name: String,
        labels: Labels,
        (size, inodes): (u64, u64),
    ) -> Outcome {
        self.run("commit a snapshot", move |t| {
            let Some(active) = find(t, &key)? else { return Ok(Err(Refused::Missing)) };
            if active.kind != SnapshotKind::Active {
                return Ok(Err(Refused::NotActive));
            }
            if find(t, &name)?.is_some() {
                return Ok(Err(Refused::Exists));
            }
            t.execute(
                "UPDATE snapshots SET name = ?2, kind = 'committed', labels = ?3, created = ?4,
                                      updated = ?4, size = ?5, inodes = ?6
                 WHERE id = ?1",
                params![
                    signed(active.id.0)?,
                    name,
                    json(&labels)?,
                    nanoseconds(),
                    signed(size)?,
                    signed(inodes)?
                ],
            )?;
            found(t, &name)
        })
        .await
    }

    /// Forgets a snapshot that no other is on top of; gives what it was.
    pub async fn remove_snapshot(&self, name: String) -> Outcome {
        self.run("forget a snapshot", move |t| {
            let Some(snapshot) = find(t, &name)? else { return Ok(Err(Refused::Missing)) };
            let id = signed(snapshot.id.0)?;
            let children: i64 =
                t.query_row("SELECT count(*) FROM snapshots WHERE parent = ?1", [id], |row| {
                    row.get(0)
                })?;
            if children > 0 {
                return Ok(Err(Refused::HasChildren));
            }
            t.execute("DELETE FROM snapshots WHERE id = ?1", [id])?;
            Ok(Ok(snapshot))
        })
        .await
    }

    /// Changes labels: all of them, or those that are named. An empty one is removed.
    pub async fn label_snapshot(
        &self,
        name: String,
        labels: Labels,
        only: Option<Vec<String>>,
    ) -> Outcome {
        self.run("label a snapshot", move |t| {
            let Some(snapshot) = find(t, &name)? else { return Ok(Err(Refused::Missing)) };
            let mut now = match &only {
                None => labels.clone(),
                Some(_) => snapshot.labels,
            };
            for label in only.into_iter().flatten() {
                let value = labels.get(&label).cloned().unwrap_or_default();
                now.insert(label, value);
            }
            now.retain(|_, value| !value.is_empty());
            t.execute(
                "UPDATE snapshots SET labels = ?2, updated = ?3 WHERE id = ?1",
                params![signed(snapshot.id.0)?, json(&now)?, nanoseconds()],
            )?;
            found(t, &name)
        })
        .await
    }

    pub async fn snapshot(&self, name: &str) -> Result<Option<Snapshot>, CatalogError> {
        let name = name.to_owned();
        self.run("read a snapshot", move |t| find(t, &name)).await
    }

    /// All of them, the oldest first.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, CatalogError> {
        self.run("list the snapshots", |t| {
            let query = format!("{} ORDER BY s.id", Snapshot::SELECT);
            t.prepare(&query)?.query_map([], Snapshot::from_row)?.collect()
        })
        .await
    }

    /// A snapshot and all below it, from the top down. Nothing, if there is none of that name.
    pub async fn snapshot_chain(&self, name: &str) -> Result<Vec<Snapshot>, CatalogError> {
        let name = name.to_owned();
        self.run("read a snapshot and what is below it", move |t| {
            let mut chain = Vec::new();
            let mut next = Some(name);
            while let Some(name) = next {
                let Some(snapshot) = find(t, &name)? else { break };
                next = snapshot.parent.clone();
                chain.push(snapshot);
            }
            Ok(chain)
        })
        .await
    }

    /// The trees that snapshots show.
    pub async fn snapshot_trees(&self) -> Result<HashSet<TreeId>, CatalogError> {
        self.run("list the snapshots' trees", |t| {
            t.prepare("SELECT DISTINCT tree FROM snapshots WHERE tree IS NOT NULL")?
                .query_map([], |row| Ok(TreeId(unsigned(row, 0)?)))?
                .collect()
        })
        .await
    }

    /// The trees of all pools whose URL begins so, with their commits: first those that are known to be what their
    /// commits say.
    pub async fn trees_by_commit(
        &self,
        url: &'static str,
    ) -> Result<Vec<(ObjectId, TreeId)>, CatalogError> {
        self.run("list trees", move |t| {
            t.prepare(
                "SELECT trees.git_commit, trees.id FROM trees JOIN pools ON pools.id = trees.pool
                 WHERE substr(pools.url, 1, length(?1)) = ?1
                 ORDER BY trees.revision <> '', trees.proved = 0, trees.id",
            )?
            .query_map([url], |row| {
                let id = ObjectId::from_bytes(&row.get::<_, Vec<u8>>(0)?)
                    .map_err(|e| Error::FromSqlConversionFailure(0, Type::Blob, Box::new(e)))?;
                Ok((id, TreeId(unsigned(row, 1)?)))
            })?
            .collect()
        })
        .await
    }

    /// The names that images with this tree were pulled by.
    pub async fn names_of_tree(&self, tree: TreeId) -> Result<Vec<String>, CatalogError> {
        self.run("list the images of a layer", move |t| {
            t.prepare(
                "SELECT DISTINCT reference FROM images JOIN image_layers ON image = images.id WHERE tree = ?1",
            )?
            .query_map([signed(tree.0)?], |row| row.get(0))?
            .collect()
        })
        .await
    }
}

fn find(t: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<Snapshot>> {
    let query = format!("{} WHERE s.name = ?1", Snapshot::SELECT);
    t.prepare_cached(&query)?.query_row([name], Snapshot::from_row).optional()
}

/// What was just written.
fn found(t: &Transaction<'_>, name: &str) -> rusqlite::Result<Result<Snapshot, Refused>> {
    Ok(find(t, name)?.ok_or(Refused::Missing))
}

fn json(labels: &Labels) -> rusqlite::Result<String> {
    serde_json::to_string(labels).map_err(|e| Error::ToSqlConversionFailure(Box::new(e)))
}

/// Since the epoch.
fn nanoseconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn catalog() -> (tempfile::TempDir, Catalog) {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.sqlite")).unwrap();
        (directory, catalog)
    }

    async fn new(catalog: &Catalog, name: &str, parent: &str, kind: SnapshotKind) -> NewSnapshot {
        NewSnapshot {
            id: catalog.allocate_snapshot().await.unwrap(),
            name: name.into(),
            parent: Some(parent.to_owned()).filter(|parent| !parent.is_empty()),
            kind,
            tree: None,
            labels: Labels::from([("l".into(), name.into())]),
        }
    }

    #[tokio::test]
    async fn a_life() {
        let (_directory, catalog) = catalog().await;
        let made = new(&catalog, "a", "", SnapshotKind::Active).await;
        let snapshot = catalog.insert_snapshot(made.clone()).await.unwrap().unwrap();
        assert_eq!((snapshot.id, snapshot.parent.as_deref()), (made.id, None));
        assert_eq!(catalog.snapshot("a").await.unwrap(), Some(snapshot));
        let on_active = new(&catalog, "b", "a", SnapshotKind::Active).await;
        let refused = catalog.insert_snapshot(on_active).await.unwrap();
        assert_eq!(refused, Err(Refused::ParentNotCommitted));
        let on_nothing = new(&catalog, "b", "x", SnapshotKind::Active).await;
        let refused = catalog.insert_snapshot(on_nothing).await.unwrap();
        assert_eq!(refused, Err(Refused::ParentMissing));
        let again = new(&catalog, "a", "", SnapshotKind::View).await;
        assert_eq!(catalog.insert_snapshot(again).await.unwrap(), Err(Refused::Exists));

        let labels = Labels::from([("m".into(), "1".into())]);
        let commit = |key: &str, name: &str| {
            catalog.commit_snapshot(key.into(), name.into(), labels.clone(), (10, 2))
        };
        assert_eq!(commit("x", "c").await.unwrap(), Err(Refused::Missing));
        assert_eq!(commit("a", "a").await.unwrap(), Err(Refused::Exists));
        let committed = commit("a", "c").await.unwrap().unwrap();
        assert_eq!((committed.id, committed.size, committed.inodes), (made.id, 10, 2));
        assert_eq!((committed.kind, &committed.labels), (SnapshotKind::Committed, &labels));
        assert_eq!(commit("c", "d").await.unwrap(), Err(Refused::NotActive));

        let view = new(&catalog, "v", "c", SnapshotKind::View).await;
        catalog.insert_snapshot(view).await.unwrap().unwrap();
        let chain = catalog.snapshot_chain("v").await.unwrap();
        let names: Vec<_> = chain.iter().map(|snapshot| snapshot.name.as_str()).collect();
        assert_eq!(names, ["v", "c"]);
        assert_eq!(catalog.snapshot_chain("x").await.unwrap(), []);
        let remove = |name: &str| catalog.remove_snapshot(name.into());
        assert_eq!(remove("c").await.unwrap(), Err(Refused::HasChildren));
        remove("v").await.unwrap().unwrap();
        remove("c").await.unwrap().unwrap();
        assert_eq!(remove("c").await.unwrap(), Err(Refused::Missing));
        assert_eq!(catalog.snapshots().await.unwrap(), []);
        assert!(catalog.allocate_snapshot().await.unwrap() > made.id, "a number comes back");
    }

    #[tokio::test]
    async fn labels() {
        let (_directory, catalog) = catalog().await;
        let made = new(&catalog, "a", "", SnapshotKind::View).await;
        catalog.insert_snapshot(made).await.unwrap().unwrap();
        let labels = |labels: &[(&str, &str)]| -> Labels {
            labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
        };
        let change = |new: Labels, only: Option<&[&str]>| {
            let only = only.map(|only| only.iter().map(|name| (*name).to_owned()).collect());
            catalog.label_snapshot("a".into(), new, only)
        };
        let changed = change(labels(&[("x", "1"), ("y", "")]), None).await.unwrap().unwrap();
        assert_eq!(changed.labels, labels(&[("x", "1")]));
        let new = labels(&[("z", "3"), ("x", "2")]);
        let changed = change(new, Some(&["z", "l"])).await.unwrap().unwrap();
        assert_eq!(changed.labels, labels(&[("x", "1"), ("z", "3")]));
        let changed = change(Labels::new(), Some(&["x"])).await.unwrap().unwrap();
        assert_eq!(changed.labels, labels(&[("z", "3")]));
        let missing = catalog.label_snapshot("b".into(), Labels::new(), None).await.unwrap();
        assert_eq!(missing, Err(Refused::Missing));
    }
}
