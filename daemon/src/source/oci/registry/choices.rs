//! Which host is asked, and which one then.

use std::time::Duration;

use tokio::time::Instant;

use super::{Host, refused};
use crate::source::FetchError;

/// How long a host that has failed is asked after the others.
const REST_AFTER_REFUSAL: Duration = Duration::from_secs(10);
const REST_AFTER_FAILURE: Duration = Duration::from_secs(60);
const REST_AFTER_WRONG: Duration = Duration::from_secs(15 * 60);

/// What is wanted of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// What a tag leads to: the host is believed.
    Tag,
    /// What has a digest.
    Content,
}

/// The hosts for one request: the configured order, but those that have failed a moment ago last.
#[derive(Debug)]
pub struct Choices<'a> {
    registry: &'a str,
    need: Need,
    hosts: std::vec::IntoIter<&'a Host>,
    asked: Option<&'a Host>,
    failure: Option<FetchError>,
}

impl<'a> Choices<'a> {
    pub(super) fn new(registry: &'a str, hosts: &'a [Host], need: Need) -> Self {
        let able = hosts.iter().filter(|host| host.can(need));
        let now = Instant::now();
        let mut able: Vec<_> = able.map(|host| (host.rests(now), host)).collect();
        able.sort_by_key(|(rests, _)| *rests);
        let hosts: Vec<_> = able.into_iter().map(|(_, host)| host).collect();
        Self { registry, need, hosts: hosts.into_iter(), asked: None, failure: None }
    }

    /// The next host to ask. An error once there is none: what was wrong with those before.
    pub fn ask(&mut self) -> Result<&'a Host, FetchError> {
        self.asked = self.hosts.next();
        self.asked.ok_or_else(|| {
            self.failure.take().unwrap_or_else(|| {
                let what = match self.need {
                    Need::Tag => "resolve tags",
                    Need::Content => "give content",
                };
                refused(format!("no host is configured for {} that may {what}", self.registry))
            })
        })
    }

    /// How many there are after this one.
    #[must_use]
    pub fn left(&self) -> usize {
        self.hosts.len()
    }

    /// The host that [`ask`](Self::ask) gave last has failed. An error that is not the host's ends it.
    pub fn failed(&mut self, error: FetchError) -> Result<(), FetchError> {
        let Some(host) = self.asked.take() else { return Err(error) };
        host.has_failed(&error);
        if matches!(error, FetchError::Sink(_) | FetchError::Missing { .. }) {
            return Err(error);
        }
        if self.left() > 0 {
            tracing::warn!(host = host.shown(), %error, "asking another host");
        }
        self.failure = Some(match self.failure.take() {
            None => error,
            Some(before) => both(before, error),
        });
        Ok(())
    }
}

/// How long a host rests that has failed in this way.
pub(super) fn rest(error: &FetchError) -> Duration {
    match error {
        FetchError::Refused { .. } => REST_AFTER_REFUSAL,
        FetchError::Retry { after, .. } => after.unwrap_or_default().max(REST_AFTER_FAILURE),
        FetchError::Wrong { .. } => REST_AFTER_WRONG,
        FetchError::Missing { .. } | FetchError::Sink(_) => Duration::ZERO,
    }
}

/// Two failures as one: as long as one of the hosts may do it later, it is tried again.
fn both(before: FetchError, error: FetchError) -> FetchError {
    use FetchError::{Refused, Retry, Wrong};
    let text = |error: &FetchError| match error {
        Retry { message, .. } | Refused { message } | Wrong { message } => message.clone(),
        other => other.to_string(),
    };
    let message = format!("{}; {}", text(&error), text(&before));
    match (before, error) {
        (Retry { after: one, .. }, Retry { after: other, .. }) => {
            let after = one.zip(other).map(|(one, other)| one.min(other));
            Retry { message, after }
        }
        (Retry { .. }, _) | (_, Retry { .. }) => Retry { message, after: None },
        (Wrong { .. }, _) | (_, Wrong { .. }) => Wrong { message },
        _ => Refused { message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::oci::registry::{retry, wrong};

    #[test]
    fn a_host_that_may_do_it_later_is_not_forgotten() {
        let kind = |before, error| match both(before, error) {
            FetchError::Retry { message, after } => (message, after),
            FetchError::Wrong { message } => (format!("wrong: {message}"), None),
            other => (other.to_string(), None),
        };
        assert_eq!(kind(retry("a"), refused("b")), ("b; a".into(), None));
        assert_eq!(kind(wrong("a"), refused("b")), ("wrong: b; a".into(), None));
        assert_eq!(kind(refused("a"), refused("b")), ("b; a".into(), None));
        let after = |secs| {
            let after = Some(Duration::from_secs(secs));
            FetchError::Retry { message: secs.to_string(), after }
        };
        assert_eq!(kind(after(3), after(2)), ("2; 3".into(), Some(Duration::from_secs(2))));
        assert_eq!(kind(after(3), retry("x")), ("x; 3".into(), None));
    }
}
