//! The windows of an index that came without them.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use anyhow::Context;

use super::pinned::patience;
use crate::object::ObjectId;
use crate::source::oci::digest;
use crate::source::oci::layer::BlobStream;
use crate::source::oci::registry::{Need, Registry};

/// Fetches the blob of `len` bytes that has them into a file.
pub async fn fetch(
    registry: &Registry,
    blob: ObjectId,
    len: u64,
    file: OwnedFd,
) -> anyhow::Result<()> {
    let whole = tokio::time::timeout(patience(len), whole(registry, blob, len));
    let whole = whole.await.unwrap_or_else(|_| anyhow::bail!("it comes too slowly"))?;
    let write = move || File::from(file).write_all(&whole).context("can't write the windows");
    tokio::task::spawn_blocking(write).await.context("a thread ended")?
}

async fn whole(registry: &Registry, blob: ObjectId, len: u64) -> anyhow::Result<Vec<u8>> {
    let mut hosts = registry.choices(Need::Content).left();
    loop {
        let mut stream = BlobStream::new(registry, blob, len);
        let mut whole = Vec::new();
        while let Some(piece) = stream.next().await? {
            whole.extend_from_slice(&piece);
        }
        if digest::sha256(&whole) == blob {
            return Ok(whole);
        }
        hosts = hosts.saturating_sub(1);
        anyhow::ensure!(hosts > 0, "{} has another digest", digest::text(&blob));
        stream.is_wrong();
    }
}
