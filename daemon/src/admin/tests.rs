//! The admin server over a real socket, with a service that only remembers.

use std::sync::Mutex;
use std::time::Duration;

use hydrant_api::{
    Counters, Directories, ErrorBody, ErrorCode, Evicted, Image, ImageRequest, IndexRequest,
    MountImageRequest, Owner, Progress, PullRequest, TraceRequest, TracedLayer, path_from_text,
    path_to_text,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;

use super::*;

/// Does nothing, and says so. An operation on `/wait` waits for `go`, one on `/panic` panics.
#[derive(Debug)]
struct Fake {
    calls: Mutex<Vec<String>>,
    go: Semaphore,
    finished: Semaphore,
}

impl Fake {
    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    async fn operate(&self, directory: &str) -> Result<Summary, ApiError> {
        match directory {
            "/wait" => self.go.acquire().await.unwrap().forget(),
            "/panic" => panic!("as asked"),
            "/missing" => return Err(ApiError::not_found("no such tree").with_hint("hydrant ls")),
            _ => {}
        }
        self.finished.add_permits(1);
        Ok(Summary { files: 3, ..Summary::default() })
    }
}

fn a_mount(directory: &str) -> Mount {
    Mount {
        directory: directory.into(),
        url: "https://example.org/a.git".into(),
        revision: "main".into(),
        commit: "0".repeat(40),
        owner: Owner { uid: 1, gid: 2 },
        read_only: false,
        mounted: true,
        files: 3,
        tree_bytes: 10,
        present_bytes: 0,
        segment_bytes: 12288,
        segments: 1,
        complete_segments: 0,
        pool: 1,
        shard: 0,
        history: "shallow".into(),
        trouble: None,
    }
}

impl Service for Fake {
    fn state_dir(&self) -> &Path {
        Path::new("/s")
    }

    async fn status(&self, caller: Caller) -> Result<Status, ApiError> {
        self.note(format!("status {}:{} {:?}", caller.uid, caller.gid, caller.pid));
        Ok(Status {
            instance: 1,
            version: "0".into(),
            pid: 1,
            state_dir: "/s".into(),
            run_dir: "/r".into(),
            queue: "brokered".into(),
            mounts: vec![],
            shards: vec![],
            counters: Counters::default(),
            layers: Vec::new(),
        })
    }

    async fn mounts(&self, _: Caller) -> Result<Vec<Mount>, ApiError> {
        Ok(vec![a_mount("/a")])
    }

    async fn clone_tree(
        &self,
        _: Caller,
        request: CloneRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.note(format!("clone {} {:?}", request.url, request.environment));
        progress.step("metadata");
        progress.count(1, Some(2), "objects");
        progress.note("no sizes");
        self.operate(&request.directory).await
    }

    async fn mount(&self, _: Caller, request: PathRequest) -> Result<Mount, ApiError> {
        self.operate(&request.directory).await?;
        Ok(a_mount(&request.directory))
    }

    async fn umount(&self, _: Caller, request: UmountRequest) -> Result<Vec<Mount>, ApiError> {
        Ok(request.directory.iter().map(|d| a_mount(d)).collect())
    }

    async fn rm(
        &self,
        _: Caller,
        request: RmRequest,
        progress: ProgressSender,
    ) -> Result<Summary, ApiError> {
        for done in 0..10_000 {
            progress.count(done, None, "files");
        }
        self.operate(&request.directory).await
    }

    async fn prefetch(
        &self,
        _: Caller,
        request: PrefetchRequest,
        _: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.note(format!("prefetch {:?}", path_from_text(&request.path)));
        self.operate(&request.path).await
    }

    async fn images(&self, _: Caller) -> Result<Vec<Image>, ApiError> {
        Ok(vec![])
    }

    async fn pull_image(
        &self,
        _: Caller,
        request: PullRequest,
        _: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.note(format!("pull {}", request.reference));
        Ok(Summary::default())
    }

    async fn index_image(
        &self,
        _: Caller,
        request: IndexRequest,
        _: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.note(format!("index {} {:?}", request.reference, request.key));
        Ok(Summary::default())
    }

    async fn trace_image(
        &self,
        _: Caller,
        request: TraceRequest,
    ) -> Result<Vec<TracedLayer>, ApiError> {
        self.note(format!("trace {} {}", request.reference, request.record));
        Ok(Vec::new())
    }

    async fn mount_image(
        &self,
        _: Caller,
        request: MountImageRequest,
        _: ProgressSender,
    ) -> Result<Summary, ApiError> {
        self.operate(&request.directory).await
    }

    async fn evict_image(&self, _: Caller, _: ImageRequest) -> Result<Evicted, ApiError> {
        Ok(Evicted { bytes: 1, in_use: 0 })
    }

    async fn rm_image(&self, _: Caller, request: ImageRequest) -> Result<(), ApiError> {
        self.note(format!("rm image {}", request.reference));
        Ok(())
    }

    async fn queue(&self, _: Caller) -> Result<Vec<QueueEvent>, ApiError> {
        Ok(vec![])
    }

    async fn queue_event(&self, _: Caller, event: EventId) -> Result<QueueEvent, ApiError> {
        Err(ApiError::not_found(format!("no event {event}")))
    }

    async fn retry(&self, _: Caller, event: EventId) -> Result<(), ApiError> {
        self.note(format!("retry {event}"));
        Ok(())
    }

    async fn deny(&self, _: Caller, event: EventId) -> Result<(), ApiError> {
        self.note(format!("deny {event}"));
        Ok(())
    }

    async fn failed(&self, _: Caller) -> Result<Vec<FailedEvent>, ApiError> {
        Ok(vec![])
    }

    async fn clear_failed(&self, _: Caller) -> Result<Cleared, ApiError> {
        self.note("clear".into());
        Ok(Cleared { cleared: 3 })
    }

    async fn workers(&self, _: Caller) -> Result<Vec<Worker>, ApiError> {
        Ok(vec![])
    }

    async fn restart_workers(
        &self,
        _: Caller,
        request: RestartRequest,
    ) -> Result<Vec<Worker>, ApiError> {
        self.note(format!("restart {:?}", request.shard));
        Ok(vec![])
    }

    async fn reload(&self, _: Caller) -> Result<(), ApiError> {
        self.note("reload".into());
        Ok(())
    }

    async fn stop(&self, _: Caller) -> Result<(), ApiError> {
        self.note("stop".into());
        Ok(())
    }
}

struct Server {
    fake: Arc<Fake>,
    client: reqwest::Client,
    directories: Directories,
    stop: oneshot::Sender<()>,
    task: JoinHandle<io::Result<()>>,
    _root: TempDir,
}

impl Server {
    fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories { state: root.path().into(), run: root.path().into() };
        let socket = AdminSocket::bind(&directories, None).unwrap();
        let fake = Arc::new(Fake {
            calls: Mutex::default(),
            go: Semaphore::new(0),
            finished: Semaphore::new(0),
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(socket, Arc::clone(&fake), async move {
            let _ = stopped.await;
        }));
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .unix_socket(directories.socket())
            .tls_certs_only([])
            .build()
            .unwrap();
        Self { fake, client, directories, stop, task, _root: root }
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("http://x{path}")).send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_slice(&response.bytes().await.unwrap()).unwrap())
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Vec<Value>) {
        let request = self.client.post(format!("http://x{path}")).body(body.to_string());
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn calls(&self) -> Vec<String> {
        self.fake.calls.lock().unwrap().clone()
    }
}

fn clone_to(directory: &str) -> Value {
    json!({ "url": "https://example.org/a.git", "directory": directory,
            "environment": [["HOME", "/h"], ["LD_PRELOAD", "/evil.so"]] })
}

#[tokio::test]
async fn the_caller_is_who_connected() {
    let server = Server::start();
    let (status, body) = server.get("/v1/status").await;
    assert_eq!((status, &body["queue"]), (200, &json!("brokered")));
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let own = format!("status {uid}:{gid} Some({})", std::process::id());
    assert_eq!(server.calls(), [own]);
}

#[tokio::test]
async fn a_request_for_another_state_directory_is_refused() {
    let server = Server::start();
    for (asked, status) in [("/s", 200), ("/s2", 409), ("/", 409)] {
        let request = server.client.get("http://x/v1/mounts");
        let response = request.header(hydrant_api::STATE_DIR_HEADER, asked).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{asked}");
        let text = response.text().await.unwrap();
        assert!(status == 200 || text.contains("--state-dir /s"), "{text}");
    }
}

#[tokio::test]
async fn progress_comes_in_lines_and_ends_with_the_outcome() {
    let server = Server::start();
    let (status, lines) = server.post("/v1/clone", clone_to("/a")).await;
    assert_eq!(status, 200);
    let lines: Vec<Progress> =
        lines.into_iter().map(|line| serde_json::from_value(line).unwrap()).collect();
    assert_eq!(
        lines,
        [
            Progress::Step { step: "metadata".into() },
            Progress::Count { done: 1, total: Some(2), unit: "objects".into() },
            Progress::Note { message: "no sizes".into() },
            Progress::Done { summary: Summary { files: 3, ..Summary::default() } },
        ]
    );
    assert_eq!(server.calls(), [r#"clone https://example.org/a.git [("HOME", "/h")]"#]);
}

#[tokio::test]
async fn a_failure_is_the_last_line() {
    let server = Server::start();
    for (directory, code) in [("/missing", ErrorCode::NotFound), ("/panic", ErrorCode::Internal)] {
        let (status, mut lines) = server.post("/v1/clone", clone_to(directory)).await;
        assert_eq!(status, 200);
        let Progress::Failed { error } = serde_json::from_value(lines.pop().unwrap()).unwrap()
        else {
            panic!("{directory} did not fail");
        };
        assert_eq!(error.code, code, "{error:?}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_nothing() {
    let server = Server::start();
    for (path, body) in
        [("/v1/clone", clone_to("/wait")), ("/v1/mount", json!({ "directory": "/wait" }))]
    {
        let request = server.client.post(format!("http://x{path}")).body(body.to_string());
        let request = async move { request.send().await.unwrap().text().await };
        let gone = tokio::time::timeout(Duration::from_millis(300), request).await;
        assert!(gone.is_err(), "{path} did not wait");
        server.fake.go.add_permits(1);
        let finished = server.fake.finished.acquire();
        tokio::time::timeout(Duration::from_secs(10), finished).await.unwrap().unwrap().forget();
    }
}

#[tokio::test]
async fn lines_that_nobody_reads_hold_up_nothing_and_the_last_one_comes() {
    let server = Server::start();
    let request = json!({ "directory": "/a" }).to_string();
    let response = server.client.post("http://x/v1/rm").body(request).send().await.unwrap();
    let finished = server.fake.finished.acquire();
    tokio::time::timeout(Duration::from_secs(10), finished).await.unwrap().unwrap().forget();
    let text = response.text().await.unwrap();
    assert!(text.lines().last().unwrap().contains("\"done\""), "{text}");
}

#[tokio::test]
async fn errors_have_a_code_and_a_status() {
    let server = Server::start();
    let (status, body) = server.get("/v1/queue/12").await;
    assert_eq!(
        (status, &body["code"], &body["message"]),
        (404, &json!("not_found"), &json!("no event 12"))
    );
    assert_eq!(server.get("/v1/queue/x").await.0, 400);
    assert_eq!(server.get("/v1/nothing").await.0, 404);
    assert_eq!(server.get("/v1/stop").await.0, 405);
    for body in [json!({}), json!({ "directory": "relative" }), json!(7)] {
        let (status, lines) = server.post("/v1/mount", body).await;
        let error: ErrorBody = serde_json::from_value(lines[0].clone()).unwrap();
        assert_eq!((status, error.code), (400, ErrorCode::Invalid));
    }
    let both = json!({ "directory": "/a", "keep": true, "discard": true });
    assert_eq!(server.post("/v1/rm", both).await.0, 400);
    let (status, lines) = server.post("/v1/mount", json!({ "directory": "/panic" })).await;
    assert_eq!((status, &lines[0]["code"]), (500, &json!("internal")));
    let huge = json!({ "directory": "/a".repeat(2 << 20) });
    assert_eq!(server.post("/v1/mount", huge).await.0, 400);
}

#[tokio::test]
async fn the_other_routes() {
    let server = Server::start();
    assert_eq!(server.get("/v1/mounts").await.1[0]["directory"], "/a");
    assert_eq!(server.get("/v1/queue").await, (200, json!([])));
    assert_eq!(server.post("/v1/queue/5/retry", json!({})).await, (200, vec![json!({})]));
    assert_eq!(server.post("/v1/queue/6/deny", json!({})).await, (200, vec![json!({})]));
    let (_, lines) = server.post("/v1/umount", json!({ "directory": "/b" })).await;
    assert_eq!(lines[0][0]["directory"], "/b");
    let odd = path_from_text(r"/odd/\xff");
    server.post("/v1/prefetch", json!({ "path": path_to_text(&odd) })).await;
    assert_eq!(server.calls(), ["retry 5".into(), "deny 6".into(), format!("prefetch {odd:?}")]);
    let root = nix::unistd::getuid().is_root();
    let (status, _) = server.post("/v1/stop", json!({})).await;
    assert_eq!(status, if root { 200 } else { 403 });
    assert_eq!(server.calls().contains(&"stop".to_owned()), root);
}

#[tokio::test]
async fn the_socket_goes_with_the_server() {
    let server = Server::start();
    assert_eq!(server.get("/v1/mounts").await.0, 200);
    let path = server.directories.socket();
    assert!(path.exists());
    server.stop.send(()).unwrap();
    drop(server.client);
    tokio::time::timeout(Duration::from_secs(10), server.task).await.unwrap().unwrap().unwrap();
    assert!(!path.exists());
}
