//! git, run as the user whose tree it is.
//!
//! The user's own git does what needs the user's credentials, proxies and ssh set-up: it fetches
//! commits and trees, answers for credentials at fault time, and opens the pipe to a remote
//! `git upload-pack`. The supervisor reads none of what comes from the origin: such output goes to
//! files or straight on to an unprivileged process.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::importer::attributes;
use crate::object::ObjectId;
use crate::queue::wire::{Credential, GitTransport, HttpTransport};
use crate::sys::user::{self, User};

/// What a partial clone in a lazily filled tree needs (git-config(1)):
/// - `trustctime`, `checkStat`: git takes a file for unchanged by its size and time alone; inode
///   numbers and change times are the file system's business;
/// - `gc.auto`, `maintenance.auto`: a repack in the background would read what nobody asked for;
/// - `packedGitWindowSize`: small windows, so that a look into the lazy pack fetches little.
pub(super) const CONFIG: [&str; 5] = [
    "core.trustctime=false",
    "core.checkStat=minimal",
    "core.packedGitWindowSize=64k",
    "gc.auto=0",
    "maintenance.auto=false",
];

/// How `git upload-pack` is run for a repository on this machine: whatever that repository's own
/// configuration, all that it has may be read by whoever can read its files.
pub const LOCAL_UPLOAD_PACK: &str = "git -c uploadpack.allowFilter=true \
    -c uploadpack.allowAnySHA1InWant=true -c transfer.advertiseObjectInfo=true upload-pack";

/// So many bytes of what a command says are kept.
const MESSAGES: usize = 8192;

/// A git command that failed.
#[derive(Debug, Error)]
pub enum GitError {
    #[error("can't run git: {source}")]
    Start { source: io::Error },
    #[error("`git {command}` failed: {message}")]
    Failed { command: String, message: String },
    #[error("`git {command}` said something that makes no sense: {output:?}")]
    Output { command: String, output: String },
    #[error("{0}")]
    Origin(String),
}

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

/// What the clone found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub commit: ObjectId,
    pub tree: ObjectId,
    /// Seconds since the epoch.
    pub commit_time: i64,
}

/// git in one repository, as one user.
#[derive(Debug, Clone)]
pub struct Git {
    pub user: User,
    /// What the user's environment had that git and ssh look at.
    pub environment: Vec<(String, String)>,
    /// The directory in which `.git` is.
    pub directory: PathBuf,
}

/// A program to be run as the user in the user's tree.
fn program(git: &Git, name: &str) -> Result<Command, GitError> {
    let start = |source| GitError::Start { source };
    let directory = fs_err::File::open(&git.directory).map_err(start)?.into_parts().0;
    // The path may lead through directories of the user's. A process of theirs in what they could
    // not reach themselves would see what is below it.
    let owner = directory.metadata().map_err(start)?.uid();
    if git.user.uid != 0 && owner != git.user.uid {
        let message = format!("{} belongs to another user", git.directory.display());
        return Err(start(io::Error::new(io::ErrorKind::PermissionDenied, message)));
    }
    let environment: Vec<_> =
        git.environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
    user::command(name, &git.user, &environment, directory.into()).map_err(start)
}

impl Git {
    /// `git ARGS` in the repository; nothing on its standard input, the other streams are pipes.
    pub fn command(&self, args: &[&str]) -> Result<Command, GitError> {
        let mut command = program(self, "git")?;
        command
            .args(args)
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// Runs `git ARGS` to its end and gives what it printed.
    pub async fn output(&self, args: &[&str]) -> Result<Vec<u8>, GitError> {
        run(self.command(args)?, args, None).await
    }

    /// The same with something on its standard input.
    pub async fn output_of(&self, args: &[&str], input: &[u8]) -> Result<Vec<u8>, GitError> {
        run(self.command(args)?, args, Some(input)).await
    }

    async fn line(&self, args: &[&str]) -> Result<String, GitError> {
        let output = self.output(args).await?;
        Ok(String::from_utf8_lossy(&output).trim_end_matches('\n').to_owned())
    }

    /// Clones commits and trees, no blobs and no files, into [`directory`](Self::directory), which
    /// is empty. `progress` gets git's progress lines.
    pub async fn clone_metadata(
        &self,
        url: &str,
        remote: &Remote,
        revision: Option<&str>,
        shallow: bool,
        mut progress: impl FnMut(&str),
    ) -> Result<(), GitError> {
        if let Some(id) = revision.filter(|r| ObjectId::from_hex(r.as_bytes()).is_ok()) {
            return self.fetch_commit(url, remote, id, shallow, progress).await;
        }
        let mut args: Vec<&str> =
            vec!["-c", "protocol.version=2", "-c", "advice.detachedHead=false", "clone"];
        args.extend(["--no-checkout", "--filter=blob:none", "--progress"]);
        if shallow {
            args.extend(["--depth=1", "--no-tags"]);
        }
        if let Some(revision) = revision {
            args.extend(["--branch", revision]);
        }
        for setting in CONFIG {
            args.extend(["-c", setting]);
        }
        let upload_pack = format!("remote.origin.uploadpack={LOCAL_UPLOAD_PACK}");
        if matches!(remote, Remote::Local(_)) {
            args.extend(["--no-local", "--upload-pack", LOCAL_UPLOAD_PACK, "-c", &upload_pack]);
        }
        args.extend(["--", url, "."]);
        run_with_progress(self.command(&args)?, "clone", &mut progress).await?;
        if shallow {
            // --depth means --single-branch; the user expects every branch at the next fetch
            self.track_all_branches().await?;
            self.output(&["config", "--unset-all", "remote.origin.tagOpt"]).await.ok();
        }
        Ok(())
    }

    async fn track_all_branches(&self) -> Result<(), GitError> {
        let refspec = "+refs/heads/*:refs/remotes/origin/*";
        self.output(&["config", "--replace-all", "remote.origin.fetch", refspec]).await?;
        Ok(())
    }

    /// The same for a commit that is given by its id, which `git clone` can't start from.
    async fn fetch_commit(
        &self,
        url: &str,
        remote: &Remote,
        id: &str,
        shallow: bool,
        mut progress: impl FnMut(&str),
    ) -> Result<(), GitError> {
        let format = if id.len() == 64 { "sha256" } else { "sha1" };
        self.output(&["init", "--quiet", &format!("--object-format={format}")]).await?;
        self.output(&["remote", "add", "origin", "--", url]).await?;
        let mut settings: Vec<String> = CONFIG.iter().map(|s| (*s).to_owned()).collect();
        settings.push("remote.origin.promisor=true".into());
        settings.push("remote.origin.partialCloneFilter=blob:none".into());
        if matches!(remote, Remote::Local(_)) {
            settings.push(format!("remote.origin.uploadpack={LOCAL_UPLOAD_PACK}"));
        }
        for setting in &settings {
            let (name, value) = setting.split_once('=').unwrap_or((setting, "true"));
            self.output(&["config", name, value]).await?;
        }
        let mut args =
            vec!["-c", "protocol.version=2", "fetch", "--filter=blob:none", "--progress"];
        if shallow {
            args.extend(["--depth=1", "--no-tags"]);
        }
        args.extend(["origin", id]);
        run_with_progress(self.command(&args)?, "fetch", &mut progress).await?;
        self.output(&["update-ref", "--no-deref", "HEAD", id]).await?;
        Ok(())
    }

    /// What `HEAD` is. An error when the origin has no commit.
    pub async fn head(&self) -> Result<Head, GitError> {
        let args = ["log", "-1", "--no-show-signature", "--format=%H %T %ct", "HEAD"];
        let line = self.line(&args).await.map_err(|error| match error {
            GitError::Failed { message, .. } if message.contains("does not have any commits") => {
                GitError::Origin("the origin has no commits yet".into())
            }
            GitError::Failed { message, .. } if message.contains("unknown revision") => {
                GitError::Origin("the origin has no default branch: name one with --rev".into())
            }
            error => error,
        })?;
        let wrong = || GitError::Output { command: "log".into(), output: line.clone() };
        let mut words = line.split(' ');
        let mut next = || words.next().ok_or_else(wrong);
        let commit = ObjectId::from_hex(next()?.as_bytes()).map_err(|_| wrong())?;
        let tree = ObjectId::from_hex(next()?.as_bytes()).map_err(|_| wrong())?;
        let commit_time = next()?.parse().map_err(|_| wrong())?;
        Ok(Head { commit, tree, commit_time })
    }

    /// The branch that `HEAD` is on, or the id of its commit.
    pub async fn revision(&self) -> Result<String, GitError> {
        match self.line(&["symbolic-ref", "--quiet", "--short", "HEAD"]).await {
            Ok(branch) => Ok(branch),
            Err(GitError::Failed { .. }) => self.line(&["rev-parse", "HEAD"]).await,
            Err(error) => Err(error),
        }
    }

    /// Fetches the rest of the history, without content.
    pub async fn fetch_history(&self) -> Result<(), GitError> {
        let shallow = self.line(&["rev-parse", "--is-shallow-repository"]).await? == "true";
        // what this writes is not made durable by us: by default git leaves refs to a power cut
        let mut args = vec!["-c", "core.fsync=committed"];
        args.extend(["fetch", "--quiet", "--filter=blob:none", "--tags"]);
        if shallow {
            args.push("--unshallow");
        }
        args.push("origin");
        self.output(&args).await?;
        Ok(())
    }

    /// How a worker reaches the origin, from the user's configuration.
    pub async fn transport(&self, url: &str) -> Result<GitTransport, GitError> {
        let Remote::Http(_) = Remote::parse(url)? else { return Ok(GitTransport::Pipe) };
        let mut http = HttpTransport::default();
        let (plain, credential) = without_credential(url);
        http.url = plain;
        http.credential = credential;
        let args = ["config", "-z", "--get-urlmatch", "http", &http.url.clone()];
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
        http.extra_headers = self.extra_headers(&http.url).await?;
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
    async fn extra_headers(&self, url: &str) -> Result<Vec<String>, GitError> {
        let args = ["config", "-z", "--get-regexp", r"^http\.(.*\.)?extraheader$"];
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

    /// The URL of the origin after `url.<base>.insteadOf`.
    pub async fn effective_url(&self) -> Result<String, GitError> {
        self.line(&["ls-remote", "--get-url", "origin"]).await
    }

    /// What the user's credential helpers know for a URL. `rejected` is forgotten by them first.
    pub async fn credential(
        &self,
        url: &str,
        rejected: Option<&Credential>,
    ) -> Result<Option<Credential>, GitError> {
        let mut description = format!("url={url}\n");
        if let Some(rejected) = rejected {
            let (username, password) = (&rejected.username, &rejected.password);
            if [username, password].iter().all(|text| !text.contains(['\n', '\0'])) {
                let input = format!("{description}username={username}\npassword={password}\n\n");
                self.output_of(&["credential", "reject"], input.as_bytes()).await?;
            }
        }
        description.push('\n');
        let output = match self.output_of(&["credential", "fill"], description.as_bytes()).await {
            Ok(output) => output,
            // no helper knows one, and nobody can be asked
            Err(GitError::Failed { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let output = String::from_utf8_lossy(&output);
        let field =
            |name: &str| output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let found = field("username").zip(field("password"));
        Ok(found.map(|(username, password)| Credential {
            username: username.to_owned(),
            password: password.to_owned(),
        }))
    }

    /// A `git upload-pack` at the other end of a pipe, over ssh if need be, in protocol version 2.
    /// The command's standard input and output are for the caller to set.
    pub fn upload_pack(&self, remote: &Remote) -> Result<Command, GitError> {
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
                command.arg(destination).arg(format!("git-upload-pack '{path}'"));
                command
            }
        };
        command.env("GIT_PROTOCOL", "version=2").env("GIT_TERMINAL_PROMPT", "0");
        Ok(command)
    }
}

pub(super) async fn run(
    mut command: Command,
    args: &[&str],
    input: Option<&[u8]>,
) -> Result<Vec<u8>, GitError> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|source| GitError::Start { source })?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let read = async {
        let mut output = Vec::new();
        if let Some(mut stdout) = stdout {
            stdout.read_to_end(&mut output).await?;
        }
        Ok(output)
    };
    let errors = last_of(child.stderr.take());
    let feed = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // a command that doesn't read it all says why by itself
            stdin.write_all(input).await.ok();
        }
    };
    let (output, errors, ()) = tokio::join!(read, errors, feed);
    let output = output.map_err(|source| GitError::Start { source })?;
    let status = child.wait().await.map_err(|source| GitError::Start { source })?;
    if status.success() { Ok(output) } else { Err(failure(args, &errors, status)) }
}

/// Reads a stream of messages to its end and keeps the last of them: origins have a say in how much
/// git and ssh print.
pub(super) async fn last_of(stream: Option<impl AsyncRead + Unpin>) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    let Some(mut stream) = stream else { return String::new() };
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(buffer.get(..length).unwrap_or_default());
        let surplus = kept.len().saturating_sub(MESSAGES);
        kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

async fn run_with_progress(
    mut command: Command,
    name: &str,
    progress: &mut impl FnMut(&str),
) -> Result<(), GitError> {
    command.stdout(Stdio::null());
    let mut child = command.spawn().map_err(|source| GitError::Start { source })?;
    let mut errors = String::new();
    if let Some(stderr) = child.stderr.take() {
        let mut stderr = BufReader::new(stderr);
        let mut line = Vec::new();
        while let Ok(chunk) = stderr.fill_buf().await {
            // progress is rewritten in place with carriage returns
            let end = chunk.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
            let (taken, last) = (end.map_or(chunk.len(), |end| end + 1), chunk.is_empty());
            let room = MESSAGES.saturating_sub(line.len());
            line.extend(chunk.iter().take(taken.min(room)));
            stderr.consume(taken);
            if end.is_none() && !last {
                continue;
            }
            let text = String::from_utf8_lossy(&line);
            let part = text.trim();
            if part.contains('%') || part.starts_with("remote: ") {
                progress(part);
            } else if !part.is_empty() && errors.len() < MESSAGES {
                errors.push_str(part);
                errors.push('\n');
            }
            if last {
                break;
            }
            line.clear();
        }
    }
    let status = child.wait().await.map_err(|source| GitError::Start { source })?;
    if status.success() { Ok(()) } else { Err(failure(&[name], &errors, status)) }
}

fn failure(args: &[&str], stderr: &str, status: std::process::ExitStatus) -> GitError {
    let stderr = stderr.trim();
    let message = if stderr.is_empty() { status.to_string() } else { stderr.to_owned() };
    let options = args.iter().position(|arg| *arg == "--").unwrap_or(args.len());
    let command = args[..options].iter().find(|arg| !arg.starts_with('-') && !arg.contains('='));
    GitError::Failed { command: command.unwrap_or(&"").to_string(), message }
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

/// A URL without the user and password that may stand in it.
fn without_credential(text: &str) -> (String, Option<Credential>) {
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

/// A URL as others may see it: without user and password, either of which may be a token.
pub(super) fn for_display(text: &str) -> String {
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

    #[tokio::test]
    async fn messages_have_a_bound() {
        let mut command = Command::new("sh");
        let script = "yes remote: x | head -c 1000000 >&2; echo 50% >&2; echo fatal: y >&2; exit 1";
        command.args(["-c", script]).stderr(Stdio::piped());
        let mut lines = 0;
        let error = run_with_progress(command, "clone", &mut |_| lines += 1).await.unwrap_err();
        assert!(lines > 1000, "{lines}");
        assert_eq!(error.to_string(), "`git clone` failed: fatal: y");
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; yes | head -c 1000000 >&2; echo fatal: z >&2; exit 1"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let error = run(command, &["x"], None).await.unwrap_err().to_string();
        assert!(error.ends_with("fatal: z") && error.len() < 2 * MESSAGES, "{}", error.len());
    }
}
