//! The admin server: the daemon's side of [`hydrant_api`], over a Unix socket in the run directory.
//!
//! It knows who asks (the peer's credentials), checks what can be checked of a request without
//! knowing a mount, and hands it to a [`Service`]. Who may do what with a mount is the service's business.
//!
//! A client that goes away cancels nothing: every operation that changes something runs in a task
//! of its own, to its end.

mod caller;
mod check;
mod error;
mod lock;
mod progress;
mod routes;
mod socket;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;

use hydrant_api::{
    Cleared, CloneRequest, Evicted, FailedEvent, Image, ImageRequest, IndexRequest, Mount,
    MountImageRequest, PathRequest, PrefetchRequest, PullRequest, QueueEvent, RestartRequest,
    RmRequest, Status, Summary, TraceRequest, TracedLayer, UmountRequest, Worker,
};

pub use caller::Caller;
pub use error::ApiError;
pub use lock::{InstanceLock, LockError, is_state_locked};
pub use progress::ProgressSender;
pub use socket::{AdminSocket, DEFAULT_GROUP, SocketError, SocketFile};

use crate::ids::EventId;

/// What the admin server asks for. Requests of one client come side by side with those of others.
///
/// Paths in requests are absolute and have been through
/// [`path_to_text`](hydrant_api::path_to_text); a request's `environment` holds only variables that
/// [are wanted](hydrant_api::is_wanted_variable); its `owner` is set only where root asks.
pub trait Service: Send + Sync + 'static {
    /// Absolute.
    fn state_dir(&self) -> &Path;

    fn status(&self, caller: Caller) -> impl Future<Output = Result<Status, ApiError>> + Send;

    fn mounts(&self, caller: Caller) -> impl Future<Output = Result<Vec<Mount>, ApiError>> + Send;

    fn clone_tree(
        &self,
        caller: Caller,
        request: CloneRequest,
        progress: ProgressSender,
    ) -> impl Future<Output = Result<Summary, ApiError>> + Send;

    fn mount(
        &self,
        caller: Caller,
        request: PathRequest,
    ) -> impl Future<Output = Result<Mount, ApiError>> + Send;

    /// Gives the mounts that were unmounted. With `all`: those that are the caller's.
    fn umount(
        &self,
        caller: Caller,
        request: UmountRequest,
    ) -> impl Future<Output = Result<Vec<Mount>, ApiError>> + Send;

    fn rm(
        &self,
        caller: Caller,
        request: RmRequest,
        progress: ProgressSender,
    ) -> impl Future<Output = Result<Summary, ApiError>> + Send;

    fn prefetch(
        &self,
        caller: Caller,
        request: PrefetchRequest,
        progress: ProgressSender,
    ) -> impl Future<Output = Result<Summary, ApiError>> + Send;

    fn images(&self, caller: Caller) -> impl Future<Output = Result<Vec<Image>, ApiError>> + Send;

    fn pull_image(
        &self,
        caller: Caller,
        request: PullRequest,
        progress: ProgressSender,
    ) -> impl Future<Output = Result<Summary, ApiError>> + Send;

    fn index_image(
        &self,
        caller: Caller,
        request: IndexRequest,
        progress: ProgressSender,
    ) -> impl Future<Output = Result<Summary, ApiError>> + Send;

    fn trace_image(
        &self,
        caller: Caller,
        request: TraceRequest,
    ) -> impl Future<Output = Result<Vec<TracedLayer>, ApiError>> + Send;

    /// Pulls it first, if it is not there.
    fn mount_image(
        &self,
        caller: Caller,
        request: MountImageRequest,
        progress: ProgressSender,
    ) -> impl Future<Output = Result<Summary, ApiError>> + Send;

    fn evict_image(
        &self,
        caller: Caller,
        request: ImageRequest,
    ) -> impl Future<Output = Result<Evicted, ApiError>> + Send;

    fn rm_image(
        &self,
        caller: Caller,
        request: ImageRequest,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    fn queue(
        &self,
        caller: Caller,
    ) -> impl Future<Output = Result<Vec<QueueEvent>, ApiError>> + Send;

    fn queue_event(
        &self,
        caller: Caller,
        event: EventId,
    ) -> impl Future<Output = Result<QueueEvent, ApiError>> + Send;

    /// Gives the event to a worker anew.
    fn retry(
        &self,
        caller: Caller,
        event: EventId,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Lets the reader have an error.
    fn deny(
        &self,
        caller: Caller,
        event: EventId,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// The events that were given up, newest first.
    fn failed(
        &self,
        caller: Caller,
    ) -> impl Future<Output = Result<Vec<FailedEvent>, ApiError>> + Send;

    /// Forgets them, and lets what they wanted be tried again.
    fn clear_failed(
        &self,
        caller: Caller,
    ) -> impl Future<Output = Result<Cleared, ApiError>> + Send;

    fn workers(&self, caller: Caller)
    -> impl Future<Output = Result<Vec<Worker>, ApiError>> + Send;

    /// Replaces workers by new ones; gives those.
    fn restart_workers(
        &self,
        caller: Caller,
        request: RestartRequest,
    ) -> impl Future<Output = Result<Vec<Worker>, ApiError>> + Send;

    /// Begins to replace the daemon by the one that is installed now, and returns. Only root's requests
    /// get here.
    fn reload(&self, caller: Caller) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Begins to stop the daemon, and returns. Only root's requests get here.
    fn stop(&self, caller: Caller) -> impl Future<Output = Result<(), ApiError>> + Send;
}

/// Serves until `shutdown` is done and the requests in hand are answered. The socket is gone then.
pub async fn serve<S: Service>(
    socket: AdminSocket,
    service: Arc<S>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (listener, _guard) = socket.into_parts();
    let routes = routes::router(service).into_make_service_with_connect_info::<caller::Peer>();
    axum::serve(listener, routes).with_graceful_shutdown(shutdown).await
}
