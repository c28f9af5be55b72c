//! containerd's socket, which is not closed as long as there is somebody to keep it: systemd, which listens there itself if
//! `hydrant-containerd.socket` is installed, or our own parent.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use tokio::task::JoinHandle;
use tracing::{error, warn};

use super::super::Supervisor;
use super::super::kept::{self, Listener};
use crate::snapshotter::{Socket, serve};

/// The socket's name in the run directory.
const SOCKET: &str = "containerd.sock";

/// What the options of an overlay can't have in a path, as containerd writes them.
const NOT_IN_OPTIONS: [char; 3] = [':', ',', '\\'];

/// containerd is served.
#[derive(Debug)]
pub struct Listening {
    pub task: JoinHandle<()>,
    /// The socket for the next supervisor, and by which name that knows it.
    pub estate: (String, OwnedFd),
}

impl Supervisor {
    /// Listens for containerd, if that can be: without it, all else works. `passed`: a socket that is there already.
    pub(in super::super) fn listen_for_containerd(
        self: &Arc<Self>,
        passed: Option<Listener>,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Option<Listening> {
        let path = self.directories.run.join(SOCKET);
        let state = self.store.root().to_string_lossy();
        if state.contains(NOT_IN_OPTIONS) || self.store.root().to_str().is_none() {
            warn!(%state, "containerd can't use a state directory with such a name");
            return None;
        }
        let (socket, estate) = match open(passed, &path) {
            Ok(opened) => opened,
            Err(error) => {
                error!(%error, path = %path.display(), "can't listen for containerd");
                return None;
            }
        };
        let supervisor = Arc::clone(self);
        let task = tokio::spawn(async move {
            if let Err(error) = serve(socket, supervisor, shutdown).await {
                error!(%error, "can't serve containerd any more");
            }
        });
        Some(Listening { task, estate })
    }
}

/// The socket, and what is left to the next supervisor.
fn open(passed: Option<Listener>, path: &Path) -> io::Result<(Socket, (String, OwnedFd))> {
    let passed = passed.map(|listener| {
        let (name, fd) = match listener {
            Listener::Managers(fd) => (kept::CONTAINERD, fd),
            Listener::Ours(fd) => (kept::OWN_CONTAINERD, fd),
        };
        (name, Socket::passed(fd, path))
    });
    let (name, socket) = match passed {
        Some((name, Ok(socket))) => (name, socket),
        other => {
            if let Some((name, Err(error))) = other {
                warn!(%error, name, path = %path.display(), "containerd's socket is made anew");
                kept::forget(kept::OWN_CONTAINERD);
            }
            let socket = Socket::bind(path)?;
            kept::keep(kept::OWN_CONTAINERD, socket.copy()?.as_fd());
            (kept::OWN_CONTAINERD, socket)
        }
    };
    if name == kept::CONTAINERD {
        // should there be one of before there was systemd's
        kept::forget(kept::OWN_CONTAINERD);
    }
    let copy = socket.copy()?;
    Ok((socket, (name.to_owned(), copy)))
}
