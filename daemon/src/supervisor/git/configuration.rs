//! What the user's configuration and environment say.

use std::path::Path;
use std::process::Stdio;

use super::remote::without_credential;
use super::{Git, GitError, Remote, program, run};
use crate::importer::attributes;
use crate::queue::wire::{GitTransport, HttpTransport};

/// How an origin is reached.
#[derive(Debug)]
pub struct Way {
    /// After `url.<base>.insteadOf`.
    pub url: String,
    pub remote: Remote,
    pub transport: GitTransport,
}

impl Git {
    /// The way to an origin, from the user's configuration, for a clone that need not be there yet:
    /// [`directory`](Self::directory) is any one of the user's.
    pub async fn way(&self, url: &str) -> Result<Way, GitError> {
        let mut git = self.clone();
        if let Some(parent) = self.directory.parent() {
            // what may lie further up is somebody else's
            let ceiling = parent.to_string_lossy().into_owned();
            git.environment.push(("GIT_CEILING_DIRECTORIES".into(), ceiling));
        }
        // for conditional includes
        let origin = format!("remote.origin.url={url}");
        let url = git.line(&["-c", &origin, "ls-remote", "--get-url", "origin"]).await?;
        let remote = Remote::parse(&url)?;
        let transport = git.transport(&url, &origin).await?;
        Ok(Way { url, remote, transport })
    }

    async fn transport(&self, url: &str, origin: &str) -> Result<GitTransport, GitError> {
        let Remote::Http(_) = Remote::parse(url)? else { return Ok(GitTransport::Pipe) };
        let mut http = HttpTransport::default();
        let (plain, credential) = without_credential(url);
        http.url = plain;
        http.credential = credential;
        let args = ["-c", origin, "config", "-z", "--get-urlmatch", "http", &http.url.clone()];
        let output = match self.output(&args).await {
            Ok(output) => output,
            // nothing is configured
            Err(GitError::Failed { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut ca_file = None;
        for (name, value) in settings(&output) {
            match name.as_str() {
                "http.proxy" if !value.is_empty() => http.proxy = Some(value),
                "http.useragent" => http.user_agent = Some(value),
                "http.sslverify" => http.insecure = is_false(&value),
                "http.sslcainfo" => ca_file = Some(value),
                _ => {}
            }
        }
        http.extra_headers = self.extra_headers(&http.url, origin).await?;
        if let Some((_, file)) = self.environment.iter().find(|(name, _)| name == "GIT_SSL_CAINFO")
        {
            ca_file = Some(file.clone());
        }
        if http.proxy.is_none() {
            http.proxy = self.proxy_from_environment(&http.url);
        }
        if self.environment.iter().any(|(name, _)| name == "GIT_SSL_NO_VERIFY") {
            http.insecure = true;
        }
        if let Some(file) = ca_file {
            // read as the user, who may point it to whatever the user may read
            let mut command = program(self, "cat")?;
            command.arg("--").arg(&file).stdin(Stdio::null()).stdout(Stdio::piped());
            command.stderr(Stdio::piped());
            let pem = run(command, &["cat", &file], None).await?;
            http.ca_pem = Some(String::from_utf8_lossy(&pem).into_owned());
        }
        Ok(GitTransport::Http(http))
    }

    /// What the configuration says of conversions between repository and files.
    pub async fn conversion(&self) -> Result<attributes::Config, GitError> {
        let pattern = r"^(core\.(autocrlf|eol|attributesfile)|filter\..*\.(smudge|process))$";
        let output = match self.output(&["config", "-z", "--get-regexp", pattern]).await {
            Ok(output) => output,
            Err(GitError::Failed { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut config = attributes::Config::default();
        for (name, value) in settings(&output) {
            match name.as_str() {
                "core.autocrlf" => {
                    config.autocrlf_input = value == "input";
                    config.autocrlf = !config.autocrlf_input && !is_false(&value);
                }
                "core.eol" => config.eol_crlf = value == "crlf",
                "core.attributesfile" => config.other_files = true,
                _ if value.is_empty() => {}
                name => {
                    let filter = name.strip_prefix("filter.").and_then(|n| n.rsplit_once('.'));
                    config.filters.extend(filter.map(|(filter, _)| filter.as_bytes().to_vec()));
                }
            }
        }
        let home = self.user.home.join(".config/git/attributes");
        config.other_files |= home.exists() || Path::new("/etc/gitattributes").exists();
        Ok(config)
    }

    /// `http.extraHeader` may be there several times, which `--get-urlmatch` doesn't tell.
    async fn extra_headers(&self, url: &str, origin: &str) -> Result<Vec<String>, GitError> {
        let pattern = r"^http\.(.*\.)?extraheader$";
        let args = ["-c", origin, "config", "-z", "--get-regexp", pattern];
        let output = match self.output(&args).await {
            Ok(output) => output,
            Err(GitError::Failed { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut headers = Vec::new();
        for (name, value) in settings(&output) {
            let of = name.strip_prefix("http.").and_then(|n| n.strip_suffix("extraheader"));
            let of = of.unwrap_or_default().trim_end_matches('.');
            if !of.is_empty() && !url.starts_with(of) {
                continue;
            }
            if value.is_empty() {
                // an empty value forgets those before it
                headers.clear();
            } else {
                headers.push(value);
            }
        }
        Ok(headers)
    }

    /// The proxy that curl would take for a URL (`ENVIRONMENT` in curl(1)).
    fn proxy_from_environment(&self, url: &str) -> Option<String> {
        let variable = |name: &str| {
            let found = self.environment.iter().find(|(other, _)| other == name);
            found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
        };
        let url = url::Url::parse(url).ok()?;
        let host = url.host_str()?;
        let none = variable("no_proxy").or_else(|| variable("NO_PROXY")).unwrap_or_default();
        let excepted =
            none.split(',').map(|name| name.trim().trim_start_matches('.')).any(|name| {
                !name.is_empty()
                    && (name == "*" || host == name || host.ends_with(&format!(".{name}")))
            });
        if excepted {
            return None;
        }
        // as curl, which doesn't look at HTTP_PROXY: a CGI's clients can set that
        let names: &[&str] = match url.scheme() {
            "https" => &["https_proxy", "HTTPS_PROXY"],
            _ => &["http_proxy"],
        };
        names.iter().chain(&["all_proxy", "ALL_PROXY"]).find_map(|name| variable(name))
    }
}

/// `name\nvalue\0…`, as `git config -z` prints it.
fn settings(output: &[u8]) -> impl Iterator<Item = (String, String)> + '_ {
    output.split(|b| *b == 0).filter(|entry| !entry.is_empty()).map(|entry| {
        let text = String::from_utf8_lossy(entry);
        match text.split_once('\n') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (text.into_owned(), "true".to_owned()),
        }
    })
}

/// A boolean of git-config(1).
fn is_false(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "false" | "no" | "off" | "0" | "")
}
