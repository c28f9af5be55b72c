//! Where the images of a registry are asked for: at its mirrors and itself, as administrators have configured it for
//! containerd (its `docs/hosts.md`) or Docker.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use thiserror::Error;
use toml::Spanned;
use url::Url;

use crate::queue::wire::image::Host;
use crate::queue::wire::{ClientCertificate, HttpTransport};
use crate::source::oci::reference::Reference;

/// Where there is a directory for each registry: containerd's, unless another one is configured, and Docker's.
const CONTAINERD: &str = "/etc/containerd/certs.d";
const DOCKER: &str = "/etc/docker/certs.d";

/// The directory for registries that have none of their own.
const DEFAULT: &str = "_default";

const FILE: &str = "hosts.toml";

/// All certificates and headers of a registry's hosts have at most so many bytes: they go into one message.
const MAX_SETTINGS: usize = 512 << 10;

/// Why it is not known where to ask.
#[derive(Debug, Error)]
pub enum HostsError {
    #[error("can't read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("can't make sense of {}: {source}", .path.display())]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("in {}: {what}", .path.display())]
    Value { path: PathBuf, what: String },
    #[error("there is no certificate in {}", .path.display())]
    NoCertificate { path: PathBuf },
    #[error("the settings in {} are too long", .path.display())]
    TooLong { path: PathBuf },
}

/// How registries are to be reached, in Hydrant's own configuration.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    pub directory: Option<&'a Path>,
    /// `host:port`
    pub insecure: &'a [String],
}

/// What `hosts.toml` says of one host. What it says besides is for pushing.
#[derive(Debug, Default, Deserialize)]
struct Table {
    #[serde(default)]
    capabilities: Vec<String>,
    ca: Option<Many<PathBuf>>,
    client: Option<Many<Pair>>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<String, Many<String>>,
    #[serde(default)]
    override_path: bool,
}

/// The whole of it. The settings of the server itself, which is the last to be asked, are a [`Table`] beside.
#[derive(Debug, Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, Table>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Many<T> {
    // first: two names are two files, not a pair
    Several(Vec<T>),
    One(T),
}

/// A certificate and its key, in a file or two.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Pair {
    Together(PathBuf),
    Apart(PathBuf, PathBuf),
}

impl<T> Many<T> {
    fn list(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Several(several) => several,
        }
    }
}

/// The registry itself, with nothing but Hydrant's own settings.
pub fn itself(settings: Settings<'_>, reference: &Reference) -> Host {
    let plain = reference.is_loopback() || settings.insecure.contains(&reference.registry);
    let scheme = if plain { "http" } else { "https" };
    let url = format!("{scheme}://{}/v2/", reference.host());
    let http = HttpTransport { url, ..HttpTransport::default() };
    Host { http, mirror: false, resolves: true, pulls: true }
}

/// The hosts that may be asked for images of the registry, in order.
pub fn of(settings: Settings<'_>, reference: &Reference) -> Result<Vec<Host>, HostsError> {
    let mut itself = itself(settings, reference);
    let roots = [settings.directory.unwrap_or(Path::new(CONTAINERD)), Path::new(DOCKER)];
    let registry = &reference.registry;
    let Some(directory) = roots.iter().find_map(|root| directory_of(root, registry)) else {
        return Ok(vec![itself]);
    };
    let path = directory.join(FILE);
    let hosts = match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text, &directory, itself)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            add_certificates(&directory, &mut itself.http)?;
            vec![itself]
        }
        Err(source) => return Err(HostsError::Read { path, source }),
    };
    match hosts.iter().map(|host| length(&host.http)).sum::<usize>() {
        0..=MAX_SETTINGS => Ok(hosts),
        _ => Err(HostsError::TooLong { path }),
    }
}

fn directory_of(root: &Path, registry: &str) -> Option<PathBuf> {
    // names can't have colons on all systems
    let port = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = port.iter().map(String::as_str).chain([registry, DEFAULT]);
    names.map(|name| root.join(name)).find(|directory| directory.is_dir())
}

fn length(http: &HttpTransport) -> usize {
    let client = http.client_certificate.as_ref();
    let client = client.map_or(0, |client| client.certificate.len() + client.key.len());
    let headers: usize = http.extra_headers.iter().map(String::len).sum();
    http.url.len() + http.ca_pem.as_ref().map_or(0, String::len) + client + headers
}

/// What `hosts.toml` in `directory` says.
fn parse(text: &str, directory: &Path, itself: Host) -> Result<Vec<Host>, HostsError> {
    let path = directory.join(FILE);
    let wrong = |source| HostsError::Parse { path: path.clone(), source };
    let file: File = toml::from_str(text).map_err(wrong)?;
    let own: Table = toml::from_str(text).map_err(wrong)?;
    let registry = Url::parse(&itself.http.url).ok();
    let is_itself = |url: &Url| {
        registry.as_ref().is_some_and(|registry| {
            (registry.host(), registry.port_or_known_default())
                == (url.host(), url.port_or_known_default())
        })
    };
    let mut tables: Vec<_> = file.host.into_iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    let tables = tables.into_iter().map(|(name, table)| (Some(name.into_inner()), table));
    let mut hosts = Vec::new();
    for (server, table) in tables.chain([(file.server, own)]) {
        let value = |what| HostsError::Value { path: path.clone(), what };
        let can = |what: &str| {
            let capabilities = &table.capabilities;
            capabilities.is_empty() || capabilities.iter().any(|c| c.eq_ignore_ascii_case(what))
        };
        let (resolves, pulls) = (can("resolve"), can("pull"));
        let (url, mirror) = match server {
            None => (itself.http.url.clone(), false),
            Some(server) => {
                let url = api(&server, table.override_path)
                    .map_err(|e| value(format!("{server:?} can't be asked: {e}")))?;
                let mirror = !is_itself(&url);
                (url.into(), mirror)
            }
        };
        if !resolves && !pulls {
            continue;
        }
        let mut http =
            HttpTransport { url, insecure: table.skip_verify, ..HttpTransport::default() };
        let ca = table.ca.map(Many::list).unwrap_or_default();
        let ca = ca.iter().map(|file| certificates(&directory.join(file)));
        http.ca_pem = joined(ca.collect::<Result<_, _>>()?);
        // which of several fits is not known before the server has asked
        let client = table.client.map(Many::list).unwrap_or_default().into_iter().next();
        http.client_certificate =
            client.map(|pair| client_certificate(directory, pair)).transpose()?;
        for (name, values) in table.header {
            http.extra_headers.extend(values.list().into_iter().map(|v| format!("{name}: {v}")));
        }
        hosts.push(Host { http, mirror, resolves, pulls });
    }
    Ok(hosts)
}

/// The URL of a host's API.
fn api(server: &str, override_path: bool) -> Result<Url, url::ParseError> {
    let mut url = match server.contains("://") {
        true => Url::parse(server)?,
        false => Url::parse(&format!("https://{server}"))?,
    };
    let path = url.path().trim_end_matches('/');
    let path = match override_path || path.ends_with("/v2") {
        true => format!("{path}/"),
        false => format!("{path}/v2/"),
    };
    url.set_path(&path);
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

/// Docker's way: certificates to trust are `*.crt`, one to show is `NAME.cert` with `NAME.key`.
fn add_certificates(directory: &Path, http: &mut HttpTransport) -> Result<(), HostsError> {
    let failed = |source| HostsError::Read { path: directory.to_owned(), source };
    let entries = std::fs::read_dir(directory).map_err(failed)?;
    let files = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut files = files.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    files.sort();
    let ending = |end: &'static str| {
        files.iter().filter(move |file| file.extension().is_some_and(|found| found == end))
    };
    let ca = ending("crt").map(|file| certificates(file));
    http.ca_pem = joined(ca.collect::<Result<_, _>>()?);
    if let Some(file) = ending("cert").next() {
        let pair = Pair::Apart(file.clone(), file.with_extension("key"));
        http.client_certificate = Some(client_certificate(directory, pair)?);
    }
    Ok(())
}

fn joined(texts: Vec<String>) -> Option<String> {
    (!texts.is_empty()).then(|| texts.join("\n"))
}

fn read(path: &Path) -> Result<String, HostsError> {
    std::fs::read_to_string(path)
        .map_err(|source| HostsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<String, HostsError> {
    let pem = read(path)?;
    match CertificateDer::pem_slice_iter(pem.as_bytes()).any(|certificate| certificate.is_ok()) {
        true => Ok(pem),
        false => Err(HostsError::NoCertificate { path: path.to_owned() }),
    }
}

fn client_certificate(directory: &Path, pair: Pair) -> Result<Box<ClientCertificate>, HostsError> {
    let (certificate, key) = match &pair {
        Pair::Together(file) => (file, file),
        Pair::Apart(certificate, key) => (certificate, key),
    };
    let certificate = certificates(&directory.join(certificate))?;
    Ok(Box::new(ClientCertificate { certificate, key: read(&directory.join(key))? }))
}

#[cfg(test)]
mod tests;
