//! Docker with containerd's images and Hydrant as its storage driver: the one beside the containerd in `HYDRANT_TEST_CONTAINERD`.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::containerd::Containerd;
use crate::process::{Run, Running, last_lines, until};

/// A running `dockerd` without a network of its own. It ends with its containerd.
#[derive(Debug)]
pub struct Docker<'a> {
    containerd: &'a Containerd,
    directory: PathBuf,
    _process: Running,
}

impl<'a> Docker<'a> {
    pub fn start(containerd: &'a Containerd) -> Result<Self> {
        Self::start_with(containerd, "")
    }

    /// With containers in user namespaces: root there is this user elsewhere.
    pub fn start_remapped(containerd: &'a Containerd, outside: u32) -> Result<Self> {
        // in containerd's own namespace of mounts; images of tests have files of gid 3,000,000
        let give = format!(
            "echo daemon:{outside}:4000000 >/run/ids
             for file in /etc/subuid /etc/subgid; do mount --bind /run/ids $file; done"
        );
        containerd.inside(&["sh", "-euc", &give]).check()?;
        Self::start_with(containerd, r#""userns-remap": "daemon","#)
    }

    fn start_with(containerd: &'a Containerd, configuration: &str) -> Result<Self> {
        let directory = containerd.directory().join("docker");
        fs_err::create_dir_all(&directory)?;
        let here = directory.display();
        let configuration = format!(
            r#"{{ {configuration}
  "features": {{"containerd-snapshotter": true}}, "storage-driver": "hydrant",
  "containerd": "{}", "hosts": ["unix://{here}/s"],
  "data-root": "{here}/data", "exec-root": "{here}/run", "pidfile": "{here}/pid",
  "bridge": "none", "iptables": false, "ip6tables": false, "ip-forward": false, "ip-masq": false,
  "exec-opts": ["native.cgroupdriver=cgroupfs"], "cgroup-parent": "/{}"
}}"#,
            containerd.address().display(),
            containerd.cgroup()
        );
        fs_err::write(directory.join("daemon.json"), configuration)?;
        let serve = format!("exec dockerd --config-file '{here}/daemon.json' >'{here}/log' 2>&1");
        let process = containerd.inside(&["sh", "-c", &serve]).time_out(LIFE).start()?;
        let docker = Self { containerd, directory, _process: process };
        until("dockerd answers", Duration::from_secs(60), || {
            docker.run(&["version"]).output().ok()?.status.success().then_some(())
        })
        .with_context(|| docker.log_tail())?;
        Ok(docker)
    }

    /// `docker ARGUMENTS`
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Run {
        let host = format!("unix://{}/s", self.directory.display());
        let run = self.containerd.inside(&[&["docker", "--host", &host], arguments].concat());
        let own = self.directory.join("client");
        run.env("DOCKER_CONFIG", own).env("DOCKER_BUILDKIT", "0")
    }

    /// `docker ARGUMENTS`, which has to do it; gives what it says.
    pub fn check(&self, arguments: &[&str]) -> Result<String> {
        let done = self.run(arguments).check();
        let logs = || format!("{}\n{}", self.log_tail(), self.containerd.log_tail());
        Ok(done.with_context(logs)?.text())
    }

    fn log_tail(&self) -> String {
        last_lines(&self.directory.join("log"), 30)
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        if thread::panicking() || std::env::var_os("HYDRANT_TEST_LOG").is_some() {
            eprintln!("{}", self.log_tail());
        }
    }
}

/// No test takes so long.
const LIFE: Duration = Duration::from_secs(900);
