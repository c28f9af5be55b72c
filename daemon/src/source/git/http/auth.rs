//! Who we say we are: one credential per host, asked for when a server wants it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::BoxFuture;
use reqwest::Url;
use reqwest::header::HeaderValue;
use tokio::sync::Mutex;

use crate::queue::wire::Credential;
use crate::source::FetchError;
use crate::source::git::refused;

/// Knows users and passwords, as the user's git does.
pub trait Credentials: Send + Sync {
    /// The credential for the repository at `url`. `rejected` has just been refused by the server. `None`: there
    /// is none. The error is a message.
    fn get<'a>(
        &'a self,
        url: &'a str,
        rejected: Option<Credential>,
    ) -> BoxFuture<'a, Result<Option<Credential>, String>>;
}

/// Scheme, host and port: what a credential is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin(String);

impl From<&Url> for Origin {
    fn from(url: &Url) -> Self {
        Self(url.origin().ascii_serialization())
    }
}

/// The credentials of one repository's hosts.
pub struct Auth {
    credentials: Arc<dyn Credentials>,
    hosts: StdMutex<HashMap<Origin, Arc<Mutex<Host>>>>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Host {
    current: Option<Credential>,
    /// The last one that the server did not take.
    refused: Option<Credential>,
    /// Goes up whenever somebody has asked, whatever came of it.
    turn: u64,
    /// Why there is none, after somebody has asked.
    none: String,
}

/// What a request was sent with.
#[derive(Debug, Clone)]
pub struct Ticket {
    pub credential: Option<Credential>,
    turn: u64,
}

impl Ticket {
    /// The header `Authorization` (RFC 7617).
    pub fn header(&self) -> Option<HeaderValue> {
        let Credential { username, password } = self.credential.as_ref()?;
        let value = format!("Basic {}", STANDARD.encode(format!("{username}:{password}")));
        let mut value = HeaderValue::try_from(value).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl Auth {
    /// `first` stood in the URL, and is used without being asked for.
    pub fn new(credentials: Arc<dyn Credentials>, home: Origin, first: Option<Credential>) -> Self {
        let host = Host { current: first, ..Host::default() };
        let hosts = HashMap::from([(home, Arc::new(Mutex::new(host)))]);
        Self { credentials, hosts: StdMutex::new(hosts) }
    }

    fn host(&self, origin: &Origin) -> Arc<Mutex<Host>> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.entry(origin.clone()).or_default().clone()
    }

    /// What to send a request to `origin` with. Waits while somebody is being asked.
    pub async fn ticket(&self, origin: &Origin) -> Ticket {
        let host = self.host(origin);
        let host = host.lock().await;
        Ticket { credential: host.current.clone(), turn: host.turn }
    }

    /// After a 401: something better than `ticket`. Asks, unless somebody else has asked since. The
    /// lock is what makes the others wait for the answer instead of asking as well, so it is held
    /// meanwhile.
    pub async fn renew(
        &self,
        origin: &Origin,
        url: &str,
        ticket: &Ticket,
    ) -> Result<Ticket, FetchError> {
        let host = self.host(origin);
        let mut host = host.lock().await;
        if host.turn == ticket.turn {
            let rejected = ticket.credential.clone().or_else(|| host.refused.take());
            let answer = self.credentials.get(url, rejected.clone()).await;
            host.turn += 1;
            host.current = None;
            host.refused = rejected;
            match answer {
                Ok(Some(new)) if Some(&new) == host.refused.as_ref() => {
                    host.none = format!("{url} does not accept the user name and password");
                }
                Ok(new @ Some(_)) => host.current = new,
                Ok(None) => {
                    host.none = format!("{url} wants a user name and password, and git knows none");
                }
                Err(message) => {
                    host.none = format!("{url} wants a user name and password: {message}");
                }
            }
        }
        match &host.current {
            Some(_) => Ok(Ticket { credential: host.current.clone(), turn: host.turn }),
            None => Err(refused(host.none.clone())),
        }
    }

    /// The server has not taken the second one either.
    pub async fn give_up(&self, origin: &Origin, url: &str, ticket: &Ticket) -> FetchError {
        let host = self.host(origin);
        let mut host = host.lock().await;
        let message = format!("{url} does not accept the user name and password");
        if host.turn == ticket.turn {
            host.turn += 1;
            host.refused = host.current.take();
            host.none.clone_from(&message);
        }
        refused(message)
    }
}
