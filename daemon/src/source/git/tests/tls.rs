//! TLS: whom we trust, and HTTP/2.

use super::repo::Repo;
use super::server::{Fault, Server};
use super::*;
use crate::queue::wire::ClientCertificate;

const CA: &str = include_str!("tls/ca.pem");
const CLIENT: &str = include_str!("tls/client.pem");
const CLIENT_KEY: &str = include_str!("tls/client.key");

#[tokio::test]
async fn a_certificate_of_the_users_and_http_2() {
    let repo = Repo::new(HashKind::Sha1);
    let ids: Vec<_> = (0..20).map(|i| repo.add_blob(&noise(50_000 + i))).collect();
    let server = Server::with_tls(repo.dir.path()).await;
    let transport = HttpTransport { ca_pem: Some(CA.into()), ..at(server.url()) };
    let source = http_source(HashKind::Sha1, transport, LIMITS);
    let fetches = ids.iter().map(|id| fetch_all(&source, std::slice::from_ref(id)));
    futures_util::future::join_all(fetches).await;
    assert!(server.seen().iter().all(|seen| seen.http2));

    let to = server.url().replace("https:", "http:") + "/info/refs?service=git-upload-pack";
    server.gets([Fault::Status(301, vec![("location", to)])]);
    let transport = HttpTransport { ca_pem: Some(CA.into()), ..at(server.url()) };
    let error = http_source(HashKind::Sha1, transport, LIMITS).capabilities().await.unwrap_err();
    assert!(matches!(&error, FetchError::Refused { message } if message.contains("not encrypted")));
}

#[tokio::test]
async fn a_certificate_of_nobodys() {
    let repo = Repo::new(HashKind::Sha1);
    let id = repo.add_blob(b"x");
    let server = Server::with_tls(repo.dir.path()).await;
    let error = plain(HashKind::Sha1, server.url()).capabilities().await.unwrap_err();
    assert!(
        matches!(&error, FetchError::Refused { message } if message.contains("certificate")),
        "{error:?}"
    );
    assert!(server.seen().is_empty());
    // unless the user does not care
    let transport = HttpTransport { insecure: true, ..at(server.url()) };
    fetch_all(&http_source(HashKind::Sha1, transport, LIMITS), &[id]).await;

    let transport = HttpTransport {
        ca_pem: Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into()),
        ..at(server.url())
    };
    let result = try_source(HashKind::Sha1, transport, LIMITS, Keyring::new(&[]));
    assert!(matches!(result, Err(FetchError::Refused { .. })));
}

#[tokio::test]
async fn a_certificate_to_show() {
    let repo = Repo::new(HashKind::Sha1);
    let id = repo.add_blob(b"x");
    let server = Server::with_tls_for(repo.dir.path(), Some(CLIENT)).await;
    let with = |client_certificate| HttpTransport {
        ca_pem: Some(CA.into()),
        client_certificate,
        ..at(server.url())
    };
    let client = |key: &str| {
        Some(ClientCertificate { certificate: CLIENT.into(), key: key.to_owned() }.into())
    };
    let without = http_source(HashKind::Sha1, with(None), LIMITS);
    without.capabilities().await.unwrap_err();
    assert!(server.seen().is_empty());
    fetch_all(&http_source(HashKind::Sha1, with(client(CLIENT_KEY)), LIMITS), &[id]).await;
    assert!(!server.seen().is_empty());

    let encrypted = CLIENT_KEY.replace("PRIVATE", "ENCRYPTED PRIVATE");
    for (key, why) in [(encrypted.as_str(), "passphrase"), ("x", "http.sslKey")] {
        let transport = with(client(key));
        let result = try_source(HashKind::Sha1, transport, LIMITS, Keyring::new(&[]));
        let Err(FetchError::Refused { message }) = result else { panic!("{result:?}") };
        assert!(message.contains(why), "{message}");
    }
}
