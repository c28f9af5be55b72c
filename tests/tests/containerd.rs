//! containerd with Hydrant as its snapshotter: images as they are, containers that work, nothing left.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use hydrant_tests::containerd::{Containerd, share_mounts};
use hydrant_tests::registry::{Registry, listed, same_list};
use hydrant_tests::snapshots::Snapshots;
use hydrant_tests::world::{Setting, World};

/// Dropped in order.
struct Host {
    containerd: Containerd,
    snapshots: Snapshots,
    world: World,
    registry: Registry,
}

/// What the container runtime interface uses.
const CRI: &str = "k8s.io";

impl Host {
    fn new(name: &str) -> Result<Self> {
        let mut world = World::with(name, Setting { start: false, ..Setting::default() })?;
        share_mounts(&world.daemon.directories().state)?;
        world.daemon.start()?;
        let registry = Registry::start(&world.path("registry"))?;
        let snapshots = Snapshots::of(&world.daemon.directories().run);
        let containerd = Containerd::start(&world.path("containerd"), snapshots.socket())
            .with_context(|| world.daemon.log_tail(40))?;
        Ok(Self { containerd, snapshots, world, registry })
    }

    fn push(&self, name: &str, kind: &str) -> Result<String> {
        self.registry.push(name, "v1", kind)?;
        Ok(format!("127.0.0.1:{}/{name}:v1", self.registry.port()))
    }

    fn count(&self, directory: &str) -> Result<usize> {
        let path = self.world.daemon.directories().state.join(directory);
        Ok(fs_err::read_dir(path)?.count())
    }
}

/// Pulled as kubelets do it: no layer is unpacked, the tree is the same as unpacked by containerd, and a container works.
#[test]
#[ignore = "needs root"]
fn root_images_are_not_unpacked() -> Result<()> {
    let host = Host::new("containerd-cri")?;
    let image = host.push("odd", "index")?;
    let containerd = &host.containerd;
    containerd.pull_by_cri(&image)?;
    ensure!(host.count("layers")? == 3, "{}", host.world.daemon.log_tail(40));
    ensure!(host.count("snapshots")? == 0, "something was unpacked");

    let expected = host.registry.unpacked("odd")?;
    {
        let view = containerd.look(CRI, "hydrant")?;
        same_list(&expected, &listed(view.path())?)?;
    }
    let said =
        containerd.run(CRI, "hydrant", &image, "c1", &["/bin/busybox", "cat", "/etc/passwd"])?;
    ensure!(said.contains("me:x:1:1"), "{said}");
    containerd.remove_images(CRI)?;
    ensure!(host.snapshots.list(&[])?.is_empty(), "{:?}", host.snapshots.names(&[])?);
    ensure!(host.count("layers")? == 0 && host.count("trees")? == 0, "layers are left");
    Ok(())
}

#[allow(dead_code)]
fn unused(_: &Path) {}
