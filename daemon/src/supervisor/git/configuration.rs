//! What the user's configuration and environment say.

mod http;

use std::path::Path;

use super::{Git, GitError, Remote};
use crate::importer::attributes;
use crate::queue::wire::{GitTransport, HttpTransport};

/// How an origin is reached.
#[derive(Debug)]
pub struct Way {
    /// After `url.<base>.insteadOf`.
    pub url: String,
    pub remote: Remote,
    pub transport: GitTransport,
    /// Where a forge has it for everybody, too, if it is one that is reached over ssh.
    pub web: Option<HttpTransport>,
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
        let transport = match remote {
            Remote::Http(_) => GitTransport::Http(git.http(&url, &origin).await?),
            _ => GitTransport::Pipe,
        };
        let web = match remote.web() {
            // it is not needed
            Some(web) => git.http(&web, &origin).await.ok(),
            None => None,
        };
        Ok(Way { url, remote, transport, web })
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
