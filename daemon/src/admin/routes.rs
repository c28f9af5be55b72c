//! The routes, as `hydrant_api` lists them.

use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hydrant_api::{
    Cleared, CloneRequest, ErrorBody, Evicted, FailedEvent, Image, ImageRequest, IndexRequest,
    Mount, MountImageRequest, PathRequest, PrefetchRequest, PullRequest, QueueEvent,
    RestartRequest, RmRequest, STATE_DIR_HEADER, Status, TraceRequest, TracedLayer, UmountRequest,
    VERSION_HEADER, Worker,
};
use serde::de::DeserializeOwned;

use super::caller::Caller;
use super::error::ApiError;
use super::{Service, check, progress};
use crate::ids::EventId;

type Body = Result<Bytes, BytesRejection>;
type Reply<T> = Result<Json<T>, ApiError>;
/// `{}`
type Nothing = serde_json::Map<String, serde_json::Value>;

pub(super) fn router<S: Service>(service: Arc<S>) -> Router {
    let state: Arc<path::Path> = service.state_dir().into();
    Router::new()
        .route("/v1/status", get(status::<S>))
        .route("/v1/mounts", get(mounts::<S>))
        .route("/v1/clone", post(clone_tree::<S>))
        .route("/v1/mount", post(mount::<S>))
        .route("/v1/umount", post(umount::<S>))
        .route("/v1/rm", post(rm::<S>))
        .route("/v1/prefetch", post(prefetch::<S>))
        .route("/v1/images", get(images::<S>))
        .route("/v1/image/pull", post(pull_image::<S>))
        .route("/v1/image/index", post(index_image::<S>))
        .route("/v1/image/trace", post(trace_image::<S>))
        .route("/v1/image/mount", post(mount_image::<S>))
        .route("/v1/image/evict", post(evict_image::<S>))
        .route("/v1/image/rm", post(rm_image::<S>))
        .route("/v1/queue", get(queue::<S>))
        .route("/v1/queue/failed", get(failed::<S>))
        .route("/v1/queue/failed/clear", post(clear_failed::<S>))
        .route("/v1/queue/{id}", get(queue_event::<S>))
        .route("/v1/queue/{id}/retry", post(retry::<S>))
        .route("/v1/queue/{id}/deny", post(deny::<S>))
        .route("/v1/workers", get(workers::<S>))
        .route("/v1/workers/restart", post(restart_workers::<S>))
        .route("/v1/reload", post(reload::<S>))
        .route("/v1/stop", post(stop::<S>))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .with_state(service)
        .layer(from_fn_with_state(state, only_for_us))
        .layer(map_response(with_version))
}

/// Refuses a request that is for the daemon of another state directory.
async fn only_for_us(
    State(ours): State<Arc<path::Path>>,
    request: Request,
    next: Next,
) -> Response {
    let asked = request.headers().get(STATE_DIR_HEADER).map(HeaderValue::as_bytes);
    let asked = asked.map(|asked| path::Path::new(OsStr::from_bytes(asked)));
    let is_ours =
        |asked: &path::Path| asked == &*ours || ours.canonicalize().is_ok_and(|ours| asked == ours);
    match asked {
        Some(asked) if !is_ours(asked) => {
            let (ours, asked) = (ours.display(), asked.display());
            ApiError::conflict(format!(
                "the daemon that runs here has the state directory {ours}, not {asked}"
            ))
            .with_hint(format!(
                "use --state-dir {ours}, or another --run-dir for a daemon of its own"
            ))
            .into_response()
        }
        _ => next.run(request).await,
    }
}

/// A client of another version can say so when it is not understood.
async fn with_version(mut response: Response) -> Response {
    let version = HeaderValue::from_static(env!("CARGO_PKG_VERSION"));
    response.headers_mut().insert(VERSION_HEADER, version);
    response
}

async fn status<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Status> {
    service.status(caller).await.map(Json)
}

async fn mounts<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Vec<Mount>> {
    service.mounts(caller).await.map(Json)
}

async fn clone_tree<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let request = check::clone(&caller, parse::<CloneRequest>(body)?)?;
    tracing::info!(uid = caller.uid, directory = request.directory, "clone");
    Ok(progress::respond("clone", move |progress| async move {
        service.clone_tree(caller, request, progress).await
    }))
}

async fn mount<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Reply<Mount> {
    let request: PathRequest = parse(body)?;
    check::directory(&request.directory)?;
    tracing::info!(uid = caller.uid, directory = request.directory, "mount");
    to_the_end("mount", async move { service.mount(caller, request).await }).await
}

async fn umount<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Reply<Vec<Mount>> {
    let request: UmountRequest = parse(body)?;
    check::umount(&request)?;
    tracing::info!(uid = caller.uid, directory = request.directory, all = request.all, "umount");
    to_the_end("umount", async move { service.umount(caller, request).await }).await
}

async fn rm<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let request: RmRequest = parse(body)?;
    check::directory(&request.directory)?;
    if request.discard && request.keep {
        return Err(ApiError::invalid("changes can be kept or discarded, not both"));
    }
    let RmRequest { directory, discard, keep } = &request;
    tracing::info!(uid = caller.uid, directory, discard, keep, "rm");
    Ok(progress::respond("rm", move |progress| async move {
        service.rm(caller, request, progress).await
    }))
}

async fn prefetch<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let request: PrefetchRequest = parse(body)?;
    check::directory(&request.path)?;
    tracing::info!(uid = caller.uid, path = request.path, "prefetch");
    Ok(progress::respond("prefetch", move |progress| async move {
        service.prefetch(caller, request, progress).await
    }))
}

async fn images<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Vec<Image>> {
    service.images(caller).await.map(Json)
}

async fn pull_image<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let mut request: PullRequest = parse(body)?;
    check::image(&caller, &request.reference, &mut request.environment, &mut request.owner)?;
    tracing::info!(uid = caller.uid, image = request.reference, "pull");
    Ok(progress::respond("pull", move |progress| async move {
        service.pull_image(caller, request, progress).await
    }))
}

async fn index_image<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let mut request: IndexRequest = parse(body)?;
    check::image(&caller, &request.reference, &mut request.environment, &mut request.owner)?;
    let IndexRequest { reference, push, .. } = &request;
    tracing::info!(uid = caller.uid, image = reference, push, "index");
    Ok(progress::respond("index", move |progress| async move {
        service.index_image(caller, request, progress).await
    }))
}

async fn trace_image<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Reply<Vec<TracedLayer>> {
    let request: TraceRequest = parse(body)?;
    check::reference(&request.reference)?;
    to_the_end("trace", async move { service.trace_image(caller, request).await }).await
}

async fn mount_image<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let mut request: MountImageRequest = parse(body)?;
    check::directory(&request.directory)?;
    check::image(&caller, &request.reference, &mut request.environment, &mut request.owner)?;
    tracing::info!(
        uid = caller.uid,
        image = request.reference,
        directory = request.directory,
        "mount"
    );
    Ok(progress::respond("mount", move |progress| async move {
        service.mount_image(caller, request, progress).await
    }))
}

async fn evict_image<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Reply<Evicted> {
    let request: ImageRequest = parse(body)?;
    check::reference(&request.reference)?;
    tracing::info!(uid = caller.uid, image = request.reference, "evict image");
    to_the_end("evict", async move { service.evict_image(caller, request).await }).await
}

async fn rm_image<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Reply<Nothing> {
    let request: ImageRequest = parse(body)?;
    check::reference(&request.reference)?;
    tracing::info!(uid = caller.uid, image = request.reference, "remove image");
    to_the_end("rm image", async move {
        service.rm_image(caller, request).await.map(|()| Nothing::new())
    })
    .await
}

async fn queue<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
) -> Reply<Vec<QueueEvent>> {
    service.queue(caller).await.map(Json)
}

async fn queue_event<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Reply<QueueEvent> {
    service.queue_event(caller, event(&id)?).await.map(Json)
}

async fn retry<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Reply<Nothing> {
    let event = event(&id)?;
    tracing::info!(uid = caller.uid, %event, "retry");
    to_the_end("retry", async move { service.retry(caller, event).await.map(|()| Nothing::new()) })
        .await
}

async fn deny<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Reply<Nothing> {
    let event = event(&id)?;
    tracing::info!(uid = caller.uid, %event, "deny");
    to_the_end("deny", async move { service.deny(caller, event).await.map(|()| Nothing::new()) })
        .await
}

async fn failed<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
) -> Reply<Vec<FailedEvent>> {
    service.failed(caller).await.map(Json)
}

async fn clear_failed<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Cleared> {
    tracing::info!(uid = caller.uid, "clear the failed events");
    to_the_end("clear", async move { service.clear_failed(caller).await }).await
}

async fn workers<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Vec<Worker>> {
    service.workers(caller).await.map(Json)
}

async fn restart_workers<S: Service>(
    State(service): State<Arc<S>>,
    caller: Caller,
    body: Body,
) -> Reply<Vec<Worker>> {
    let request: RestartRequest = parse(body)?;
    tracing::info!(uid = caller.uid, shard = request.shard, "restart workers");
    to_the_end("restart", async move { service.restart_workers(caller, request).await }).await
}

async fn reload<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Nothing> {
    caller.require_root("reload the daemon")?;
    tracing::info!(pid = caller.pid, "reload");
    to_the_end("reload", async move { service.reload(caller).await.map(|()| Nothing::new()) }).await
}

async fn stop<S: Service>(State(service): State<Arc<S>>, caller: Caller) -> Reply<Nothing> {
    caller.require_root("stop the daemon")?;
    tracing::info!(pid = caller.pid, "stop");
    to_the_end("stop", async move { service.stop(caller).await.map(|()| Nothing::new()) }).await
}

async fn unknown(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {}", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let error = ApiError::invalid(format!("{} does not take {method}", uri.path()));
    (StatusCode::METHOD_NOT_ALLOWED, Json(ErrorBody::from(error))).into_response()
}

/// A request's body. What `Content-Type` says doesn't matter, so that `curl --data` will do.
fn parse<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    let body = body.map_err(|e| ApiError::invalid(format!("can't read the request: {e}")))?;
    serde_json::from_slice(&body)
        .map_err(|e| ApiError::invalid(format!("can't make sense of the request: {e}")))
}

fn event(id: &str) -> Result<EventId, ApiError> {
    id.parse().map(EventId).map_err(|_| ApiError::invalid(format!("{id:?} is not an event's id")))
}

/// Runs an operation to its end also when the client goes away, which drops a handler's future.
async fn to_the_end<T: Send + 'static>(
    name: &'static str,
    operation: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Reply<T> {
    let outcome = tokio::spawn(operation).await.unwrap_or_else(|error| {
        tracing::error!(%error, operation = name, "an operation did not end");
        Err(ApiError::internal(format!("{name} did not end: {error}")))
    });
    if let Err(error) = &outcome {
        tracing::warn!(operation = name, %error, "failed");
    }
    outcome.map(Json)
}
