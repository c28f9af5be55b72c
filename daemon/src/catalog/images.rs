//! Container images.

use std::collections::HashMap;

use rusqlite::{OptionalExtension, Params, Transaction, params};

use super::pools::now;
use super::records::{object, signed, unsigned};
use super::{Catalog, CatalogError, Image, NewImage};
use crate::ids::{ImageId, PoolId, TreeId};
use crate::object::ObjectId;
use crate::source::oci::digest;

/// A layer, as people know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedLayer {
    /// The digest of its archive.
    pub layer: String,
    /// The names of the images that have it.
    pub images: Vec<String>,
}

impl Catalog {
    /// Puts an image on record, under a name that is its own from now on. An image that had the name
    /// stays for its mounts.
    pub async fn insert_image(&self, image: NewImage) -> Result<Image, CatalogError> {
        self.run("put an image on record", move |t| {
            let NewImage { reference, digest, manifest, config, layers, held } = image;
            // who has pulled it by its name wants what has the name now
            let held = held
                || t.query_row(
                    "SELECT EXISTS (SELECT 1 FROM images WHERE reference = ?1 AND named AND held)",
                    [&reference],
                    |row| row.get(0),
                )?;
            t.execute("UPDATE images SET named = 0 WHERE reference = ?1", [&reference])?;
            let id: i64 = t.query_row(
                "INSERT INTO images (reference, digest, manifest, config, pulled, named, held)
                 VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6)
                 ON CONFLICT (reference, manifest)
                     DO UPDATE SET digest = ?2, pulled = ?5, named = 1, held = max(held, ?6)
                 RETURNING id",
                params![
                    reference,
                    digest.as_bytes(),
                    manifest.as_bytes(),
                    config.as_bytes(),
                    now(),
                    held
                ],
                |row| row.get(0),
            )?;
            t.execute("DELETE FROM image_layers WHERE image = ?1", [id])?;
            let mut insert = t.prepare(
                "INSERT INTO image_layers (image, position, tree, bytes) VALUES (?1, ?2, ?3, ?4)",
            )?;
            for (position, (tree, bytes)) in layers.iter().enumerate() {
                let position = signed(position as u64)?;
                insert.execute([id, position, signed(tree.0)?, signed(*bytes)?])?;
            }
            let query = format!("SELECT {} FROM images WHERE id = ?1", Image::COLUMNS);
            let image = t.query_row(&query, [id], Image::from_row)?;
            with_layers(t, image)
        })
        .await
    }

    /// All that have a name, by name.
    pub async fn images(&self) -> Result<Vec<Image>, CatalogError> {
        self.run("list the images", |t| {
            let query =
                format!("SELECT {} FROM images WHERE named ORDER BY reference, id", Image::COLUMNS);
            let images: Vec<Image> =
                t.prepare(&query)?.query_map([], Image::from_row)?.collect::<Result<_, _>>()?;
            images.into_iter().map(|image| with_layers(t, image)).collect()
        })
        .await
    }

    /// All layers of images that have a name, by their pools.
    pub async fn layers_by_pool(&self) -> Result<HashMap<PoolId, NamedLayer>, CatalogError> {
        self.run("find the images of layers", |t| {
            let mut select = t.prepare(
                "SELECT DISTINCT trees.pool, trees.git_commit, images.reference FROM images
                 JOIN image_layers ON image_layers.image = images.id
                 JOIN trees ON trees.id = image_layers.tree
                 WHERE images.named ORDER BY images.reference",
            )?;
            let mut layers: HashMap<PoolId, NamedLayer> = HashMap::new();
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let layer = digest::text(&object(row, 1)?);
                let of_pool = layers.entry(PoolId(unsigned(row, 0)?));
                let of_pool = of_pool.or_insert(NamedLayer { layer, images: Vec::new() });
                of_pool.images.push(row.get(2)?);
            }
            Ok(layers)
        })
        .await
    }

    pub async fn image(&self, id: ImageId) -> Result<Option<Image>, CatalogError> {
        self.run("read an image", move |t| one(t, "id = ?1", [signed(id.0)?])).await
    }

    /// The image that has the name.
    pub async fn image_named(&self, reference: &str) -> Result<Option<Image>, CatalogError> {
        let reference = reference.to_owned();
        self.run("find an image", move |t| one(t, "reference = ?1 AND named", [reference])).await
    }

    /// What was pulled by this name and has this manifest, also if it has lost the name since.
    pub async fn image_of(
        &self,
        reference: String,
        manifest: ObjectId,
    ) -> Result<Option<Image>, CatalogError> {
        self.run("find an image", move |t| {
            one(t, "reference = ?1 AND manifest = ?2", params![reference, manifest.as_bytes()])
        })
        .await
    }

    /// Takes its name from an image; the rest stays until [`take_garbage`](Self::take_garbage), and as
    /// long as it is somewhere mounted.
    pub async fn forget_image(&self, id: ImageId) -> Result<(), CatalogError> {
        self.run("forget an image", move |t| {
            t.execute("UPDATE images SET named = 0 WHERE id = ?1", [signed(id.0)?])?;
            Ok(())
        })
        .await
    }
}

/// The image for which this holds.
fn one(t: &Transaction<'_>, condition: &str, of: impl Params) -> rusqlite::Result<Option<Image>> {
    let query = format!("SELECT {} FROM images WHERE {condition}", Image::COLUMNS);
    let image = t.query_row(&query, of, Image::from_row).optional()?;
    image.map(|image| with_layers(t, image)).transpose()
}

fn with_layers(t: &Transaction<'_>, mut image: Image) -> rusqlite::Result<Image> {
    image.layers = t
        .prepare_cached("SELECT tree, bytes FROM image_layers WHERE image = ?1 ORDER BY position")?
        .query_map([signed(image.id.0)?], |row| Ok((TreeId(unsigned(row, 0)?), unsigned(row, 1)?)))?
        .collect::<Result<_, _>>()?;
    Ok(image)
}
