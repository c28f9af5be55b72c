//! The origins of the pools, as far as the supervisor helps a worker to reach them: credentials and
//! pipes, both made by the owner's own git.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use super::git::{self, Git, Remote};
use super::images::RegistryAccess;
use crate::ids::PoolId;
use crate::queue::wire::Credential;

/// A credential helper that takes longer is given up.
pub(super) const HELPER_PATIENCE: Duration = Duration::from_secs(60);

/// So many `git upload-pack` of one pool run at the same time. A worker has up to `connections` of them, and those of
/// the worker before it end when they notice that it is gone.
const MAX_UPLOAD_PACKS: usize = 32;

/// Whoever wants another one waits so long for one of them to end.
const UPLOAD_PACK_PATIENCE: Duration = Duration::from_secs(20);

/// In the catalog, with a [`GitOrigin`](crate::queue::wire::GitOrigin) at the other end of a pipe: its URL after
/// `url.<base>.insteadOf`.
pub(super) const REACHED: &str = "reached";

/// One pool's origin.
#[derive(Debug, Clone)]
pub enum Access {
    Git(GitAccess),
    Registry(RegistryAccess),
}

/// A git repository.
#[derive(Debug, Clone)]
pub struct GitAccess {
    pub url: String,
    pub remote: Remote,
    pub git: Git,
    by_command: Arc<AtomicBool>,
}

/// All of them. A lock is held for a look-up, never longer.
#[derive(Debug, Default)]
pub struct Origins {
    pools: Mutex<HashMap<PoolId, Access>>,
    upload_packs: Mutex<HashMap<PoolId, Arc<Semaphore>>>,
}

impl Origins {
    /// Adds or replaces a pool's origin.
    pub fn insert(&self, pool: PoolId, access: Access) {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner).insert(pool, access);
    }

    pub fn remove(&self, pool: PoolId) {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner).remove(&pool);
        self.upload_packs.lock().unwrap_or_else(PoisonError::into_inner).remove(&pool);
    }

    #[must_use]
    pub fn knows(&self, pool: PoolId) -> bool {
        self.get(pool).is_some()
    }

    /// The origin's URL, as it may be shown.
    #[must_use]
    pub fn url(&self, pool: PoolId) -> Option<String> {
        Some(match self.get(pool)? {
            Access::Git(git) => git::for_display(&git.url),
            Access::Registry(registry) => registry.shown(),
        })
    }

    fn get(&self, pool: PoolId) -> Option<Access> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner).get(&pool).cloned()
    }

    /// Starts a `git upload-pack` for the pool; gives the fds of [`ToWorker::Transport`].
    ///
    /// [`ToWorker::Transport`]: crate::queue::wire::ToWorker::Transport
    pub async fn transport(&self, pool: PoolId) -> Result<[OwnedFd; 2], String> {
        let Access::Git(access) = self.get(pool).ok_or("the pool has no origin any more")? else {
            return Err("the pool's origin is no git repository".into());
        };
        let slots = {
            let mut slots = self.upload_packs.lock().unwrap_or_else(PoisonError::into_inner);
            let new = || Arc::new(Semaphore::new(MAX_UPLOAD_PACKS));
            Arc::clone(slots.entry(pool).or_insert_with(new))
        };
        match tokio::time::timeout(UPLOAD_PACK_PATIENCE, slots.acquire_owned()).await {
            Ok(slot) => access.start_transport(slot.ok()).await,
            Err(_) => Err("too many git upload-pack run for this origin".into()),
        }
    }

    /// What the owner's credential helpers say.
    pub async fn credential(
        &self,
        pool: PoolId,
        url: &str,
        rejected: Option<&Credential>,
    ) -> Result<Option<Credential>, String> {
        let access = self.get(pool).ok_or("the pool has no origin any more")?;
        match access {
            Access::Git(access) => access.credential(url, rejected).await,
            Access::Registry(access) => access.credential(url, rejected).await,
        }
    }
}

impl GitAccess {
    #[must_use]
    pub fn new(url: String, remote: Remote, git: Git) -> Self {
        Self { url, remote, git, by_command: Arc::default() }
    }

    /// Starts a `git upload-pack`; gives what [`Origins::transport`] does.
    pub async fn transport(&self) -> Result<[OwnedFd; 2], String> {
        self.start_transport(None).await
    }

    /// `slot` is held until it has ended.
    async fn start_transport(
        &self,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Result<[OwnedFd; 2], String> {
        let slot = slot.map(Arc::new);
        let by_command = self.by_command.load(Ordering::Relaxed);
        let first = self.start(by_command, slot.clone())?;
        let is_ssh = matches!(self.remote, Remote::Ssh { .. });
        if !is_ssh || by_command || is_version_2(&first[0]).await != Some(false) {
            return Ok(first);
        }
        // Most servers let the variable in only if they are told to. A shell at the other end can set it; if there is
        // none, what was said at first is for who has asked to make sense of.
        let second = self.start(true, slot)?;
        if is_version_2(&second[0]).await != Some(true) {
            return Ok(first);
        }
        self.by_command.store(true, Ordering::Relaxed);
        Ok(second)
    }

    fn start(
        &self,
        by_command: bool,
        slot: Option<Arc<OwnedSemaphorePermit>>,
    ) -> Result<[OwnedFd; 2], String> {
        let command = self.git.upload_pack(&self.remote, by_command);
        let command = command.map_err(|error| error.to_string())?;
        connect(command, slot).map_err(|error| format!("can't start git upload-pack: {error}"))
    }

    /// What the owner's credential helpers say.
    pub async fn credential(
        &self,
        url: &str,
        rejected: Option<&Credential>,
    ) -> Result<Option<Credential>, String> {
        let Some(url) = on_host(url, &self.url) else {
            return Err(format!("{url:?} is not the pool's origin"));
        };
        let asked = self.git.credential(&url, rejected);
        match tokio::time::timeout(HELPER_PATIENCE, asked).await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("the credential helper did not answer".into()),
        }
    }
}

/// `url` if it is on the same host as `origin`: a process that was taken over must not learn the
/// passwords of other hosts. It is given as it was understood here. The text itself may have line ends,
/// which a URL parser skips and `git credential` takes for the start of another field, such as `host=`.
pub(super) fn on_host(url: &str, origin: &str) -> Option<String> {
    let (url, origin) = (url::Url::parse(url).ok()?, url::Url::parse(origin).ok()?);
    (url.origin() == origin.origin()).then(|| url.into())
}

/// Runs a command with one end of a socket pair as its standard input and output, and gives the other
/// end and a socket that says, once the command has failed, why.
fn connect(
    mut command: tokio::process::Command,
    slot: Option<Arc<OwnedSemaphorePermit>>,
) -> io::Result<[OwnedFd; 2]> {
    let (ours, theirs) = UnixStream::pair()?;
    let (why, mut says_why) = UnixStream::pair()?;
    command.stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)));
    command.stdout(Stdio::from(OwnedFd::from(theirs)));
    command.stderr(Stdio::piped());
    let mut child = command.spawn()?;
    tokio::spawn(async move {
        // what the origin says there has no end that can be relied on
        let stderr = git::last_of(child.stderr.take()).await;
        match child.wait().await {
            Ok(status) if !status.success() => {
                warn!(%status, stderr = stderr.trim(), "git upload-pack ended");
                let reason = match reason(&stderr) {
                    "" => status.to_string(),
                    reason => reason.to_owned(),
                };
                // a few bytes in a new socket's buffer: this doesn't wait; the worker may be gone
                says_why.write_all(reason.as_bytes()).ok();
            }
            Ok(_) => debug!("git upload-pack ended"),
            Err(error) => warn!(%error, "git upload-pack was lost"),
        }
        drop(slot);
    });
    Ok([ours.into(), why.into()])
}

/// Whether what comes begins as version 2 of the protocol does; `None` if nothing comes. It is all still to be
/// read then.
async fn is_version_2(socket: &OwnedFd) -> Option<bool> {
    const BEGINNING: &[u8] = b"000eversion 2\n";
    let socket = UnixStream::from(socket.try_clone().ok()?);
    socket.set_nonblocking(true).ok()?;
    let socket = tokio::net::UnixStream::from_std(socket).ok()?;
    let look = async {
        let mut seen = [0; BEGINNING.len()];
        loop {
            socket.readable().await.ok()?;
            let mut peek = || Ok(recv(socket.as_raw_fd(), &mut seen, MsgFlags::MSG_PEEK)?);
            let count = match socket.try_io(Interest::READABLE, &mut peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                count => count.ok().filter(|count| *count > 0)?,
            };
            if seen.get(..count) != BEGINNING.get(..count) {
                return Some(false);
            }
            if count == BEGINNING.len() {
                return Some(true);
            }
            // the rest of it is under way
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(UPLOAD_PACK_PATIENCE, look).await.ok()?
}

/// The line that says why a git or ssh has failed: the one that git calls fatal, which advice may
/// follow, else the last one.
fn reason(stderr: &str) -> &str {
    let lines = || stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    lines()
        .rfind(|line| line.starts_with("fatal: "))
        .or_else(|| lines().next_back())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_git_that_fails_says_why() {
        for (script, expected) in [
            (
                "echo 'me@h: Permission denied (publickey).' >&2; exit 255",
                "Permission denied (publickey).",
            ),
            (
                "printf 'warning: x\\nfatal: no repository\\nTo add:\\n\\n\\tgit config\\n' >&2; exit 128",
                "fatal: no repository",
            ),
            ("yes | head -c 1000000 | tr -d '\\n' >&2; exit 1", "yyyy"),
            ("kill -9 $$", "signal: 9"),
            ("exit 0", ""),
        ] {
            let mut command = tokio::process::Command::new("sh");
            command.args(["-c", script]);
            let [_stream, why] = connect(command, None).unwrap();
            let why = UnixStream::from(why);
            let said = tokio::task::spawn_blocking(|| io::read_to_string(why)).await;
            let said = said.unwrap().unwrap();
            assert!(said.contains(expected) && said.is_empty() == expected.is_empty(), "{said:?}");
        }
    }

    #[tokio::test]
    async fn the_version_is_seen_and_left() {
        for (said, version_2) in [
            (&b"000eversion 2\n0015agent=git/2.47.3"[..], Some(true)),
            (b"00a8 0123 HEAD\0multi_ack", Some(false)),
            (b"", None),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(said).unwrap();
            drop(theirs);
            let ours = OwnedFd::from(ours);
            assert_eq!(is_version_2(&ours).await, version_2, "{said:?}");
        }
    }

    #[test]
    fn passwords_of_other_hosts_are_not_asked_for() {
        let origin = "https://h/x.git";
        assert_eq!(on_host("https://h/y", origin).as_deref(), Some("https://h/y"));
        for other in ["https://other/x.git", "http://h/x.git", "https://h:1/x.git", "x"] {
            assert_eq!(on_host(other, origin), None, "{other}");
        }
        // the last of two fields of a name counts for git
        for trick in ["https://h/\nhost=other", "https://h/\r\nhost=other\n\n", "https://h/\0x"] {
            let url = on_host(trick, origin).unwrap();
            assert!(!url.contains(['\n', '\r', '\0']), "{url:?}");
        }
    }
}
