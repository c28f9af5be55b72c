//! stargz-snapshotter, built of Debian's sources (`tests/peers/stargz`), and images that its client makes for it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{LIFE, NAMESPACE, PATIENCE};
use crate::containerd::Containerd;
use crate::process::{Run, Running, until};

/// How long it may take to fetch and build it.
const BUILD: Duration = Duration::from_secs(1800);
/// How many seconds a workload is watched, if it has not ended before.
const WATCHED: &str = "30";

/// Where its programs are.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    directory: PathBuf,
}

/// The snapshotter, in the namespaces of a containerd. Killed when dropped.
#[derive(Debug)]
pub(super) struct Stargz {
    programs: Programs,
    _process: Running,
}

/// Its socket, for a containerd in `directory`.
pub(super) fn socket(directory: &Path) -> PathBuf {
    directory.join("stargz.sock")
}

impl Programs {
    /// Builds them, if they are not here.
    pub(super) fn get() -> Result<Self> {
        let mut get = Command::new("bash");
        get.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/peers/stargz/get"));
        Ok(Self { directory: Run::new(get).time_out(BUILD).check()?.text().into() })
    }

    /// `ctr-remote images ARGUMENTS` in a namespace of containerd's.
    fn images(&self, containerd: &Containerd, space: &str, arguments: &[&str]) -> Result<()> {
        let program = self.directory.join("ctr-remote");
        let address = containerd.address();
        let text = |path: &Path| path.to_str().map(str::to_owned).context("not UTF-8");
        let (program, address) = (text(&program)?, text(&address)?);
        let client = [&program, "--address", &address, "--namespace", space, "images"];
        containerd.inside(&[&client, arguments].concat()).time_out(PATIENCE).check().map(drop)
    }

    /// Converts an image, with what `command` reads at the beginning of its layers, and pushes it.
    pub(super) fn optimise(
        &self,
        containerd: &Containerd,
        from: &str,
        to: &str,
        command: &[&str],
    ) -> Result<()> {
        // the client's container has a cgroup below one of the name of its namespace
        let space = containerd.cgroup();
        let pull =
            ["images", "pull", "--local", "--plain-http", "--snapshotter", "overlayfs", from];
        containerd.check(space, &pull)?;
        let command = serde_json::to_string(command)?;
        let optimise = ["optimize", "--oci", "--period", WATCHED, "--args", &command, from, to];
        self.images(containerd, space, &optimise)?;
        containerd.check(space, &["images", "push", "--local", "--plain-http", to]).map(drop)
    }
}

impl Stargz {
    pub(super) fn start(programs: &Programs, containerd: &Containerd) -> Result<Self> {
        let directory = containerd.directory();
        let script = "exec \"$2/stargz-snapshotter\" \"$1/stargz.sock\" \"$1/stargz\" >\"$1/stargz.log\" 2>&1";
        let text = |path: &Path| path.to_str().map(str::to_owned).context("not UTF-8");
        let (place, program) = (text(directory)?, text(&programs.directory)?);
        let run = containerd.inside(&["sh", "-euc", script, "sh", &place, &program]);
        let process = run.time_out(LIFE).start()?;
        let socket = socket(directory);
        until("stargz-snapshotter listens", Duration::from_secs(60), || {
            UnixStream::connect(&socket).is_ok().then_some(())
        })
        .with_context(|| {
            fs_err::read_to_string(directory.join("stargz.log")).unwrap_or_default()
        })?;
        Ok(Self { programs: programs.clone(), _process: process })
    }

    pub(super) fn pull(&self, containerd: &Containerd, image: &str) -> Result<()> {
        let pull = ["rpull", "--plain-http", "--snapshotter", "stargz", image];
        self.programs.images(containerd, NAMESPACE, &pull)
    }
}
