//! Credentials for registries: those that `docker login`, `podman login` and `skopeo login` have kept.
//!
//! The files are read, and credential helpers run, as the user whose they are. What is found goes to
//! the process that asks the registry, and to no other.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use url::Url;

use super::super::origins::{HELPER_PATIENCE, on_host};
use crate::queue::wire::Credential;
use crate::queue::wire::image::{Host, Repository};
use crate::source::oci::registry::IDENTITY_TOKEN;
use crate::sys::user::{self, User};

/// The longest file of credentials, or answer of a helper, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// What Docker calls its own registry there.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// A registry, and whose credentials there are for it.
#[derive(Debug, Clone)]
pub struct RegistryAccess {
    /// As people name it: `docker.io`, `host:port`.
    registry: String,
    /// The URLs of those who may be asked for its images, and by which names there are credentials for them.
    hosts: Vec<(String, String)>,
    user: User,
    environment: Vec<(String, String)>,
}

/// `config.json`, as far as it is about credentials (docker-login(1), containers-auth.json(5)).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    auths: HashMap<String, Auth>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
struct Auth {
    /// `user:password` in base64.
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    /// In the password's place (`identitytoken`).
    #[serde(default, rename = "identitytoken")]
    identity_token: Option<String>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").field("username", &self.username).finish_non_exhaustive()
    }
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Where a credential is.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Here(Credential),
    /// With the program `docker-credential-<helper>`, under this name.
    Helper {
        helper: String,
        name: String,
    },
}

impl RegistryAccess {
    #[must_use]
    pub fn new(repository: &Repository, user: User, environment: Vec<(String, String)>) -> Self {
        let registry = repository.registry.clone();
        let name = |host: &Host| match Url::parse(&host.http.url) {
            Ok(url) if host.mirror => authority(&url),
            _ => registry.clone(),
        };
        let hosts = repository.hosts.iter().map(|host| (host.http.url.clone(), name(host)));
        Self { hosts: hosts.collect(), registry, user, environment }
    }

    /// The registry's URL, as it may be shown.
    #[must_use]
    pub fn shown(&self) -> String {
        format!("oci://{}", self.registry)
    }

    /// The user's credential for the host at `url`, which is one of the registry's. `rejected` has just been refused.
    pub async fn credential(
        &self,
        url: &str,
        rejected: Option<&Credential>,
    ) -> Result<Option<Credential>, String> {
        let host = self.hosts.iter().find(|(theirs, _)| on_host(url, theirs).is_some());
        let Some((_, name)) = host else {
            return Err(format!("{url:?} is not the layer's registry"));
        };
        let look = async {
            for path in self.files() {
                let found =
                    self.read(&path).await.map_err(|e| format!("can't read {path}: {e}"))?;
                let Some(bytes) = found else { continue };
                let file: File = serde_json::from_slice(&bytes)
                    .map_err(|e| format!("can't make sense of {path}: {e}"))?;
                match file.find(name) {
                    Some(Found::Here(credential)) => return Ok(Some(credential)),
                    Some(Found::Helper { helper, name }) => {
                        if let Some(credential) = self.ask(&helper, &name).await? {
                            return Ok(Some(credential));
                        }
                    }
                    None => {}
                }
            }
            Ok::<_, String>(None)
        };
        let found = tokio::time::timeout(HELPER_PATIENCE, look).await;
        let found = found.map_err(|_| "the credential helper did not answer".to_owned())??;
        match (&found, rejected) {
            (Some(found), Some(rejected)) if found == rejected => {
                Err(format!("{name} does not take the password of {:?}", found.username))
            }
            _ => Ok(found),
        }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        let found = self.environment.iter().find(|(n, value)| n == name && !value.is_empty());
        found.map(|(_, value)| value.as_str())
    }

    /// Where the files are, the most important first.
    fn files(&self) -> Vec<String> {
        let home = self.variable("HOME").map(str::to_owned);
        let home = home.unwrap_or_else(|| self.user.home.display().to_string());
        let docker = match self.variable("DOCKER_CONFIG") {
            Some(directory) => directory.to_owned(),
            None => format!("{home}/.docker"),
        };
        let runtime = match self.variable("XDG_RUNTIME_DIR") {
            Some(directory) => directory.to_owned(),
            None => format!("/run/containers/{}", self.user.uid),
        };
        let mut files: Vec<_> =
            self.variable("REGISTRY_AUTH_FILE").map(str::to_owned).into_iter().collect();
        files.push(format!("{runtime}/containers/auth.json"));
        files.push(format!("{docker}/config.json"));
        files
    }

    fn command(&self, program: &str) -> io::Result<tokio::process::Command> {
        let variables: Vec<_> =
            self.environment.iter().map(|(n, v)| (n.into(), v.into())).collect();
        let root = OwnedFd::from(std::fs::File::open("/")?);
        let mut command = user::command(program, &self.user, &variables, root)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(command)
    }

    /// Reads a file as the user. A file that they can't read is none.
    async fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let mut command = self.command("head")?;
        command.args(["-c", &(MAX_FILE + 1).to_string(), "--", path]);
        let output = command.output().await?;
        if output.stdout.len() as u64 > MAX_FILE {
            return Err(io::Error::other("it is too long"));
        }
        Ok(output.status.success().then_some(output.stdout))
    }

    /// Asks a credential helper, as Docker does: the name on its standard input, JSON on its output.
    async fn ask(&self, helper: &str, name: &str) -> Result<Option<Credential>, String> {
        let program = format!("docker-credential-{helper}");
        let failed = |error: io::Error| format!("can't ask {program}: {error}");
        let mut command = self.command(&program).map_err(failed)?;
        let mut child = command.arg("get").stdin(Stdio::piped()).spawn().map_err(failed)?;
        if let Some(mut input) = child.stdin.take() {
            // one that does not want to know has said so otherwise
            input.write_all(name.as_bytes()).await.ok();
        }
        let mut answer = Vec::new();
        if let Some(output) = child.stdout.take() {
            output.take(MAX_FILE).read_to_end(&mut answer).await.map_err(failed)?;
        }
        if !child.wait().await.map_err(failed)?.success() {
            return Ok(None); // it has none
        }
        let helped: Helped = serde_json::from_slice(&answer)
            .map_err(|error| format!("can't make sense of what {program} says: {error}"))?;
        let Helped { username, secret: password } = helped;
        Ok((!password.is_empty()).then_some(Credential { username, password }))
    }
}

/// `host[:port]`, as people name a registry.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match (host, url.port()) {
        ("registry-1.docker.io", None) => "docker.io".into(),
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.into(),
    }
}

impl File {
    fn find(self, registry: &str) -> Option<Found> {
        let names = match registry {
            "docker.io" => vec![HUB_KEY.to_owned(), "docker.io".into(), "index.docker.io".into()],
            other => vec![other.to_owned(), format!("https://{other}"), format!("http://{other}")],
        };
        let helper = |helper: &String, name: &str| Found::Helper {
            helper: helper.clone(),
            name: name.to_owned(),
        };
        let is_name = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        for name in &names {
            if let Some(found) = self.cred_helpers.get(name).filter(|helper| is_name(helper)) {
                return Some(helper(found, name));
            }
        }
        for (name, auth) in &self.auths {
            let name = name.trim_end_matches('/');
            if names.iter().any(|n| n.trim_end_matches('/') == name)
                && let Some(credential) = auth.credential()
            {
                return Some(Found::Here(credential));
            }
        }
        let store = self.creds_store.as_ref().filter(|helper| is_name(helper))?;
        Some(helper(store, names.first()?))
    }
}

impl Auth {
    fn credential(&self) -> Option<Credential> {
        if let Some(token) = self.identity_token.as_ref().filter(|token| !token.is_empty()) {
            let username = IDENTITY_TOKEN.to_owned();
            return Some(Credential { username, password: token.clone() });
        }
        if let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) {
            let text = String::from_utf8(STANDARD.decode(auth).ok()?).ok()?;
            let (username, password) = text.split_once(':')?;
            let password = password.trim_end_matches('\0').to_owned();
            return Some(Credential { username: username.to_owned(), password });
        }
        let (username, password) = (self.username.clone()?, self.password.clone()?);
        Some(Credential { username, password })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(json: &str, registry: &str) -> Option<Found> {
        serde_json::from_str::<File>(json).unwrap().find(registry)
    }

    fn here(username: &str, password: &str) -> Option<Found> {
        let (username, password) = (username.to_owned(), password.to_owned());
        Some(Found::Here(Credential { username, password }))
    }

    #[test]
    fn credentials_are_found_by_the_registrys_name() {
        // a:b, and me:p:w
        let json = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"},
            "h.io:5000": {"auth": "bWU6cDp3"}, "x.io": {}, "https://y.io/": {"username": "u", "password": "p"},
            "token.io": {"auth": "YTpi", "identitytoken": "t"}}}"#;
        assert_eq!(find(json, "docker.io"), here("a", "b"));
        assert_eq!(find(json, "h.io:5000"), here("me", "p:w"));
        assert_eq!(find(json, "y.io"), here("u", "p"));
        assert_eq!(find(json, "token.io"), here("<token>", "t"));
        for none in ["h.io", "x.io", "z.io"] {
            assert_eq!(find(json, none), None, "{none}");
        }
    }

    #[test]
    fn helpers() {
        let json =
            r#"{"credsStore": "desktop", "credHelpers": {"gcr.io": "gcloud", "e.io": "../x"}}"#;
        let helper = |helper: &str, name: &str| {
            Some(Found::Helper { helper: helper.into(), name: name.into() })
        };
        assert_eq!(find(json, "gcr.io"), helper("gcloud", "gcr.io"));
        assert_eq!(find(json, "docker.io"), helper("desktop", HUB_KEY));
        assert_eq!(find(json, "e.io"), helper("desktop", "e.io"), "not a program elsewhere");
        assert_eq!(find("{}", "e.io"), None);
    }
}
