//! All that one test needs: a server, a proxy in front of it if wanted, a daemon, a home directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::daemon::Daemon;
use crate::guest;
use crate::process::{Output, Run};
use crate::proxy::{Proxy, Quality};
use crate::repository::{MAIN, Repository, lonely, lonely_path};
use crate::scratch::Scratch;
use crate::server::{GitServer, Manners, Offers, url_at};
use crate::state_fs::{self, StateFs};

/// The environment of every git of a test: no configuration but the test's, nothing asked.
pub const GIT_ENVIRONMENT: [(&str, &str); 7] = [
    ("GIT_CONFIG_NOSYSTEM", "1"),
    ("GIT_TERMINAL_PROMPT", "0"),
    ("LC_ALL", "C"),
    ("GIT_AUTHOR_DATE", "1750000000 +0000"),
    ("GIT_COMMITTER_DATE", "1750000000 +0000"),
    ("GIT_EDITOR", "true"),
    ("GIT_ADVICE", "0"),
];

/// How the world of a test is.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub state_fs: StateFs,
    /// Of the state directory's file system, unless it is the host's.
    pub state_bytes: u64,
    /// A proxy with this quality between daemon and server.
    pub proxy: Option<Quality>,
    pub offers: Offers,
    /// The server asks for a name and a password: `user`, `secret`.
    pub password: bool,
    /// The server speaks TLS too, as this host.
    pub tls: Option<&'static str>,
    /// Lines of the daemon's configuration file; none if empty.
    pub configuration: &'static str,
    /// The daemon runs from the start.
    pub start: bool,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            state_fs: StateFs::Host,
            state_bytes: 2 << 30,
            proxy: None,
            offers: Offers::default(),
            password: false,
            tls: None,
            configuration: "",
            start: true,
        }
    }
}

/// See the module. Fields are dropped in order: the daemon before the server that it asks, the
/// directory last.
#[derive(Debug)]
pub struct World {
    pub daemon: Daemon,
    pub proxy: Option<Proxy>,
    pub server: GitServer,
    pub scratch: Scratch,
    offers: Offers,
}

impl World {
    pub fn new(name: &str) -> Result<Self> {
        Self::with(name, Setting::default())
    }

    pub fn with(name: &str, setting: Setting) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        if !nix::unistd::geteuid().is_root() {
            bail!("this test needs root");
        }
        let place = scratch.make("server")?;
        let password = setting.password.then_some(("user", "secret"));
        let manners = Manners { password, tls: setting.tls, elsewhere: None };
        let server = GitServer::start_with(&place, manners)?;
        let proxy = match setting.proxy {
            Some(quality) => Some(Proxy::start(server.port(), quality)?),
            None => None,
        };
        let home = scratch.make("home")?;
        let configuration = "[user]\n\tname = T Ester\n\temail = tester@example.org\n\
                             [init]\n\tdefaultBranch = main\n[advice]\n\tdetachedHead = false\n\
                             [safe]\n\tdirectory = *\n";
        fs_err::write(home.join(".gitconfig"), configuration)?;
        let state = scratch.path().join("state");
        state_fs::mount(setting.state_fs, &state, setting.state_bytes)?;
        let mut daemon = Daemon::stopped(scratch.path(), &state);
        daemon.set_env("HOME", &home.to_string_lossy());
        daemon.set_env("RUST_LOG", &std::env::var("RUST_LOG").unwrap_or("info".to_owned()));
        for (name, value) in GIT_ENVIRONMENT {
            daemon.set_env(name, value);
        }
        let configuration = guest::configuration() + setting.configuration;
        if !configuration.is_empty() {
            daemon.configure(&configuration)?;
        }
        if setting.start {
            daemon.start()?;
            if let Ok(wanted) = std::env::var("HYDRANT_QUEUE") {
                let queue = daemon.status()?.queue;
                ensure!(wanted == "auto" || queue == wanted, "the queue is {queue}, not {wanted}");
            }
        }
        Ok(Self { daemon, proxy, server, scratch, offers: setting.offers })
    }

    /// A path in the test's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Serves a copy of `repository`; gives its URL, through the proxy if there is one.
    pub fn serve(&self, repository: &Repository, name: &str) -> Result<String> {
        self.server.add(repository, name, self.offers)?;
        Ok(self.url(name))
    }

    #[must_use]
    pub fn url(&self, name: &str) -> String {
        let port = self.proxy.as_ref().map_or(self.server.port(), Proxy::port);
        url_at(port, name)
    }

    /// `git ARGUMENTS` in `directory`, with the test's environment.
    #[must_use]
    pub fn git(&self, directory: &Path, arguments: &[&str]) -> Run {
        let mut command = Command::new("git");
        command.arg("-C").arg(directory).args(arguments).envs(GIT_ENVIRONMENT);
        command.env("HOME", self.path("home"));
        Run::new(command).time_out(Duration::from_secs(300))
    }

    /// A plain `git clone` of what was served as `name`, to compare with.
    pub fn clone_plain(&self, name: &str, directory: &str, arguments: &[&str]) -> Result<PathBuf> {
        let path = self.path(directory);
        let mut command = Command::new("git");
        command.args(["clone", "-q"]).args(arguments).arg(self.server.url(name)).arg(&path);
        command.envs(GIT_ENVIRONMENT).env("HOME", self.path("home"));
        Run::new(command).time_out(Duration::from_secs(600)).check()?;
        Ok(path)
    }

    /// `hydrant clone URL DIR` of what was served as `name`.
    pub fn clone_lazy(&self, name: &str, directory: &str, arguments: &[&str]) -> Result<PathBuf> {
        let path = self.path(directory);
        self.clone_url(&self.url(name), &path, arguments)?;
        Ok(path)
    }

    /// `hydrant clone URL DIR`.
    pub fn clone_url(&self, url: &str, path: &Path, arguments: &[&str]) -> Result<Output> {
        let path = path.to_str().context("a directory of a test is UTF-8")?;
        let all = [&["clone"], arguments, &[url, path]].concat();
        let run = self.daemon.hydrant(&all)?.time_out(Duration::from_secs(300));
        run.check().with_context(|| self.daemon.log_tail(40))
    }

    /// Object ids that were fetched as content since the server was asked last: every `want` that
    /// is a blob of `revision` in `repository`.
    pub fn fetched_blobs(
        &self,
        repository: &Repository,
        revisions: &[&str],
    ) -> Result<Vec<String>> {
        let mut blobs = std::collections::HashSet::new();
        for revision in revisions {
            blobs.extend(repository.blobs(revision)?.into_iter().map(|(id, _)| id));
        }
        let requests = self.server.new_requests()?;
        let wants = requests.iter().flat_map(|request| request.wants().iter());
        Ok(wants.filter(|id| blobs.contains(*id)).cloned().collect())
    }

    /// Files of [`lonely`] in `tree` with their truth.
    pub fn lonely_files(
        &self,
        repository: &Repository,
        tree: &Path,
        numbers: std::ops::Range<usize>,
    ) -> Result<Vec<(PathBuf, PathBuf)>> {
        let all = numbers.map(|n| {
            let path = lonely_path(n);
            Ok((tree.join(&path), self.truth(repository, &path)?))
        });
        all.collect()
    }

    /// The proxy of a world that has one.
    pub fn proxy(&self) -> Result<&Proxy> {
        self.proxy.as_ref().context("a world without a proxy")
    }

    /// A lazy clone of `repository` at `DIR`, with the server's record emptied after it.
    pub fn quick(&self, repository: &Repository) -> Result<PathBuf> {
        self.serve(repository, "repo")?;
        let tree = self.clone_lazy("repo", "tree", &["--history=none"])?;
        self.server.new_requests()?;
        Ok(tree)
    }

    /// A lazy clone, as by [`quick`](Self::quick), of [`lonely`] files of so many bytes: at `DIR`, and its files with their
    /// truth.
    pub fn lonely_tree(
        &self,
        count: usize,
        bytes: usize,
    ) -> Result<(PathBuf, Vec<(PathBuf, PathBuf)>)> {
        let repository = lonely(count, bytes)?;
        let tree = self.quick(&repository)?;
        let files = self.lonely_files(&repository, &tree, 0..count)?;
        Ok((tree, files))
    }

    /// The content of `path` (no quoting) in `repository`'s main branch.
    pub fn truth(&self, repository: &Repository, path: &str) -> Result<PathBuf> {
        let content = repository.git(&["cat-file", "blob", &format!("{MAIN}:{path}")])?;
        let file = self.scratch.make("truth")?.join(path.replace('/', "_"));
        fs_err::write(&file, content)?;
        Ok(file)
    }
}
