//! Fetching over HTTP, when all goes well or the server plainly can't.

use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::{Method, Response};

use super::repo::{Repo, feed, git};
use super::server::{Fault, Server};
use super::*;
use crate::source::git::Capabilities;

/// Versions of a text that differ little, so that packs have deltas of them.
fn versions(n: usize) -> Vec<Vec<u8>> {
    let text: Vec<String> = (0..300).map(|i| format!("line {} of the text\n", i * 7919)).collect();
    (0..n)
        .map(|i| {
            let mut text = text.clone();
            text[i % 300] = format!("changed in version {i}\n");
            text.concat().into_bytes()
        })
        .collect()
}

fn named(contents: &[Vec<u8>]) -> impl Iterator<Item = (String, &[u8])> {
    contents.iter().enumerate().map(|(i, content)| (format!("d{}/f{i}", i / 100), &content[..]))
}

#[tokio::test]
async fn one_get_then_one_post_for_each_fetch() {
    let contents = versions(30);
    let repo = Repo::with_files(HashKind::Sha1, named(&contents));
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url() + "/");
    let ids: Vec<_> = contents.iter().map(|content| repo.blob(content)).collect();

    let (first, second) = (&ids[..1], &ids[1..]);
    let got = fetch_all(&source, first).await;
    assert!(got.received > 100);
    let first_sent = got.sent;
    let zipped = fetch_all(&source, second).await;
    // asked for twice in one request: given once
    let (got, result) = collect(&source, &[ids[3], ids[3]]).await;
    result.unwrap();
    assert_eq!(got.objects.len(), 1);
    // nothing asked for: nothing sent
    collect(&source, &[]).await.1.unwrap();

    let seen = server.seen();
    assert_eq!(server.count(Method::GET), 1);
    assert_eq!(server.count(Method::POST), 3);
    assert_eq!(server.connections.load(Ordering::Relaxed), 1, "kept alive");
    assert_eq!(seen[0].query, "service=git-upload-pack");
    for request in &seen {
        assert_eq!(request.headers["git-protocol"], "version=2");
        let agent = request.headers["user-agent"].to_str().unwrap();
        assert!(agent.starts_with("git/2.") && agent.contains("hydrant/"), "{agent}");
        assert!(!request.path.contains("//"));
    }
    assert!(!seen[1].headers.contains_key("content-encoding"));
    assert_eq!(seen[2].headers["content-encoding"], "gzip");
    assert!(seen[2].body_len < 29 * 50, "{}", seen[2].body_len);
    assert!(first_sent > 100);
    let told = [first_sent, zipped.sent].map(|bytes| bytes as usize);
    assert_eq!(told, [seen[1].body_len, seen[2].body_len]);
}

#[tokio::test]
async fn what_another_process_found_out_is_not_asked_again() {
    let contents = versions(3);
    let repo = Repo::with_files(HashKind::Sha1, named(&contents));
    let server = Server::new(repo.dir.path()).await;
    let ids: Vec<_> = contents.iter().map(|content| repo.blob(content)).collect();
    let told = Arc::new(Mutex::new(Vec::new()));
    let source = |known| {
        let source = plain(HashKind::Sha1, server.url());
        let told = Arc::clone(&told);
        source.introduce(known, move |server: &Capabilities| {
            told.lock().unwrap().push(server.clone());
        });
        source
    };
    fetch_all(&source(None), &ids[..1]).await;
    let known = told.lock().unwrap().clone();
    assert_eq!((known.len(), server.count(Method::GET)), (1, 1));

    fetch_all(&source(known.first().cloned()), &ids[1..2]).await;
    assert_eq!((server.count(Method::GET), server.count(Method::POST)), (1, 2));

    // what is wrong about it is found out, and the next try asks
    let wrong = Capabilities { object_format: Some(HashKind::Sha256), ..known[0].clone() };
    let source = source(Some(wrong));
    let (_, result) = collect(&source, &ids[2..]).await;
    assert!(matches!(result, Err(FetchError::Refused { .. })), "{result:?}");
    fetch_all(&source, &ids[2..]).await;
    assert_eq!((server.count(Method::GET), server.count(Method::POST)), (2, 3));
    assert_eq!(*told.lock().unwrap(), [known[0].clone(), known[0].clone()]);
}

#[tokio::test]
async fn a_connection_is_kept_although_its_answer_ends_late() {
    let repo = Repo::new(HashKind::Sha1);
    let ids: Vec<_> = (0..5).map(|i| repo.add_blob(&noise(i))).collect();
    let server = Server::new(repo.dir.path()).await;
    server.posts(vec![Fault::LateEnd; 5]);
    let source = plain(HashKind::Sha1, server.url());
    for id in &ids {
        fetch_all(&source, std::slice::from_ref(id)).await;
    }
    assert_eq!(server.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn five_thousand_blobs_in_one_request() {
    let contents = versions(5000);
    let repo = Repo::with_files(HashKind::Sha1, named(&contents));
    repo.git(&["repack", "-adfq", "--window=10"]);
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    let ids: Vec<_> = contents.iter().map(|content| repo.blob(content)).collect();
    let start = std::time::Instant::now();
    let got = fetch_all(&source, &ids).await;
    println!("5000 blobs, {} bytes on the wire: {:?}", got.received, start.elapsed());
    assert_eq!(server.count(Method::POST), 1);
    // as whole objects it would be several times as much
    assert!(got.received < 5000 * 400, "{}: no deltas?", got.received);
}

#[tokio::test]
async fn the_raw_pack_is_good_for_index_pack() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let contents = versions(200);
        let repo = Repo::with_files(hash, named(&contents));
        repo.git(&["repack", "-adfq"]);
        let server = Server::new(repo.dir.path()).await;
        let source = plain(hash, server.url());
        let ids: Vec<_> = contents.iter().map(|content| repo.blob(content)).collect();
        let mut sink = Collect::default();
        let raw = match source.raw_fetch(&ids, &mut sink).await.unwrap() {
            Content::Memory(bytes) => bytes,
            Content::Spooled { file, .. } => read_spooled(file).unwrap(),
        };
        assert_eq!(sink.objects.len(), 200);
        let other = Repo::new(hash);
        match source.raw_fetch(&[], &mut Collect::default()).await.unwrap() {
            Content::Memory(empty) => {
                feed(git(&other.path()).args(["index-pack", "--stdin", "--strict"]), &empty);
            }
            spooled @ Content::Spooled { .. } => panic!("{spooled:?}"),
        }
        feed(git(&other.path()).args(["index-pack", "--stdin", "--strict"]), &raw);
        let pack = other.git(&["count-objects", "-v"]);
        assert!(pack.contains("in-pack: 200"), "{pack}");
        let list = ids.iter().map(|id| format!("{id}\n")).collect::<String>();
        let info = feed(
            git(&other.path()).args(["cat-file", "--batch-check=%(objecttype) %(deltabase)"]),
            list.as_bytes(),
        );
        let info = String::from_utf8(info).unwrap();
        assert!(info.lines().all(|line| line.starts_with("blob ")), "{info}");
        let whole = format!("blob {}", "0".repeat(hash.id_len() * 2));
        let deltas = info.lines().filter(|line| *line != whole).count();
        assert!(deltas > 100, "only {deltas} deltas: this tests nothing");
    }
}

#[tokio::test]
async fn a_large_blob_goes_through_a_file() {
    let large = noise(20_000_000);
    let repo = Repo::with_files(HashKind::Sha1, [("large".to_owned(), &large[..])]);
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    let got = fetch_all(&source, &[repo.blob(&large)]).await;
    assert_eq!((got.spooled, got.spools), (1, 1), "its pack is not kept besides");
    assert!(got.received >= 20_000_000);
    // among others, and as the raw pack too
    let small = repo.add_blob(b"small");
    let mut sink = Collect::default();
    let keys = [small, repo.blob(&large)];
    let raw = source.raw_fetch(&keys, &mut sink).await.unwrap();
    assert!(matches!(raw, Content::Spooled { len, .. } if len > 20_000_000));
    assert_eq!(sink.objects.len(), 2);
}

#[tokio::test]
async fn sha256_and_empty() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let repo = Repo::new(hash);
        let ids = [repo.add_blob(b""), repo.add_blob(b"x"), repo.add_blob(&noise(300_000))];
        let server = Server::new(repo.dir.path()).await;
        let source = plain(hash, server.url());
        fetch_all(&source, &ids[..1]).await;
        fetch_all(&source, &ids).await;
        let other = match hash {
            HashKind::Sha1 => HashKind::Sha256,
            HashKind::Sha256 => HashKind::Sha1,
        };
        let result = plain(other, server.url()).capabilities().await;
        assert!(matches!(result, Err(FetchError::Refused { .. })), "{result:?}");
    }
}

#[tokio::test]
async fn an_object_that_is_not_there_is_named() {
    let repo = Repo::new(HashKind::Sha1);
    let there = repo.add_blob(b"there");
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    let missing = repo.blob(b"not there");
    for keys in [&[missing][..], &[there, missing]] {
        match collect(&source, keys).await.1 {
            Err(FetchError::Missing { key, .. }) => assert_eq!(key, missing),
            other => panic!("{other:?}"),
        }
    }
    fetch_all(&source, &[there]).await;
    // an id of the other kind can't be there
    let other = ObjectId::of_blob(HashKind::Sha256, b"there");
    assert!(matches!(collect(&source, &[other]).await.1, Err(FetchError::Missing { .. })));
}

#[tokio::test]
async fn whether_a_blob_is_given_can_be_asked() {
    for hash in [HashKind::Sha1, HashKind::Sha256] {
        let repo = Repo::new(hash);
        let there = repo.add_blob(b"there");
        let server = Server::new(repo.dir.path()).await;
        let source = plain(hash, server.url());
        source.probe(there).await.unwrap();
        let withheld = |result| match result {
            Err(FetchError::Missing { key, message }) => (key, message),
            other => panic!("{other:?}"),
        };
        let missing = repo.blob(b"not there");
        assert_eq!(withheld(source.probe(missing).await).0, missing);
        // as JGit says it
        let line = format!("ERR want {there} not valid");
        let body = format!("{:04x}{line}", line.len() + 4).into_bytes();
        server.posts([Fault::Body("application/x-git-upload-pack-result", body)]);
        let (key, message) = withheld(source.probe(there).await);
        assert!(key == there && message.contains("not valid"), "{message}");
        server.posts([Fault::Status(500, vec![])]);
        let result = source.probe(there).await;
        assert!(matches!(result, Err(FetchError::Retry { .. })), "{result:?}");
    }
}

#[tokio::test]
async fn no_git_server_of_version_2() {
    let repo = Repo::new(HashKind::Sha1);
    let server = Server::new(repo.dir.path()).await;
    repo.add_blob(b"x");
    feed(
        git(&repo.path()).args(["fast-import", "--quiet"]),
        b"commit refs/heads/main\ncommitter A <a@b> 0 +0000\ndata 1\nx\n",
    );
    let cases = [
        (Fault::OldProtocol, "version 0"),
        (Fault::Body("text/plain", b"7d1\trefs/heads/main\n".to_vec()), "dumb HTTP"),
        (Fault::Body("text/html; charset=utf-8", b"<html>".to_vec()), "web page"),
        (
            Fault::Body("application/x-git-upload-pack-advertisement", b"<html>".to_vec()),
            "not answer as a git server",
        ),
        (Fault::Status(404, vec![]), "404"),
    ];
    for (fault, words) in cases {
        server.gets([fault]);
        // a new one each time, which knows nothing
        let source = plain(HashKind::Sha1, server.url());
        let error = collect(&source, &[repo.blob(b"x")]).await.1.unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    let source = plain(HashKind::Sha1, server.url().replace("repo.git", "other.git"));
    let result = source.capabilities().await;
    assert!(matches!(result, Err(FetchError::Refused { .. })), "{result:?}");
    for url in ["", "ftp://localhost/x", "file:///x"] {
        let result = try_source(HashKind::Sha1, at(url.into()), LIMITS, Keyring::new(&[]));
        assert!(matches!(result, Err(FetchError::Refused { .. })), "{url}");
    }
}

#[tokio::test]
async fn the_first_redirect_moves_the_repository() {
    let repo = Repo::new(HashKind::Sha1);
    let ids = [repo.add_blob(b"one"), repo.add_blob(b"two")];
    let here = Server::new(repo.dir.path()).await;
    let there = Server::new(repo.dir.path()).await;
    let to = there.url();
    here.handle(move |seen| {
        let location = format!("{to}/info/refs?{}", seen.query);
        Some(redirect(302, location))
    });
    let transport = HttpTransport {
        extra_headers: vec!["Authorization: Bearer secret".into(), "X-Token: secret".into()],
        credential: Some(credential("me", "secret")),
        ..at(here.url())
    };
    let source = http_source(HashKind::Sha1, transport, LIMITS);
    fetch_all(&source, &ids[..1]).await;
    fetch_all(&source, &ids[1..]).await;
    let seen = here.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].headers["x-token"], "secret");
    assert!(seen[0].headers.contains_key("authorization"));
    assert_eq!(there.seen().len(), 3);
    for request in there.seen() {
        assert!(!request.headers.contains_key("authorization"), "it went to another host");
        assert!(!request.headers.contains_key("x-token"), "it went to another host");
        assert!(request.headers.contains_key("user-agent"));
    }
}

fn redirect(status: u16, location: String) -> Response<Body> {
    Response::builder().status(status).header("location", location).body(Body::empty()).unwrap()
}

#[tokio::test]
async fn other_redirects() {
    let repo = Repo::new(HashKind::Sha1);
    let id = repo.add_blob(b"one");
    let server = Server::new(repo.dir.path()).await;
    let url = server.url();
    let to = |location: &str| Fault::Status(301, vec![("location", location.to_owned())]);

    // within the same host, relative
    server.gets([to("/repo.git/info/refs?service=git-upload-pack")]);
    let source = plain(HashKind::Sha1, url.replace("repo.git", "old-name"));
    fetch_all(&source, &[id]).await;

    // a POST is not sent on, but the next try finds out where the repository is
    let gets = server.count(Method::GET);
    server.posts([to("https://elsewhere.invalid/repo.git/git-upload-pack")]);
    let error = collect(&source, &[id]).await.1.unwrap_err();
    assert!(matches!(error, FetchError::Retry { .. }), "{error:?}");
    server.gets([to("/repo.git/info/refs?service=git-upload-pack")]);
    fetch_all(&source, &[id]).await;
    assert_eq!(server.count(Method::GET), gets + 2);

    let refused = [
        ("/repo.git/HEAD?service=git-upload-pack", "no git repository"),
        ("/repo.git/info/refs", "no git repository"),
        ("file:///etc/passwd", "redirects to file:"),
        ("http://[", "redirects to"),
    ];
    for (location, words) in refused {
        server.gets([to(location)]);
        let error = plain(HashKind::Sha1, url.clone()).capabilities().await.unwrap_err();
        assert!(matches!(error, FetchError::Refused { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "{location}: {error}");
    }
    // for ever
    let seen = server.seen().len();
    server.handle(|seen| Some(redirect(307, format!("{}?{}", seen.path, seen.query))));
    let error = plain(HashKind::Sha1, url).capabilities().await.unwrap_err();
    assert!(error.to_string().contains("for ever"), "{error}");
    assert!(server.seen().len() - seen < 30);
}

#[tokio::test]
async fn through_a_proxy_with_extra_headers() {
    let repo = Repo::new(HashKind::Sha1);
    let id = repo.add_blob(b"one");
    let server = Server::new(repo.dir.path()).await;
    let transport = HttpTransport {
        proxy: Some(format!("http://{}", server.address)),
        extra_headers: vec!["X-One: 1".into(), String::new(), "X-Two: 2".into()],
        user_agent: Some("mine/1".into()),
        // the proxy resolves it, not we
        ..at("http://origin.invalid/repo.git".into())
    };
    let source = http_source(HashKind::Sha1, transport, LIMITS);
    fetch_all(&source, &[id]).await;
    for request in server.seen() {
        assert_eq!(request.headers["host"], "origin.invalid");
        assert_eq!(request.headers["user-agent"], "mine/1");
        assert_eq!(request.headers["x-two"], "2");
        assert!(!request.headers.contains_key("x-one"), "an empty line forgets those before");
    }
}
