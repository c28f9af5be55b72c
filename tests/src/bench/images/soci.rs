//! SOCI, as Debian has it: version 0.4, which wants TLS, and to be told the digest of the index.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::tls::{self, Tls};
use super::{LIFE, NAMESPACE, PATIENCE};
use crate::containerd::{Containerd, packages};
use crate::process::{Run, Running, until};

/// Where its programs are, and whom they trust.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    directory: PathBuf,
    certificate: PathBuf,
}

/// The snapshotter, in the namespaces of a containerd. Killed when dropped.
#[derive(Debug)]
pub(super) struct Soci {
    programs: Programs,
    _process: Running,
}

impl Programs {
    pub(super) fn get(tls: &Tls) -> Result<Self> {
        let directory = packages(&["soci-snapshotter"])?;
        Ok(Self { directory, certificate: tls.certificate() })
    }

    fn run(&self, containerd: &Containerd, program: &str, arguments: &[&str]) -> Result<Run> {
        let program = self.directory.join(program);
        let program = program.to_str().context("not UTF-8")?;
        let run = containerd.inside(&[&[program], arguments].concat());
        Ok(run.env("SSL_CERT_FILE", &self.certificate))
    }
}

/// Its socket, for a containerd in `directory`.
pub(super) fn socket(directory: &Path) -> PathBuf {
    directory.join("soci.sock")
}

impl Soci {
    pub(super) fn start(programs: &Programs, containerd: &Containerd) -> Result<Self> {
        let directory = containerd.directory();
        let lib = directory.join("lib");
        fs_err::create_dir_all(lib.join("soci-snapshotter-grpc"))?;
        let hosts = fs_err::read_to_string("/etc/hosts").unwrap_or_default();
        let ours = directory.join("hosts");
        fs_err::write(&ours, format!("{hosts}\n127.0.0.1 {}\n", tls::NAME))?;
        fs_err::write(directory.join("soci.toml"), "")?;
        let socket = socket(directory);
        // where its client looks can't be told
        let script = "mount --bind \"$1/hosts\" /etc/hosts; mount --bind \"$1/lib\" /var/lib; \
                      exec \"$2/soci-snapshotter-grpc\" -address \"$1/soci.sock\" \
                      -root /var/lib/soci-snapshotter-grpc -config \"$1/soci.toml\" >\"$1/soci.log\" 2>&1";
        let text = |path: &Path| path.to_str().map(str::to_owned).context("not UTF-8");
        let (place, program) = (text(directory)?, text(&programs.directory)?);
        let run = containerd.inside(&["sh", "-euc", script, "sh", &place, &program]);
        let process = run.env("SSL_CERT_FILE", &programs.certificate).time_out(LIFE).start()?;
        until("SOCI's snapshotter listens", Duration::from_secs(60), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok().then_some(())
        })
        .with_context(|| fs_err::read_to_string(directory.join("soci.log")).unwrap_or_default())?;
        Ok(Self { programs: programs.clone(), _process: process })
    }

    fn soci(&self, containerd: &Containerd, arguments: &[&str]) -> Result<String> {
        let address = containerd.address();
        let address = address.to_str().context("not UTF-8")?;
        let client = ["--address", address, "--namespace", NAMESPACE];
        let run = self.programs.run(containerd, "soci", &[&client, arguments].concat())?;
        Ok(run.time_out(PATIENCE).check()?.text())
    }

    /// Makes and pushes an index of all layers; gives its digest.
    pub(super) fn index(&self, containerd: &Containerd, image: &str) -> Result<String> {
        let pull = ["images", "pull", "--local", "--snapshotter", "overlayfs", image];
        let pull =
            containerd.ctr(NAMESPACE, &pull).env("SSL_CERT_FILE", &self.programs.certificate);
        pull.check()?;
        self.soci(containerd, &["create", "--min-layer-size", "0", image])?;
        self.soci(containerd, &["push", image])?;
        let digest = self.soci(containerd, &["index", "list", "--quiet", "--ref", image])?;
        ensure!(digest.starts_with("sha256:") && digest.lines().count() == 1, "{digest:?}");
        Ok(digest)
    }

    pub(super) fn pull(&self, containerd: &Containerd, image: &str, index: &str) -> Result<()> {
        let pull = ["image", "rpull", "--snapshotter", "soci", "--soci-index-digest", index, image];
        self.soci(containerd, &pull).map(drop)
    }
}
