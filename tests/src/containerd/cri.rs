//! containerd as kubelets use it: images and pods, by the container runtime interface
//! ([`runtime.v1`](https://github.com/kubernetes/cri-api/blob/master/pkg/apis/runtime/v1/api.proto)).

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use prost::Message;

use super::Containerd;
use crate::grpc;

/// containerd's namespace for it.
const NAMESPACE: &str = "k8s.io";
/// As many users as kubelets give a pod.
const USERS: u32 = 65_536;
/// Seconds that a command in a container may take.
const COMMAND_SECONDS: i64 = 120;

/// The plugin of the networks of pods: each has its own, in which there is nobody else. containerd has `lo` made by one that
/// is called `loopback`, and then wants to hear of an `eth0` with an address.
const NETWORK: &str = r#"#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
nsenter --net="$CNI_NETNS" /bin/busybox ip link set lo up >&2 || exit 1
cat <<END
{ "cniVersion": "0.3.1", "interfaces": [{ "name": "$CNI_IFNAME", "sandbox": "$CNI_NETNS" }],
  "ips": [{ "version": "4", "address": "127.0.0.1/8", "interface": 0 }] }
END
"#;

/// A pod that runs.
#[derive(Debug)]
pub struct Pod<'a> {
    containerd: &'a Containerd,
    id: String,
    config: PodSandboxConfig,
    namespaces: NamespaceOption,
}

/// The networks of pods, in `directory`.
pub(super) fn configure_network(directory: &Path) -> Result<()> {
    for name in ["loopback", "alone"] {
        let plugin = directory.join(name);
        fs_err::write(&plugin, NETWORK)?;
        fs_err::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755))?;
    }
    let networks = r#"{ "cniVersion": "0.3.1", "name": "pods", "plugins": [{ "type": "alone" }] }"#;
    Ok(fs_err::write(directory.join("pods.conflist"), networks)?)
}

impl Containerd {
    /// Has the image pulled as kubelets do.
    pub fn pull_by_cri(&self, image: &str) -> Result<()> {
        let image = Some(ImageSpec { image: image.to_owned() });
        self.cri::<_, PullImageResponse>("ImageService/PullImage", &PullImageRequest { image })?;
        Ok(())
    }

    /// Runs a pod without containers; with `hostUsers: false` if root in it is to be `outside` elsewhere.
    pub fn run_pod(&self, name: &str, outside: Option<u32>) -> Result<Pod<'_>> {
        let users = outside.map(|host_id| {
            let map = IdMapping { host_id, container_id: 0, length: USERS };
            let map = vec![map];
            UserNamespace { mode: NamespaceMode::Pod.into(), uids: map.clone(), gids: map }
        });
        let namespaces = NamespaceOption {
            network: NamespaceMode::Pod.into(),
            pid: NamespaceMode::Container.into(),
            ipc: NamespaceMode::Pod.into(),
            userns_options: users,
        };
        let security_context =
            Some(SecurityContext { namespace_options: Some(namespaces.clone()) });
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
            }),
            hostname: name.to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.cgroup),
                security_context,
            }),
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let answer: PodId = self.runtime("RunPodSandbox", &request)?;
        Ok(Pod { containerd: self, id: answer.pod_sandbox_id, config, namespaces })
    }

    fn runtime<Q: Message, A: Message + Default>(&self, method: &str, request: &Q) -> Result<A> {
        self.cri(&format!("RuntimeService/{method}"), request)
    }

    fn cri<Q: Message, A: Message + Default>(&self, method: &str, request: &Q) -> Result<A> {
        let path = format!("/runtime.v1.{method}");
        let answers = grpc::call(&self.address(), &path, NAMESPACE, request)
            .with_context(|| format!("{method}\n{}", self.log_tail()))?;
        ensure!(answers.len() == 1, "{method}: {} answers", answers.len());
        answers.into_iter().next().context("no answer")
    }
}

impl Pod<'_> {
    /// Runs a command in a new container of an image that is there; gives the container's id. `volume`: another image, and
    /// the directory where the container has it.
    pub fn start(
        &self,
        name: &str,
        image: &str,
        volume: Option<(&str, &str)>,
        command: &[&str],
    ) -> Result<String> {
        let security_context =
            Some(ContainerSecurityContext { namespace_options: Some(self.namespaces.clone()) });
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned() }),
            image: Some(ImageSpec { image: image.to_owned() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            mounts: volume.map(|(image, path)| Mount::of(image, path)).into_iter().collect(),
            linux: Some(LinuxContainerConfig { security_context }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let container: ContainerId = self.containerd.runtime("CreateContainer", &request)?;
        self.containerd.runtime::<_, Empty>("StartContainer", &container)?;
        Ok(container.container_id)
    }

    /// Runs a command beside those of a container, which has to do it; gives what it says.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<String> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: COMMAND_SECONDS,
        };
        let said: ExecSyncResponse = self.containerd.runtime("ExecSync", &request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(said.exit_code == 0, "{command:?}: {}, {}", said.exit_code, text(&said.stderr));
        Ok(text(&said.stdout))
    }

    /// Ends and removes a container.
    pub fn end(&self, container: &str) -> Result<()> {
        let container = ContainerId { container_id: container.to_owned() };
        for method in ["StopContainer", "RemoveContainer"] {
            self.containerd.runtime::<_, Empty>(method, &container)?;
        }
        Ok(())
    }

    /// Ends and removes the pod.
    pub fn remove(self) -> Result<()> {
        let pod = PodId { pod_sandbox_id: self.id };
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            self.containerd.runtime::<_, Empty>(method, &pod)?;
        }
        Ok(())
    }
}

// The messages as far as they are used. Several that are the same are one here.

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum NamespaceMode {
    Pod = 0,
    Container = 1,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct IdMapping {
    #[prost(uint32, tag = "1")]
    host_id: u32,
    #[prost(uint32, tag = "2")]
    container_id: u32,
    #[prost(uint32, tag = "3")]
    length: u32,
}

#[derive(Clone, PartialEq, Message)]
struct UserNamespace {
    #[prost(enumeration = "NamespaceMode", tag = "1")]
    mode: i32,
    #[prost(message, repeated, tag = "2")]
    uids: Vec<IdMapping>,
    #[prost(message, repeated, tag = "3")]
    gids: Vec<IdMapping>,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    #[prost(enumeration = "NamespaceMode", tag = "1")]
    network: i32,
    #[prost(enumeration = "NamespaceMode", tag = "2")]
    pid: i32,
    #[prost(enumeration = "NamespaceMode", tag = "3")]
    ipc: i32,
    #[prost(message, optional, tag = "5")]
    userns_options: Option<UserNamespace>,
}

/// `LinuxSandboxSecurityContext`
#[derive(Clone, PartialEq, Message)]
struct SecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<SecurityContext>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

/// `RunPodSandboxResponse`, `StopPodSandboxRequest`, `RemovePodSandboxRequest`
#[derive(Clone, PartialEq, Message)]
struct PodId {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Mount {
    #[prost(string, tag = "1")]
    container_path: String,
    #[prost(bool, tag = "3")]
    readonly: bool,
    #[prost(message, optional, tag = "9")]
    image: Option<ImageSpec>,
}

impl Mount {
    fn of(image: &str, path: &str) -> Self {
        let image = Some(ImageSpec { image: image.to_owned() });
        Self { container_path: path.to_owned(), readonly: true, image }
    }
}

/// `LinuxContainerSecurityContext`
#[derive(Clone, PartialEq, Message)]
struct ContainerSecurityContext {
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainerConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<ContainerSecurityContext>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    mounts: Vec<Mount>,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainerConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

/// `CreateContainerResponse`, `StartContainerRequest`, `StopContainerRequest` (that gives it no time), `RemoveContainerRequest`
#[derive(Clone, PartialEq, Message)]
struct ContainerId {
    #[prost(string, tag = "1")]
    container_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}
