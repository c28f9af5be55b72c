//! The puller: the importer of container images, in a worker's sandbox.
//!
//! It resolves a reference, tells the supervisor which layers the image has, and streams those that it is
//! asked for: compressed bytes in; out go the archive into the layer's segment, a manifest of its tree
//! for the builder, and the index that lets a worker fetch parts of the layer later.
//!
//! A layer whose index the image pins, or somebody who is trusted has put beside it (`beside`), is not streamed (`pinned`). The windows
//! of an index of ours follow later (`windows`). What the layer's archive says is read once all of it is here (`reread`).

mod beside;
mod pinned;
mod publish;
mod reread;
mod windows;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::{Semaphore, mpsc, oneshot};

use self::beside::{Beside, Trust};
use super::process;
use crate::layer::index::Index;
use crate::layer::indexer::Indexer;
use crate::layer::tar::TarReader;
use crate::layer::tree::{Tree, TreeBuilder};
use crate::object::ObjectId;
use crate::queue::wire::image::{FromPuller, Layer, Shown, ToPuller};
use crate::queue::wire::{self, Credential};
use crate::source::FetchError;
use crate::source::git::{Clients, Credentials};
use crate::source::oci::digest;
use crate::source::oci::layer::BlobStream;
use crate::source::oci::registry::{Need, Registry};
use crate::sys::seqpacket::Seqpacket;

/// How many fds a puller is started with: control socket, scratch directory.
pub const FDS: usize = 2;
/// The files of a layer: segment, manifest, index.
pub const LAYER_FDS: usize = 3;

/// Layers that are fetched at the same time.
const LAYERS: usize = 3;
/// Pieces of a layer that wait to be inflated.
const QUEUED: usize = 64;
/// How often the supervisor hears how far it is.
const REPORT: Duration = Duration::from_millis(200);
/// How often a request for a document is tried.
const ATTEMPTS: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_millis(250);

/// Runs the process: gives up privileges, then pulls.
pub fn main(uid: u32, gid: u32, without_landlock: bool, fds: [OwnedFd; FDS]) -> anyhow::Result<()> {
    let [control, spool] = fds;
    process::begin(uid, gid, without_landlock, &spool)?.block_on(async {
        let supervisor = Arc::new(Supervisor::new(Arc::new(Seqpacket::new(control)?)));
        let (orders, messages) = mpsc::unbounded_channel();
        let listen = Arc::clone(&supervisor).listen(orders);
        let outcome = tokio::select! {
            outcome = pull(&supervisor, messages) => outcome,
            () = listen => return Ok(()), // it has what it wanted
        };
        let Err(error) = outcome else { return Ok(()) };
        let hint = hint(&error);
        let message = format!("{error:#}");
        supervisor.tell(&FromPuller::Failed { message, hint }).await
    })
}

fn hint(error: &anyhow::Error) -> Option<String> {
    let refused = error.chain().find_map(|e| match e.downcast_ref::<FetchError>() {
        Some(FetchError::Refused { message } | FetchError::Retry { message, .. }) => Some(message),
        _ => None,
    })?;
    let login = ["who we are", "does not let us", "refuses"].iter().any(|s| refused.contains(s));
    login.then(|| {
        "credentials come from ~/.docker/config.json: `docker login`, `skopeo login`".into()
    })
}

/// A layer to be fetched, and its files.
type Order = (u32, [OwnedFd; LAYER_FDS]);

async fn pull(
    supervisor: &Arc<Supervisor>,
    mut messages: mpsc::UnboundedReceiver<(ToPuller, Vec<OwnedFd>)>,
) -> anyhow::Result<()> {
    let credentials: Arc<dyn Credentials> = Arc::clone(supervisor) as _;
    let clients = Clients::default();
    let (version, repository, reference, platform, limits, trust) = match messages.recv().await {
        Some((
            ToPuller::Image {
                version,
                repository,
                reference,
                platform,
                limits,
                index_keys: keys,
                traces,
                soci_v1,
            },
            _,
        )) => {
            let trust = Trust { keys, traces, soci_v1 };
            (version, repository, reference, platform, limits, trust)
        }
        Some((ToPuller::Publish { version, repository, image, what, limits, push }, _)) => {
            anyhow::ensure!(version == wire::VERSION, wire::other_version("supervisor", version));
            let registry = Registry::new(&repository, limits, &credentials, &clients)?;
            return publish::publish(supervisor, messages, &registry, &image, what, push).await;
        }
        Some((ToPuller::Windows { version, repository, limits, blob, len }, fds)) => {
            anyhow::ensure!(version == wire::VERSION, wire::other_version("supervisor", version));
            let registry = Registry::new(&repository, limits, &credentials, &clients)?;
            let file = fds.into_iter().next().context("the supervisor sent no file")?;
            windows::fetch(&registry, blob, len, file).await?;
            return supervisor.tell(&FromPuller::Windows).await;
        }
        Some((ToPuller::Reread { version }, fds)) => {
            anyhow::ensure!(version == wire::VERSION, wire::other_version("supervisor", version));
            let files = files_of(fds)?;
            let reread = tokio::task::spawn_blocking(move || reread::read(files)).await;
            let done = match reread.context("a thread ended")? {
                Ok(shown) => FromPuller::Layer { number: 0, shown, pinned: None },
                // it may do another time
                Err(error) if error.chain().any(|cause| cause.is::<std::io::Error>()) => {
                    return Err(error);
                }
                Err(error) => FromPuller::Unreadable { message: format!("{error:#}") },
            };
            return supervisor.tell(&done).await;
        }
        _ => anyhow::bail!("the supervisor sent no image"),
    };
    anyhow::ensure!(version == wire::VERSION, wire::other_version("supervisor", version));
    let registry = Arc::new(Registry::new(&repository, limits, &credentials, &clients)?);
    let look_beside =
        |image| Beside::begin(image, &registry, trust.clone(), Arc::clone(supervisor));
    // what may be the manifest's digest is not waited for before what is beside it is looked for
    let named = digest::parse(&reference).map(look_beside);
    let found = retried(|| registry.find(&reference, &platform)).await?;
    let named = named.filter(|named| named.image() == found.image);
    let beside = named.unwrap_or_else(|| look_beside(found.image));
    let resolve = retried(|| registry.resolve(&found, &reference, &platform));
    let (resolved, pins) = resolve.await?;
    let layers = resolved.layers.clone();
    supervisor.tell(&FromPuller::Resolved(Box::new(resolved))).await?;

    let slots = Arc::new(Semaphore::new(LAYERS));
    let received = Arc::new(AtomicU64::new(0));
    let mut running = tokio::task::JoinSet::new();
    let mut ticks = tokio::time::interval(REPORT);
    let mut told = 0;
    loop {
        tokio::select! {
            order = messages.recv() => {
                // the supervisor hangs up when it has all layers
                let Some((message, fds)) = order else { return Ok(()) };
                let (number, files) = order_of(message, fds)?;
                let layer = *layers.get(number as usize).context("there is no such layer")?;
                let pin = pins.get(number as usize).copied().flatten();
                let (registry, slots) = (Arc::clone(&registry), Arc::clone(&slots));
                let (beside, supervisor) = (Arc::clone(&beside), Arc::clone(supervisor));
                let received = Arc::clone(&received);
                running.spawn(async move {
                    let _slot = slots.acquire_owned().await;
                    let failed = || format!("layer {} can't be used", number + 1);
                    let whole = async {
                        let pin = match pin {
                            Some(pin) => Some(pin),
                            None => beside.pin(&layer).await,
                        };
                        if let Some(pin) = pin {
                            let made = pinned::make(&registry, &layer, &pin, &files, &received);
                            if let Some(made) = made.await.with_context(failed)? {
                                return anyhow::Ok((made.shown, Some(made.format), made.trace));
                            }
                        }
                        let shown = fetch(&registry, layer, files, &received).await;
                        anyhow::Ok((shown.with_context(failed)?, None, None))
                    };
                    let (trace, whole) = tokio::join!(beside.trace(&layer), whole);
                    let (shown, format, first) = whole?;
                    if let Some(runs) = trace.or(first) {
                        supervisor.tell(&FromPuller::Trace { number, runs }).await?;
                    }
                    anyhow::Ok((number, shown, format))
                });
            }
            Some(done) = running.join_next() => {
                let (number, shown, pinned) = done.context("a layer's task ended")??;
                supervisor.tell(&FromPuller::Layer { number, shown, pinned }).await?;
            }
            _ = ticks.tick() => {
                let now = received.load(Ordering::Relaxed);
                if now != told {
                    told = now;
                    supervisor.tell(&FromPuller::Progress { received: now }).await?;
                }
            }
        }
    }
}

/// Asks for a document until it comes or there is no hope.
async fn retried<T, A: Future<Output = Result<T, FetchError>>>(
    ask: impl Fn() -> A,
) -> Result<T, FetchError> {
    let mut failures = 0;
    loop {
        match ask().await {
            Err(FetchError::Retry { message, after }) if failures + 1 < ATTEMPTS => {
                tracing::debug!(message, "can't get a document yet");
                let wait = after.unwrap_or(FIRST_WAIT * 2u32.pow(failures));
                failures += 1;
                tokio::time::sleep(wait.min(Duration::from_secs(30))).await;
            }
            done => return done,
        }
    }
}

fn order_of(message: ToPuller, fds: Vec<OwnedFd>) -> anyhow::Result<Order> {
    let ToPuller::Layer { number } = message else {
        anyhow::bail!("the supervisor is out of step");
    };
    Ok((number, files_of(fds)?))
}

fn files_of(fds: Vec<OwnedFd>) -> anyhow::Result<[OwnedFd; LAYER_FDS]> {
    fds.try_into().map_err(|_| anyhow::anyhow!("the supervisor sent no files"))
}

/// Fetches one layer. What is wrong is fetched again while there is a host that has not given any of it.
async fn fetch(
    registry: &Registry,
    layer: Layer,
    files: [OwnedFd; LAYER_FDS],
    received: &AtomicU64,
) -> anyhow::Result<Shown> {
    let mut hosts = registry.choices(Need::Content).left();
    loop {
        let [segment, manifest, index] = &files;
        let copies = [segment.try_clone()?, manifest.try_clone()?, index.try_clone()?];
        let mut stream = BlobStream::new(registry, layer.digest, layer.size);
        let error = match fetch_once(&mut stream, layer, copies, received).await {
            Err(error) if hosts > 1 && is_of_wrong_bytes(&error) => error,
            done => return done,
        };
        let digest = digest::text(&layer.digest);
        tracing::warn!("layer {digest} is asked for again, of another host: {error:#}");
        hosts -= 1;
        stream.is_wrong();
    }
}

/// What came is not the layer, rather than that it did not come or can't be kept.
fn is_of_wrong_bytes(error: &anyhow::Error) -> bool {
    match error.downcast_ref() {
        Some(fetch) => matches!(fetch, FetchError::Wrong { .. }),
        None => !error.chain().any(|cause| cause.is::<std::io::Error>()),
    }
}

async fn fetch_once(
    stream: &mut BlobStream<'_>,
    layer: Layer,
    files: [OwnedFd; LAYER_FDS],
    received: &AtomicU64,
) -> anyhow::Result<Shown> {
    let (pieces, input) = mpsc::channel(QUEUED);
    let unpack = tokio::task::spawn_blocking(move || unpack(input, &layer, files));
    let download = async {
        while let Some(piece) = stream.next().await? {
            received.fetch_add(piece.len() as u64, Ordering::Relaxed);
            if pieces.send(piece).await.is_err() {
                break; // it is known elsewhere why
            }
        }
        drop(pieces);
        Ok::<_, FetchError>(())
    };
    let downloaded = download.await;
    let unpacked = unpack.await.context("a thread ended")?;
    downloaded?;
    unpacked
}

/// Writes a layer's files; all of it is verified when it returns.
fn unpack(
    mut input: mpsc::Receiver<Bytes>,
    layer: &Layer,
    files: [OwnedFd; LAYER_FDS],
) -> anyhow::Result<Shown> {
    let [segment, manifest, index_file] = files.map(File::from);
    for mut file in [&segment, &manifest, &index_file] {
        // another host may have begun
        file.set_len(0).and_then(|()| file.rewind()).context("can't begin a layer's files")?;
    }
    let mut segment = BufWriter::with_capacity(1 << 20, segment);
    let mut indexer = Indexer::default();
    let mut reader = TarReader::default();
    let mut tree = TreeBuilder::default();
    let mut take = |bytes: &[u8]| -> anyhow::Result<()> {
        segment.write_all(bytes).context("can't write the segment")?;
        reader.push(bytes, &mut |entry| tree.add(entry))?;
        Ok(())
    };
    while let Some(piece) = input.blocking_recv() {
        indexer.push(&piece, &mut take)?;
    }
    let index = indexer.finish(&mut take)?;
    // before anything that was found in it counts
    check("the layer", index.digest().as_bytes(), &layer.digest)?;
    check("what is in the layer", index.diff_id().as_bytes(), &layer.diff_id)?;
    reader.finish()?;
    segment.flush().context("can't write the segment")?;
    write(&tree.finish(), &index, manifest, index_file)
}

/// Writes the manifest of a layer's tree, and its index.
fn write(tree: &Tree, index: &Index, manifest: File, index_file: File) -> anyhow::Result<Shown> {
    let shown = write_manifest(tree, index.uncompressed_len(), manifest)?;
    write_index(index, index_file)?;
    Ok(shown)
}

fn write_index(index: &Index, file: File) -> anyhow::Result<()> {
    let mut out = BufWriter::new(file);
    index.write(&mut out).context("can't write the index")?;
    out.flush().context("can't write the index")
}

/// Writes a manifest for a segment of `len` bytes.
fn write_manifest(tree: &Tree, len: u64, manifest: File) -> anyhow::Result<Shown> {
    // overlayfs does not look for that at the root
    anyhow::ensure!(!tree.is_opaque(), "it hides all layers below it, which is not supported");
    let summary = tree.summary();
    let implicit = tree.implicit().len() as u64;
    let mut out = tree.write(BufWriter::new(manifest), len)?;
    out.flush().context("can't write the manifest")?;
    let shown = [summary.files, summary.directories, summary.symlinks, summary.special];
    Ok(Shown { files: shown.iter().sum(), bytes: summary.bytes, implicit })
}

fn check(what: &str, found: &[u8], expected: &ObjectId) -> anyhow::Result<()> {
    let found = ObjectId::from_bytes(found)?;
    anyhow::ensure!(
        found == *expected,
        "{what} has the digest sha256:{found} instead of sha256:{expected}"
    );
    Ok(())
}

/// A credential, if there is one.
type Reply = Result<Option<Credential>, String>;

/// The supervisor, as the puller asks it for credentials.
struct Supervisor {
    control: Arc<Seqpacket>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
}

impl Supervisor {
    fn new(control: Arc<Seqpacket>) -> Self {
        Self { control, next: AtomicU64::new(1), waiting: Mutex::default() }
    }

    async fn tell(&self, message: &FromPuller) -> anyhow::Result<()> {
        let bytes = wire::encode(message)?;
        self.control.send(&bytes, &[]).await.context("can't talk to the supervisor")
    }

    /// Takes in what the supervisor says, until it hangs up.
    async fn listen(self: Arc<Self>, orders: mpsc::UnboundedSender<(ToPuller, Vec<OwnedFd>)>) {
        let mut buffer = vec![0; wire::MAX_MESSAGE];
        while let Ok(Some(received)) = self.control.recv(&mut buffer).await {
            let bytes = buffer.get(..received.length).unwrap_or_default();
            match wire::decode(bytes) {
                Ok(ToPuller::Credential { request, result }) => {
                    let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(waiting) = waiting.remove(&request) {
                        // who asked may have given up
                        drop(waiting.send(result));
                    }
                }
                Ok(message) => drop(orders.send((message, received.fds))),
                Err(_) => return,
            }
        }
    }
}

impl Credentials for Supervisor {
    fn get<'a>(
        &'a self,
        url: &'a str,
        rejected: Option<Credential>,
    ) -> BoxFuture<'a, Result<Option<Credential>, String>> {
        Box::pin(async move {
            let request = self.next.fetch_add(1, Ordering::Relaxed);
            let (sender, reply) = oneshot::channel();
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(request, sender);
            let ask = FromPuller::NeedCredential { request, url: url.to_owned(), rejected };
            self.tell(&ask).await.map_err(|error| format!("{error:#}"))?;
            reply.await.map_err(|_| "the supervisor is gone".to_owned())?
        })
    }
}
