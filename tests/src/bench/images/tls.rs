//! TLS in front of the proxies, for clients that can do without it only where the registry is this machine, and not for all that
//! they ask for. It is between them and the slow way, so that the round trips of its handshakes are not counted.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;

use crate::process::{Leashed, Run, leash, require, until};
use crate::server::free_port;

/// The registry's name; who uses it has to have it in `/etc/hosts`.
pub(super) const NAME: &str = "registry.test";

/// The server. Killed when dropped.
#[derive(Debug)]
pub(super) struct Tls {
    directory: PathBuf,
    /// In the order of what it stands in front of.
    pub(super) ports: Vec<u16>,
    _process: Leashed,
}

impl Tls {
    pub(super) fn start(directory: &Path, upstreams: &[u16]) -> Result<Self> {
        require(&[("openssl", "openssl"), ("nginx", "nginx-light")])?;
        fs_err::create_dir_all(directory)?;
        let make = "cd \"$1\" && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
                    -keyout key.pem -out certificate.pem -subj /CN=registry.test \
                    -addext subjectAltName=DNS:registry.test -days 30 2>&1";
        Run::shell(make, &[directory]).check()?;
        let ports = upstreams.iter().map(|_| free_port()).collect::<Result<Vec<_>>>()?;
        let place = directory.display();
        let servers: String = ports
            .iter()
            .zip(upstreams)
            .map(|(port, upstream)| {
                format!(
                    "server {{ listen 127.0.0.1:{port} ssl;
                     location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }}\n"
                )
            })
            .collect();
        let configuration = format!(
            "daemon off; user root; pid {place}/pid; error_log {place}/log;
             events {{}}
             http {{
             access_log off; client_max_body_size 0; client_body_temp_path {place}/body;
             proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
             uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
             ssl_certificate {place}/certificate.pem; ssl_certificate_key {place}/key.pem;
             proxy_buffering off; proxy_request_buffering off; proxy_http_version 1.1;
             proxy_set_header Connection \"\"; proxy_set_header Host $http_host;
             proxy_set_header X-Forwarded-Proto https;
             {servers} }}\n"
        );
        let file = directory.join("nginx.conf");
        fs_err::write(&file, configuration)?;
        let mut command = Command::new("nginx");
        command.arg("-e").arg(directory.join("log")).arg("-p").arg(directory).arg("-c").arg(&file);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = leash(command)?;
        until("nginx answers", Duration::from_secs(60), || {
            let up = |port: &u16| TcpStream::connect(("127.0.0.1", *port)).is_ok();
            ports.iter().all(up).then_some(())
        })?;
        Ok(Self { directory: directory.to_owned(), ports, _process: process })
    }

    /// Who signs for the registry: itself.
    pub(super) fn certificate(&self) -> PathBuf {
        self.directory.join("certificate.pem")
    }
}
