//! Mounting an image.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use hydrant_api::{MountImageRequest, Summary, path_from_text};
use tracing::info;

use super::super::clone::Cloning;
use super::super::durable;
use super::super::target::Target;
use super::super::{Supervisor, internal};
use super::{ROOT, Wanted, catalog};
use crate::admin::{ApiError, Caller};
use crate::catalog::{Image, Mount, NewMount};
use crate::ids::MountId;
use crate::sys::user::User;

impl Supervisor {
    pub(super) async fn mount_new_image(
        &self,
        caller: &Caller,
        request: &MountImageRequest,
        image: &Image,
    ) -> Result<Summary, ApiError> {
        let user = User::lookup(ROOT.uid, ROOT.gid)
            .map_err(|error| internal("can't look the user up", &error))?;
        let path = path_from_text(&request.directory);
        let _busy = self.begin(&path)?;
        let target = Target::prepare(&path, caller, &user).await?;
        if self.mount_at(&target.path).await?.is_some() {
            let message = format!("{} has a tree already", target.path.display());
            return Err(ApiError::conflict(message)
                .with_hint("`hydrant mount DIR` mounts it, `hydrant rm` removes it"));
        }
        let id = self.catalog.allocate_mount().await.map_err(catalog)?;
        match self.put_in_place(id, &target, request.read_only, image).await {
            Ok(summary) => Ok(summary),
            Err(error) => {
                self.undo_mount(id).await;
                target.undo();
                Err(error)
            }
        }
    }

    async fn put_in_place(
        &self,
        id: MountId,
        target: &Target,
        read_only: bool,
        image: &Image,
    ) -> Result<Summary, ApiError> {
        let directory = self.store.mount_dir(id);
        let owner = self.store.owner_dir(id);
        self.store
            .make_mount_dir(id, ROOT)
            .map_err(|error| internal("can't make room for the tree", &error))?;
        let top = image.layers.last().ok_or_else(|| ApiError::internal("it has no layers"))?;
        let mount = NewMount {
            id,
            tree: top.0,
            directory: target.path.clone(),
            read_only,
            owner: ROOT,
            // not before it is all there
            mounted: false,
            pack: None,
            history: "none".into(),
            image: Some(image.id),
        };
        self.catalog.insert_mount(mount).await.map_err(catalog)?;
        let mount = self.mount_at(&target.path).await?;
        let mount = mount.ok_or_else(|| ApiError::internal("the catalog has lost the mount"))?;
        let trees = self.trees_of(&mount).await?;
        let _in_use: Vec<_> = trees.iter().map(|(_, pool)| Cloning::begin(self, pool.id)).collect();
        for (_, pool) in &trees {
            self.introduce_origin(&mount, pool)?;
        }
        let _not_evicted = self.eviction.read().await;
        let detached = self.make_mount(&mount, &trees, true).await?;
        let synced = tokio::task::spawn_blocking(move || {
            durable::Synced::default().sync(&owner)?;
            durable::keep(&directory)
        });
        let synced = synced.await.map_err(io::Error::other).and_then(|synced| synced);
        synced.map_err(|error| internal("can't make the mount durable", &error))?;
        self.set_mounted(&mount, true).await?;
        self.attach_mount(&mount, &trees, detached, target.fd.as_fd())?;
        for (tree, _) in &trees {
            self.unmark_complete(tree).await?;
        }
        self.fill_in_background(&trees, Wanted::Pulled).await;
        info!(mount = %id, image = image.reference, directory = %target.path.display(), "mounted");
        let (files, tree_bytes) = trees
            .iter()
            .fold((0, 0), |(files, bytes), (tree, _)| (files + tree.files, bytes + tree.bytes));
        let message = Some(format!("mounted {}", image.reference));
        Ok(Summary { files, tree_bytes, message, ..Summary::default() })
    }

    /// What has been changed in an image's mount: the names of what is in its upper directory.
    pub(in super::super) fn changes_of_image(&self, mount: &Mount) -> io::Result<Vec<String>> {
        let mut changes = Vec::new();
        for entry in fs::read_dir(self.store.upper_dir(mount.id))? {
            changes.push(hydrant_api::path_to_text(Path::new(&entry?.file_name())));
        }
        changes.sort();
        Ok(changes)
    }
}
