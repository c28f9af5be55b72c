//! A real `git upload-pack` at the other end of a socket.

use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::AsyncWriteExt;

use super::repo::{Repo, git};
use super::*;
use crate::source::git::SizesQuery;

/// Runs `git upload-pack` as the supervisor does for a local path.
pub struct UploadPack {
    repo: Arc<Repo>,
    children: Mutex<Vec<Child>>,
    started: AtomicUsize,
    version: &'static str,
}

impl UploadPack {
    pub fn new(repo: impl Into<Arc<Repo>>, version: &'static str) -> Arc<Self> {
        let (repo, started) = (repo.into(), AtomicUsize::new(0));
        Arc::new(Self { repo, children: Mutex::default(), started, version })
    }

    fn kill_all(&self) {
        for mut child in self.children.lock().unwrap().drain(..) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for UploadPack {
    fn drop(&mut self) {
        self.kill_all();
    }
}

impl Connector for UploadPack {
    fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>> {
        Box::pin(async {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let out = OwnedFd::from(theirs.try_clone().unwrap());
            let child = git(self.repo.dir.path())
                .args(["upload-pack", "repo.git"])
                .env("GIT_PROTOCOL", self.version)
                .stdin(Stdio::from(OwnedFd::from(theirs)))
                .stdout(Stdio::from(out))
                .stderr(Stdio::null())
                .spawn()
                .map_err(|e| e.to_string())?;
            self.children.lock().unwrap().push(child);
            self.started.fetch_add(1, Ordering::Relaxed);
            Pipe::received(vec![ours.into()]).map_err(|e| e.to_string())
        })
    }
}

fn pipe_source(upload_pack: &Arc<UploadPack>, limits: Limits) -> GitSource {
    let origin = GitOrigin { hash: upload_pack.repo.hash, transport: GitTransport::Pipe };
    GitSource::new(origin, limits, Keyring::new(&[]), upload_pack.clone()).unwrap()
}

fn repo(hash: HashKind, n: usize) -> (Repo, Vec<ObjectId>) {
    let contents: Vec<_> = (0..n).map(|i| noise(3000 + i)).collect();
    let files = contents.iter().enumerate().map(|(i, c)| (format!("f{i}"), &c[..]));
    let repo = Repo::with_files(hash, files);
    let ids = contents.iter().map(|content| repo.blob(content)).collect();
    (repo, ids)
}

#[tokio::test]
async fn command_after_command_on_one_connection() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let (repo, ids) = repo(hash, 40);
        let upload_pack = UploadPack::new(repo, "version=2");
        let source = pipe_source(&upload_pack, LIMITS);
        for id in &ids {
            fetch_all(&source, std::slice::from_ref(id)).await;
        }
        let sent = fetch_all(&source, &ids).await.sent;
        assert!(sent > 40 * ("0032want \n".len() + hash.id_len() * 2) as u64, "{sent}");
        let query = SizesQuery { tree: None, entries: &[], wanted: &ids };
        let sizes = source.sizes(&query).await.unwrap();
        assert_eq!((sizes.known.len(), sizes.how), (40, "object-info"));
        fetch_all(&source, &ids[..1]).await;
        assert_eq!(upload_pack.started.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn more_connections_when_they_are_needed_and_no_more_than_that() {
    let (repo, ids) = repo(HashKind::Sha1, 50);
    let upload_pack = UploadPack::new(repo, "version=2");
    let source = pipe_source(&upload_pack, Limits { connections: 3, ..LIMITS });
    let fetches = ids.iter().map(|id| fetch_all(&source, std::slice::from_ref(id)));
    futures_util::future::join_all(fetches).await;
    assert_eq!(upload_pack.started.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_broken_connection_is_replaced() {
    let (repo, ids) = repo(HashKind::Sha1, 3);
    let upload_pack = UploadPack::new(repo, "version=2");
    let source = pipe_source(&upload_pack, LIMITS);
    fetch_all(&source, &ids).await;
    upload_pack.kill_all();
    // noticed before or while it is used
    match collect(&source, &ids).await.1 {
        Ok(()) | Err(FetchError::Retry { .. }) => {}
        other => panic!("{other:?}"),
    }
    fetch_all(&source, &ids).await;
    assert_eq!(upload_pack.started.load(Ordering::Relaxed), 2);
    // given up in the middle: its connection is not used again
    let cut = tokio::time::timeout(Duration::from_micros(300), collect(&source, &ids)).await;
    let given_up = cut.is_err();
    fetch_all(&source, &ids).await;
    assert_eq!(upload_pack.started.load(Ordering::Relaxed), 2 + usize::from(given_up));
}

#[tokio::test]
async fn missing_among_many_is_named() {
    let (repo, ids) = repo(HashKind::Sha1, 1);
    let missing = repo.blob(b"not there");
    // more than a socket's buffer holds, and the server hangs up at the first
    let mut keys: Vec<_> = (0..20_000u32).map(|i| repo.blob(&i.to_le_bytes())).collect();
    keys.insert(0, missing);
    let upload_pack = UploadPack::new(repo, "version=2");
    let source = pipe_source(&upload_pack, LIMITS);
    // answered without the blob, after which the connection could not be used again
    source.probe(ids[0]).await.unwrap();
    source.probe(ids[0]).await.unwrap();
    assert_eq!(upload_pack.started.load(Ordering::Relaxed), 1);
    match source.probe(missing).await {
        Err(FetchError::Missing { key, .. }) => assert_eq!(key, missing),
        other => panic!("{other:?}"),
    }
    match collect(&source, &keys).await.1 {
        Err(FetchError::Missing { key, .. }) => assert_eq!(key, missing),
        other => panic!("{other:?}"),
    }
    fetch_all(&source, &ids).await;
}

#[tokio::test]
async fn not_version_2_or_not_there() {
    let (repo, _) = repo(HashKind::Sha1, 1);
    let upload_pack = UploadPack::new(repo, "version=0");
    let error = pipe_source(&upload_pack, LIMITS).capabilities().await.unwrap_err();
    assert!(matches!(&error, FetchError::Unable { message } if message.contains("version 0")));
    let origin = GitOrigin { hash: HashKind::Sha1, transport: GitTransport::Pipe };
    let source = GitSource::new(origin, LIMITS, Keyring::new(&[]), Arc::new(NoPipes)).unwrap();
    let error = source.capabilities().await.unwrap_err();
    assert!(matches!(&error, FetchError::Retry { message, .. } if message.contains("not a pipe")));
}

#[tokio::test]
async fn a_silent_one_is_given_up() {
    struct Silent(Mutex<Vec<UnixStream>>);
    impl Connector for Silent {
        fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>> {
            Box::pin(async {
                let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
                self.0.lock().unwrap().push(theirs);
                Ok(Pipe { stream: ours, why: None })
            })
        }
    }
    let origin = GitOrigin { hash: HashKind::Sha1, transport: GitTransport::Pipe };
    let limits = Limits { stall_secs: 1, ..LIMITS };
    let connector = Arc::new(Silent(Mutex::default()));
    let source = GitSource::new(origin, limits, Keyring::new(&[]), connector).unwrap();
    let error = source.capabilities().await.unwrap_err();
    assert!(matches!(error, FetchError::Retry { .. }), "{error:?}");
}

/// One that has ended before it has said anything, and why.
#[tokio::test]
async fn one_that_fails_says_why() {
    struct Failed(Option<&'static str>);
    impl Connector for Failed {
        fn connect(&self) -> BoxFuture<'_, Result<Pipe, String>> {
            Box::pin(async {
                let (stream, _ended) = UnixStream::pair().map_err(|e| e.to_string())?;
                let (why, mut says) = UnixStream::pair().map_err(|e| e.to_string())?;
                let said = self.0.unwrap_or_default();
                tokio::spawn(async move { says.write_all(said.as_bytes()).await });
                Ok(Pipe { stream, why: self.0.map(|_| why) })
            })
        }
    }
    for (says, expected) in [
        (Some("fatal: no \u{1b}[31mrepository"), "has ended: fatal: no  [31mrepository"),
        (Some(""), "ends too early"),
        (None, "ends too early"),
    ] {
        let origin = GitOrigin { hash: HashKind::Sha1, transport: GitTransport::Pipe };
        let connector = Arc::new(Failed(says));
        let source = GitSource::new(origin, LIMITS, Keyring::new(&[]), connector).unwrap();
        let error = source.capabilities().await.unwrap_err();
        assert!(
            matches!(&error, FetchError::Retry { message, .. } if message.contains(expected)),
            "{error:?}"
        );
    }
}
