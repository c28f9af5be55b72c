//! What an HTTP answer or failure means.

use std::error::Error;
use std::fmt::Write;
use std::io;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode};

use crate::source::FetchError;
use crate::source::git::refused;

/// An origin that asks for a longer pause than this is not waited for: the next reader tries again.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// An error for every status but 2xx; 401 and redirects have been dealt with before.
pub fn check_status(response: Response) -> Result<Response, FetchError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let message = format!("{} answers {status}", shown(response.url()));
    if passes(status) {
        let after = pause(response.headers(), SystemTime::now());
        return Err(FetchError::Retry { message, after });
    }
    Err(refused(message))
}

fn passes(status: StatusCode) -> bool {
    const TOO_EARLY: u16 = 425;
    status.is_server_error()
        || status == StatusCode::REQUEST_TIMEOUT
        || status == StatusCode::TOO_MANY_REQUESTS
        || status.as_u16() == TOO_EARLY
}

/// `Retry-After`: seconds or a date (RFC 9110, 10.2.3).
pub fn pause(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let pause = match value.parse() {
        Ok(secs) => Duration::from_secs(secs),
        Err(_) => {
            httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or(Duration::ZERO)
        }
    };
    Some(pause.min(LONGEST_PAUSE))
}

/// A request that did not get through, or an answer that broke off. A certificate that is not
/// trusted stays so, all else may pass.
pub fn broken(what: &str, error: &reqwest::Error) -> FetchError {
    let mut message = what.to_owned();
    let mut certificate = false;
    // reqwest's own message repeats the URL, the reason is further down
    let mut source = error.source();
    if source.is_none() {
        let _ = write!(message, ": {error}");
    }
    while let Some(e) = source {
        let _ = write!(message, ": {e}");
        certificate |= is_certificate(e);
        source = e.source();
    }
    match certificate {
        true => refused(message),
        false => FetchError::Retry { message, after: None },
    }
}

fn is_certificate(error: &(dyn Error + 'static)) -> bool {
    // I/O errors are often wrapped in I/O errors, and hide what is in them from `source`
    if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        return is_certificate(inner);
    }
    matches!(error.downcast_ref(), Some(rustls::Error::InvalidCertificate(_)))
}

/// A URL as messages show it: without user, password and query.
pub fn shown(url: &reqwest::Url) -> String {
    let mut url = url.clone();
    // fails for URLs that have no host, which have no user either
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let pause = |value: &str| {
            pause(&HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]), now)
                .map(|d| d.as_secs())
        };
        assert_eq!(pause("120"), Some(120));
        assert_eq!(pause("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        assert_eq!(pause("Sunday, 06-Nov-94 08:50:07 GMT"), Some(30));
        assert_eq!(pause("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        assert_eq!(pause("99999999"), Some(3600));
        assert_eq!(pause("soon"), None);
    }
}
