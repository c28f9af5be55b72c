//! The windows of an index that came without them.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;

use anyhow::Context;

use crate::object::{HashKind, ObjectId};
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
    let mut file = File::from(file);
    let mut hosts = registry.choices(Need::Content).left();
    loop {
        file.set_len(0).and_then(|()| file.rewind()).context("can't begin the windows")?;
        let mut stream = BlobStream::new(registry, blob, len);
        let mut hasher = HashKind::Sha256.hasher();
        while let Some(piece) = stream.next().await? {
            hasher.update(&piece);
            // nothing else goes on in this process
            file.write_all(&piece).context("can't write the windows")?;
        }
        if hasher.finish() == blob {
            return Ok(());
        }
        hosts = hosts.saturating_sub(1);
        anyhow::ensure!(hosts > 0, "{} has another digest", digest::text(&blob));
        stream.is_wrong();
    }
}
