//! Indexes and traces of an image that is here, put into its repository beside it. The supervisor signs them: it has the key.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use anyhow::Context;
use tokio::sync::mpsc;

use super::{Supervisor, reread};
use crate::layer::index::Index;
use crate::layer::pinned::own;
use crate::object::ObjectId;
use crate::queue::wire::image::{FromPuller, ToPuller};
use crate::source::oci::artifact::{self, Part, What};
use crate::source::oci::digest;
use crate::source::oci::fetch::MAX_INDEX;
use crate::source::oci::registry::Registry;

type Messages = mpsc::UnboundedReceiver<(ToPuller, Vec<OwnedFd>)>;

/// Makes the parts that the supervisor asks for; with `push`, puts them into the repository.
pub async fn publish(
    supervisor: &Supervisor,
    mut messages: Messages,
    registry: &Registry,
    image: &ObjectId,
    what: What,
    push: bool,
) -> anyhow::Result<()> {
    let described = match push {
        true => Some(registry.describe(image).await?),
        false => None,
    };
    supervisor.tell(&FromPuller::Ready).await?;
    let mut parts = Vec::new();
    loop {
        match messages.recv().await {
            Some((ToPuller::Part { layer }, fds)) => {
                let made = tokio::task::spawn_blocking(move || make(what, fds)).await;
                let Some(bytes) = made.context("a thread ended")?? else {
                    supervisor.tell(&FromPuller::Part { blob: None }).await?;
                    continue;
                };
                let (blob, size) = (digest::sha256(&bytes), bytes.len() as u64);
                if push {
                    supervisor.tell(&FromPuller::Ready).await?;
                    registry.push_blob(&blob, bytes.into()).await?;
                }
                parts.push(Part { what, layer, blob, size });
                supervisor.tell(&FromPuller::Part { blob: Some((blob, size)) }).await?;
            }
            Some((ToPuller::Sign { signature }, _)) => {
                let described = described.as_ref().context("it is not to be put anywhere")?;
                let manifest = artifact::manifest(described, what, &parts, &signature);
                let artifact = registry.push_artifact(image, what, manifest).await?;
                return supervisor.tell(&FromPuller::Published { artifact }).await;
            }
            Some(_) => anyhow::bail!("the supervisor is out of step"),
            None => return Ok(()),
        }
    }
}

/// The blob of a part. `None`: there is no use in it.
fn make(what: What, fds: Vec<OwnedFd>) -> anyhow::Result<Option<Vec<u8>>> {
    let mut files = fds.into_iter().map(File::from);
    let mut next = || files.next().context("the supervisor sent no files");
    let mut bytes = Vec::new();
    let mut read = |file: File| {
        file.take(MAX_INDEX).read_to_end(&mut bytes).context("can't read a layer's file")?;
        anyhow::Ok(())
    };
    match what {
        What::Trace => {
            read(next()?)?;
            Ok(Some(bytes))
        }
        What::Index => {
            let segment = next()?;
            read(next()?)?;
            let index = Index::parse(&bytes)?;
            if !own::is_of_use(&index) {
                return Ok(None);
            }
            let tree = reread::tree_of(&index, &segment)?;
            let manifest = tree.write(Vec::new(), index.uncompressed_len())?;
            let blob = own::write(&manifest, &bytes, tree.implicit().len() as u64)?;
            // nobody takes a longer one
            let len = blob.len().max(manifest.len()) as u64;
            Ok((len <= own::MAX_BLOB).then_some(blob))
        }
    }
}
