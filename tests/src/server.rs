//! A real git server: nginx, fcgiwrap and `git http-backend`, private to a test, on a free port of
//! 127.0.0.1. Its access log has the body of every request, so a test can ask what was fetched.

mod record;

use std::fmt::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Leashed, Run, leash, require, until};
use crate::repository::Repository;

pub use record::{GitCommand, Request, Totals};

/// As many requests are served at the same time.
const FCGIWRAPS: usize = 8;

/// What a repository's server may do, beyond plain fetches.
#[derive(Debug, Clone, Copy)]
pub struct Offers {
    /// `uploadpack.allowFilter`
    pub filter: bool,
    /// `transfer.advertiseObjectInfo`
    pub object_info: bool,
    /// `http.receivepack`
    pub push: bool,
}

impl Default for Offers {
    fn default() -> Self {
        Self { filter: true, object_info: true, push: true }
    }
}

/// How a server receives who asks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manners<'a> {
    /// Only those who know this name and password (see [`GitServer::set_password`]).
    pub password: Option<(&'a str, &'a str)>,
    /// Over TLS too, as the host of this name. The certificate is one that openssl makes when nothing is said
    /// about it: signed by itself, and an authority.
    pub tls: Option<&'a str>,
    /// It has nothing itself and sends everybody on to this URL, those who know the password if there is one.
    pub elsewhere: Option<&'a str>,
}

/// The server. Killed when dropped.
#[derive(Debug)]
pub struct GitServer {
    directory: PathBuf,
    port: u16,
    tls_port: Option<u16>,
    _fcgiwraps: Vec<Leashed>,
    _nginx: Leashed,
}

impl GitServer {
    /// Serves the repositories that are put into `directory` with [`add`](Self::add).
    pub fn start(directory: &Path) -> Result<Self> {
        Self::start_with(directory, Manners::default())
    }

    pub fn start_with(directory: &Path, manners: Manners) -> Result<Self> {
        require(&[("nginx", "nginx-light"), ("fcgiwrap", "fcgiwrap"), ("git", "git")])?;
        fs_err::create_dir_all(directory.join("repositories"))?;
        if let Some((user, password)) = manners.password {
            write_password(directory, user, password)?;
        }
        if let Some(host) = manners.tls {
            make_certificate(directory, host)?;
        }
        let backend = Run::program("git", &["--exec-path"]).check()?.text() + "/git-http-backend";
        // Not by fcgiwrap's own forking: its children outlive it when it is killed.
        let listener = UnixListener::bind(directory.join("fcgi.sock"))?;
        let log = fs_err::File::create(directory.join("fcgiwrap.log"))?.into_parts().0;
        let mut fcgiwraps = Vec::with_capacity(FCGIWRAPS);
        for _ in 0..FCGIWRAPS {
            let mut command = Command::new("fcgiwrap");
            command.args(["-p", &backend]).stdin(OwnedFd::from(listener.try_clone()?));
            command.stdout(Stdio::null()).stderr(log.try_clone()?);
            fcgiwraps.push(leash(command)?);
        }

        // Somebody else may take the port between our look and nginx's start.
        for _ in 0..5 {
            let port = free_port()?;
            let tls_port = manners.tls.map(|_| free_port()).transpose()?;
            let configuration = configuration(directory, port, tls_port, &backend, manners);
            let file = directory.join("nginx.conf");
            fs_err::write(&file, configuration)?;
            let error_log = directory.join("error.log");
            let mut command = Command::new("nginx");
            command.args(["-p"]).arg(directory).arg("-e").arg(&error_log).arg("-c").arg(&file);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut nginx = leash(command)?;
            let up = until("nginx's port", Duration::from_secs(10), || {
                let ended = nginx.ended().is_some();
                let up = TcpStream::connect(("127.0.0.1", port)).is_ok();
                (up || ended).then_some(!ended)
            })?;
            if up {
                let directory = directory.to_owned();
                return Ok(Self {
                    directory,
                    port,
                    tls_port,
                    _fcgiwraps: fcgiwraps,
                    _nginx: nginx,
                });
            }
        }
        let log = fs_err::read_to_string(directory.join("error.log")).unwrap_or_default();
        bail!("nginx does not start:\n{log}")
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port for TLS of a server that speaks it.
    pub fn tls_port(&self) -> Result<u16> {
        self.tls_port.context("a server without TLS")
    }

    /// The certificate of a server that speaks TLS.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.directory.join("certificate.pem")
    }

    /// Serves a copy of `repository` as `NAME.git`; gives its directory, a bare repository.
    pub fn add(&self, repository: &Repository, name: &str, offers: Offers) -> Result<PathBuf> {
        let path = self.directory.join("repositories").join(format!("{name}.git"));
        repository.copy_to(&path)?;
        for (key, value) in [
            ("uploadpack.allowFilter", offers.filter),
            ("transfer.advertiseObjectInfo", offers.object_info),
            ("http.receivepack", offers.push),
        ] {
            let mut command = Command::new("git");
            command.arg("-C").arg(&path).args([
                "config",
                key,
                if value { "true" } else { "false" },
            ]);
            Run::new(command).check()?;
        }
        Ok(path)
    }

    /// The URL of the repository that was added as `name`.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        url_at(self.port, name)
    }

    /// From now on only this name and password will do.
    pub fn set_password(&self, user: &str, password: &str) -> Result<()> {
        write_password(&self.directory, user, password)
    }

    /// Everything that was asked so far, in the order in which the answers were complete.
    pub fn requests(&self) -> Result<Vec<Request>> {
        self.settle()?;
        record::parse(&fs_err::read(self.directory.join("access.log"))?)
    }

    /// What was asked since the last call of this function, or since the start.
    pub fn new_requests(&self) -> Result<Vec<Request>> {
        self.settle()?;
        let log = fs_err::read(self.directory.join("access.log"))?;
        let place = self.directory.join("read-so-far");
        let from = fs_err::read_to_string(&place).ok().and_then(|s| s.parse().ok()).unwrap_or(0);
        fs_err::write(place, log.len().to_string())?;
        record::parse(&log[from..])
    }

    /// nginx is a single process and handles one thing after the other: once it has answered this,
    /// it has logged every request whose answer was complete before.
    fn settle(&self) -> Result<()> {
        use std::io::Read as _;
        use std::io::Write as _;
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).context("nginx is gone")?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(b"GET /settled HTTP/1.0\r\n\r\n")?;
        stream.read_to_end(&mut Vec::new()).context("nginx does not answer")?;
        Ok(())
    }
}

/// The URL of repository `name` behind `port`: the server's own, or a proxy's.
#[must_use]
pub fn url_at(port: u16, name: &str) -> String {
    format!("http://127.0.0.1:{port}/{name}.git")
}

/// A TCP port of 127.0.0.1 that was free a moment ago.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no free port")?;
    Ok(listener.local_addr()?.port())
}

fn write_password(directory: &Path, user: &str, password: &str) -> Result<()> {
    let new = directory.join("password.new");
    fs_err::write(&new, format!("{user}:{{PLAIN}}{password}\n"))?;
    Ok(fs_err::rename(new, directory.join("password"))?)
}

fn make_certificate(directory: &Path, host: &str) -> Result<()> {
    let script = r#"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
        -subj "/CN=$2" -addext "subjectAltName=DNS:$2" -keyout "$1/key.pem" -out "$1/certificate.pem""#;
    Run::shell(script, &[directory, Path::new(host)]).check()?;
    Ok(())
}

fn configuration(
    directory: &Path,
    port: u16,
    tls_port: Option<u16>,
    backend: &str,
    manners: Manners,
) -> String {
    let directory = directory.display();
    let mut temporary = String::new();
    for kind in ["client_body", "fastcgi", "proxy", "scgi", "uwsgi"] {
        let _ = writeln!(temporary, "    {kind}_temp_path {directory}/temporary/{kind};");
    }
    let _ = std::fs::create_dir_all(format!("{directory}/temporary"));
    let password = manners.password.map_or_else(String::new, |_| {
        format!("auth_basic repositories; auth_basic_user_file {directory}/password;")
    });
    let tls = tls_port.map_or_else(String::new, |port| {
        format!(
            "listen 127.0.0.1:{port} ssl http2; ssl_certificate {directory}/certificate.pem; \
             ssl_certificate_key {directory}/key.pem;"
        )
    });
    // Not a plain `return`, which comes before the password.
    let (try_elsewhere, elsewhere) = manners.elsewhere.map_or_else(Default::default, |url| {
        let on = format!("location @elsewhere {{ return 302 {url}$request_uri; }}");
        ("try_files /nothing @elsewhere;", on)
    });
    // Bodies are kept in memory whole: only then can they be logged.
    format!(
        r#"daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 4096; }}
http {{
{temporary}    log_format requests escape=none '$request_method $request_uri $status $request_length $bytes_sent $request_time $authorized $content_length\n$request_body';
    map $http_authorization $authorized {{ "" no; default yes; }}
    access_log off;
    client_max_body_size 0;
    client_body_buffer_size 64m;
    client_body_in_single_buffer on;
    keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        {tls}
        access_log {directory}/access.log requests;
        location = /settled {{ access_log off; return 204; }}
        {elsewhere}
        location / {{
            {password}
            {try_elsewhere}
            fastcgi_pass unix:{directory}/fcgi.sock;
            fastcgi_buffering off;
            fastcgi_read_timeout 600s;
            fastcgi_param SCRIPT_FILENAME {backend};
            fastcgi_param GIT_PROJECT_ROOT {directory}/repositories;
            fastcgi_param GIT_HTTP_EXPORT_ALL 1;
            fastcgi_param GIT_PROTOCOL $http_git_protocol;
            fastcgi_param PATH_INFO $uri;
            fastcgi_param QUERY_STRING $query_string;
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param CONTENT_TYPE $content_type;
            fastcgi_param CONTENT_LENGTH $content_length;
            fastcgi_param REMOTE_USER $remote_user;
            fastcgi_param REMOTE_ADDR $remote_addr;
        }}
    }}
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::{MAIN, generated};
    use crate::scratch::Scratch;

    fn git(directory: &Path, arguments: &[&str]) -> Run {
        let mut command = Command::new("git");
        command.arg("-C").arg(directory).args(arguments).env("GIT_TERMINAL_PROMPT", "0");
        Run::new(command)
    }

    #[test]
    fn serves_and_records() {
        let scratch = Scratch::new("server").unwrap();
        let server = GitServer::start(&scratch.path().join("server")).unwrap();
        let repository = generated(2_000).unwrap();
        server.add(&repository, "some", Offers::default()).unwrap();
        let url = server.url("some");
        let partial = ["clone", "-q", "--filter=blob:none", "--no-checkout", &url, "clone"];
        git(scratch.path(), &partial).check().unwrap();
        let requests = server.new_requests().unwrap();
        let filters = requests.iter().filter_map(|request| match &request.command {
            GitCommand::Fetch { filter, .. } => filter.clone(),
            _ => None,
        });
        assert_eq!(filters.collect::<Vec<_>>(), ["blob:none"]);
        assert!(requests.iter().any(|request| request.command == GitCommand::LsRefs));

        let (id, _) = &repository.blobs(MAIN).unwrap()[7];
        let clone = scratch.path().join("clone");
        git(&clone, &["cat-file", "blob", id]).check().unwrap();
        let requests = server.new_requests().unwrap();
        let wants: Vec<&String> = requests.iter().flat_map(Request::wants).collect();
        assert_eq!(wants, [id]);
        let totals: Totals = requests.iter().collect();
        assert!(totals.sent_bytes > 200 && totals.received_bytes > 200, "{totals:?}");
        assert!(server.new_requests().unwrap().is_empty());
        assert!(server.requests().unwrap().len() > requests.len());

        // A body of more than a buffer, chunked, packed by git: all of it is in the log.
        let ids: Vec<String> = repository.blobs(MAIN).unwrap().into_iter().map(|b| b.0).collect();
        let fetch = "-c http.postBuffer=70000 -c fetch.negotiationAlgorithm=noop fetch origin -q \
                     --no-tags --no-write-fetch-head --filter=blob:none --stdin";
        let fetch: Vec<&str> = fetch.split_whitespace().collect();
        git(&clone, &fetch).input(ids.join("\n") + "\n").check().unwrap();
        let requests = server.new_requests().unwrap();
        assert!(requests.iter().map(|request| request.wants().len()).sum::<usize>() > 1_900);
    }

    #[test]
    fn asks_for_a_password_that_may_change() {
        let scratch = Scratch::new("password").unwrap();
        let place = scratch.path().join("server");
        let server = GitServer::start_with(
            &place,
            Manners { password: Some(("user", "one")), ..Manners::default() },
        )
        .unwrap();
        server.add(&generated(2_000).unwrap(), "some", Offers::default()).unwrap();
        let with = |user: &str| server.url("some").replace("://", &format!("://{user}@"));
        let ask = |url: &str| git(scratch.path(), &["ls-remote", url]).output().unwrap().status;
        assert!(!ask(&server.url("some")).success());
        assert!(ask(&with("user:one")).success());
        server.set_password("user", "two").unwrap();
        assert!(!ask(&with("user:one")).success());
        assert!(ask(&with("user:two")).success());
    }
}
