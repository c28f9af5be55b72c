//! The client against a server that says what it is told to.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use hydrant_api::Mount;
use serde_json::json;
use tempfile::TempDir;

use super::*;

struct Server {
    directories: Directories,
    /// Gives the request that came.
    thread: JoinHandle<String>,
    _root: TempDir,
}

impl Server {
    /// Answers one request with these bytes, then closes.
    fn start(response: &'static str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories { state: root.path().into(), run: root.path().into() };
        let listener = UnixListener::bind(directories.socket()).unwrap();
        let thread = std::thread::spawn(move || {
            // The first connection only shows that somebody listens.
            drop(listener.accept().unwrap());
            let (mut stream, _) = listener.accept().unwrap();
            let request = read_request(&mut stream);
            stream.write_all(response.as_bytes()).unwrap();
            request
        });
        Self { directories, thread, _root: root }
    }

    fn client(&self) -> Client {
        Client::connect(&self.directories).unwrap()
    }

    fn request(self) -> String {
        self.thread.join().unwrap()
    }
}

fn read_request(stream: &mut UnixStream) -> String {
    let mut request = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let n = stream.read(&mut chunk).unwrap();
        request.extend_from_slice(&chunk[..n]);
        let text = String::from_utf8(request.clone()).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.to_lowercase();
        let length = length
            .split("content-length: ")
            .nth(1)
            .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
        if body.len() == length {
            return text;
        }
    }
}

#[derive(Default)]
struct Seen(Vec<Progress>);

impl Watch for Seen {
    fn progress(&mut self, line: &Progress) {
        self.0.push(line.clone());
    }
    fn tick(&mut self) {}
}

#[tokio::test]
async fn asks_and_understands() {
    let server = Server::start("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]");
    let mounts: Vec<Mount> = server.client().get("/v1/mounts").await.unwrap();
    assert_eq!(mounts, []);
    assert!(server.request().starts_with("GET /v1/mounts HTTP/1.1\r\n"));
}

#[tokio::test]
async fn an_error_comes_with_its_hint() {
    let server = Server::start(
        "HTTP/1.1 404 Not Found\r\ncontent-length: 56\r\n\r\n\
         {\"code\":\"not_found\",\"message\":\"no tree\",\"hint\":\"look\"}   ",
    );
    let body = json!({ "directory": "/a" });
    let failure = server.client().post::<Mount>("/v1/mount", &body).await.unwrap_err();
    assert_eq!(failure, Failure::new("no tree").hint("look"));
    let request = server.request();
    assert!(request.ends_with("\r\n\r\n{\"directory\":\"/a\"}"), "{request}");
}

/// What a newer daemon says besides is overlooked; what an older one does not know is told as such.
#[tokio::test]
async fn a_daemon_of_another_version() {
    let server = Server::start(
        "HTTP/1.1 200 OK\r\nhydrant-version: 99.0.0\r\ncontent-length: 70\r\n\r\n\
         {\"code\":\"not_found\",\"message\":\"m\",\"hint\":null,\"later\":{\"field\":[1,2]}}",
    );
    let error: ErrorBody = server.client().get("/v1/status").await.unwrap();
    assert_eq!(error.message, "m");
    for answer in [
        "HTTP/1.1 404 Not Found\r\nhydrant-version: 0.0.1\r\ncontent-length: 52\r\n\r\n\
         {\"code\":\"not_found\",\"message\":\"there is no /v1/it\"} ",
        "HTTP/1.1 200 OK\r\nhydrant-version: 0.0.1\r\ncontent-length: 2\r\n\r\n{}",
    ] {
        let failure = Server::start(answer).client().get::<Mount>("/v1/it").await.unwrap_err();
        let hint = failure.hint.unwrap();
        assert!(hint.contains("the daemon is version 0.0.1"), "{hint}");
    }
}

#[tokio::test]
async fn lines_may_come_in_pieces() {
    let server = Server::start(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
         11\r\n{\"state\":\"step\",\"\r\n\
         20\r\nstep\":\"tree\"}\n{\"state\":\"note\",\"m\r\n\
         e\r\nessage\":\"hm\"}\n\r\n\
         58\r\n{\"state\":\"done\",\"summary\":{\"files\":3,\"tree_bytes\":4,\"fetched_bytes\":5,\
         \"elapsed_ms\":6}}\n\r\n\
         0\r\n\r\n",
    );
    let mut seen = Seen::default();
    let summary = server.client().watch("/v1/clone", &json!({}), &mut seen).await.unwrap();
    assert_eq!((summary.files, summary.elapsed_ms), (3, 6));
    let step = Progress::Step { step: "tree".into() };
    assert_eq!(seen.0, [step, Progress::Note { message: "hm".into() }]);
}

#[tokio::test]
async fn an_operation_that_fails() {
    let server = Server::start(
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n\
         {\"state\":\"failed\",\"error\":{\"code\":\"origin\",\"message\":\"gone\"}}\n",
    );
    let failure =
        server.client().watch("/v1/rm", &json!({}), &mut Seen::default()).await.unwrap_err();
    assert_eq!(failure, Failure::new("gone"));
}

#[tokio::test]
async fn a_daemon_that_dies_is_no_success() {
    for response in [
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"state\":\"step\",\"step\":\"tree\"}\n{\"sta",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"sta",
        "HTTP/1.1 200 OK\r\ncontent-le",
    ] {
        let server = Server::start(response);
        let failure =
            server.client().watch("/v1/clone", &json!({}), &mut Seen::default()).await.unwrap_err();
        assert_eq!(failure.kind, Kind::Unreachable, "{failure:?}");
        assert!(failure.hint.unwrap().contains("hydrantd.log"));
    }
}

#[tokio::test]
async fn nobody_there() {
    let root = tempfile::tempdir().unwrap();
    let directories = Directories { state: root.path().into(), run: root.path().into() };
    assert!(matches!(Client::connect(&directories), Err(Unreachable::NotRunning)));
    drop(UnixListener::bind(directories.socket()).unwrap());
    assert!(matches!(Client::connect(&directories), Err(Unreachable::NotRunning)));
}
