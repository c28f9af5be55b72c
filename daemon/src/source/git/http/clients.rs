//! HTTP clients that are shared, and with them their connections: layers of one image come from one host, and each would else
//! begin with handshakes of its own.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use reqwest::Client;

use super::client;
use crate::queue::wire::HttpTransport;
use crate::source::FetchError;

/// All that makes a client what it is.
#[derive(Clone, PartialEq, Eq)]
struct Key {
    settings: HttpTransport,
    stall: Duration,
}

/// Idle connections that are kept for all who share a client.
const KEPT: usize = 32;

/// The clients in use of a process. One that nobody uses any more is gone, with its connections.
#[derive(Default)]
pub struct Clients {
    known: Mutex<Vec<(Key, Weak<Client>)>>,
}

impl Clients {
    /// The one for these settings, all of which count, also what proves who we are. `stall` is how long a connection may be in the
    /// making.
    pub fn get(
        &self,
        settings: &HttpTransport,
        stall: Duration,
    ) -> Result<Arc<Client>, FetchError> {
        let key = Key { settings: settings.clone(), stall };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let same = known.iter().find(|(other, _)| *other == key);
        if let Some(shared) = same.and_then(|(_, client)| client.upgrade()) {
            return Ok(shared);
        }
        known.retain(|(_, client)| client.strong_count() > 0);
        let made = Arc::new(client(settings, stall, KEPT)?);
        known.push((key, Arc::downgrade(&made)));
        Ok(made)
    }
}

impl fmt::Debug for Clients {
    /// Settings have secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_the_same_settings_shares_a_client() {
        let clients = Clients::default();
        let settings = HttpTransport { url: "https://a.test/".into(), ..HttpTransport::default() };
        let get = |settings: &HttpTransport, secs| {
            clients.get(settings, Duration::from_secs(secs)).unwrap()
        };
        let first = get(&settings, 4);
        assert!(Arc::ptr_eq(&first, &get(&settings, 4)));
        assert!(!Arc::ptr_eq(&first, &get(&settings, 5)));
        let insecure = HttpTransport { insecure: true, ..settings.clone() };
        assert!(!Arc::ptr_eq(&first, &get(&insecure, 4)));
        drop(first);
        let _other = get(&insecure, 4);
        assert_eq!(clients.known.lock().unwrap().len(), 1, "nobody uses the others");
    }
}
