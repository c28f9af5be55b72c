//! An HTTP server with the real `git http-backend` behind it, and faults in front.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, Response, StatusCode};
use axum::serve::{Listener, ListenerExt};
use futures_util::stream::{self, StreamExt};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::repo::git;

/// What is done to one request instead of answering it.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This request is answered as it should be.
    None,
    Status(u16, Vec<(&'static str, String)>),
    /// The connection breaks after so many bytes of the body.
    Truncate(usize),
    /// The end of the body comes a little later than the body.
    LateEnd,
    /// Nothing more comes after so many bytes of the body.
    Stall(usize),
    /// A byte of the body is another: so many before its end.
    Corrupt(usize),
    /// The answer as if `Git-Protocol` had got lost on the way.
    OldProtocol,
    /// This body instead.
    Body(&'static str, Vec<u8>),
}

/// A request that came in.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub query: String,
    pub headers: HeaderMap,
    pub body_len: usize,
    pub http2: bool,
}

type Handler = dyn Fn(&Seen) -> Option<Response<Body>> + Send + Sync;

#[derive(Clone)]
struct Shared {
    root: PathBuf,
    posts: Arc<Mutex<VecDeque<Fault>>>,
    gets: Arc<Mutex<VecDeque<Fault>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// The header `Authorization` that is needed.
    authorization: Arc<Mutex<Option<String>>>,
    handler: Arc<Mutex<Option<Box<Handler>>>>,
}

pub struct Server {
    pub address: SocketAddr,
    shared: Shared,
    scheme: &'static str,
    /// Connections that were opened, without TLS.
    pub connections: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Serves the repositories below `root`.
    pub async fn new(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<AtomicUsize>::default();
        let counter = connections.clone();
        let listener = listener.tap_io(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let mut server = Self::start(root, "http", address, listener);
        server.connections = connections;
        server
    }

    pub async fn with_tls(root: &Path) -> Self {
        Self::with_tls_for(root, None).await
    }

    /// With `client`: only for whoever has this certificate.
    pub async fn with_tls_for(root: &Path, client: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let certificate = CertificateDer::from_pem_slice(include_bytes!("tls/server.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("tls/server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = match client {
            None => config.with_no_client_auth(),
            Some(client) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(client.as_bytes()).unwrap()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                config.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let mut config = config.with_single_cert(vec![certificate], key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let address = listener.local_addr().unwrap();
        let listener = TlsListener { listener, acceptor: TlsAcceptor::from(Arc::new(config)) };
        Self::start(root, "https", address, listener)
    }

    fn start<L: Listener<Addr = SocketAddr>>(
        root: &Path,
        scheme: &'static str,
        address: SocketAddr,
        listener: L,
    ) -> Self {
        let shared = Shared {
            root: root.to_owned(),
            posts: Arc::default(),
            gets: Arc::default(),
            seen: Arc::default(),
            authorization: Arc::default(),
            handler: Arc::default(),
        };
        let app = axum::Router::new().fallback(answer).with_state(shared.clone());
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, shared, scheme, connections: Arc::default(), task }
    }

    pub fn url(&self) -> String {
        format!("{}://localhost:{}/repo.git", self.scheme, self.address.port())
    }

    /// The faults of the next POSTs.
    pub fn posts(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.posts.lock().unwrap().extend(faults);
    }

    pub fn gets(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.gets.lock().unwrap().extend(faults);
    }

    pub fn needs(&self, authorization: Option<&str>) {
        *self.shared.authorization.lock().unwrap() = authorization.map(str::to_owned);
    }

    /// Asked first about every request.
    pub fn handle(&self, f: impl Fn(&Seen) -> Option<Response<Body>> + Send + Sync + 'static) {
        *self.shared.handler.lock().unwrap() = Some(Box::new(f));
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    pub fn count(&self, method: Method) -> usize {
        self.seen().iter().filter(|seen| seen.method == method).count()
    }
}

struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, address) = self.listener.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

async fn answer(State(shared): State<Shared>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap();
    let seen = Seen {
        method: parts.method.clone(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers.clone(),
        body_len: body.len(),
        http2: parts.version == axum::http::Version::HTTP_2,
    };
    shared.seen.lock().unwrap().push(seen.clone());
    if let Some(needed) = &*shared.authorization.lock().unwrap()
        && parts.headers.get("authorization").is_none_or(|given| given != needed)
    {
        let response = Response::builder().status(401).header("WWW-Authenticate", "Basic realm=x");
        return response.body(Body::empty()).unwrap();
    }
    if let Some(handler) = &*shared.handler.lock().unwrap()
        && let Some(response) = handler(&seen)
    {
        return response;
    }
    let faults = if parts.method == Method::POST { &shared.posts } else { &shared.gets };
    let fault = faults.lock().unwrap().pop_front().unwrap_or(Fault::None);
    match &fault {
        Fault::Status(status, headers) => {
            let mut response = Response::builder().status(*status);
            for (name, value) in headers {
                response = response.header(*name, value);
            }
            return response.body(Body::from("no")).unwrap();
        }
        Fault::Body(kind, body) => {
            return Response::builder()
                .header("content-type", *kind)
                .body(Body::from(body.clone()))
                .unwrap();
        }
        _ => {}
    }
    let old = matches!(fault, Fault::OldProtocol);
    let (status, headers, mut body) = backend(&shared.root, &seen, old, body).await;
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, value);
    }
    let body = match fault {
        Fault::Truncate(n) => {
            let part = Bytes::copy_from_slice(&body[..n.min(body.len())]);
            let broken = stream::iter([Ok(part), Err(std::io::Error::other("broken"))]);
            // in two polls, so that the part really gets out
            Body::from_stream(broken.then(|part| async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                part
            }))
        }
        Fault::Stall(n) => {
            let part = Bytes::copy_from_slice(&body[..n.min(body.len())]);
            let part = stream::iter([Ok::<_, Infallible>(part)]);
            Body::from_stream(part.chain(stream::pending()))
        }
        Fault::LateEnd => {
            let end = stream::once(async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                Bytes::new()
            });
            let body = stream::iter([Bytes::from(body)]);
            Body::from_stream(body.chain(end).map(Ok::<_, Infallible>))
        }
        Fault::Corrupt(back) => {
            let at = body.len() - back;
            body[at] ^= 0x55;
            Body::from(body)
        }
        _ => Body::from(body),
    };
    response.body(body).unwrap()
}

/// Runs `git http-backend` as a web server does (RFC 3875).
async fn backend(
    root: &Path,
    seen: &Seen,
    old: bool,
    body: Bytes,
) -> (StatusCode, Vec<(String, String)>, Vec<u8>) {
    let header = |name: &str| {
        seen.headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
    };
    let mut command = tokio::process::Command::from(git(root));
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", seen.method.as_str())
        .env("PATH_INFO", &seen.path)
        .env("QUERY_STRING", &seen.query)
        .env("CONTENT_TYPE", header("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("REMOTE_ADDR", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if !old {
        command.env("GIT_PROTOCOL", header("git-protocol"));
    }
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let write = async move {
        let _ = stdin.write_all(&body).await;
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), write);
    let output = output.unwrap().stdout;
    let end = output.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let mut status = StatusCode::OK;
    let mut headers = Vec::new();
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        let (name, value) = line.split_once(": ").unwrap();
        if name == "Status" {
            status = StatusCode::from_bytes(&value.as_bytes()[..3]).unwrap();
        } else {
            headers.push((name.to_owned(), value.to_owned()));
        }
    }
    (status, headers, output[end + 4..].to_vec())
}
