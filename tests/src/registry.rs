//! A real registry for container images (Debian's `docker-registry`), and images for it.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{Leashed, Run, leash, require, until};
use crate::repository::cached_directory;
use crate::server::free_port;

/// How long a script may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// The scripts that make and unpack images.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("images").join(name)
}

/// The registry. Killed when dropped.
#[derive(Debug)]
pub struct Registry {
    directory: PathBuf,
    port: u16,
    process: Option<Leashed>,
}

/// What wants tokens in front of a registry. Killed when dropped.
#[derive(Debug)]
pub struct Front {
    pub directory: PathBuf,
    pub port: u16,
    _process: Leashed,
}

impl Registry {
    /// Starts a registry that keeps its images in `directory`.
    pub fn start(directory: &Path) -> Result<Self> {
        Self::serve(directory, directory, "")
    }

    /// Starts another one, in `directory`, that has the same images and talks TLS with who shows a certificate. The files that
    /// a client needs are `ca.pem`, `client.pem` and `client.key` there.
    pub fn with_tls(&self, directory: &Path) -> Result<Self> {
        require(&[("openssl", "openssl")])?;
        fs_err::create_dir_all(directory)?;
        let make = "cd \"$1\" && key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes' && \
            openssl req -x509 $key -keyout ca.key -out ca.pem -subj /CN=test-ca -days 30 && \
            for who in server client; do \
                openssl req $key -keyout $who.key -out $who.csr -subj /CN=$who && \
                printf 'subjectAltName=IP:127.0.0.1\\n' > extensions && \
                openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 \
                    -extfile extensions -out $who.pem || exit 1; \
            done";
        Run::shell(make, &[directory]).time_out(PATIENCE).check()?;
        let at = |name: &str| directory.join(name).display().to_string();
        let tls = format!(
            ", tls: {{certificate: {}, key: {}, clientcas: [{}]}}",
            at("server.pem"),
            at("server.key"),
            at("ca.pem")
        );
        Self::serve(directory, &self.directory, &tls)
    }

    /// `tls`: what stands beside the address in its configuration.
    fn serve(directory: &Path, images: &Path, tls: &str) -> Result<Self> {
        require(&[
            ("docker-registry", "docker-registry"),
            ("python3", "python3"),
            ("zstd", "zstd"),
            ("getfattr", "attr"),
        ])?;
        fs_err::create_dir_all(directory)?;
        // Somebody else may take the port between our look and its start.
        for _ in 0..5 {
            let port = free_port()?;
            let configuration = format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}/data}}}}\n\
                 http: {{addr: 127.0.0.1:{port}{tls}}}\n",
                images.display()
            );
            let file = directory.join("config.yml");
            fs_err::write(&file, configuration)?;
            let log = fs_err::File::create(directory.join("log"))?.into_parts().0;
            let mut command = Command::new("docker-registry");
            command.arg("serve").arg(&file).stdin(Stdio::null());
            command.stdout(log.try_clone()?).stderr(log);
            let mut process = leash(command)?;
            let up = until("the registry's port", Duration::from_secs(60), || {
                let ended = process.ended().is_some();
                let up = TcpStream::connect(("127.0.0.1", port)).is_ok();
                (up || ended).then_some(!ended)
            })?;
            if up {
                let directory = directory.to_owned();
                return Ok(Self { directory, port, process: Some(process) });
            }
        }
        bail!("{}", fs_err::read_to_string(directory.join("log")).unwrap_or_default())
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on nobody answers.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Makes an image of a kind (see `images/make.py`) and pushes it; gives its digest. The archives of its layers are
    /// in [`layers`](Self::layers) then.
    pub fn push(&self, name: &str, tag: &str, kind: &str) -> Result<String> {
        let mut command = self.make(name, tag, kind);
        command.arg("--keep").arg(self.layers(name));
        Ok(Run::new(command).time_out(PATIENCE).check()?.text())
    }

    fn make(&self, name: &str, tag: &str, kind: &str) -> Command {
        let mut command = Command::new("python3");
        command.arg(script("make.py")).arg(format!("http://127.0.0.1:{}", self.port));
        command.args([name, tag, kind]);
        command
    }

    /// As [`push`](Self::push): an image of so many layers, each of which changes what those below have.
    pub fn push_many_layers(&self, name: &str, tag: &str, layers: usize) -> Result<String> {
        let mut command = self.make(name, tag, "many");
        command.env("LAYERS", layers.to_string()).arg("--keep").arg(self.layers(name));
        Ok(Run::new(command).time_out(PATIENCE).check()?.text())
    }

    /// As [`push`](Self::push): an image of Debian packages (see `images/debian.py`), its layers compressed as `how` says.
    pub fn push_debian(&self, name: &str, tag: &str, kind: &str, how: &str) -> Result<String> {
        let mut command = self.make(name, tag, "archives");
        command.env("FROM", debian(kind)?).env("HOW", how);
        Ok(Run::new(command).time_out(PATIENCE).check()?.text())
    }

    /// Where the archives of an image's layers are.
    #[must_use]
    pub fn layers(&self, name: &str) -> PathBuf {
        self.directory.join("layers").join(name)
    }

    /// Unpacks an image, with nothing of Hydrant's; gives the list of what is in it.
    pub fn unpacked(&self, name: &str) -> Result<String> {
        let tree = self.directory.join("unpacked").join(name);
        let mut layers: Vec<_> = fs_err::read_dir(self.layers(name))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        let number =
            |path: &PathBuf| path.file_stem().and_then(|stem| stem.to_str()?.parse::<usize>().ok());
        layers.sort_by_key(number);
        let mut command = Command::new("python3");
        command.arg(script("unpack.py")).arg(&tree).args(layers);
        Run::new(command).time_out(PATIENCE).check()?;
        listed(&tree)
    }

    /// Changes a byte in the middle of the longest blob that the registry keeps.
    pub fn damage_longest_blob(&self) -> Result<()> {
        let find = "find \"$1\" -name data -type f -printf '%s %p\\n' | sort -n | tail -n 1";
        let blobs = self.directory.join("data/docker/registry/v2/blobs");
        let found = Run::shell(find, &[&blobs]).check()?.text();
        let (_, path) = found.split_once(' ').context("the registry has no blobs")?;
        let mut bytes = fs_err::read(path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Ok(fs_err::write(path, bytes)?)
    }
}

/// The layers of an image of Debian packages, which are made once.
fn debian(kind: &str) -> Result<PathBuf> {
    require(&[("apt-get", "apt"), ("dpkg-deb", "dpkg")])?;
    cached_directory(&format!("image-{kind}-1"), |new| {
        let mut command = Command::new("python3");
        command.arg(script("debian.py")).arg(kind).arg(new);
        Run::new(command).time_out(Duration::from_secs(900)).check().map(drop)
    })
}

/// All that can be seen of a tree.
pub fn listed(tree: &Path) -> Result<String> {
    let mut command = Command::new("sh");
    command.arg(script("list.sh")).arg(tree);
    Ok(Run::new(command).time_out(PATIENCE).check()?.text())
}

/// That two lists are the same.
pub fn same_list(expected: &str, found: &str) -> Result<()> {
    for (left, right) in expected.lines().zip(found.lines()) {
        ensure!(left == right, "expected {left:?}, found {right:?}");
    }
    let (left, right) = (expected.lines().count(), found.lines().count());
    ensure!(left == right, "expected {left} lines, found {right}");
    Ok(())
}

impl Front {
    /// Stands in front of what listens on `upstream`.
    pub fn start(directory: &Path, upstream: u16) -> Result<Self> {
        Self::with("front.py", directory, upstream, &[])
    }

    /// Has a list of what refers to what, and lets only `user` write, with the password `secret`.
    pub fn with_referrers(directory: &Path, upstream: u16) -> Result<Self> {
        Self::with("referrers.py", directory, upstream, &[])
    }

    /// Wants no token, and to see none.
    pub fn open(directory: &Path, upstream: u16) -> Result<Self> {
        Self::with("front.py", directory, upstream, &["--open"])
    }

    fn with(program: &str, directory: &Path, upstream: u16, options: &[&str]) -> Result<Self> {
        fs_err::create_dir_all(directory)?;
        let output = directory.join("port");
        let mut command = Command::new("python3");
        command.arg(script(program)).arg(format!("http://127.0.0.1:{upstream}")).arg(directory);
        command.args(options);
        command.stdin(Stdio::null()).stdout(fs_err::File::create(&output)?.into_parts().0);
        let process = leash(command)?;
        let port = until("the front's port", Duration::from_secs(60), || {
            fs_err::read_to_string(&output).ok()?.trim().parse().ok()
        })?;
        Ok(Self { directory: directory.to_owned(), port, _process: process })
    }

    /// The lines of what was asked: path, kind of credential, range, header `X-Test`.
    pub fn log(&self) -> Result<Vec<String>> {
        let log = fs_err::read_to_string(self.directory.join("log")).unwrap_or_default();
        Ok(log.lines().map(str::to_owned).collect())
    }

    /// From now on these blobs are not given as a whole.
    pub fn hold(&self, digests: &[&str]) -> Result<()> {
        Ok(fs_err::write(self.directory.join("hold"), digests.join("\n"))?)
    }

    /// That nobody has done what should not be done.
    pub fn check(&self) -> Result<()> {
        let wrong = fs_err::read_to_string(self.directory.join("wrong")).unwrap_or_default();
        ensure!(wrong.is_empty(), "{wrong}");
        Ok(())
    }
}
