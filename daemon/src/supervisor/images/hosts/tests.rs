use std::fs;

use super::*;

const PEM: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

/// A directory with a file for each name.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    directory
}

fn of(root: &Path, reference: &str) -> Result<Vec<Host>, HostsError> {
    let settings = Settings { directory: Some(root), insecure: &["plain.io".into()] };
    super::of(settings, &Reference::parse(reference).unwrap())
}

fn urls(root: &Path, reference: &str) -> Vec<String> {
    of(root, reference).unwrap().into_iter().map(|host| host.http.url).collect()
}

#[test]
fn without_a_file_the_registry_itself_is_asked() {
    let root = directory(&[]);
    for (reference, url) in [
        ("busybox", "https://registry-1.docker.io/v2/"),
        ("h.io:5000/x", "https://h.io:5000/v2/"),
        ("plain.io/x", "http://plain.io/v2/"),
        ("127.0.0.1:5000/x", "http://127.0.0.1:5000/v2/"),
    ] {
        let hosts = of(root.path(), reference).unwrap();
        let http = HttpTransport { url: url.into(), ..HttpTransport::default() };
        let itself = Host { http, mirror: false, resolves: true, pulls: true };
        assert_eq!(hosts, [itself], "{reference}");
    }
}

#[test]
fn mirrors_are_asked_in_the_files_order() {
    let file = r#"
        server = "https://registry-1.docker.io"
        [host."https://z.io"]
          capabilities = ["pull"]
        [host."a.io:5000/hub"]
          skip_verify = true
          unknown = 1
          [host."a.io:5000/hub".header]
            x-one = "1"
            x-more = ["2", "3"]
        [host."http://m.io/v2/"]
          capabilities = ["Pull", "resolve"]
        [host."https://harbor.io/v2/proxy"]
          override_path = true
        [host."https://push.io"]
          capabilities = ["push"]
    "#;
    let root = directory(&[("docker.io/hosts.toml", file)]);
    let hosts = of(root.path(), "busybox").unwrap();
    let seen: Vec<_> =
        hosts.iter().map(|h| (h.http.url.as_str(), h.mirror, h.resolves, h.pulls)).collect();
    assert_eq!(
        seen,
        [
            ("https://z.io/v2/", true, false, true),
            ("https://a.io:5000/hub/v2/", true, true, true),
            ("http://m.io/v2/", true, true, true),
            ("https://harbor.io/v2/proxy/", true, true, true),
            ("https://registry-1.docker.io/v2/", false, true, true),
        ]
    );
    assert!(hosts[1].http.insecure && !hosts[0].http.insecure);
    assert_eq!(hosts[1].http.extra_headers, ["x-more: 2", "x-more: 3", "x-one: 1"]);
}

#[test]
fn settings_of_the_server_itself() {
    let file = "capabilities = [\"resolve\"]\nskip_verify = true\n[host.\"m.io\"]\n";
    let root = directory(&[("h.io/hosts.toml", file)]);
    let hosts = of(root.path(), "h.io/x").unwrap();
    assert_eq!(hosts[0].http.url, "https://m.io/v2/");
    assert!(hosts[1].http.insecure && hosts[1].resolves && !hosts[1].pulls && !hosts[1].mirror);
    assert_eq!(hosts[1].http.url, "https://h.io/v2/");
}

#[test]
fn the_directory_of_a_registry() {
    let server = |name: &str| format!("server = \"{name}\"");
    let root = directory(&[
        ("h.io_5000_/hosts.toml", &server("port.io")),
        ("h.io:6000/hosts.toml", &server("colon.io")),
        ("_default/hosts.toml", &server("default.io")),
    ]);
    assert_eq!(urls(root.path(), "h.io:5000/x"), ["https://port.io/v2/"]);
    assert_eq!(urls(root.path(), "h.io:6000/x"), ["https://colon.io/v2/"]);
    assert_eq!(urls(root.path(), "h.io/x"), ["https://default.io/v2/"]);
}

#[test]
fn certificates_beside() {
    let file = "ca = [\"a.pem\", \"sub/b.pem\"]\n[host.\"one.io\"]\nca = \"a.pem\"\nclient = \"both.pem\"\n\
                [host.\"two.io\"]\nclient = [[\"c.pem\", \"c.key\"], [\"x\", \"y\"]]\n\
                [host.\"three.io\"]\nclient = [\"both.pem\", \"x\"]\n";
    let root = directory(&[
        ("h.io/hosts.toml", file),
        ("h.io/a.pem", PEM),
        ("h.io/sub/b.pem", PEM),
        ("h.io/both.pem", PEM),
        ("h.io/c.pem", PEM),
        ("h.io/c.key", "key"),
    ]);
    let hosts = of(root.path(), "h.io/x").unwrap();
    let client = |host: &Host| {
        let client = host.http.client_certificate.as_ref().unwrap();
        (client.certificate.clone(), client.key.clone())
    };
    assert_eq!(hosts[0].http.ca_pem.as_deref(), Some(PEM));
    assert_eq!(client(&hosts[0]), (PEM.into(), PEM.into()));
    assert_eq!(client(&hosts[1]), (PEM.into(), "key".into()));
    assert_eq!(client(&hosts[2]), (PEM.into(), PEM.into()));
    assert_eq!(hosts[3].http.ca_pem, Some(format!("{PEM}\n{PEM}")));
}

#[test]
fn docker_has_certificates_alone() {
    let root =
        directory(&[("h.io/ca.crt", PEM), ("h.io/client.cert", PEM), ("h.io/client.key", "key")]);
    let hosts = of(root.path(), "h.io/x").unwrap();
    assert_eq!(hosts[0].http.ca_pem.as_deref(), Some(PEM));
    assert_eq!(hosts[0].http.client_certificate.as_ref().unwrap().key, "key");
}

#[test]
fn what_can_not_be_used_is_named() {
    for (file, expected) in [
        ("server = 1", "make sense"),
        ("server = \"https://\"", "can't be asked"),
        ("ca = \"none.pem\"", "none.pem"),
        ("ca = \"empty.pem\"", "no certificate"),
    ] {
        let root = directory(&[("h.io/hosts.toml", file), ("h.io/empty.pem", "")]);
        let error = of(root.path(), "h.io/x").unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("h.io"), "{error}");
    }
}
