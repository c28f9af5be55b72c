//! Origins that fail, break off, stall or lie: never a wrong byte, and a try later succeeds.

use std::time::Instant;

use axum::http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::repo::{Repo, feed, git};
use super::server::{Fault, Server};
use super::*;

struct Setup {
    repo: Repo,
    server: Server,
    source: GitSource,
    ids: Vec<ObjectId>,
}

async fn setup() -> Setup {
    let repo = Repo::new(HashKind::Sha1);
    let ids = (0..5).map(|i| repo.add_blob(&noise(100_000 + i))).collect();
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    Setup { repo, server, source, ids }
}

fn right(sink: &Collect) {
    for (id, content) in &sink.objects {
        assert_eq!(*id, ObjectId::of_blob(id.kind(), content));
    }
}

#[tokio::test]
async fn statuses() {
    let Setup { repo: _repo, server, source, ids } = setup().await;
    let retry = |after: Option<u64>| (true, after.map(Duration::from_secs));
    let cases = [
        (429, vec![("retry-after", "7".to_owned())], retry(Some(7))),
        (503, vec![("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT".to_owned())], retry(Some(0))),
        (500, vec![], retry(None)),
        (502, vec![], retry(None)),
        (408, vec![], retry(None)),
        (403, vec![], (false, None)),
        (404, vec![], (false, None)),
        (400, vec![], (false, None)),
    ];
    for (status, headers, (passes, pause)) in cases {
        server.posts([Fault::Status(status, headers)]);
        match collect(&source, &ids).await.1 {
            Err(FetchError::Retry { message, after }) => {
                assert!(passes, "{status}");
                assert_eq!(after, pause, "{status}");
                assert!(message.contains(&status.to_string()), "{message}");
            }
            Err(FetchError::Refused { message }) => {
                assert!(!passes, "{status}");
                assert!(message.contains(&status.to_string()), "{message}");
            }
            other => panic!("{status}: {other:?}"),
        }
        // and then it is over
        fetch_all(&source, &ids).await;
    }
}

#[tokio::test]
async fn broken_off_anywhere() {
    let Setup { repo: _repo, server, source, ids } = setup().await;
    for at in [0, 3, 4, 12, 13, 17, 18, 30, 5_000, 400_000, 490_000] {
        server.posts([Fault::Truncate(at)]);
        let (sink, result) = collect(&source, &ids).await;
        assert!(matches!(result, Err(FetchError::Retry { .. })), "{at}: {result:?}");
        right(&sink);
        assert_eq!(sink.objects.len() > 1, at >= 400_000, "those before are given");
    }
    server.gets([Fault::Truncate(10)]);
    let fresh = plain(HashKind::Sha1, server.url());
    let result = collect(&fresh, &ids).await.1;
    assert!(matches!(result, Err(FetchError::Retry { .. })), "{result:?}");
    fetch_all(&fresh, &ids).await;
    fetch_all(&source, &ids).await;
}

#[tokio::test]
async fn an_answer_that_is_cut_but_well_formed() {
    let Setup { repo: _repo, server, source, ids } = setup().await;
    // an end where the middle of the pack should be
    let cut = [&b"000dpackfile\n0015\x01PACK\0\0\0\x02\0\0\0\x05"[..], b"\x310000"].concat();
    let cases = [
        (b"0000".to_vec(), true),
        (b"000dpackfile\n0000".to_vec(), false),
        (cut, true),
        (b"000dpackfile\n0004".to_vec(), true),
        (b"000dpackfile\n0006\x09x0000".to_vec(), true),
        (b"000dpackfile\n000a\x01PACK!0000".to_vec(), false),
        (b"hello".to_vec(), true),
    ];
    for (body, is_wrong) in cases {
        server.posts([Fault::Body("application/x-git-upload-pack-result", body.clone())]);
        let (sink, result) = collect(&source, &ids).await;
        let shown = String::from_utf8_lossy(&body).into_owned();
        match result {
            Err(FetchError::Wrong { .. }) => assert!(is_wrong, "{shown:?}"),
            Err(FetchError::Retry { .. }) => assert!(!is_wrong, "{shown:?}"),
            other => panic!("{shown:?}: {other:?}"),
        }
        assert!(sink.objects.is_empty());
    }
    let error = b"000dpackfile\n000d\x03too bad0000".to_vec();
    server.posts([Fault::Body("application/x-git-upload-pack-result", error)]);
    let error = collect(&source, &ids).await.1.unwrap_err();
    assert!(matches!(&error, FetchError::Retry { message, .. } if message.contains("too bad")));
    for (line, passes) in [("0010ERR go away\n", false), ("0016ERR try again later", true)] {
        let body = line.as_bytes().to_vec();
        server.posts([Fault::Body("application/x-git-upload-pack-result", body)]);
        match collect(&source, &ids).await.1 {
            Err(FetchError::Retry { .. }) => assert!(passes),
            Err(FetchError::Refused { .. }) => assert!(!passes),
            other => panic!("{other:?}"),
        }
    }
    server.posts([Fault::Body("text/html", b"please log in".to_vec())]);
    let error = collect(&source, &ids).await.1.unwrap_err();
    assert!(matches!(error, FetchError::Wrong { .. }));
    fetch_all(&source, &ids).await;
}

#[tokio::test]
async fn stalled() {
    let Setup { repo: _repo, server, source: patient, ids } = setup().await;
    let limits = Limits { stall_secs: 1, ..LIMITS };
    let source = http_source(HashKind::Sha1, at(server.url()), limits);
    for at in [0, 13, 20_000] {
        server.posts([Fault::Stall(at)]);
        let start = Instant::now();
        let (sink, result) = collect(&source, &ids).await;
        assert!(matches!(result, Err(FetchError::Retry { .. })), "{at}: {result:?}");
        let took = start.elapsed().as_secs_f32();
        assert!((0.9..15.0).contains(&took), "{took} s");
        right(&sink);
    }
    fetch_all(&patient, &ids).await;
}

#[tokio::test]
async fn reset() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/repo.git", listener.local_addr().unwrap());
    let answers = [
        "",
        "HTTP/1.1 200 OK\r\n",
        "HTTP/1.1 200 OK\r\ncontent-type: application/x-git-upload-pack-advertisement\r\n\
         content-length: 1000\r\n\r\n000eversion 2\n",
    ];
    for answer in answers {
        let serve = async {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1000];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
                // so that closing it sends a reset
                reset_when_closed(&stream);
            }
        };
        let source = plain(HashKind::Sha1, url.clone());
        let error = tokio::select! {
            result = source.capabilities() => result.unwrap_err(),
            () = serve => unreachable!(),
        };
        assert!(matches!(error, FetchError::Retry { .. }), "{answer:?}: {error:?}");
    }
}

fn reset_when_closed(stream: &tokio::net::TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
}

#[tokio::test]
async fn nobody_listens() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/repo.git", socket.local_addr().unwrap());
    drop(socket);
    let source = plain(HashKind::Sha1, url);
    let error = source.capabilities().await.unwrap_err();
    assert!(matches!(&error, FetchError::Retry { message, .. } if message.contains("refused")));
}

#[tokio::test]
async fn lies() {
    let Setup { repo, server, source, ids } = setup().await;
    // the answer to another question
    let other = Repo::new(HashKind::Sha1);
    let others = [other.add_blob(b"something else")];
    let wrong_pack = {
        let list = format!("{}\n", others[0]);
        feed(git(&other.path()).args(["pack-objects", "--stdout", "-q"]), list.as_bytes())
    };
    let mut body = b"000dpackfile\n".to_vec();
    body.extend(format!("{:04x}\x01", wrong_pack.len() + 5).bytes());
    body.extend_from_slice(&wrong_pack);
    body.extend_from_slice(b"0000");
    server.posts([Fault::Body("application/x-git-upload-pack-result", body)]);
    let (sink, result) = collect(&source, &ids[..1]).await;
    assert!(matches!(result, Err(FetchError::Wrong { .. })), "{result:?}");
    assert!(sink.objects.is_empty());
    // a byte is another: in the flush, the trailer, the middle of an object
    for back in [5, 10, 20, 30, 9_000, 25_000, 50_000] {
        server.posts([Fault::Corrupt(back)]);
        let (sink, result) = collect(&source, &ids).await;
        assert!(result.is_err(), "{back}");
        right(&sink);
    }
    fetch_all(&source, &ids).await;
    drop(repo);
}

#[tokio::test]
async fn a_dropped_fetch_leaves_nothing_behind() {
    let Setup { repo: _repo, server, source, ids } = setup().await;
    server.posts([Fault::Stall(20_000)]);
    let asked = async {
        while server.count(Method::POST) == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        result = collect(&source, &ids) => panic!("{:?}", result.1),
        () = asked => {}
    }
    fetch_all(&source, &ids).await;
}
