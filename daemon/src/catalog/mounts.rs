//! Mounts.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rusqlite::{OptionalExtension, params};

use super::pools::now;
use super::records::signed;
use super::{Catalog, CatalogError, Mount, NewMount};
use crate::ids::MountId;

impl Catalog {
    /// Fails where the directory has a mount already.
    pub async fn insert_mount(&self, mount: NewMount) -> Result<(), CatalogError> {
        self.run("put a mount on record", move |t| {
            t.execute(
                "INSERT INTO mounts (id, tree, directory, read_only, owner_uid, owner_gid, mounted,
                                     pack, history, created, image)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                params![
                    signed(mount.id.0)?,
                    signed(mount.tree.0)?,
                    mount.directory.as_os_str().as_bytes(),
                    mount.read_only,
                    mount.owner.uid,
                    mount.owner.gid,
                    mount.mounted,
                    mount.pack,
                    mount.history,
                    now(),
                    mount.image.map(|image| signed(image.0)).transpose()?,
                ],
            )?;
            Ok(())
        })
        .await
    }

    /// All of them, by directory.
    pub async fn mounts(&self) -> Result<Vec<Mount>, CatalogError> {
        self.run("list the mounts", |t| {
            let query = format!("SELECT {} FROM mounts ORDER BY directory", Mount::COLUMNS);
            t.prepare(&query)?.query_map([], Mount::from_row)?.collect()
        })
        .await
    }

    pub async fn mount_by_directory(
        &self,
        directory: &Path,
    ) -> Result<Option<Mount>, CatalogError> {
        let directory = directory.as_os_str().as_bytes().to_vec();
        self.run("find a mount", move |t| {
            let query = format!("SELECT {} FROM mounts WHERE directory = ?1", Mount::COLUMNS);
            t.query_row(&query, [directory], Mount::from_row).optional()
        })
        .await
    }

    /// Whether it is to be mounted, now and after a restart.
    pub async fn set_mounted(&self, id: MountId, mounted: bool) -> Result<(), CatalogError> {
        self.run("change a mount", move |t| {
            t.execute(
                "UPDATE mounts SET mounted = ?2 WHERE id = ?1",
                params![signed(id.0)?, mounted],
            )?;
            Ok(())
        })
        .await
    }

    pub async fn set_history(
        &self,
        id: MountId,
        history: impl Into<String>,
    ) -> Result<(), CatalogError> {
        let history = history.into();
        self.run("change a mount", move |t| {
            t.execute(
                "UPDATE mounts SET history = ?2 WHERE id = ?1",
                params![signed(id.0)?, history],
            )?;
            Ok(())
        })
        .await
    }

    /// Forgets the mount. Its tree stays until [`take_garbage`](Self::take_garbage).
    pub async fn remove_mount(&self, id: MountId) -> Result<(), CatalogError> {
        self.run("forget a mount", move |t| {
            t.execute("DELETE FROM mounts WHERE id = ?1", [signed(id.0)?])?;
            Ok(())
        })
        .await
    }
}
