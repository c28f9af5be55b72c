//! Against real git, over real sockets.

mod auth;
mod faults;
mod http;
mod pipe;
mod repo;
mod server;
mod sizes;
mod tls;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::net::UnixStream;

use super::{Connector, Credentials, GitSource, Pipe};
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::{Credential, GitOrigin, GitTransport, HttpTransport, Limits};
use crate::source::{Content, Fetch, FetchError, Sink};

/// Keeps everything in memory.
#[derive(Debug, Default)]
pub struct Collect {
    pub objects: HashMap<ObjectId, Vec<u8>>,
    /// Objects that came through a file.
    pub spooled: usize,
    /// Files that were asked for.
    pub spools: usize,
    pub received: u64,
    pub sent: u64,
}

impl Sink for Collect {
    fn object(&mut self, key: ObjectId, content: Content) -> io::Result<()> {
        let bytes = match content {
            Content::Memory(bytes) => bytes,
            Content::Spooled { file, len } => {
                self.spooled += 1;
                let bytes = read_spooled(file)?;
                assert_eq!(bytes.len() as u64, len);
                bytes
            }
        };
        assert!(self.objects.insert(key, bytes).is_none(), "{key} given twice");
        Ok(())
    }

    fn spool(&mut self) -> io::Result<File> {
        self.spools += 1;
        tempfile::tempfile()
    }

    fn received(&mut self, bytes: u64) {
        self.received += bytes;
    }

    fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }
}

pub fn read_spooled(mut file: File) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Answers with these, one after another; remembers what it was asked.
#[derive(Default)]
pub struct Keyring {
    answers: Mutex<VecDeque<Credential>>,
    asked: Mutex<Vec<(String, Option<Credential>)>>,
}

pub fn credential(username: &str, password: &str) -> Credential {
    Credential { username: username.into(), password: password.into() }
}

impl Keyring {
    pub fn new(answers: &[Credential]) -> Arc<Self> {
        let answers = Mutex::new(answers.iter().cloned().collect());
        Arc::new(Self { answers, ..Self::default() })
    }

    pub fn asked(&self) -> Vec<(String, Option<Credential>)> {
        self.asked.lock().unwrap().clone()
    }
}

impl Credentials for Keyring {
    fn get<'a>(
        &'a self,
        url: &'a str,
        rejected: Option<Credential>,
    ) -> BoxFuture<'a, Result<Option<Credential>, String>> {
        Box::pin(async move {
            // long enough for others to come and ask as well
            tokio::time::sleep(Duration::from_millis(50)).await;
            self.asked.lock().unwrap().push((url.to_owned(), rejected));
            Ok(self.answers.lock().unwrap().pop_front())
        })
    }
}

/// No pipes here.
struct NoPipes;

impl Connector for NoPipes {
    fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>> {
        Box::pin(async { Err("not a pipe".to_owned()) })
    }
}

pub const LIMITS: Limits =
    Limits { deadline_secs: 60, stall_secs: 20, connections: 4, read_ahead: false };

pub fn http_source(hash: HashKind, transport: HttpTransport, limits: Limits) -> GitSource {
    try_source(hash, transport, limits, Keyring::new(&[])).unwrap()
}

pub fn try_source(
    hash: HashKind,
    transport: HttpTransport,
    limits: Limits,
    keyring: Arc<Keyring>,
) -> Result<GitSource, FetchError> {
    let origin = GitOrigin { hash, transport: GitTransport::Http(transport) };
    GitSource::new(origin, limits, keyring, Arc::new(NoPipes))
}

/// A source of the repository at this URL, with nothing else set.
pub fn plain(hash: HashKind, url: String) -> GitSource {
    http_source(hash, at(url), LIMITS)
}

pub fn at(url: String) -> HttpTransport {
    HttpTransport { url, ..HttpTransport::default() }
}

/// Fetches into memory.
pub async fn collect(source: &GitSource, keys: &[ObjectId]) -> (Collect, Result<(), FetchError>) {
    let mut sink = Collect::default();
    let result = source.fetch(keys, &mut sink).await;
    (sink, result)
}

/// Fetches what must be there, and checks that it is right.
pub async fn fetch_all(source: &GitSource, keys: &[ObjectId]) -> Collect {
    let (sink, result) = collect(source, keys).await;
    result.unwrap();
    assert_eq!(sink.objects.len(), keys.len());
    for (id, content) in &sink.objects {
        assert_eq!(*id, ObjectId::of_blob(id.kind(), content));
    }
    sink
}

/// Bytes that don't compress, others for every length.
pub fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(2 * len as u64 + 1);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
