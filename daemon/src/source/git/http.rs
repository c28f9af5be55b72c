//! Smart HTTP (gitprotocol-http(5)) in version 2: one POST a command, on connections that are kept.

mod answer;
mod auth;
mod clients;
mod tls;

use std::io::{Read, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, LOCATION, USER_AGENT,
};
use reqwest::{Client, Method, NoProxy, Proxy, Response, StatusCode, Url, redirect};

pub use self::answer::{broken, check_status, shown};
use self::auth::{Auth, Ticket};
pub use self::auth::{Credentials, Origin};
pub use self::clients::Clients;
pub use self::tls::load_system_roots;
use super::capabilities::Capabilities;
use super::transport::{Body, Command, Reply, check_hash, stalled};
use super::{refused, retry, wrong};
use crate::object::HashKind;
use crate::queue::wire::HttpTransport;
use crate::source::FetchError;

/// How we name ourselves to HTTP servers. Some talk the protocol only to names that begin like this.
const AGENT: &str = concat!("git/2.47.0 hydrant/", env!("CARGO_PKG_VERSION"));

/// Requests longer than this are sent compressed; git's own client has the same limit.
const GZIP_FROM: usize = 1024;

/// Requests longer than this are compressed by another thread.
const GZIP_ASIDE: usize = 64 << 10;

/// As many redirects as git follows.
const REDIRECTS: usize = 20;

/// How long opening a connection may take.
const CONNECT: Duration = Duration::from_secs(15);

/// One repository at an HTTP server.
#[derive(Debug)]
pub struct Http {
    client: Client,
    home: Url,
    extra: HeaderMap,
    auth: Auth,
    stall: Duration,
    session: Mutex<Option<Arc<Session>>>,
    /// Whoever holds it asks for the capabilities; the others wait for what comes of it.
    asking: tokio::sync::Mutex<()>,
    /// Told what the first request found out, where it did not lead elsewhere.
    tell: OnceLock<Tell>,
}

/// See [`Http::introduce`].
struct Tell(Box<dyn Fn(&Capabilities) + Send + Sync>);

impl std::fmt::Debug for Tell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tell")
    }
}

/// What the first request found out.
#[derive(Debug)]
pub struct Session {
    /// Where the repository is, after redirects.
    base: Url,
    pub capabilities: Arc<Capabilities>,
}

/// One request, before it knows by whom and where to.
struct Request<'a> {
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Option<Bytes>,
    follow: bool,
    /// Whose credentials to use, and the URL to ask for them with.
    identity: Option<(&'a Origin, &'a str)>,
}

impl Http {
    pub fn new(
        settings: HttpTransport,
        stall: Duration,
        connections: usize,
        credentials: Arc<dyn Credentials>,
    ) -> Result<Self, FetchError> {
        let home = parse_base(&settings.url)?;
        let client = client(&settings, stall, connections)?;
        let mut extra = HeaderMap::new();
        for line in &settings.extra_headers {
            if line.is_empty() {
                // as git reads it: forget those before
                extra.clear();
                continue;
            }
            let (name, value) = header(line)?;
            extra.append(name, value);
        }
        let agent = settings.user_agent.as_deref().unwrap_or(AGENT);
        let agent = HeaderValue::try_from(agent)
            .map_err(|_| refused("http.userAgent can't be put in a header"))?;
        // after the extra headers, of which one may be another's
        extra.entry(USER_AGENT).or_insert(agent);
        let auth = Auth::new(credentials, Origin::from(&home), settings.credential);
        Ok(Self {
            client,
            home,
            extra,
            auth,
            stall,
            session: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
            tell: OnceLock::new(),
        })
    }

    /// What another process has found out about the server, if it has: then nobody asks before it turns out to
    /// be wrong. `tell` is told what we find out, for the next process.
    pub fn introduce(
        &self,
        known: Option<Capabilities>,
        tell: impl Fn(&Capabilities) + Send + Sync + 'static,
    ) {
        let session = known.map(|capabilities| {
            Arc::new(Session { base: self.home.clone(), capabilities: Arc::new(capabilities) })
        });
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
        self.tell.set(Tell(Box::new(tell))).ok();
    }

    pub fn home(&self) -> &Url {
        &self.home
    }

    /// Where the repository is and what its server can do; asks unless that is known.
    pub async fn session(&self) -> Result<Arc<Session>, FetchError> {
        if let Some(session) = self.known() {
            return Ok(session);
        }
        let _asking = self.asking.lock().await;
        if let Some(session) = self.known() {
            return Ok(session);
        }
        let session = Arc::new(self.discover().await?);
        if let Some(Tell(tell)) = self.tell.get()
            && session.base == self.home
        {
            tell(&session.capabilities);
        }
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        Ok(session)
    }

    fn known(&self) -> Option<Arc<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is known may be wrong: the next request asks anew.
    pub fn forget(&self) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// `GET <repository>/info/refs?service=git-upload-pack`. The only request whose redirects are
    /// followed (`http.followRedirects=initial`): the repository is then where it led to.
    async fn discover(&self) -> Result<Session, FetchError> {
        let mut url = self.home.clone();
        url.set_path(&inside(&self.home, "info/refs"));
        url.query_pairs_mut().append_pair("service", "git-upload-pack");
        let query = url.query().map(str::to_owned);
        let headers = HeaderMap::from_iter([
            (HeaderName::from_static("git-protocol"), HeaderValue::from_static("version=2")),
            (ACCEPT, HeaderValue::from_static("*/*")),
        ]);
        let method = Method::GET;
        let request = Request { method, url, headers, body: None, follow: true, identity: None };
        let (url, response) = self.send(request, &mut 0).await?;
        let mut base = url.clone();
        match url.path().strip_suffix("/info/refs") {
            Some(path) if url.query() == query.as_deref() => base.set_path(path),
            _ => {
                let (from, to) = (shown(&self.home), shown(&url));
                return Err(refused(format!(
                    "{from} redirects to {to}, which is no git repository"
                )));
            }
        }
        base.set_query(self.home.query());
        let kind = content_type(&response);
        if kind == "text/html" {
            let at = shown(&base);
            return Err(refused(format!("{at} answers with a web page, not as a git server")));
        }
        if kind != "application/x-git-upload-pack-advertisement" {
            return Err(super::capabilities::NotVersion2::Dumb.of(&shown(&base)));
        }
        let mut reply = Reply::new(Body::Http(Box::new(response)), self.stall);
        let capabilities = Arc::new(reply.advertisement(&shown(&base)).await?);
        Ok(Session { base, capabilities })
    }

    pub async fn command(
        &self,
        hash: HashKind,
        command: &Command,
        sent: &mut u64,
    ) -> Result<Reply, FetchError> {
        let session = self.session().await?;
        check_hash(hash, &session.capabilities)?;
        let body = command.encode(hash, &session.capabilities);
        let mut url = session.base.clone();
        url.set_path(&inside(&session.base, "git-upload-pack"));
        let mut headers = HeaderMap::from_iter([
            (HeaderName::from_static("git-protocol"), HeaderValue::from_static("version=2")),
            (CONTENT_TYPE, HeaderValue::from_static("application/x-git-upload-pack-request")),
            (ACCEPT, HeaderValue::from_static("application/x-git-upload-pack-result")),
        ]);
        let body = if body.len() > GZIP_FROM {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            gzip(body).await?
        } else {
            body
        };
        let method = Method::POST;
        let request =
            Request { method, url, headers, body: Some(body), follow: false, identity: None };
        let (url, response) = match self.send(request, sent).await {
            Err(e @ FetchError::Refused { .. }) => {
                // it may have moved: the next try asks where it is
                self.forget();
                return Err(e);
            }
            other => other?,
        };
        if content_type(&response) != "application/x-git-upload-pack-result" {
            self.forget();
            let kind = content_type(&response);
            return Err(wrong(format!("{} answers with {kind:?}, not as git does", shown(&url))));
        }
        Ok(Reply::new(Body::Http(Box::new(response)), self.stall))
    }

    /// Gets a whole document of at most `limit` bytes from a forge's API.
    pub async fn get(&self, url: Url, limit: usize) -> Result<Bytes, FetchError> {
        let headers = HeaderMap::from_iter([
            (ACCEPT, HeaderValue::from_static("application/json")),
            (ACCEPT_ENCODING, HeaderValue::from_static("gzip")),
        ]);
        let home = (Origin::from(&self.home), shown(&self.home));
        // GitHub's API has a host of its own, and takes the same credentials
        let theirs = home.0 == Origin::from(&url)
            || url.scheme() == "https"
                && url.host_str() == Some("api.github.com")
                && self.home.scheme() == "https"
                && self.home.host_str() == Some("github.com");
        let identity = theirs.then_some((&home.0, home.1.as_str()));
        let request =
            Request { method: Method::GET, url, headers, body: None, follow: true, identity };
        let (url, mut response) = self.send(request, &mut 0).await?;
        let zipped = response.headers().get(CONTENT_ENCODING).is_some_and(|e| e == "gzip");
        let too_long = || refused(format!("{} sends more than {limit} bytes", shown(&url)));
        let mut body = Vec::new();
        loop {
            match tokio::time::timeout(self.stall, response.chunk()).await {
                Ok(Ok(Some(bytes))) if body.len() + bytes.len() <= limit => {
                    body.extend_from_slice(&bytes);
                }
                Ok(Ok(Some(_))) => return Err(too_long()),
                Ok(Ok(None)) => break,
                Ok(Err(e)) => return Err(broken("the answer broke off", &e)),
                Err(_) => return Err(stalled(self.stall)),
            }
        }
        if !zipped {
            return Ok(body.into());
        }
        let mut plain = Vec::new();
        GzDecoder::new(&body[..])
            .take(limit as u64 + 1)
            .read_to_end(&mut plain)
            .map_err(|e| wrong(format!("{} can't be unzipped: {e}", shown(&url))))?;
        if plain.len() > limit { Err(too_long()) } else { Ok(plain.into()) }
    }

    /// Sends a request, with credentials when they are asked for. A status of 2xx, or an error.
    /// Counts the bytes of each body in `sent`.
    async fn send(
        &self,
        mut request: Request<'_>,
        sent: &mut u64,
    ) -> Result<(Url, Response), FetchError> {
        let mut redirects = 0;
        let mut named_rejected = false;
        loop {
            let origin = Origin::from(&request.url);
            let base = repository(&request.url);
            let (whose, name) = request.identity.unwrap_or((&origin, &base));
            let ticket = self.auth.ticket(whose).await;
            let response = self.once(&request, &origin, &ticket, sent).await?;
            if response.status() == StatusCode::UNAUTHORIZED {
                if named_rejected {
                    return Err(self.auth.give_up(whose, name, &ticket).await);
                }
                named_rejected = ticket.credential.is_some();
                self.auth.renew(whose, name, &ticket).await?;
                continue;
            }
            if response.status().is_redirection() {
                redirects += 1;
                let next = redirected(&request.url, &response)?;
                if !request.follow {
                    let (from, to) = (shown(&request.url), shown(&next));
                    self.forget();
                    return Err(retry(format!("{from} redirects to {to} now")));
                }
                if redirects > REDIRECTS {
                    return Err(refused(format!("{} redirects for ever", shown(&self.home))));
                }
                if Origin::from(&next) != origin {
                    request.identity = None;
                }
                request.url = next;
                named_rejected = false;
                continue;
            }
            return Ok((request.url, check_status(response)?));
        }
    }

    async fn once(
        &self,
        request: &Request<'_>,
        origin: &Origin,
        ticket: &Ticket,
        sent: &mut u64,
    ) -> Result<Response, FetchError> {
        let mut headers = request.headers.clone();
        if *origin == Origin::from(&self.home) {
            // extra headers may hold secrets, and not only in Authorization
            headers.extend(self.extra.clone());
        } else if let Some(agent) = self.extra.get(USER_AGENT) {
            headers.insert(USER_AGENT, agent.clone());
        }
        if let Some(value) = ticket.header() {
            headers.insert(AUTHORIZATION, value);
        }
        let mut message =
            self.client.request(request.method.clone(), request.url.clone()).headers(headers);
        if let Some(body) = &request.body {
            message = message.body(body.clone());
        }
        let body = request.body.as_ref().map_or(0, |body| body.len() as u64);
        let again = message.try_clone();
        let mut result = tokio::time::timeout(self.stall, message.send()).await;
        if !matches!(&result, Ok(Err(error)) if error.is_connect()) {
            *sent += body;
        }
        if let (Ok(Err(e)), Some(again)) = (&result, again)
            && !e.is_connect()
            && !e.is_timeout()
        {
            // A connection that was kept, and that the server closed just now. Asking twice is harmless.
            result = tokio::time::timeout(self.stall, again.send()).await;
            *sent += body;
        }
        match result {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(broken(&format!("can't reach {}", shown(&request.url)), &e)),
            Err(_) => Err(stalled(self.stall)),
        }
    }
}

/// A client as the user's settings want it, which follows no redirects by itself.
pub fn client(
    settings: &HttpTransport,
    stall: Duration,
    connections: usize,
) -> Result<Client, FetchError> {
    let tls = tls::config(
        settings.ca_pem.as_deref(),
        settings.client_certificate.as_deref(),
        settings.insecure,
    );
    let tls = tls.map_err(refused)?;
    let mut client = Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT.min(stall))
        .pool_max_idle_per_host(connections)
        // before most servers close an idle connection
        .pool_idle_timeout(Duration::from_secs(55))
        .tcp_nodelay(true)
        .tcp_keepalive(Duration::from_secs(30))
        // a batch must not hold up the blob that somebody waits for on the same connection
        .http2_initial_stream_window_size(1 << 20)
        .http2_initial_connection_window_size(16 << 20)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .referer(false);
    client = match settings.proxy.as_deref() {
        None => client,
        Some("") => client.no_proxy(),
        Some(proxy) => {
            let proxy = Proxy::all(proxy)
                .map_err(|e| refused(format!("http.proxy {proxy:?} can't be used: {e}")))?;
            client.proxy(proxy.no_proxy(NoProxy::from_env()))
        }
    };
    client.build().map_err(|e| refused(format!("HTTP can't be used: {e}")))
}

/// A repository's URL, without what we take from elsewhere and without a slash at the end.
fn parse_base(url: &str) -> Result<Url, FetchError> {
    let unusable = |why: &str| refused(format!("the origin's URL can't be used: {why}"));
    let mut base = Url::parse(url).map_err(|e| unusable(&e.to_string()))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(unusable("it is not http or https"));
    }
    base.set_fragment(None);
    base.set_username("").and_then(|()| base.set_password(None)).map_err(|()| unusable("user"))?;
    let path = base.path().trim_end_matches('/').to_owned();
    base.set_path(&path);
    Ok(base)
}

/// The path of something in the repository.
fn inside(base: &Url, name: &str) -> String {
    format!("{}/{name}", base.path().trim_end_matches('/'))
}

/// Where a redirect leads: not from TLS to plain text.
pub fn redirected(from: &Url, response: &Response) -> Result<Url, FetchError> {
    let at = shown(from);
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let location =
        location.ok_or_else(|| refused(format!("{at} answers {}", response.status())))?;
    let mut next =
        from.join(location).map_err(|e| refused(format!("{at} redirects to {location:?}: {e}")))?;
    let to = shown(&next);
    match (from.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => {
            return Err(refused(format!("{at} redirects to {to}, which is not encrypted")));
        }
        _ => return Err(refused(format!("{at} redirects to {to}"))),
    }
    next.set_fragment(None);
    // a user name in it would be one that the server chose
    let _ = next.set_username("");
    let _ = next.set_password(None);
    Ok(next)
}

/// The repository's URL, of a URL in it: what credentials are asked for with.
fn repository(url: &Url) -> String {
    let mut base = url.clone();
    let path = url.path();
    let path = ["/info/refs", "/git-upload-pack"].iter().find_map(|end| path.strip_suffix(end));
    if let Some(path) = path {
        base.set_path(path);
    }
    shown(&base)
}

fn header(line: &str) -> Result<(HeaderName, HeaderValue), FetchError> {
    // The value may be a secret: it is not shown.
    let unusable = |name: &str| refused(format!("http.extraHeader {name:?} can't be used"));
    let (name, value) = line.split_once(':').ok_or_else(|| unusable("without a colon"))?;
    let mut value = HeaderValue::try_from(value.trim()).map_err(|_| unusable(name))?;
    value.set_sensitive(true);
    Ok((HeaderName::try_from(name.trim()).map_err(|_| unusable(name))?, value))
}

fn content_type(response: &Response) -> String {
    let value = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Compresses a request; a long one beside what else there is to do.
async fn gzip(bytes: Bytes) -> Result<Bytes, FetchError> {
    let long = bytes.len() > GZIP_ASIDE;
    let compress = move || {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&bytes).and_then(|()| encoder.finish()).map(Bytes::from)
    };
    let zipped = match long {
        true => tokio::task::spawn_blocking(compress).await.map_err(std::io::Error::other),
        false => Ok(compress()),
    };
    zipped.and_then(|zipped| zipped).map_err(FetchError::Sink)
}
