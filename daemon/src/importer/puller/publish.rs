//! Indexes and traces of an image that is here, put into its repository beside it. The supervisor signs them: it has the key.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use anyhow::Context;
use tokio::sync::mpsc;

use super::{Supervisor, reread};
use crate::layer::index::{Head, Index};
use crate::layer::pinned::own;
use crate::object::ObjectId;
use crate::queue::wire::image::{FromPuller, ToPuller};
use crate::source::oci::artifact::{self, Kind, Part, What};
use crate::source::oci::digest;
use crate::source::oci::registry::Registry;

type Messages = mpsc::UnboundedReceiver<(ToPuller, Vec<OwnedFd>)>;

/// The longest access index in bytes.
const MAX_INDEX: u64 = 1 << 30;

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
                let made = made.context("a thread ended")??;
                let mut of_layer = Vec::with_capacity(made.len());
                if push && !made.is_empty() {
                    supervisor.tell(&FromPuller::Ready).await?;
                }
                for (kind, bytes) in made {
                    let (blob, size) = (digest::sha256(&bytes), bytes.len() as u64);
                    if push {
                        registry.push_blob(&blob, bytes.into()).await?;
                    }
                    of_layer.push(Part { kind, layer, blob, size });
                }
                parts.extend_from_slice(&of_layer);
                supervisor.tell(&FromPuller::Parts { parts: of_layer }).await?;
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

/// The blobs of a layer's parts. None: there is no use in them.
fn make(what: What, fds: Vec<OwnedFd>) -> anyhow::Result<Vec<(Kind, Vec<u8>)>> {
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
            Ok(vec![(Kind::Trace, bytes)])
        }
        What::Index => {
            let segment = next()?;
            read(next()?)?;
            // the windows of one that somebody else has made may have yet to come
            if Head::parse(&bytes)?.pinned {
                return Ok(Vec::new());
            }
            let index = Index::parse(&bytes)?;
            if !own::is_of_use(&index) {
                return Ok(Vec::new());
            }
            let tree = reread::tree_of(&index, &segment)?;
            let manifest = tree.write(Vec::new(), index.uncompressed_len())?;
            let blob = own::write(&manifest, &index, tree.implicit().len() as u64)?;
            let windows = index.windows();
            // nobody takes longer ones
            if blob.len().max(manifest.len()).max(windows.len()) as u64 > own::MAX_BLOB {
                return Ok(Vec::new());
            }
            let mut made = vec![(Kind::Index, blob)];
            if !windows.is_empty() {
                made.push((Kind::Windows, windows.to_vec()));
            }
            Ok(made)
        }
    }
}
