//! Who asks.

use std::io;

use axum::extract::FromRequestParts;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::request::Parts;
use axum::serve::IncomingStream;
use hydrant_api::{ErrorCode, Owner};
use tokio::net::{UnixListener, UnixStream};

use super::error::ApiError;

/// The process at the other end of the admin socket when it connected (`SO_PEERCRED`, unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    /// `None` where the process is not in the daemon's pid namespace.
    pub pid: Option<i32>,
}

impl Caller {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = stream.peer_cred()?;
        Ok(Self { uid: peer.uid(), gid: peer.gid(), pid: peer.pid() })
    }

    #[must_use]
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner { uid: self.uid, gid: self.gid }
    }

    /// Whether the caller may do something to what is `owner`'s.
    #[must_use]
    pub fn may_change(&self, owner: Owner) -> bool {
        self.is_root() || self.uid == owner.uid
    }

    /// An error unless root asks. `what` completes "only root may".
    pub fn require_root(&self, what: &str) -> Result<(), ApiError> {
        if self.is_root() {
            return Ok(());
        }
        Err(ApiError::forbidden(format!("only root may {what}")))
    }
}

/// What a connection knows of its peer. Where it knows nothing, no request on it is answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(Option<Caller>);

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let caller = Caller::of(stream.io());
        if let Err(error) = &caller {
            tracing::warn!(%error, "can't read the credentials of an admin client");
        }
        Self(caller.ok())
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match parts.extensions.get::<ConnectInfo<Peer>>() {
            Some(ConnectInfo(Peer(Some(caller)))) => Ok(*caller),
            _ => Err(ApiError::new(ErrorCode::Internal, "the caller's credentials are not known")),
        }
    }
}
