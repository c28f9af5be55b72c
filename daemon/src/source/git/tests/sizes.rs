//! Sizes: every way to learn them, against what `git ls-tree -l` says.

use axum::body::Body;
use axum::http::{Method, Response};
use reqwest::Url;
use serde_json::json;

use super::pipe::UploadPack;
use super::repo::Repo;
use super::server::{Fault, Server};
use super::*;
use crate::source::git::{Forge, ForgeKind, ObjectInfo, SizesOutcome, SizesQuery, sidecar};

fn repo() -> Repo {
    let contents: Vec<_> = (0..60usize).map(|i| vec![b'x'; i * i % 50 * 37]).collect();
    let files = contents.iter().enumerate().map(|(i, c)| (format!("d{}/e/f{i}", i % 4), &c[..]));
    Repo::with_files(HashKind::Sha1, files)
}

async fn sizes(source: &GitSource, repo: &Repo) -> SizesOutcome {
    let entries: Vec<_> = repo.entries().iter().map(|(id, _)| *id).collect();
    let mut seen = std::collections::HashSet::new();
    let wanted: Vec<_> = entries.iter().copied().filter(|id| seen.insert(*id)).collect();
    let query = SizesQuery { tree: Some(repo.tree()), entries: &entries, wanted: &wanted };
    source.sizes(&query).await.unwrap()
}

fn by_id(outcome: &SizesOutcome) -> HashMap<ObjectId, u64> {
    let by_id: HashMap<_, _> = outcome.known.iter().copied().collect();
    assert_eq!(by_id.len(), outcome.known.len(), "each once");
    by_id
}

fn all_right(outcome: &SizesOutcome, repo: &Repo, how: &str) {
    assert_eq!(outcome.how, how, "{outcome:?}");
    assert_eq!(outcome.unknown, []);
    assert_eq!(by_id(outcome), repo.entries().into_iter().collect());
    assert_eq!(outcome.advice, None);
}

#[tokio::test]
async fn object_info() {
    let repo = repo();
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    assert_eq!(source.capabilities().await.unwrap().object_info, ObjectInfo::Bare);
    all_right(&sizes(&source, &repo).await, &repo, "object-info");

    // what the server does not have is not guessed
    let entries = repo.entries();
    let missing = repo.blob(b"not there");
    let ids = [entries[0].0, missing, entries[1].0];
    let query = SizesQuery { tree: None, entries: &[], wanted: &ids };
    let outcome = source.sizes(&query).await.unwrap();
    assert_eq!(outcome.unknown, [missing]);
    assert_eq!(outcome.known, entries[..2]);

    let posts = server.count(Method::POST);
    let query = SizesQuery { tree: None, entries: &ids, wanted: &[] };
    assert!(source.sizes(&query).await.unwrap().known.is_empty());
    assert_eq!(server.count(Method::POST), posts);
}

#[tokio::test]
async fn who_has_met_the_server_asks_at_once() {
    let repo = repo();
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha256, server.url());
    source.meet().await;
    assert_eq!((server.count(Method::GET), server.count(Method::POST)), (1, 0));
    let source = source.with_hash(HashKind::Sha1);
    all_right(&sizes(&source, &repo).await, &repo, "object-info");
    assert_eq!((server.count(Method::GET), server.count(Method::POST)), (1, 1));
}

#[tokio::test]
async fn object_info_in_chunks() {
    let repo = repo();
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    let mut ids: Vec<_> = (0..25_000u32).map(|i| repo.blob(&i.to_be_bytes())).collect();
    let here = repo.entries();
    ids.push(here[5].0);
    let start = std::time::Instant::now();
    let query = SizesQuery { tree: None, entries: &[], wanted: &ids };
    let outcome = source.sizes(&query).await.unwrap();
    println!("25001 sizes in {:?}", start.elapsed());
    assert_eq!(outcome.unknown, ids[..25_000]);
    assert_eq!(outcome.known, [here[5]]);
    let posts: Vec<_> = server.seen().into_iter().filter(|s| s.method == Method::POST).collect();
    assert_eq!(posts.len(), 3);
    assert!(posts.iter().all(|post| post.headers["content-encoding"] == "gzip"));
}

#[tokio::test]
async fn object_info_that_fails_or_lies() {
    let repo = repo();
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    let (id, _) = repo.entries()[0];
    let query = SizesQuery { tree: None, entries: &[], wanted: &[id] };
    let answer = |line: &str| {
        let body = format!("0009size\n{:04x}{line}0000", line.len() + 4).into_bytes();
        Fault::Body("application/x-git-upload-pack-result", body)
    };
    let other = repo.blob(b"other");
    let lies =
        [format!("{id}"), format!("{id} +5"), format!("{id} x"), format!("{other} 5"), "".into()];
    for line in lies {
        server.posts([answer(&line)]);
        let error = source.sizes(&query).await.unwrap_err();
        assert!(matches!(error, FetchError::Wrong { .. }), "{line}: {error:?}");
    }
    server.posts([answer(&format!("{id} "))]);
    assert_eq!(source.sizes(&query).await.unwrap().unknown, [id]);
    // trouble is trouble, and no reason to fetch everything
    for fault in [Fault::Status(500, vec![]), Fault::Truncate(20)] {
        server.posts([fault]);
        let error = source.sizes(&query).await.unwrap_err();
        assert!(matches!(error, FetchError::Retry { .. }), "{error:?}");
    }
    all_right(&sizes(&source, &repo).await, &repo, "object-info");
}

fn without_object_info(repo: &Repo) {
    repo.git(&["config", "transfer.advertiseObjectInfo", "false"]);
}

#[tokio::test]
async fn nobody_tells() {
    let repo = repo();
    without_object_info(&repo);
    let server = Server::new(repo.dir.path()).await;
    let outcome = sizes(&plain(HashKind::Sha1, server.url()), &repo).await;
    assert_eq!(outcome.how, "nobody");
    assert!(outcome.known.is_empty());
    let mut ids: Vec<_> = repo.entries().into_iter().map(|(id, _)| id).collect();
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    assert_eq!(outcome.unknown, ids);
    assert!(outcome.advice.unwrap().contains("transfer.advertiseObjectInfo"));
}

#[tokio::test]
async fn a_sidecar() {
    let repo = repo();
    without_object_info(&repo);
    let list: Vec<_> = repo.entries().iter().map(|(_, size)| *size).collect();
    let blob = repo.add_blob(&sidecar::encode(&list).unwrap());
    repo.git(&["update-ref", &sidecar::name(repo.tree()), &blob.to_string()]);
    let server = Server::new(repo.dir.path()).await;
    let source = plain(HashKind::Sha1, server.url());
    all_right(&sizes(&source, &repo).await, &repo, "sidecar ref");
    // of another tree, or damaged: not used
    let wrong = repo.add_blob(&sidecar::encode(&list[1..]).unwrap());
    repo.git(&["update-ref", &sidecar::name(repo.tree()), &wrong.to_string()]);
    let outcome = sizes(&source, &repo).await;
    assert_eq!(outcome.how, "nobody");
    assert!(outcome.known.is_empty());
    assert!(outcome.advice.unwrap().contains("refs/hydrant/sizes/"));
}

/// A tree as `git ls-tree` lists it, in the form of GitHub and Gitea.
fn listing(repo: &Repo, id: &str, recursive: bool) -> Vec<serde_json::Value> {
    let mut args = vec!["ls-tree", "-l"];
    args.extend(recursive.then_some(&["-r", "-t"][..]).into_iter().flatten());
    args.push(id);
    repo.git(&args)
        .lines()
        .map(|line| {
            let (meta, path) = line.split_once('\t').unwrap();
            let words: Vec<_> = meta.split_ascii_whitespace().collect();
            json!({
                "path": path, "mode": words[0], "type": words[1], "sha": words[2],
                "size": words[3].parse::<u64>().ok(),
            })
        })
        .collect()
}

fn answer(value: &serde_json::Value) -> Option<Response<Body>> {
    let response = Response::builder().header("content-type", "application/json");
    Some(response.body(Body::from(value.to_string())).unwrap())
}

async fn forge(
    repo: Repo,
    kind: ForgeKind,
    api: impl Fn(&Repo, &str, &str) -> Option<Response<Body>> + Send + Sync + 'static,
) -> (Arc<Repo>, Server, GitSource) {
    without_object_info(&repo);
    let server = Server::new(repo.dir.path()).await;
    let repo = Arc::new(repo);
    let theirs = repo.clone();
    server.handle(move |seen| {
        let path = seen.path.strip_prefix("/api/")?;
        let id = path.trim_start_matches("git/trees/").trim_start_matches("+/").trim_matches('/');
        api(&theirs, id, &seen.query)
    });
    let url = format!("http://localhost:{}/api/", server.address.port());
    let forge = Forge { kind, api: Url::parse(&url).unwrap() };
    let source = plain(HashKind::Sha1, server.url()).with_forge(forge);
    (repo, server, source)
}

#[tokio::test]
async fn github() {
    let (repo, server, source) = forge(repo(), ForgeKind::GitHub, |repo, id, query| {
        let tree = listing(repo, id, query == "recursive=1");
        answer(&json!({"sha": id, "tree": tree, "truncated": false}))
    })
    .await;
    all_right(&sizes(&source, &repo).await, &repo, "GitHub's API");
    assert_eq!(server.seen().iter().filter(|s| s.path.starts_with("/api")).count(), 1);
}

/// Behind a pipe, the forge is asked at its address for everybody, and not told who asks.
#[tokio::test]
async fn github_of_a_repository_behind_a_pipe() {
    let (repo, server, over_http) = forge(repo(), ForgeKind::GitHub, |repo, id, query| {
        let tree = listing(repo, id, query == "recursive=1");
        answer(&json!({"sha": id, "tree": tree, "truncated": false}))
    })
    .await;
    let forge = over_http.inner.forge.clone().unwrap();
    let keyring = Keyring::new(&[credential("me", "secret")]);
    let pipe = || {
        let origin = GitOrigin { hash: HashKind::Sha1, transport: GitTransport::Pipe };
        let connector = UploadPack::new(repo.clone(), "version=2");
        let source = GitSource::new(origin, LIMITS, keyring.clone(), connector);
        source.unwrap().with_forge(forge.clone())
    };
    assert_eq!(sizes(&pipe(), &repo).await.how, "nobody");
    let source = pipe().with_web(at(server.url()), LIMITS);
    all_right(&sizes(&source, &repo).await, &repo, "GitHub's API");
    // who wants to know who asks is not told
    server.needs(Some("Basic bWU6c2VjcmV0"));
    let outcome = sizes(&source, &repo).await;
    assert_eq!(outcome.how, "nobody");
    assert!(outcome.advice.unwrap().contains("GitHub's API"));
    assert!(server.seen().iter().all(|seen| !seen.headers.contains_key("authorization")));
    assert!(keyring.asked().is_empty());
}

#[tokio::test]
async fn github_descends_where_it_is_cut() {
    let (repo, server, source) = forge(repo(), ForgeKind::GitHub, |repo, id, query| {
        let recursive = query == "recursive=1";
        let mut tree = listing(repo, id, recursive);
        let truncated = recursive && tree.len() > 30;
        if truncated {
            tree.truncate(30);
        }
        answer(&json!({"sha": id, "tree": tree, "truncated": truncated}))
    })
    .await;
    all_right(&sizes(&source, &repo).await, &repo, "GitHub's API");
    let calls = server.seen().iter().filter(|s| s.path.starts_with("/api")).count();
    assert!((4..10).contains(&calls), "{calls}");
}

#[tokio::test]
async fn a_forge_that_stops_half_way() {
    let limited = std::sync::atomic::AtomicUsize::new(0);
    let (repo, _server, source) = forge(repo(), ForgeKind::GitHub, move |repo, id, query| {
        let recursive = query == "recursive=1";
        if limited.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 3 {
            return Some(Response::builder().status(403).body(Body::empty()).unwrap());
        }
        let tree = listing(repo, id, recursive);
        let truncated = recursive && tree.len() > 30;
        answer(&json!({"tree": &tree[..tree.len().min(20)], "truncated": truncated}))
    })
    .await;
    let outcome = sizes(&source, &repo).await;
    assert!(!outcome.known.is_empty() && !outcome.unknown.is_empty());
    let truth: HashMap<_, _> = repo.entries().into_iter().collect();
    assert!(outcome.known.iter().all(|(id, size)| truth[id] == *size));
    assert!(outcome.advice.unwrap().contains("403"));
}

#[tokio::test]
async fn gitea_in_pages() {
    let (repo, server, source) = forge(repo(), ForgeKind::Gitea, |repo, id, query| {
        let page: usize =
            query.split('&').find_map(|q| q.strip_prefix("page=")).unwrap().parse().unwrap();
        let all = listing(repo, id, true);
        let some: Vec<_> = all.iter().skip((page - 1) * 20).take(20).cloned().collect();
        let more = page * 20 < all.len();
        answer(&json!({"tree": some, "truncated": more, "page": page, "total_count": all.len()}))
    })
    .await;
    all_right(&sizes(&source, &repo).await, &repo, "Gitea's API");
    assert_eq!(server.seen().iter().filter(|s| s.path.starts_with("/api")).count(), 4);
}

#[tokio::test]
async fn gitiles() {
    let (repo, _server, source) = forge(repo(), ForgeKind::Gitiles, |repo, id, query| {
        assert!(query.contains("long=1"));
        let entries: Vec<_> = listing(repo, id, true)
            .into_iter()
            .filter(|entry| entry["type"] == "blob")
            .map(|e| json!({"id": e["sha"], "type": "blob", "name": e["path"], "size": e["size"]}))
            .collect();
        let body = format!(")]}}'\n{}", json!({"id": id, "entries": entries}));
        Some(Response::new(Body::from(body)))
    })
    .await;
    all_right(&sizes(&source, &repo).await, &repo, "Gitiles");
}

#[tokio::test]
async fn forges_by_host() {
    let repo = repo();
    let server = Server::new(repo.dir.path()).await;
    let mut capabilities =
        (*plain(HashKind::Sha1, server.url()).capabilities().await.unwrap()).clone();
    let mut guess = |url: &str, agent: &str| {
        capabilities.agent = Some(agent.to_owned());
        let forge = Forge::guess(&Url::parse(url).unwrap(), &capabilities)?;
        Some((forge.kind, forge.api.to_string()))
    };
    let is = |kind, url: &str| Some((kind, url.to_owned()));
    let git = "git/2.47.3";
    assert_eq!(
        guess("https://github.com/git/git.git", "git/github-1"),
        is(ForgeKind::GitHub, "https://api.github.com/repos/git/git")
    );
    assert_eq!(
        guess("https://git.example.com/a/b", "git/github-abc-Linux"),
        is(ForgeKind::GitHub, "https://git.example.com/api/v3/repos/a/b")
    );
    assert_eq!(
        guess("https://codeberg.org/a/b.git", git),
        is(ForgeKind::Gitea, "https://codeberg.org/api/v1/repos/a/b")
    );
    assert_eq!(
        guess("https://go.googlesource.com/a/go", "git/x"),
        is(ForgeKind::Gitiles, "https://go.googlesource.com/go")
    );
    assert_eq!(guess("https://git.example.com/a/b", git), None);
}
