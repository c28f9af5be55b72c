//! The importer's process: its fds, its sandbox, its talk with the supervisor.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use futures_util::future::BoxFuture;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use tokio::sync::{mpsc, oneshot, watch};

use super::{ImportError, Importer, Listing, Origin, Revision, Spool, attributes, process};
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::{self, Credential, FromImporter, GitOrigin, Imported, ToImporter};
use crate::source::git::{Connector, Credentials, GitSource, Pipe, SizesQuery};
use crate::source::{Content, Fetch, FetchError, Sink};
use crate::sys::seqpacket::Seqpacket;

/// How many fds an importer is started with.
pub const FDS: usize = 11;

/// What an importer is given, in the order of its fds from 3 on.
#[derive(Debug)]
pub struct Fds {
    pub control: OwnedFd,
    /// The scratch directory.
    pub spool: OwnedFd,
    /// `git ls-tree -r -t -z --full-tree HEAD`
    pub tree: OwnedFd,
    /// `git cat-file --batch-all-objects`: id, type and size of what is in the repository already.
    pub local: OwnedFd,
    /// The same of what the pool has already.
    pub known: OwnedFd,
    /// The attributes of all paths, once they have been asked for.
    pub attributes: OwnedFd,
    /// Files to be written: two packs for the repository, the manifest, the ids of what is in the
    /// packs, and content for the builder.
    pub eager_pack: OwnedFd,
    pub converted_pack: OwnedFd,
    pub manifest: OwnedFd,
    pub in_repository: OwnedFd,
    pub contents: OwnedFd,
}

impl From<[OwnedFd; FDS]> for Fds {
    fn from(fds: [OwnedFd; FDS]) -> Self {
        let [
            control,
            spool,
            tree,
            local,
            known,
            attributes,
            eager_pack,
            converted_pack,
            manifest,
            in_repository,
            contents,
        ] = fds;
        Self {
            control,
            spool,
            tree,
            local,
            known,
            attributes,
            eager_pack,
            converted_pack,
            manifest,
            in_repository,
            contents,
        }
    }
}

impl From<Fds> for [OwnedFd; FDS] {
    fn from(fds: Fds) -> Self {
        [
            fds.control,
            fds.spool,
            fds.tree,
            fds.local,
            fds.known,
            fds.attributes,
            fds.eager_pack,
            fds.converted_pack,
            fds.manifest,
            fds.in_repository,
            fds.contents,
        ]
    }
}

/// Runs the process: gives up privileges, then imports.
pub fn main(uid: u32, gid: u32, without_landlock: bool, fds: [OwnedFd; FDS]) -> anyhow::Result<()> {
    let fds = Fds::from(fds);
    process::begin(uid, gid, without_landlock, &fds.spool)?.block_on(async {
        let control = Arc::new(Seqpacket::new(fds.control.try_clone()?)?);
        let supervisor = Arc::new(Supervisor::new(Arc::clone(&control)));
        let (jobs, messages) = mpsc::unbounded_channel();
        let listen = Arc::clone(&supervisor).listen(jobs);
        let work = import(&supervisor, messages, fds);
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = listen => return Ok(()), // nobody wants to know any more
        };
        let last = match outcome {
            Ok(imported) => FromImporter::Done(imported),
            Err(error) => match error.downcast_ref().and_then(ImportError::withheld) {
                Some(message) => FromImporter::Withheld { message },
                None => FromImporter::Failed { message: format!("{error:#}"), hint: None },
            },
        };
        supervisor.tell(&last).await
    })
}

async fn import(
    supervisor: &Arc<Supervisor>,
    mut messages: mpsc::UnboundedReceiver<ToImporter>,
    fds: Fds,
) -> anyhow::Result<Imported> {
    let Some(ToImporter::Origin { version, transport, web, limits }) = messages.recv().await else {
        anyhow::bail!("the supervisor sent no origin");
    };
    anyhow::ensure!(version == wire::VERSION, wire::other_version("supervisor", version));
    let credentials: Arc<dyn Credentials> = Arc::clone(supervisor) as _;
    let connector: Arc<dyn Connector> = Arc::clone(supervisor) as _;
    // the hash function is not known yet
    let origin = GitOrigin { hash: HashKind::Sha1, transport: *transport };
    let mut source = GitSource::new(origin, limits, credentials, connector)?;
    if let Some(web) = web {
        source = source.with_web(*web, limits);
    }
    // while git is still busy
    let meeting = source.clone();
    tokio::spawn(async move { meeting.meet().await });

    let Some(ToImporter::Job { commit, tree, time, conversion, whole }) = messages.recv().await
    else {
        anyhow::bail!("the supervisor sent no job");
    };
    supervisor.begun.send_replace(true);
    let hash = commit.kind();
    let listing = Listing::read(hash, BufReader::new(File::from(fds.tree)))?;
    let names = u64::from(listing.len());
    let blobs = listing.blobs();
    let spool = fds.spool;
    let make = move || {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        Ok(File::from(openat(&spool, ".", flags, Mode::from_bits_truncate(0o600))?))
    };
    let contents = BufWriter::new(File::from(fds.contents));
    let mut importer = Importer::new(listing, contents, Spool::new(make));
    for list in [fds.local, fds.known] {
        for line in BufReader::new(File::from(list)).split(b'\n') {
            if let Some((key, size)) = local_blob(&line?) {
                importer.know(&key, size);
            }
        }
    }
    // in no pool, as it needs no place
    importer.know(&ObjectId::of_blob(hash, b""), 0);
    let source = RepositoryOrigin::new(source.with_hash(hash), tree, blobs, whole);

    let mut eager_pack = File::from(fds.eager_pack);
    let unknown = importer.unknown();
    // side by side: neither needs the other
    let (files, ()) =
        tokio::join!(importer.eager(&source, &mut eager_pack), source.ask_sizes(&unknown));
    let files = files?;
    drop(unknown);
    let wanted = attributes::needs_attributes(files.iter().map(Vec::as_slice), &conversion);
    // what is to be fetched for its size is fetched while git takes the pack and lists attributes
    supervisor.tell(&FromImporter::Eager { attributes: wanted }).await?;
    let sizes = importer.sizes(&source).await?;
    match messages.recv().await {
        Some(ToImporter::Attributes { listed: true }) => {
            let attributes = BufReader::new(File::from(fds.attributes));
            let paths = attributes::converted(attributes, &conversion)?;
            let mut pack = File::from(fds.converted_pack);
            importer.convert(&source, paths, &mut pack).await?;
        }
        Some(ToImporter::Attributes { listed: false }) => {}
        _ => anyhow::bail!("the supervisor is out of step"),
    }
    importer
        .write_in_repository(BufWriter::new(File::from(fds.in_repository)))
        .context("can't write the list of objects")?;
    let revision = Revision { commit, tree, time };
    let mut contents =
        importer.write_manifest(&revision, BufWriter::new(File::from(fds.manifest)))?;
    contents.flush().context("can't write what was fetched")?;
    let outcome = source.outcome();
    let known = if whole { "content" } else { "known before" };
    let outcome = outcome.unwrap_or_else(|| (known.to_owned(), None));
    Ok(Imported {
        names,
        fetched_files: sizes.fetched,
        fetched_bytes: sizes.fetched_bytes,
        sizes: outcome.0,
        advice: outcome.1,
    })
}

/// `<id> blob <size>`
pub(crate) fn local_blob(line: &[u8]) -> Option<(ObjectId, u64)> {
    let mut words = line.split(|b| *b == b' ');
    let key = ObjectId::from_hex(words.next()?).ok()?;
    let is_blob = words.next()? == b"blob";
    let size = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    is_blob.then_some((key, size))
}

/// The git repository as the importer asks it, and what it said of sizes.
struct RepositoryOrigin {
    source: GitSource,
    tree: ObjectId,
    /// All blobs of the tree, in the order of its listing.
    blobs: Vec<ObjectId>,
    /// It is the repository itself, and all files are to be fetched.
    whole: bool,
    /// How the sizes became known, and advice; nothing when they were not asked for.
    outcome: Mutex<Option<(String, Option<String>)>>,
    /// Sizes that were asked for already.
    told: Mutex<Option<Vec<(ObjectId, u64)>>>,
}

impl RepositoryOrigin {
    fn new(source: GitSource, tree: ObjectId, blobs: Vec<ObjectId>, whole: bool) -> Self {
        Self { source, tree, blobs, whole, outcome: Mutex::default(), told: Mutex::default() }
    }

    fn outcome(self) -> Option<(String, Option<String>)> {
        self.outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RepositoryOrigin {
    /// Asks for sizes that [`Origin::sizes`] then gives. Trouble is left to that.
    async fn ask_sizes(&self, keys: &[ObjectId]) {
        if let Ok(sizes) = self.sizes(keys).await {
            *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(sizes);
        }
    }
}

impl Fetch for RepositoryOrigin {
    async fn fetch(&self, keys: &[ObjectId], sink: &mut dyn Sink) -> Result<(), FetchError> {
        self.source.fetch(keys, sink).await
    }
}

impl Origin for RepositoryOrigin {
    async fn sizes(&self, keys: &[ObjectId]) -> Result<Vec<(ObjectId, u64)>, FetchError> {
        if keys.is_empty() || self.whole {
            return Ok(Vec::new());
        }
        if let Some(told) = self.told.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(told);
        }
        let query = SizesQuery { tree: Some(self.tree), entries: &self.blobs, wanted: keys };
        let outcome = self.source.sizes(&query).await?;
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((outcome.how.to_owned(), outcome.advice));
        Ok(outcome.known)
    }

    async fn probe(&self, key: ObjectId) -> Result<(), FetchError> {
        self.source.probe(key).await
    }

    async fn fetch_pack(
        &self,
        keys: &[ObjectId],
        pack: &mut (dyn Write + Send),
        sink: &mut dyn Sink,
    ) -> Result<(), FetchError> {
        if self.whole {
            // the repository has them
            return self.source.fetch(keys, sink).await;
        }
        match self.source.raw_fetch(keys, sink).await? {
            Content::Memory(bytes) => pack.write_all(&bytes),
            Content::Spooled { mut file, .. } => {
                let copy = io::Seek::rewind(&mut file).and_then(|()| io::copy(&mut file, pack));
                copy.map(drop)
            }
        }
        .map_err(FetchError::Sink)
    }
}

/// The supervisor, as the importer asks it for what it may not do itself.
struct Supervisor {
    control: Arc<Seqpacket>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
    /// The job has come. Before that the supervisor answers no questions: the user's git may be
    /// asking for the same password just then.
    begun: watch::Sender<bool>,
}

enum Reply {
    Transport(Result<Pipe, String>),
    Credential(Result<Option<Credential>, String>),
}

impl Supervisor {
    fn new(control: Arc<Seqpacket>) -> Self {
        let begun = watch::Sender::new(false);
        Self { control, next: AtomicU64::new(1), waiting: Mutex::default(), begun }
    }

    async fn tell(&self, message: &FromImporter) -> anyhow::Result<()> {
        let bytes = wire::encode(message)?;
        self.control.send(&bytes, &[]).await.context("can't talk to the supervisor")
    }

    /// Takes in what the supervisor says, until it hangs up.
    async fn listen(self: Arc<Self>, jobs: mpsc::UnboundedSender<ToImporter>) {
        let mut buffer = vec![0; wire::MAX_MESSAGE];
        while let Ok(Some(received)) = self.control.recv(&mut buffer).await {
            let bytes = buffer.get(..received.length).unwrap_or_default();
            let Ok(message) = wire::decode(bytes) else { return };
            match message {
                ToImporter::Transport { request, result } => {
                    let pipe = result
                        .and_then(|()| Pipe::received(received.fds).map_err(|e| e.to_string()));
                    self.reply(request, Reply::Transport(pipe));
                }
                ToImporter::Credential { request, result } => {
                    self.reply(request, Reply::Credential(result));
                }
                message => drop(jobs.send(message)),
            }
        }
    }

    fn reply(&self, request: u64, reply: Reply) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&request);
        if let Some(waiting) = waiting {
            // who asked may have given up
            drop(waiting.send(reply));
        }
    }

    async fn ask(&self, message: impl FnOnce(u64) -> FromImporter) -> Result<Reply, String> {
        let begun = self.begun.subscribe().wait_for(|begun| *begun).await.map(drop);
        begun.map_err(|_| "there is no job".to_owned())?;
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(request, sender);
        self.tell(&message(request)).await.map_err(|error| format!("{error:#}"))?;
        reply.await.map_err(|_| "the supervisor is gone".to_owned())
    }
}

impl Credentials for Supervisor {
    fn get<'a>(
        &'a self,
        url: &'a str,
        rejected: Option<Credential>,
    ) -> BoxFuture<'a, Result<Option<Credential>, String>> {
        Box::pin(async move {
            let url = url.to_owned();
            let ask = |request| FromImporter::NeedCredential { request, url, rejected };
            match self.ask(ask).await? {
                Reply::Credential(result) => result,
                Reply::Transport(_) => Err("the supervisor is out of step".into()),
            }
        })
    }
}

impl Connector for Supervisor {
    fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>> {
        Box::pin(async move {
            match self.ask(|request| FromImporter::NeedTransport { request }).await? {
                Reply::Transport(result) => result,
                Reply::Credential(_) => Err("the supervisor is out of step".into()),
            }
        })
    }
}
