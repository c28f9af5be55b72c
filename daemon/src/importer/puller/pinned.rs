//! Layers whose index the image pins: the index is fetched, the content stays where it is.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;

use super::{ATTEMPTS, FIRST_WAIT, LAYER_FDS, write, write_index};
use crate::layer::digest::Digest;
use crate::layer::index::Index;
use crate::layer::pinned::own::{self, Own};
use crate::layer::pinned::{self, Pin, Pinned, Unusable, estargz, soci, zstd_chunked};
use crate::layer::tree::Tree;
use crate::object::ObjectId;
use crate::queue::wire::image::{Layer, PinnedFormat, Shown};
use crate::range::ByteRange;
use crate::source::FetchError;
use crate::source::oci::registry::{Host, Need, Registry};
use crate::source::oci::trace::{self, Traced};

/// A smaller layer is streamed: that takes no longer than asking for parts of it.
pub const SMALLEST: u64 = 128 << 10;
/// What is fetched of an eStargz blob's end at first: mostly the whole table of contents.
const END: u64 = 256 << 10;
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How long an index that stands beside the image is waited for, and how many bytes of it come in a second at least.
const OWN_PATIENCE: Duration = Duration::from_secs(10);
const OWN_PACE: u64 = 256 << 10;
/// How long a span of SOCI is in general, in bytes.
const SPAN: u64 = 4 << 20;

fn own_patience(len: u64) -> Duration {
    OWN_PATIENCE + Duration::from_secs(len / OWN_PACE)
}

/// An index that was read.
struct Read {
    index: Index,
    tree: Shows,
    /// As in [`Pinned`].
    first: u64,
}

/// A layer that need not be streamed.
pub struct Made {
    pub shown: Shown,
    pub format: PinnedFormat,
    /// What is to be fetched first, as the index says.
    pub trace: Option<Vec<Traced>>,
}

enum Shows {
    Tree(Tree),
    Manifest(Vec<u8>, Shown),
}

impl From<Pinned> for Read {
    fn from(Pinned { index, tree, first }: Pinned) -> Self {
        Self { index, tree: Shows::Tree(tree), first }
    }
}

impl From<Own> for Read {
    fn from(own: Own) -> Self {
        let Own { index, manifest, names, bytes, implicit } = own;
        let shown = Shown { files: names, bytes, implicit };
        Self { index, tree: Shows::Manifest(manifest, shown), first: 0 }
    }
}

/// Why there is no use in an index.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Unusable(#[from] Unusable),
    #[error("it does not come")]
    Slow,
}

/// Makes a layer's files out of its index. `None`: it has to be streamed, and nothing was written.
pub async fn make(
    registry: &Registry,
    layer: &Layer,
    pin: &Pin,
    files: &[OwnedFd; LAYER_FDS],
    received: &AtomicU64,
) -> anyhow::Result<Option<Made>> {
    if layer.size < SMALLEST {
        return Ok(None);
    }
    let mut attempt = 1;
    // what the image does not speak of it can do without
    let (attempts, patience) = match pin {
        Pin::Own { size, .. } => (1, own_patience(*size)),
        // with two spans, which are tried
        Pin::Soci { size, version: 1, .. } => (1, own_patience(size.saturating_add(2 * SPAN))),
        _ => (ATTEMPTS, Duration::MAX),
    };
    let (read, format) = loop {
        let asked = tokio::time::timeout(patience, ask(registry, layer, pin, received)).await;
        match asked.unwrap_or(Err(Failure::Slow)) {
            Ok(read) => break read,
            Err(Failure::Fetch(FetchError::Retry { message, .. })) if attempt < attempts => {
                tracing::debug!(message, "can't get a layer's index yet");
                let wait = FIRST_WAIT * 2u32.pow(attempt - 1);
                attempt += 1;
                tokio::time::sleep(wait.min(LONGEST_WAIT)).await;
            }
            Err(error) => {
                // whatever is wrong with the layer itself is found by streaming it
                let digest = layer.digest;
                tracing::warn!(%digest, %error, "a layer's index is not used");
                return Ok(None);
            }
        }
    };
    let trace = trace::start(read.first);
    let [segment, manifest, index] = files;
    let [segment, manifest, index] =
        [segment.try_clone()?, manifest.try_clone()?, index.try_clone()?];
    let shown = tokio::task::spawn_blocking(move || {
        if matches!(&read.tree, Shows::Tree(tree) if tree.is_opaque()) {
            return Ok(None);
        }
        let len = read.index.uncompressed_len();
        File::from(segment).set_len(len).context("can't size the segment")?;
        let (mut manifest, index) = (File::from(manifest), File::from(index));
        match &read.tree {
            Shows::Tree(tree) => write(tree, &read.index, manifest, index).map(Some),
            Shows::Manifest(bytes, shown) => {
                manifest.write_all(bytes).context("can't write the manifest")?;
                write_index(&read.index, index)?;
                Ok(Some(*shown))
            }
        }
    });
    let shown = shown.await.context("a thread ended")??;
    Ok(shown.map(|shown| Made { shown, format, trace }))
}

pub fn digest(id: &ObjectId) -> Result<Digest, Unusable> {
    let bytes = id.as_bytes().try_into().map_err(|_| Unusable::Digest)?;
    Ok(Digest::from_bytes(bytes))
}

/// Asks one host after the other.
async fn ask(
    registry: &Registry,
    layer: &Layer,
    pin: &Pin,
    received: &AtomicU64,
) -> Result<(Read, PinnedFormat), Failure> {
    let mut choices = registry.choices(Need::Content);
    loop {
        let error = match read(choices.ask()?, layer, pin, received).await {
            Err(Failure::Fetch(error)) => error,
            Err(Failure::Unusable(error @ Unusable::Digest)) if choices.left() > 0 => {
                FetchError::Wrong { message: format!("a layer's index: {error}") }
            }
            done => return done,
        };
        choices.failed(error)?;
    }
}

async fn read(
    host: &Host,
    layer: &Layer,
    pin: &Pin,
    received: &AtomicU64,
) -> Result<(Read, PinnedFormat), Failure> {
    let size = layer.size;
    let range = async |range: ByteRange| {
        let count = |bytes: u64| {
            received.fetch_add(bytes, Ordering::Relaxed);
        };
        host.range(&layer.digest, size, range, count).await
    };
    let of =
        pinned::Layer { digest: digest(&layer.digest)?, size, diff_id: digest(&layer.diff_id)? };
    match *pin {
        Pin::Estargz { toc } => {
            let from = size.saturating_sub(END);
            let mut end = range(ByteRange::between(from, size)).await?;
            let toc_at = estargz::toc_at(&end, size)?;
            if toc_at < from {
                let mut start = range(ByteRange::between(toc_at, from)).await?;
                start.extend_from_slice(&end);
                end = start;
            } else {
                end.drain(..(toc_at - from) as usize);
            }
            let read = move || estargz::read(&end, toc_at, toc, &of);
            Ok((parsed(read).await?, PinnedFormat::Estargz))
        }
        Pin::ZstdChunked(places) => {
            let bytes = range(places.both(size)?).await?;
            let read = move || zstd_chunked::read(&bytes, &places, &of);
            Ok((parsed(read).await?, PinnedFormat::ZstdChunked))
        }
        Pin::Own { blob, size: len, windows } => {
            if len == 0 || len > own::MAX_BLOB {
                return Err(Unusable::Format("it has an impossible length").into());
            }
            // who can't have them is better off without the index
            let probe = async {
                let Some(windows) = windows.filter(|windows| windows.len > 0) else {
                    return Ok(());
                };
                part(host, windows.digest, windows.len, ByteRange::new(0, 1), received)
                    .await
                    .map(drop)
            };
            let bytes = whole(host, blob, len, received);
            let (bytes, ()) = tokio::try_join!(bytes, probe)?;
            let read = move || own::read(&bytes, blob, windows, &of);
            Ok((parsed(read).await?, PinnedFormat::Signed))
        }
        Pin::Soci { ztoc, size: len, version } => {
            if len == 0 || len > soci::MAX_ZTOC {
                return Err(Unusable::Format("it has an impossible length").into());
            }
            let bytes = Arc::new(whole(host, ztoc, len, received).await?);
            let read = |len| {
                let bytes = Arc::clone(&bytes);
                parsed(move || soci::read(&bytes, ztoc, len, &of))
            };
            let mut pinned = read(None).await?;
            for number in soci::samples(pinned.index.spans()) {
                let span = pinned.index.spans().get(number).cloned();
                let span = span.ok_or(Unusable::Format("it has no spans"))?;
                let window = pinned.index.window(number).map_err(Unusable::Index)?;
                let (said, compressed) = (span.uncompressed.end(), range(span.compressed).await?);
                let end = move || soci::end(&span, &window, &compressed);
                let end = tokio::task::spawn_blocking(end).await;
                let end = end.unwrap_or(Err(Unusable::Format("a thread ended")))?;
                if end == said {
                    continue;
                }
                if number + 1 != pinned.index.spans().len() {
                    return Err(Unusable::Format("a part of it that was tried is wrong").into());
                }
                pinned = read(Some(end)).await?;
            }
            let format = if version == 1 { PinnedFormat::SociV1 } else { PinnedFormat::Soci };
            Ok((pinned, format))
        }
    }
}

/// A blob of `len` bytes, which is not checked.
async fn whole(
    host: &Host,
    blob: Digest,
    len: u64,
    received: &AtomicU64,
) -> Result<Vec<u8>, Failure> {
    part(host, blob, len, ByteRange::new(0, len), received).await
}

/// A part of it, which is not checked either.
async fn part(
    host: &Host,
    blob: Digest,
    len: u64,
    range: ByteRange,
    received: &AtomicU64,
) -> Result<Vec<u8>, Failure> {
    let count = |bytes: u64| {
        received.fetch_add(bytes, Ordering::Relaxed);
    };
    Ok(host.range(&blob.into(), len, range, count).await?)
}

/// It may take its time.
async fn parsed<T: Into<Read> + Send + 'static>(
    read: impl FnOnce() -> Result<T, Unusable> + Send + 'static,
) -> Result<Read, Unusable> {
    let read = tokio::task::spawn_blocking(read).await;
    read.unwrap_or(Err(Unusable::Format("a thread ended"))).map(Into::into)
}
