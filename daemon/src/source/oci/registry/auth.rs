//! Who we say we are at a registry: a token of its token server, or a user and password.

use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::Url;
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, USER_AGENT, WWW_AUTHENTICATE,
};
use serde::Deserialize;
use url::form_urlencoded::Serializer;

use super::host::{AGENT, Host};
use super::refused;
use crate::queue::wire::Credential;
use crate::source::FetchError;
use crate::source::git::{Credentials, check_status, shown};

/// The name with which Docker keeps an identity token in a password's place.
pub const IDENTITY_TOKEN: &str = "<token>";

/// The proof of identity for one repository.
pub struct Auth {
    credentials: Arc<dyn Credentials>,
    registry: Url,
    repository: String,
    /// The header `Authorization`.
    current: Mutex<Option<HeaderValue>>,
    /// Whoever holds it asks for a new one.
    asking: tokio::sync::Mutex<Option<Credential>>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").field("repository", &self.repository).finish_non_exhaustive()
    }
}

/// What a registry asks for (RFC 9110, 11.6.1).
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// What a token server answers.
#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

impl Auth {
    pub fn new(credentials: Arc<dyn Credentials>, registry: Url, repository: String) -> Self {
        Self {
            credentials,
            registry,
            repository,
            current: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        }
    }

    pub fn current(&self) -> Option<HeaderValue> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gets a new proof, as the registry has not taken `used`, unless another request has got one
    /// meanwhile.
    pub async fn renew(
        &self,
        host: &Host,
        headers: &HeaderMap,
        used: Option<HeaderValue>,
    ) -> Result<(), FetchError> {
        let mut last = self.asking.lock().await;
        if self.current() != used {
            return Ok(());
        }
        let at = shown(&self.registry);
        let challenges = headers.get_all(WWW_AUTHENTICATE).iter();
        let challenges = challenges.filter_map(|value| parse(value.to_str().ok()?));
        let challenge = challenges
            .reduce(|best, next| if best == Challenge::Basic { next } else { best })
            .ok_or_else(|| refused(format!("{at} asks for a proof that is not known here")))?;
        // a token runs out, a password doesn't
        let rejected = match challenge {
            Challenge::Basic => last.clone().filter(|_| used.is_some()),
            Challenge::Bearer { .. } => None,
        };
        let credential = self.credentials.get(self.registry.as_str(), rejected).await;
        let credential = credential.map_err(refused)?;
        last.clone_from(&credential);
        let value = match challenge {
            Challenge::Basic => {
                let of_use = credential.filter(|found| found.username != IDENTITY_TOKEN);
                let credential = of_use.ok_or_else(|| {
                    refused(format!("{at} asks who we are, and no credential is known for it"))
                })?;
                basic(&credential)
            }
            Challenge::Bearer { realm, service, scope } => {
                let token = self.token(host, &realm, service, scope, credential).await?;
                format!("Bearer {token}")
            }
        };
        let mut value = HeaderValue::try_from(value)
            .map_err(|_| refused(format!("the proof for {at} can't be put in a header")))?;
        value.set_sensitive(true);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        Ok(())
    }

    async fn token(
        &self,
        host: &Host,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
        credential: Option<Credential>,
    ) -> Result<String, FetchError> {
        let unusable = |why: &str| refused(format!("the token server {realm:?} {why}"));
        let mut url = Url::parse(realm).map_err(|e| unusable(&e.to_string()))?;
        let plain = url.scheme() == "http" && self.registry.scheme() == "http";
        if url.scheme() != "https" && !plain {
            return Err(unusable("is not encrypted"));
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let service = service.iter().map(|service| ("service", service.as_str()));
        let fields = service.chain([("scope", scope.as_str())]);
        let request = match &credential {
            // OAuth 2 (RFC 6749, 6), as Docker's "OAuth2 token authentication" has it
            Some(Credential { username, password }) if username == IDENTITY_TOKEN => {
                let mut form = Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token").append_pair("client_id", "hydrant");
                form.extend_pairs(fields).append_pair("refresh_token", password);
                let request = host.client().post(url.clone()).body(form.finish());
                request.header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            }
            credential => {
                url.query_pairs_mut().extend_pairs(fields);
                let request = host.client().get(url.clone());
                match credential {
                    Some(credential) => request.header(AUTHORIZATION, basic(credential)),
                    None => request,
                }
            }
        };
        let request = request.header(USER_AGENT, AGENT);
        let response = host.send(request, &url).await?;
        let status = response.status();
        if status == reqwest::StatusCode::UNAUTHORIZED || status == reqwest::StatusCode::FORBIDDEN {
            let who = match &credential {
                Some(credential) if credential.username == IDENTITY_TOKEN => {
                    "the identity token; log in again".into()
                }
                Some(credential) => format!("{:?}", credential.username),
                None => "somebody without a name; log in first".into(),
            };
            return Err(refused(format!("the token server {} refuses {who}", shown(&url))));
        }
        let body = host.body(check_status(response)?).await?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|e| unusable(&format!("sends what can't be read: {e}")))?;
        let token = token.token.or(token.access_token).filter(|token| !token.is_empty());
        token.ok_or_else(|| unusable("sends no token"))
    }
}

fn basic(credential: &Credential) -> String {
    let Credential { username, password } = credential;
    format!("Basic {}", STANDARD.encode(format!("{username}:{password}")))
}

/// Reads one challenge: a scheme, then `name="value"` with commas between. The first one only, of
/// several in a header.
pub fn parse(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    let mut rest = rest.trim_start();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut chars = quoted.char_indices();
                let end = loop {
                    match chars.next()? {
                        (at, '"') => break at,
                        (_, '\\') => value.push(chars.next()?.1),
                        (_, c) => value.push(c),
                    }
                };
                (value, &quoted[end + 1..])
            }
            None => {
                let (value, after) = after.split_once(',').unwrap_or((after, ""));
                (value.trim().to_owned(), after)
            }
        };
        match name.trim_start_matches(',').trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => scope = Some(value),
            _ => {}
        }
        rest = after.trim_start_matches([',', ' ']);
    }
    Some(Challenge::Bearer { realm: realm?, service, scope })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull,push""#;
        let Some(Challenge::Bearer { realm, service, scope }) = parse(header) else {
            panic!("a token is wanted")
        };
        assert_eq!(realm, "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert_eq!(scope.as_deref(), Some("repository:library/x:pull,push"));
        assert_eq!(parse("Basic realm=\"x\""), Some(Challenge::Basic));
        let Some(Challenge::Bearer { realm, scope, .. }) = parse(r#"bearer realm="a\"b", x=y"#)
        else {
            panic!("a token is wanted")
        };
        assert_eq!((realm.as_str(), scope), ("a\"b", None));
        for wrong in ["", "Negotiate", "Bearer", "Bearer realm=\"x", "Bearer realm=\"x\\"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn challenges_of_any_kind(header in r#"(Bearer |basic |)[a-z="\\, é]{0,60}|.{0,40}"#) {
            // read or not
            let _ = parse(&header);
        }
    }
}
