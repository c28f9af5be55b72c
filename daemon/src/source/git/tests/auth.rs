//! 401, and who is asked what.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::repo::Repo;
use super::server::Server;
use super::*;

fn basic(password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("me:{password}")))
}

async fn setup(keys: &[Credential]) -> (Repo, Server, Arc<Keyring>, ObjectId) {
    let repo = Repo::new(HashKind::Sha1);
    let id = repo.add_blob(b"secret content");
    let server = Server::new(repo.dir.path()).await;
    server.needs(Some(&basic("good")));
    (repo, server, Keyring::new(keys), id)
}

fn source(server: &Server, keyring: &Arc<Keyring>) -> GitSource {
    try_source(HashKind::Sha1, at(server.url()), LIMITS, keyring.clone()).unwrap()
}

#[tokio::test]
async fn asked_once_and_kept() {
    let (_repo, server, keyring, id) = setup(&[credential("me", "good")]).await;
    let source = source(&server, &keyring);
    fetch_all(&source, &[id]).await;
    fetch_all(&source, &[id]).await;
    assert_eq!(keyring.asked(), [(server.url(), None)]);
    assert_eq!(server.seen().len(), 4, "a 401, then three that go through");
}

#[tokio::test]
async fn one_in_the_url_needs_no_asking() {
    let (_repo, server, keyring, id) = setup(&[]).await;
    let transport =
        HttpTransport { credential: Some(credential("me", "good")), ..at(server.url()) };
    let source = try_source(HashKind::Sha1, transport, LIMITS, keyring.clone()).unwrap();
    fetch_all(&source, &[id]).await;
    assert!(keyring.asked().is_empty());
    assert!(server.seen().iter().all(|seen| seen.headers["authorization"] == basic("good")));
}

#[tokio::test]
async fn renewed_when_it_expires() {
    let (_repo, server, keyring, id) =
        setup(&[credential("me", "good"), credential("me", "better")]).await;
    let source = source(&server, &keyring);
    let mut sent = fetch_all(&source, &[id]).await.sent;
    // an hour later
    server.needs(Some(&basic("better")));
    let fetches = (0..10).map(|_| fetch_all(&source, std::slice::from_ref(&id)));
    let fetched = futures_util::future::join_all(fetches).await;
    sent += fetched.iter().map(|got| got.sent).sum::<u64>();
    let first = (server.url(), None);
    let second = (server.url(), Some(credential("me", "good")));
    assert_eq!(keyring.asked(), [first, second], "ten readers, one question");
    let bodies: usize = server.seen().iter().map(|seen| seen.body_len).sum();
    assert_eq!(sent, bodies as u64, "also those that were refused");
}

#[tokio::test]
async fn refused_after_the_second() {
    let keys = [credential("me", "bad"), credential("me", "worse"), credential("me", "good")];
    let (_repo, server, keyring, id) = setup(&keys).await;
    let source = source(&server, &keyring);
    let error = collect(&source, &[id]).await.1.unwrap_err();
    assert!(matches!(&error, FetchError::Refused { message } if message.contains("user name")));
    assert!(!error.to_string().contains("bad"));
    let bad = (server.url(), Some(credential("me", "bad")));
    assert_eq!(keyring.asked(), [(server.url(), None), bad]);
    // the next request asks again, and says what is known to be refused
    fetch_all(&source, &[id]).await;
    assert_eq!(keyring.asked()[2].1, Some(credential("me", "worse")));
}

#[tokio::test]
async fn nobody_knows_one() {
    let (_repo, server, keyring, id) = setup(&[]).await;
    let source = source(&server, &keyring);
    let fetches = (0..5).map(|_| collect(&source, std::slice::from_ref(&id)));
    for (sink, result) in futures_util::future::join_all(fetches).await {
        assert!(matches!(result, Err(FetchError::Refused { .. })), "{result:?}");
        assert!(sink.objects.is_empty());
    }
    // the capabilities are asked for one after another, so not all of them shared one question
    assert!(keyring.asked().len() <= 5);
}

#[tokio::test]
async fn the_same_again_is_not_tried() {
    let (_repo, server, keyring, id) =
        setup(&[credential("me", "bad"), credential("me", "bad")]).await;
    let source = source(&server, &keyring);
    assert!(matches!(collect(&source, &[id]).await.1, Err(FetchError::Refused { .. })));
    assert_eq!(server.seen().len(), 2);
}
