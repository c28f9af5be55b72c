//! `http.*` and `http.<url>.*` of git-config(1). Which of the latter are for a URL is git's to say.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::Stdio;

use super::super::remote::{without_credential, without_password};
use super::super::{Git, GitError, program, run};
use super::{is_false, settings};
use crate::queue::wire::{ClientCertificate, HttpTransport};

/// More certificates than these are not sent to a worker
/// ([`MAX_MESSAGE`](crate::queue::wire::MAX_MESSAGE)).
const MAX_CERTIFICATES: usize = 400 << 10;

impl Git {
    /// `origin`: a setting that names the origin, for conditional includes.
    pub(super) async fn http(&self, url: &str, origin: &str) -> Result<HttpTransport, GitError> {
        let mut http = HttpTransport::default();
        (http.url, http.credential) = without_credential(url);
        // A user name in the URL counts for what matches.
        let matched = without_password(url);
        let of_url = ["-c", origin, "config", "-z", "--get-urlmatch", "http", &matched];
        let output = self.configured(&of_url, None).await?;
        let mut files = BTreeSet::new();
        for (name, value) in settings(&output) {
            match name.as_str() {
                // empty: none, whatever the environment says
                "http.proxy" => http.proxy = Some(value),
                "http.useragent" => http.user_agent = Some(value),
                "http.sslverify" => http.insecure = is_false(&value),
                "http.sslcainfo" | "http.sslcapath" | "http.sslcert" | "http.sslkey" => {
                    files.insert(name);
                }
                _ => {}
            }
        }
        http.extra_headers = self.extra_headers(&matched, origin).await?;
        if http.proxy.is_none() {
            http.proxy = self.proxy_from_environment(&http.url);
        }
        if self.variable("GIT_SSL_NO_VERIFY").is_some() {
            http.insecure = true;
        }
        let mut path = async |variable: &str, name: &str| -> Result<Option<String>, GitError> {
            if let Some(path) = self.variable(variable) {
                return Ok(Some(path));
            }
            if !files.remove(name) {
                return Ok(None);
            }
            // `~/` is for git to expand
            let args =
                ["-c", origin, "config", "-z", "--type=path", "--get-urlmatch", name, &matched];
            let output = self.configured(&args, None).await?;
            let value = String::from_utf8_lossy(&output).trim_end_matches('\0').to_owned();
            Ok(Some(value).filter(|path| !path.is_empty()))
        };
        let ca_file = path("GIT_SSL_CAINFO", "http.sslcainfo").await?;
        let ca_directory = path("GIT_SSL_CAPATH", "http.sslcapath").await?;
        let certificate = path("GIT_SSL_CERT", "http.sslcert").await?;
        let key = path("GIT_SSL_KEY", "http.sslkey").await?;
        if ca_file.is_some() || ca_directory.is_some() {
            let mut pem = String::new();
            for path in [ca_file, ca_directory].into_iter().flatten() {
                pem += &self.read(&path).await?;
            }
            http.ca_pem = Some(certificates(&pem)?);
        }
        if let Some(certificate) = certificate {
            // as curl: the key may be in the same file
            let key = self.read(key.as_ref().unwrap_or(&certificate)).await?;
            let certificate = self.read(&certificate).await?;
            http.client_certificate = Some(ClientCertificate { certificate, key }.into());
        }
        Ok(http)
    }

    /// What `git config` prints; nothing if nothing is configured.
    async fn configured(&self, args: &[&str], input: Option<&[u8]>) -> Result<Vec<u8>, GitError> {
        match run(self.command(args)?, args, input).await {
            Err(GitError::Failed { .. }) => Ok(Vec::new()),
            other => other,
        }
    }

    fn variable(&self, name: &str) -> Option<String> {
        let found = self.environment.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
    }

    /// `http.extraHeader`, which may be there several times; `--get-urlmatch` tells only the last one.
    ///
    /// As git reads it, a header counts unless one before it was for a part of the URL that is more
    /// specific. git itself says which: it is asked of a configuration that has, for the n-th
    /// header, a variable that is set once for each header up to that one, to its number. What
    /// counts of that variable is n just when the n-th header does.
    async fn extra_headers(&self, url: &str, origin: &str) -> Result<Vec<String>, GitError> {
        let pattern = r"^http\.(.*\.)?extraheader$";
        let args = ["-c", origin, "config", "-z", "--get-regexp", pattern];
        let output = self.configured(&args, None).await?;
        let found: Vec<(Option<String>, String)> = settings(&output)
            .filter_map(|(name, value)| {
                let of = name.strip_prefix("http.")?.strip_suffix("extraheader")?;
                Some((of.strip_suffix('.').map(str::to_owned), value))
            })
            .collect();
        let mut question = String::new();
        for n in 0..found.len() {
            for (i, (of, _)) in found.iter().take(n + 1).enumerate() {
                let section = match of {
                    None => "[http]".into(),
                    Some(of) => {
                        let of = of.replace('\\', r"\\").replace('"', "\\\"");
                        format!("[http \"{of}\"]")
                    }
                };
                // writing to a string doesn't fail
                writeln!(question, "{section}\nh{n} = {i}").ok();
            }
        }
        let args = ["config", "-z", "--file", "-", "--get-urlmatch", "http", url];
        let answer = match found.is_empty() {
            true => Vec::new(),
            false => self.configured(&args, Some(question.as_bytes())).await?,
        };
        let counts: BTreeSet<usize> = settings(&answer)
            .filter_map(|(name, i)| {
                let n: usize = name.strip_prefix("http.h")?.parse().ok()?;
                (i.parse() == Ok(n)).then_some(n)
            })
            .collect();
        let mut headers = Vec::new();
        for (n, (_, value)) in found.into_iter().enumerate() {
            match (counts.contains(&n), value.is_empty()) {
                (false, _) => {}
                // an empty value forgets those before it
                (true, true) => headers.clear(),
                (true, false) => headers.push(value),
            }
        }
        Ok(headers)
    }

    /// A file, or the files of a directory. Read as the user, who may name whatever the user may
    /// read.
    async fn read(&self, path: &str) -> Result<String, GitError> {
        let mut command = program(self, "sh")?;
        let script = r#"if [ -d "$1" ]; then
                for f in "$1"/*; do if [ -f "$f" ]; then cat < "$f"; echo; fi; done
            else cat < "$1" && echo; fi"#;
        command.arg("-c").arg(script).arg("sh").arg(path);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let content = run(command, &["config", path], None).await?;
        Ok(String::from_utf8_lossy(&content).into_owned())
    }

    /// The proxy that curl would take for a URL (`ENVIRONMENT` in curl(1)).
    fn proxy_from_environment(&self, url: &str) -> Option<String> {
        let url = url::Url::parse(url).ok()?;
        let host = url.host_str()?;
        let none = self.variable("no_proxy").or_else(|| self.variable("NO_PROXY"));
        let none = none.unwrap_or_default();
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
        names.iter().chain(&["all_proxy", "ALL_PROXY"]).find_map(|name| self.variable(name))
    }
}

/// The certificates of this text, each once: a directory has them under their names and their
/// hashes. What else there is (keys, comments) stays here.
fn certificates(text: &str) -> Result<String, GitError> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let blocks = text.split(BEGIN).skip(1).filter_map(|block| block.split_once(END));
    let all: BTreeSet<&str> = blocks.map(|(body, _)| body.trim()).collect();
    let mut pem = String::new();
    for body in all {
        writeln!(pem, "{BEGIN}\n{body}\n{END}").ok();
    }
    match pem.len() {
        0 => Err(GitError::Origin("http.sslCAInfo or http.sslCAPath has no certificates".into())),
        1..MAX_CERTIFICATES => Ok(pem),
        _ => Err(GitError::Origin(format!(
            "http.sslCAInfo and http.sslCAPath have more than {MAX_CERTIFICATES} bytes of certificates"
        ))),
    }
}

#[cfg(test)]
mod tests;
