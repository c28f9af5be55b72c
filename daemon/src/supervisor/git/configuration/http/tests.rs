use std::path::Path;

use nix::unistd::{Gid, Uid};
use tempfile::TempDir;

use super::*;
use crate::queue::wire::GitTransport;
use crate::sys::user::User;

/// git with this as all of its configuration.
fn git(home: &Path, configuration: &str) -> Git {
    let user = User::lookup(Uid::effective().as_raw(), Gid::effective().as_raw()).unwrap();
    let file = home.join("configuration");
    fs_err::write(&file, configuration).unwrap();
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let environment = vec![
        variable("HOME", home.to_str().unwrap()),
        variable("GIT_CONFIG_NOSYSTEM", "1"),
        variable("GIT_CONFIG_GLOBAL", file.to_str().unwrap()),
    ];
    Git { user, environment, directory: home.to_owned() }
}

async fn way(git: &Git, url: &str) -> Result<HttpTransport, GitError> {
    match git.way(url).await?.transport {
        GitTransport::Http(http) => Ok(http),
        GitTransport::Pipe => panic!("{url} is not reached over HTTP"),
    }
}

/// Of what is configured, a forge that is reached over ssh gets what is meant for its https address.
#[tokio::test]
async fn the_web_address_of_a_repository_behind_ssh() {
    let home = TempDir::new().unwrap();
    let configuration = "[http \"https://github.com\"]\nextraHeader = X-Ours: 1\n\
        [http \"https://other.org\"]\nextraHeader = X-Others: 1\nproxy = http://p:1\n";
    let git = git(home.path(), configuration);
    let way = git.way("git@github.com:a/b.git").await.unwrap();
    assert_eq!(way.transport, GitTransport::Pipe);
    let web = way.web.unwrap();
    assert_eq!((&web.url[..], web.proxy), ("https://github.com/a/b.git", None));
    assert_eq!((web.extra_headers, web.credential), (vec!["X-Ours: 1".to_owned()], None));
    assert_eq!(git.way("/srv/x.git").await.unwrap().web, None);
    assert_eq!(git.way("https://github.com/a/b.git").await.unwrap().web, None);
}

/// The extra headers for a URL when each of these names (`""`: `http.extraHeader`) has its own name as
/// a header.
async fn headers(names: &[&str], url: &str) -> Vec<String> {
    let home = TempDir::new().unwrap();
    let section = |name: &&str| match *name {
        "" => "[http]\nextraHeader = all\n".to_owned(),
        name => format!("[http \"{name}\"]\nextraHeader = {name}\n"),
    };
    let configuration: String = names.iter().map(section).collect();
    way(&git(home.path(), &configuration), url).await.unwrap().extra_headers
}

#[tokio::test]
async fn headers_go_only_where_they_are_meant_to() {
    // (configured, origin, whether it matches)
    for (name, url, matches) in [
        ("https://github.com", "https://github.com/a/b.git", true),
        ("https://github.com", "https://GitHub.com:443/a", true),
        ("https://github.com", "https://github.com.evil.org/a", false),
        ("https://github.com", "https://github.community/a", false),
        ("https://github.com", "https://evil.org/https://github.com", false),
        ("https://github.com", "https://github.com@evil.org/a", false),
        ("https://github.com", "https://evil.org@github.com/a", true),
        ("https://github.com", "http://github.com/a", false),
        ("https://github.com", "https://github.com:8443/a", false),
        ("https://github.com:8443", "https://github.com:8443/a", true),
        ("https://github.com:8", "https://github.com:8443/a", false),
        ("https://github.com", "https://api.github.com/a", false),
        ("https://*.github.com", "https://api.github.com/a", true),
        ("https://*.github.com", "https://a.api.github.com/a", false),
        ("https://*.github.com", "https://github.com/a", false),
        ("https://*.github.com", "https://api.github.com.evil.org/a", false),
        ("https://h/team", "https://h/team/x.git", true),
        ("https://h/team", "https://h/team-evil/x.git", false),
        ("https://h/team", "https://h/team/../other/x.git", false),
        ("https://h/team", "https://h/team/%2e%2e/other/x.git", false),
        ("https://h/team/", "https://h/team", true),
        ("https://me@h", "https://me@h/x", true),
        ("https://me@h", "https://you@h/x", false),
        ("https://me@h", "https://h/x", false),
        ("https://me@h", "https://me:word@h/x", true),
        ("https://h", "https://me@h/x", true),
        ("https:", "https://h/x", false),
        ("h", "https://h/x", false),
    ] {
        let found = headers(&[name], url).await;
        assert_eq!(!found.is_empty(), matches, "{name} for {url}");
    }
}

#[tokio::test]
async fn the_more_specific_headers_win() {
    let all = ["", "https://h", "https://h/a"];
    // as git: those in front of a more specific one count too
    assert_eq!(headers(&all, "https://h/a/x").await, ["all", "https://h", "https://h/a"]);
    assert_eq!(headers(&all, "https://h/b/x").await, ["all", "https://h"]);
    assert_eq!(headers(&all, "https://other/x").await, ["all"]);
    let reversed = ["https://h/a", "https://h", ""];
    assert_eq!(headers(&reversed, "https://h/a/x").await, ["https://h/a"]);
    assert_eq!(headers(&["https://*.o", "https://a.o", ""], "https://a.o").await.len(), 2);
    assert!(headers(&[], "https://h/x").await.is_empty());
}

#[tokio::test]
async fn several_headers_of_one_name_and_odd_names() {
    let home = TempDir::new().unwrap();
    let git = git(
        home.path(),
        "[http \"https://h\"]\nextraHeader = X: 1\nextraHeader =\nextraHeader = X: 2\nextraheader = Y: 3\n\
         [http \"https://h/a\\\"b=c\"]\nextraHeader = Z: 4\n[http \"x\\\"]\\n\"]\nextraHeader = Z: 5\n",
    );
    assert_eq!(way(&git, "https://h/x").await.unwrap().extra_headers, ["X: 2", "Y: 3"]);
    let odd = way(&git, "https://h/a%22b=c/x").await.unwrap();
    assert_eq!(odd.extra_headers, ["X: 2", "Y: 3", "Z: 4"]);
}

#[tokio::test]
async fn proxies_and_certificates_of_one_host() {
    let home = TempDir::new().unwrap();
    let at = |name: &str| home.path().join(name);
    let block =
        |body: &str| format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
    fs_err::write(at("one.pem"), block("AAAA") + "-----BEGIN PRIVATE KEY-----\n").unwrap();
    fs_err::create_dir(at("many")).unwrap();
    fs_err::write(at("many/a"), block("AAAA").trim_end()).unwrap();
    fs_err::write(at("many/b"), "a comment\n".to_owned() + &block("BBBB")).unwrap();
    fs_err::write(at("me.pem"), "my certificate").unwrap();
    fs_err::write(at("me.key"), "my key").unwrap();
    let mut git = git(
        home.path(),
        "[http]\nproxy = http://p:1\nsslCAInfo = ~/one.pem\n\
         [http \"https://h\"]\nproxy =\nsslCAPath = ~/many\nsslCert = ~/me.pem\nsslVerify = false\n\
         [http \"https://h/a\"]\nsslKey = ~/me.key\n\
         [http \"https://bad\"]\nsslCAInfo = ~/me.key\n",
    );
    git.environment.push(("https_proxy".into(), "http://p:2".into()));
    let one = way(&git, "https://h.evil.org/x").await.unwrap();
    assert_eq!((one.proxy.as_deref(), one.insecure), (Some("http://p:1"), false));
    assert_eq!((one.ca_pem, one.client_certificate), (Some(block("AAAA")), None));
    let many = way(&git, "https://h/x").await.unwrap();
    assert_eq!((many.proxy.as_deref(), many.insecure), (Some(""), true));
    assert_eq!(many.ca_pem.unwrap(), block("AAAA") + &block("BBBB"));
    assert_eq!(many.client_certificate.unwrap().key.trim(), "my certificate");
    let key = way(&git, "https://h/a/x").await.unwrap().client_certificate.unwrap();
    assert_eq!((key.certificate.trim(), key.key.trim()), ("my certificate", "my key"));
    assert!(!format!("{key:?}").contains("my key"));
    let none = way(&git, "https://bad/x").await.unwrap_err().to_string();
    assert!(none.contains("no certificates"), "{none}");
    // the environment has the last word
    git.environment.push(("GIT_SSL_CAINFO".into(), at("many/b").to_str().unwrap().into()));
    let environment = way(&git, "https://h.evil.org/x").await.unwrap();
    assert_eq!(environment.ca_pem, Some(block("BBBB")));
}
