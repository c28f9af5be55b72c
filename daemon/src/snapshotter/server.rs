//! gRPC over the socket.

use std::fs::Permissions;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::Response;
use axum::routing::post;
use axum::serve::IncomingStream;
use fs_err as fs;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use nix::sys::socket::{getsockopt, sockopt};
use prost::Message;
use tokio::net::UnixListener;
use tonic::Status;
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic_prost::ProstCodec;
use tracing::{debug, warn};

use super::filter::Filter;
use super::messages::{
    CleanupRequest, CommitRequest, CreateRequest, Empty, Info, InfoResponse, KeyRequest, Kind,
    ListRequest, ListResponse, MountsResponse, UpdateRequest, UsageResponse,
};
use super::{Error, Snapshotter};

/// What the paths of all methods begin with.
pub const METHODS: &str = "/containerd.services.snapshots.v1.Snapshots/";

/// So many snapshots are in a message of `List`: a message has at most 4 MiB.
const BATCH: usize = 100;

/// The socket, listening.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
}

impl Socket {
    /// Listens at `path`, which only root can connect to. A socket that is there is a dead daemon's. To be called inside
    /// a tokio runtime.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => return Err(io::Error::other("it is in the way: not a socket")),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) => {}
        }
        // who connects is asked who they are, whatever the mode was for a moment
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(Self { listener })
    }

    /// One that somebody has listened on for us, at `path`. To be called inside a tokio runtime.
    pub fn passed(fd: OwnedFd, path: &Path) -> io::Result<Self> {
        let listener = std::os::unix::net::UnixListener::from(fd);
        let there = || fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        if listener.local_addr()?.as_pathname() != Some(path) || !there() {
            return Err(io::Error::other("a socket of another place was passed"));
        }
        if !getsockopt(&listener, sockopt::AcceptConn)? {
            return Err(io::Error::other("a socket was passed that does not listen"));
        }
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)? })
    }

    /// Another fd of it, to be passed on.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }
}

/// Whether the peer is root.
#[derive(Debug, Clone, Copy)]
struct Peer {
    root: bool,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let peer = stream.io().peer_cred();
        let root = peer.as_ref().is_ok_and(|peer| peer.uid() == 0);
        if !root {
            warn!(?peer, "only root may use the snapshotter's socket");
        }
        Self { root }
    }
}

/// Serves until `shutdown` is done and the requests in hand are answered.
pub async fn serve<S: Snapshotter>(
    socket: Socket,
    service: Arc<S>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = router(service).into_make_service_with_connect_info::<Peer>();
    axum::serve(socket.listener, routes).with_graceful_shutdown(shutdown).await
}

fn router<S: Snapshotter>(service: Arc<S>) -> Router {
    let path = |method: &str| format!("{METHODS}{method}");
    Router::new()
        .route(&path("Prepare"), unary(|s: Arc<S>, r| create(s, Kind::Active, r)))
        .route(&path("View"), unary(|s: Arc<S>, r| create(s, Kind::View, r)))
        .route(&path("Mounts"), unary(mounts::<S>))
        .route(&path("Commit"), unary(commit::<S>))
        .route(&path("Remove"), unary(remove::<S>))
        .route(&path("Stat"), unary(stat::<S>))
        .route(&path("Update"), unary(update::<S>))
        .route(&path("List"), post(list::<S>))
        .route(&path("Usage"), unary(usage::<S>))
        .route(&path("Cleanup"), unary(cleanup::<S>))
        .fallback(unknown)
        .with_state(service)
}

async fn create<S: Snapshotter>(
    service: Arc<S>,
    kind: Kind,
    request: CreateRequest,
) -> Result<MountsResponse, Error> {
    Ok(MountsResponse { mounts: service.create(kind, request).await? })
}

async fn mounts<S: Snapshotter>(service: Arc<S>, r: KeyRequest) -> Result<MountsResponse, Error> {
    Ok(MountsResponse { mounts: service.mounts(r.key).await? })
}

async fn commit<S: Snapshotter>(service: Arc<S>, r: CommitRequest) -> Result<Empty, Error> {
    service.commit(r).await?;
    Ok(Empty {})
}

async fn remove<S: Snapshotter>(service: Arc<S>, r: KeyRequest) -> Result<Empty, Error> {
    service.remove(r.key).await?;
    Ok(Empty {})
}

async fn stat<S: Snapshotter>(service: Arc<S>, r: KeyRequest) -> Result<InfoResponse, Error> {
    Ok(InfoResponse { info: Some(service.stat(r.key).await?) })
}

async fn update<S: Snapshotter>(service: Arc<S>, r: UpdateRequest) -> Result<InfoResponse, Error> {
    Ok(InfoResponse { info: Some(service.update(r).await?) })
}

async fn usage<S: Snapshotter>(service: Arc<S>, r: KeyRequest) -> Result<UsageResponse, Error> {
    service.usage(r.key).await
}

async fn cleanup<S: Snapshotter>(service: Arc<S>, _: CleanupRequest) -> Result<Empty, Error> {
    service.cleanup().await?;
    Ok(Empty {})
}

async fn unknown() -> Response<Body> {
    Status::unimplemented("the snapshotter has no such method").into_http()
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NotFound(_) => Self::not_found(message),
            Error::AlreadyExists(_) => Self::already_exists(message),
            Error::FailedPrecondition(_) => Self::failed_precondition(message),
            Error::Invalid(_) => Self::invalid_argument(message),
            Error::Internal(_) => Self::internal(message),
        }
    }
}

/// Runs an operation to its end, whether or not somebody still waits for it.
async fn to_the_end<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(operation).await {
        Ok(done) => Ok(done?),
        Err(error) => Err(Status::internal(format!("the operation ended: {error}"))),
    }
}

/// A method with one answer.
struct Call<S, F> {
    service: Arc<S>,
    method: F,
}

impl<S, F, R, A, Fut> UnaryService<R> for Call<S, F>
where
    S: Snapshotter,
    F: Fn(Arc<S>, R) -> Fut,
    Fut: Future<Output = Result<A, Error>> + Send + 'static,
    A: Send + 'static,
{
    type Response = A;
    type Future = BoxFuture<'static, Result<tonic::Response<A>, Status>>;

    fn call(&mut self, request: tonic::Request<R>) -> Self::Future {
        let operation = (self.method)(Arc::clone(&self.service), request.into_inner());
        Box::pin(async { Ok(tonic::Response::new(to_the_end(operation).await?)) })
    }
}

type Route<S> = axum::routing::MethodRouter<Arc<S>>;

fn unary<S, F, R, A, Fut>(method: F) -> Route<S>
where
    S: Snapshotter,
    F: Fn(Arc<S>, R) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<A, Error>> + Send + 'static,
    R: Message + Default + Send + 'static,
    A: Message + Send + 'static,
{
    post(
        move |State(service): State<Arc<S>>,
              ConnectInfo(peer): ConnectInfo<Peer>,
              request: Request| async move {
            if !peer.root {
                return forbidden();
            }
            debug!(method = request.uri().path(), "asked");
            let mut grpc = Grpc::new(ProstCodec::<A, R>::default());
            grpc.unary(Call { service, method }, request).await.map(Body::new)
        },
    )
}

fn forbidden() -> Response<Body> {
    Status::permission_denied("only root may use the snapshotter").into_http()
}

/// `List`: its answer comes in several messages.
struct List<S>(Arc<S>);

impl<S: Snapshotter> ServerStreamingService<ListRequest> for List<S> {
    type Response = ListResponse;
    type ResponseStream = BoxStream<'static, Result<ListResponse, Status>>;
    type Future = BoxFuture<'static, Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<ListRequest>) -> Self::Future {
        let service = Arc::clone(&self.0);
        Box::pin(async move {
            let filters = request.into_inner().filters;
            let filters: Vec<_> =
                filters.iter().map(|text| Filter::parse(text)).collect::<Result<_, _>>()?;
            let listed = to_the_end(async move { service.list().await }).await?;
            let wanted = |info: &Info| {
                filters.is_empty() || filters.iter().any(|filter| filter.matches(info))
            };
            let found: Vec<Info> = listed.into_iter().filter(wanted).collect();
            let messages: Vec<_> = found
                .chunks(BATCH)
                .map(|chunk| Ok(ListResponse { info: chunk.to_vec() }))
                .collect();
            let messages: Self::ResponseStream = Box::pin(stream::iter(messages));
            Ok(tonic::Response::new(messages))
        })
    }
}

async fn list<S: Snapshotter>(
    State(service): State<Arc<S>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Response<Body> {
    if !peer.root {
        return forbidden();
    }
    let mut grpc = Grpc::new(ProstCodec::<ListResponse, ListRequest>::default());
    grpc.server_streaming(List(service), request).await.map(Body::new)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_passed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s");
        let first = Socket::bind(&path).unwrap();
        let copy = first.copy().unwrap();
        drop(first);
        // who connects meanwhile waits
        let client = UnixStream::connect(&path).unwrap();
        let second = Socket::passed(copy, &path).unwrap();
        let (accepted, _) = second.listener.accept().await.unwrap();
        drop((accepted, client));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);

        let other = UnixListener::bind(root.path().join("other")).unwrap();
        assert!(Socket::passed(other.into(), &path).is_err());
        let (connected, _end) = UnixStream::pair().unwrap();
        assert!(Socket::passed(connected.into(), &path).is_err());
        let copy = second.copy().unwrap();
        fs::remove_file(&path).unwrap();
        assert!(Socket::passed(copy, &path).is_err(), "nobody can connect to it");
    }
}
