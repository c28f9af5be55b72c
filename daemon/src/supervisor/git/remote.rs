//! Where a repository is, and the pipe to it.

use std::path::PathBuf;

use tokio::process::Command;

use super::{Git, GitError, LOCAL_UPLOAD_PACK, program};
use crate::queue::wire::Credential;

/// Where a URL leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remote {
    Http(String),
    Local(PathBuf),
    Ssh { destination: String, port: Option<u16>, path: String },
}

impl Remote {
    /// Reads a URL as git does (`GIT URLS` in git-fetch(1)).
    pub fn parse(url: &str) -> Result<Self, GitError> {
        if url.starts_with("http://") || url.starts_with("https://") {
            return Ok(Self::Http(url.to_owned()));
        }
        if let Some(path) = url.strip_prefix("file://") {
            return Ok(Self::Local(PathBuf::from(path)));
        }
        for scheme in ["ssh://", "git+ssh://", "ssh+git://"] {
            if let Some(rest) = url.strip_prefix(scheme) {
                let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
                let (host, port) = match host.rsplit_once(':') {
                    Some((host, port)) if !port.contains(']') => (host, port.parse().ok()),
                    _ => (host, None),
                };
                let host = host.replace(['[', ']'], "");
                let path = if path.starts_with('~') { path.to_owned() } else { format!("/{path}") };
                return Self::ssh(host, port, path);
            }
        }
        if let Some((scheme, _)) = url.split_once("://") {
            return Err(GitError::Origin(format!(
                "{url}: Hydrant can't read lazily from a {scheme}:// origin; \
                 use its https or ssh address"
            )));
        }
        if url.starts_with('/') {
            return Ok(Self::Local(PathBuf::from(url)));
        }
        match url.split_once(':') {
            Some((host, path)) if !host.contains('/') => {
                Self::ssh(host.replace(['[', ']'], ""), None, path.to_owned())
            }
            _ => Err(GitError::Origin(format!("{url} is neither a URL nor an absolute path"))),
        }
    }

    fn ssh(destination: String, port: Option<u16>, path: String) -> Result<Self, GitError> {
        // as git: what looks like an option could make ssh run a command
        if destination.is_empty() || destination.starts_with('-') || path.starts_with('-') {
            return Err(GitError::Origin(format!("strange ssh address {destination}:{path}")));
        }
        Ok(Self::Ssh { destination, port, path })
    }
}

impl Git {
    /// A `git upload-pack` at the other end of a pipe, over ssh if need be, in protocol version 2.
    /// The command's standard input and output are for the caller to set. `by_command`: over ssh, the version is
    /// part of the command, as only a shell takes it, and not only a variable, as only some servers let in.
    pub fn upload_pack(&self, remote: &Remote, by_command: bool) -> Result<Command, GitError> {
        let mut command = match remote {
            Remote::Http(url) => {
                return Err(GitError::Origin(format!("{url} is not reached through a pipe")));
            }
            Remote::Local(path) => {
                let mut command = program(self, "sh")?;
                command.arg("-c").arg(format!("exec {LOCAL_UPLOAD_PACK} \"$1\""));
                command.arg("sh").arg(path);
                command
            }
            Remote::Ssh { destination, port, path } => {
                let mut command = program(self, "sh")?;
                // GIT_SSH_COMMAND, core.sshCommand and GIT_SSH in git's own order
                let script = "ssh=${GIT_SSH_COMMAND:-$(git config core.sshCommand)}\n\
                    [ -n \"$ssh\" ] || ssh=${GIT_SSH:+\"$GIT_SSH\"}\n\
                    eval \"exec ${ssh:-ssh} -o BatchMode=yes -o SendEnv=GIT_PROTOCOL \\\"\\$@\\\"\"";
                command.arg("-c").arg(script).arg("sh");
                if let Some(port) = port {
                    command.arg("-p").arg(port.to_string());
                }
                let path = path.replace('\'', r"'\''");
                let env = if by_command { "env GIT_PROTOCOL=version=2 " } else { "" };
                command.arg(destination).arg(format!("{env}git-upload-pack '{path}'"));
                command
            }
        };
        command.env("GIT_PROTOCOL", "version=2").env("GIT_TERMINAL_PROMPT", "0");
        Ok(command)
    }
}

/// A URL without the user and password that may stand in it.
pub(super) fn without_credential(text: &str) -> (String, Option<Credential>) {
    let Ok(mut url) = url::Url::parse(text) else { return (text.to_owned(), None) };
    if url.username().is_empty() && url.password().is_none() {
        return (text.to_owned(), None);
    }
    let decode = |text: &str| percent_decode(text);
    let credential = url.password().map(|password| Credential {
        username: decode(url.username()),
        password: decode(password),
    });
    if credential.is_some() {
        // neither fails for a URL with a host
        url.set_username("").ok();
        url.set_password(None).ok();
        return (url.to_string(), credential);
    }
    (text.to_owned(), None)
}

/// A URL without the password that may stand in it.
pub(super) fn without_password(text: &str) -> String {
    match url::Url::parse(text) {
        Ok(mut url) if url.password().is_some() => {
            // doesn't fail for a URL with a host
            url.set_password(None).ok();
            url.into()
        }
        _ => text.to_owned(),
    }
}

/// A URL as others may see it: without user and password, either of which may be a token.
pub(in super::super) fn for_display(text: &str) -> String {
    let parsed = url::Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(mut url) = parsed.filter(|url| !url.username().is_empty() || url.password().is_some())
    else {
        return text.to_owned();
    };
    // neither fails for a URL with a host
    url.set_username("").ok();
    url.set_password(None).ok();
    url.into()
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        let byte = digits.filter(|_| *first == b'%').and_then(|d| u8::from_str_radix(d, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_as_git_reads_them() {
        let ssh = |destination: &str, port, path: &str| Remote::Ssh {
            destination: destination.into(),
            port,
            path: path.into(),
        };
        for (url, remote) in [
            ("https://h/x.git", Remote::Http("https://h/x.git".into())),
            ("file:///srv/x", Remote::Local("/srv/x".into())),
            ("/srv/a:b", Remote::Local("/srv/a:b".into())),
            ("me@h:x.git", ssh("me@h", None, "x.git")),
            ("ssh://me@h:2222/srv/x", ssh("me@h", Some(2222), "/srv/x")),
            ("ssh://[::1]/x", ssh("::1", None, "/x")),
            ("ssh://h/~me/x", ssh("h", None, "~me/x")),
        ] {
            assert_eq!(Remote::parse(url).unwrap(), remote, "{url}");
        }
        for url in ["git://h/x", "-oProxyCommand=x:y", "ssh://-oX/y", "relative/path"] {
            assert!(Remote::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn passwords_leave_the_url() {
        let (url, credential) = without_credential("https://me:p%40ss@h:1/x");
        assert_eq!(url, "https://h:1/x");
        let credential = credential.unwrap();
        assert_eq!((&credential.username[..], &credential.password[..]), ("me", "p@ss"));
        assert!(!format!("{credential:?}").contains("p@ss"));
        assert_eq!(without_credential("https://me@h/x"), ("https://me@h/x".into(), None));
        for url in ["https://me:p%40ss@h/x", "https://ghp_token@h/x", "https://:p@h/x"] {
            assert_eq!(for_display(url), "https://h/x");
        }
        for url in ["https://h", "me@h:x.git", "/srv/me:x@y", "ssh://me@h/x"] {
            assert_eq!(for_display(url), url);
        }
    }
}
