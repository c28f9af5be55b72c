//! The importer: from a listing of git's trees to a [manifest](crate::manifest).
//!
//! It runs in a worker's sandbox, as it parses what comes from the network. In steps, with the
//! supervisor running git as the user in between:
//!
//! 1. the [`Listing`] is read;
//! 2. [`Importer::eager`] fetches what has to be there before anything is mounted: the targets of symbolic
//!    links, and `.gitattributes`, `.gitignore` and `.gitmodules` files, which git reads at once. The pack goes
//!    into the repository (`git index-pack`);
//! 3. with attributes that convert files, [`Importer::convert`] takes the paths and fetches their blobs, so that
//!    git can write them;
//! 4. [`Importer::sizes`] asks for the size of every file; what the origin can't tell the size of is fetched.
//! 5. [`Importer::write_manifest`].
//!
//! Content that was fetched goes to the builder beside the manifest (see
//! [`contents`]).

pub mod attributes;
mod blobs;
mod collect;
pub mod listing;
mod process;
pub mod puller;
mod run;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::future::Future;
use std::io::{self, Seek, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use thiserror::Error;

use crate::builder::contents;
use crate::manifest::{EntryKind, Header, VERSION, Writer};
use crate::object::ObjectId;
use crate::source::{Fetch, FetchError, Sink};

pub use attributes::ATTRIBUTES;
#[cfg(test)]
pub(crate) use run::local_blob;
pub use run::{FDS, Fds, main};

use blobs::Blobs;
use collect::Collector;
use listing::{Kind, Listed, Listing, ListingError};

/// How often a request is tried.
const ATTEMPTS: u32 = 5;
/// The first wait between two tries; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Blobs of unknown size that are fetched in one request.
const BATCH: usize = 5000;
/// How old files are at least: git looks at the content of those that are as new as its index.
const MIN_AGE_SECS: i64 = 2;

/// What is said of an origin that gives nothing by its id, and to its administrator.
const WITHHELD: &str = "the server does not give files to those who ask for them by their ids";
const REMEDY: &str = "`git config uploadpack.allowAnySHA1InWant true` in the server's repository makes it \
    give them, also with Gerrit and other servers with JGit";

/// An origin of git objects, as the importer needs it.
pub trait Origin: Fetch {
    /// The sizes of blobs in bytes, as many as the origin can tell; others are left out.
    fn sizes(
        &self,
        keys: &[ObjectId],
    ) -> impl Future<Output = Result<Vec<(ObjectId, u64)>, FetchError>> + Send;

    /// Whether the origin gives a blob by its id: [`FetchError::Missing`] if not.
    fn probe(&self, key: ObjectId) -> impl Future<Output = Result<(), FetchError>> + Send;

    /// Like [`Fetch::fetch`], and writes the pack as it came, whole and without any framing.
    fn fetch_pack(
        &self,
        keys: &[ObjectId],
        pack: &mut (dyn Write + Send),
        sink: &mut dyn Sink,
    ) -> impl Future<Output = Result<(), FetchError>> + Send;
}

/// A tree that can't be imported.
#[derive(Debug, Error)]
pub enum ImportError {
    #[error(transparent)]
    Listing(#[from] ListingError),
    #[error("can't fetch {what}")]
    Fetch { what: &'static str, source: FetchError },
    #[error("{path:?} can't be made: {what}")]
    Entry { path: String, what: &'static str },
    #[error("can't write {what}")]
    Io { what: &'static str, source: io::Error },
}

impl ImportError {
    /// Why nothing can be had by its id of an origin that has told of objects, and what would help.
    #[must_use]
    pub fn withheld(&self) -> Option<String> {
        let Self::Fetch { source, .. } = self else { return None };
        match source {
            FetchError::Missing { message, .. } => {
                Some(format!("{WITHHELD} ({message}). {REMEDY}"))
            }
            FetchError::Unable { message } => Some(message.clone()),
            _ => None,
        }
    }
}

/// Which revision the tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revision {
    pub commit: ObjectId,
    pub tree: ObjectId,
    /// The committer's time, in seconds since the epoch.
    pub time: i64,
}

/// Where the sizes of the tree's blobs came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Different blobs in the tree's files.
    pub blobs: u64,
    /// Known before: fetched already, or told with [`Importer::know`].
    pub known: u64,
    /// Told by the origin.
    pub told: u64,
    /// Fetched whole, as there was no other way.
    pub fetched: u64,
    pub fetched_bytes: u64,
}

/// Makes unlinked files for objects that are too large for memory.
pub struct Spool(Box<dyn Fn() -> io::Result<File> + Send>);

impl Spool {
    pub fn new(make: impl Fn() -> io::Result<File> + Send + 'static) -> Self {
        Self(Box::new(make))
    }
}

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Spool").finish()
    }
}

/// An import under way. `W` takes the content that was fetched; it should be buffered.
#[derive(Debug)]
pub struct Importer<W> {
    listing: Listing,
    blobs: Blobs,
    targets: HashMap<ObjectId, Vec<u8>>,
    converted: HashSet<Vec<u8>>,
    /// What is in the repository now.
    in_repository: HashSet<ObjectId>,
    contents: contents::Writer<W>,
    /// What is in `contents`.
    kept: HashSet<ObjectId>,
    spool: Spool,
}

impl<W: Write + Send> Importer<W> {
    #[must_use]
    pub fn new(listing: Listing, contents: W, spool: Spool) -> Self {
        Self {
            blobs: Blobs::new(&listing),
            listing,
            targets: HashMap::new(),
            converted: HashSet::new(),
            in_repository: HashSet::new(),
            contents: contents::Writer::new(contents),
            kept: HashSet::new(),
            spool,
        }
    }

    #[must_use]
    pub fn listing(&self) -> &Listing {
        &self.listing
    }

    /// Tells a size that is known otherwise: from the pool, from a cache. It is not asked for again.
    pub fn know(&mut self, key: &ObjectId, size: u64) {
        self.blobs.know(key, size);
    }

    /// Fetches what has to be there at once; the pack goes to `pack`, which is empty when there is
    /// nothing. Gives the contents of all `.gitattributes` files
    /// (see [`attributes::needs_attributes`]). [`ImportError::withheld`], also where there is nothing to be fetched,
    /// unless the origin gives blobs by their ids.
    pub async fn eager(
        &mut self,
        origin: &impl Origin,
        pack: &mut File,
    ) -> Result<Vec<Vec<u8>>, ImportError> {
        let mut keep = HashSet::new();
        let mut keys = Vec::new();
        let mut attributes = Vec::new();
        for (_, entry) in self.listing.iter() {
            match (entry.kind, entry.name) {
                (Kind::Symlink, _) => _ = keep.insert(entry.key),
                (Kind::File | Kind::Executable, b".gitattributes") => {
                    keep.insert(entry.key);
                    attributes.push(entry.key);
                }
                (Kind::File | Kind::Executable, b".gitignore" | b".gitmodules") => {}
                _ => continue,
            }
            if self.in_repository.insert(entry.key) {
                keys.push(entry.key);
            }
        }
        let what = "symbolic links and attributes";
        // which every git has
        let empty = ObjectId::of_blob(self.listing.hash(), b"");
        let is_file = |entry: &Listed<'_>| {
            matches!(entry.kind, Kind::File | Kind::Executable) && entry.key != empty
        };
        if keys.is_empty()
            && let Some((_, file)) = self.listing.iter().find(|(_, entry)| is_file(entry))
            && let Err(source @ (FetchError::Missing { .. } | FetchError::Unable { .. })) =
                origin.probe(file.key).await
        {
            return Err(ImportError::Fetch { what: "any file by its id", source });
        }
        let memory = self.fetch_into(origin, &keys, keep, pack, what).await?;
        let symlinks = self.listing.iter().filter(|(_, e)| e.kind == Kind::Symlink);
        for (number, entry) in symlinks {
            let target = memory.get(&entry.key);
            let what = match target.map(Vec::as_slice) {
                None => "the target of the symbolic link is too long",
                Some(b"") => "the target of the symbolic link is empty",
                Some(target) if target.len() > 4095 => {
                    "the target of the symbolic link is too long"
                }
                Some(target) if target.contains(&0) => {
                    "the target of the symbolic link has a NUL in it"
                }
                Some(_) => continue,
            };
            let path = String::from_utf8_lossy(&self.listing.path(number)).into_owned();
            return Err(ImportError::Entry { path, what });
        }
        let attributes = attributes.iter().filter_map(|key| memory.get(key).cloned()).collect();
        self.targets = memory;
        Ok(attributes)
    }

    /// Takes the paths that git converts and fetches their blobs; the pack goes to `pack`, which is
    /// empty when there is nothing. Paths that are no regular files don't matter.
    pub async fn convert(
        &mut self,
        origin: &impl Origin,
        paths: HashSet<Vec<u8>>,
        pack: &mut File,
    ) -> Result<(), ImportError> {
        self.converted = paths;
        let mut keys = Vec::new();
        for (number, entry) in self.listing.iter() {
            if matches!(entry.kind, Kind::File | Kind::Executable)
                && self.converted.contains(&self.listing.path(number))
                && self.in_repository.insert(entry.key)
            {
                keys.push(entry.key);
            }
        }
        let what = "files that git converts";
        self.fetch_into(origin, &keys, HashSet::new(), pack, what).await.map(|_| ())
    }

    /// Fetches objects and their pack. Returns the contents of those in `keep`.
    async fn fetch_into(
        &mut self,
        origin: &impl Origin,
        keys: &[ObjectId],
        keep: HashSet<ObjectId>,
        pack: &mut File,
        what: &'static str,
    ) -> Result<HashMap<ObjectId, Vec<u8>>, ImportError> {
        let failed = |source| ImportError::Fetch { what, source };
        let reset = |pack: &mut File| pack.set_len(0).and_then(|()| pack.rewind());
        let mut sink = Collector::new(self, keep);
        let mut attempt = 0;
        while !keys.is_empty() {
            reset(pack).map_err(|source| ImportError::Io { what: "a pack", source })?;
            match origin.fetch_pack(keys, pack, &mut sink).await {
                Ok(()) => break,
                Err(error) => pause(error, &mut attempt).await.map_err(failed)?,
            }
        }
        Ok(sink.finish())
    }

    /// Finds out the size of every file. Blobs whose size the origin doesn't tell are fetched.
    pub async fn sizes(&mut self, origin: &impl Origin) -> Result<Sizes, ImportError> {
        let failed = |source| ImportError::Fetch { what: "the sizes of files", source };
        let mut summary = Sizes { blobs: self.blobs.len(), ..Sizes::default() };
        let unknown = self.unknown();
        summary.known = summary.blobs - unknown.len() as u64;
        let mut attempt = 0;
        while !unknown.is_empty() {
            match origin.sizes(&unknown).await {
                Ok(sizes) => {
                    sizes.iter().for_each(|(key, size)| self.blobs.know(key, *size));
                    break;
                }
                Err(error) => pause(error, &mut attempt).await.map_err(failed)?,
            }
        }
        let still_unknown = self.unknown();
        summary.told = (unknown.len() - still_unknown.len()) as u64;
        for batch in still_unknown.chunks(BATCH) {
            self.fetch_unknown(origin, batch).await?;
        }
        summary.fetched = still_unknown.len() as u64;
        let fetched = still_unknown.iter().filter_map(|key| self.size(key));
        summary.fetched_bytes = fetched.sum();
        Ok(summary)
    }

    async fn fetch_unknown(
        &mut self,
        origin: &impl Origin,
        batch: &[ObjectId],
    ) -> Result<(), ImportError> {
        let failed = |source| ImportError::Fetch { what: "files of unknown size", source };
        let mut attempt = 0;
        loop {
            let missing = |key: &&ObjectId| self.size(key).is_none();
            let rest: Vec<ObjectId> = batch.iter().filter(missing).copied().collect();
            if rest.is_empty() {
                return Ok(());
            }
            let mut sink = Collector::new(self, HashSet::new());
            if let Err(error) = origin.fetch(&rest, &mut sink).await {
                pause(error, &mut attempt).await.map_err(failed)?;
            } else if let Some(key) = rest.iter().find(|key| self.size(key).is_none()) {
                let message = "it did not come".to_owned();
                return Err(failed(FetchError::Missing { key: *key, message }));
            }
        }
    }

    /// The blobs whose size is not known, each once, in the order of the listing.
    #[must_use]
    pub fn unknown(&self) -> Vec<ObjectId> {
        self.blobs.unknown(&self.listing)
    }

    fn size(&self, key: &ObjectId) -> Option<u64> {
        self.blobs.size(key)
    }

    /// The objects that were sent to the repository, for the builder: an id in hexadecimal digits
    /// on each line.
    pub fn write_in_repository(&self, mut out: impl Write) -> io::Result<()> {
        let mut keys: Vec<_> = self.in_repository.iter().collect();
        keys.sort_unstable();
        keys.iter().try_for_each(|key| writeln!(out, "{key}"))?;
        out.flush()
    }

    /// Writes the manifest, and ends the stream of contents.
    pub fn write_manifest(self, revision: &Revision, out: impl Write) -> Result<W, ImportError> {
        let failed = |source| ImportError::Io { what: "the manifest", source };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let header = Header {
            version: VERSION,
            hash: self.listing.hash(),
            commit: revision.commit,
            tree: revision.tree,
            mtime: file_time(revision.time, now.cast_signed()),
        };
        let mut writer = Writer::new(out, &header).map_err(failed)?;
        for (number, listed) in self.listing.iter() {
            let kind = self.kind(number, &listed)?;
            writer.put(listed.parent, listed.name, &listed.key, &kind).map_err(failed)?;
        }
        writer.finish().map_err(failed)?;
        let failed = |source| ImportError::Io { what: "the content that was fetched", source };
        self.contents.finish().map_err(failed)
    }

    fn kind(&self, number: u32, listed: &Listed<'_>) -> Result<EntryKind, ImportError> {
        let fail = |what| {
            let path = String::from_utf8_lossy(&self.listing.path(number)).into_owned();
            ImportError::Entry { path, what }
        };
        let executable = listed.kind == Kind::Executable;
        Ok(match listed.kind {
            Kind::Directory => EntryKind::Directory,
            Kind::Gitlink => EntryKind::Gitlink,
            Kind::Symlink => {
                let target = self.targets.get(&listed.key);
                let target = target.ok_or_else(|| fail("its target has not been fetched"))?;
                EntryKind::Symlink { target: target.clone() }
            }
            Kind::File | Kind::Executable
                if !self.converted.is_empty()
                    && self.converted.contains(&self.listing.path(number)) =>
            {
                EntryKind::Converted { executable }
            }
            Kind::File | Kind::Executable => {
                let size = self.blobs.size_of_entry(number);
                let size = size.ok_or_else(|| fail("its size is not known"))?;
                EntryKind::File { size, executable }
            }
        })
    }
}

/// The time that files get: the commit's, but in the past.
fn file_time(commit: i64, now: i64) -> i64 {
    commit.min(now - MIN_AGE_SECS).max(0)
}

/// Waits before the next try, or gives the error back when there is to be none.
async fn pause(error: FetchError, attempt: &mut u32) -> Result<(), FetchError> {
    let after = match &error {
        FetchError::Retry { after, .. } => *after,
        FetchError::Wrong { .. } => None,
        _ => return Err(error),
    };
    *attempt += 1;
    if *attempt >= ATTEMPTS {
        return Err(error);
    }
    let wait = after.unwrap_or(FIRST_WAIT * 2u32.pow(*attempt - 1));
    tracing::info!(%error, ?wait, "asking the origin again");
    tokio::time::sleep(wait).await;
    Ok(())
}
