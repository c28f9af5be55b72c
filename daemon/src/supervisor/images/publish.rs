//! Indexes of an image's layers, made of what is here, signed and put into its repository.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use hydrant_api::{IndexRequest, Summary};
use nix::libc::O_TMPFILE;
use tracing::info;

use super::super::clone::Cloning;
use super::super::queue::milliseconds;
use super::super::{Supervisor, internal};
use super::puller::Puller;
use super::{ROOT, access, catalog, hosts, parse, repository};
use crate::admin::{ApiError, Caller, ProgressSender};
use crate::catalog::{Image, Tree};
use crate::source::oci::artifact::{self, Kind, Part, What};
use crate::source::oci::digest;
use crate::source::oci::keys::Signer;
use crate::source::oci::trace;

/// A file without a name.
pub(super) fn tempfile_of(directory: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(O_TMPFILE).open(directory)
}

/// The signer, if something is to be pushed.
fn signer(request: &IndexRequest) -> Result<Option<Signer>, ApiError> {
    if !request.push {
        return Ok(None);
    }
    let hint = "`openssl genpkey -algorithm ed25519 -out FILE` makes a key; `--key FILE` takes it";
    let key = request.key.as_deref();
    let key = key.ok_or_else(|| ApiError::invalid("what is pushed has to be signed"));
    let signer = key.and_then(|key| {
        let none = || ApiError::invalid("this is no private key for Ed25519 (PKCS#8, PEM)");
        Signer::from_pem(key).ok_or_else(none)
    });
    signer.map(Some).map_err(|error| error.with_hint(hint))
}

impl Supervisor {
    pub(in super::super) async fn index_request(
        &self,
        caller: &Caller,
        request: &IndexRequest,
        progress: &ProgressSender,
    ) -> Result<Summary, ApiError> {
        caller.require_root("publish indexes of images")?;
        let begun = Instant::now();
        let signer = signer(request)?;
        let reference = parse(&request.reference)?;
        let image = self.known_image(&reference, "`hydrant image pull` fetches it").await?;
        progress.step("layers");
        let hosts = hosts::of(self.host_settings(), &reference);
        let hosts = hosts.map_err(|error| internal("can't tell where to ask for it", &error))?;
        let repository = repository(&reference, hosts);
        let access = access(&repository, request.owner.unwrap_or(ROOT), &request.environment)?;
        let mut puller = Puller::start(&self.store, &self.cgroups, access)?;
        let (what, kind) = match request.traces {
            true => (What::Trace, "traces"),
            false => (What::Index, "indexes"),
        };
        puller.publish(repository, image.manifest, what, self.limits(), request.push).await?;
        let parts = match what {
            What::Trace => self.make_traces(&mut puller, &image).await?,
            What::Index => self.make_parts(&mut puller, &image, progress).await?,
        };
        let count = parts.iter().filter(|part| part.kind != Kind::Windows).count();
        let message = match signer {
            None => format!("{count} {kind}"),
            Some(_) if parts.is_empty() => "there is nothing to push".into(),
            Some(signer) => {
                let signature = artifact::sign(&signer, &image.manifest, &parts);
                let artifact = digest::text(&puller.sign(signature).await?);
                info!(image = image.reference, artifact, count, kind, "pushed");
                let key = signer.public().text();
                format!("{count} {kind} in {artifact}, signed with the key {key}")
            }
        };
        puller.end();
        Ok(Summary {
            files: count as u64,
            tree_bytes: parts.iter().map(|part| part.size).sum(),
            elapsed_ms: milliseconds(begun.elapsed()),
            message: Some(message),
            ..Summary::default()
        })
    }

    async fn make_traces(&self, puller: &mut Puller, image: &Image) -> Result<Vec<Part>, ApiError> {
        let mut trees = Vec::with_capacity(image.layers.len());
        for (id, _) in &image.layers {
            trees.push(self.tree_and_pool(*id).await?.0);
        }
        let layers = trees.iter().map(|tree| tree.commit).collect();
        let traced = self.catalog.trace(layers).await.map_err(catalog)?;
        let mut of_layers: HashMap<_, Vec<(u32, u32)>> = HashMap::new();
        for ((layer, chunk), place) in traced.into_iter().zip(0..) {
            of_layers.entry(layer).or_default().push((chunk, place));
        }
        let mut parts: Vec<Part> = Vec::new();
        for tree in trees {
            let Some(chunks) = of_layers.get(&tree.commit) else { continue };
            if parts.iter().any(|part| part.layer == tree.root) {
                continue;
            }
            let failed = |error| internal("can't write a trace", &error);
            let mut file = tempfile_of(&self.store.pools_dir()).map_err(failed)?;
            file.write_all(&trace::write(&trace::runs(chunks))).map_err(failed)?;
            file.rewind().map_err(failed)?;
            parts.append(&mut puller.parts(What::Trace, tree.root, &[file], ()).await?);
        }
        if parts.is_empty() {
            let message = format!("nothing is recorded of {}", image.reference);
            return Err(ApiError::conflict(message)
                .with_hint("`hydrant image trace record` records what a start reads"));
        }
        Ok(parts)
    }

    async fn make_parts(
        &self,
        puller: &mut Puller,
        image: &Image,
        progress: &ProgressSender,
    ) -> Result<Vec<Part>, ApiError> {
        let mut parts = Vec::new();
        let mut seen = HashSet::new();
        for (id, size) in &image.layers {
            let (tree, pool) = self.tree_and_pool(*id).await?;
            let _in_use = Cloning::begin(self, pool.id);
            if !seen.insert(tree.id) {
                continue;
            }
            let layer = digest::text(&tree.root);
            if !tree.revision.is_empty() {
                progress.note(format!("{layer} has an index already ({})", tree.revision));
                continue;
            }
            let not_evicted = self.eviction.read().await;
            let segment = self.whole_segment(&tree).await?;
            let files = self
                .store
                .open_to_reread(pool.id, segment)
                .map_err(|error| internal("can't open a layer", &error))?;
            let mut made = puller.parts(What::Index, tree.root, &files, not_evicted).await?;
            let note = match made.iter().map(|part| part.size).sum::<u64>() {
                0 => format!("{layer} can't be fetched in parts"),
                len => format!("{layer}: {len} bytes for a layer of {size}"),
            };
            progress.note(note);
            parts.append(&mut made);
        }
        Ok(parts)
    }

    /// The segment of a layer that is all there.
    async fn whole_segment(&self, tree: &Tree) -> Result<crate::ids::SegmentId, ApiError> {
        let segments = self.catalog.segments_of(tree).await.map_err(catalog)?;
        let segment =
            segments.first().ok_or_else(|| ApiError::internal("a layer has no segment"))?;
        if segment.complete {
            return Ok(segment.id);
        }
        let message = format!("not all of the layer {} is here", digest::text(&tree.root));
        Err(ApiError::conflict(message).with_hint(
            "remove the image and pull it, or mount it and `hydrant prefetch` all of it",
        ))
    }
}
