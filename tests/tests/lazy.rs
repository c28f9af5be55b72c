//! Images whose index comes along, with containerd: by names that the configuration trusts they are run before they are
//! pulled; by others they are not; and no image is ever shown in the place of another.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::containerd::{Containerd, share_mounts};
use hydrant_tests::guest;
use hydrant_tests::process::until;
use hydrant_tests::proxy::{Proxy, Quality};
use hydrant_tests::registry::{Registry, listed, same_list};
use hydrant_tests::snapshots::Snapshots;
use hydrant_tests::world::{Setting, World};

/// The namespace that the container runtime interface uses.
const CRI: &str = "k8s.io";
const PATIENCE: Duration = Duration::from_secs(120);

/// Dropped in order.
struct Host {
    containerd: Containerd,
    snapshots: Snapshots,
    world: World,
    /// By this name of the registry, images are trusted.
    trusted: Proxy,
    registry: Registry,
}

impl Host {
    /// `images`: lines of the daemon's configuration of images.
    fn new(name: &str, images: &str) -> Result<Self> {
        let mut world = World::with(name, Setting { start: false, ..Setting::default() })?;
        share_mounts(&world.daemon.directories().state)?;
        let registry = Registry::start(&world.path("registry"))?;
        let trusted = Proxy::start(registry.port(), Quality::default())?;
        let lazy = format!("[containerd]\nlazy = [\"127.0.0.1:{}\"]\n", trusted.port());
        world.daemon.configure(&(guest::configuration() + &lazy + "[images]\n" + images))?;
        world.daemon.start()?;
        let snapshots = Snapshots::of(&world.daemon.directories().run);
        let containerd =
            Containerd::start(&world.path("containerd"), snapshots.socket(), true, None)
                .with_context(|| world.daemon.log_tail(40))?;
        Ok(Self { containerd, snapshots, world, trusted, registry })
    }

    /// Makes an image; gives its names: the one that is trusted, and another one.
    fn push(&self, name: &str, kind: &str) -> Result<(String, String)> {
        self.registry.push(name, "v1", kind)?;
        let named = |port: u16| format!("127.0.0.1:{port}/{name}:v1");
        Ok((named(self.trusted.port()), named(self.registry.port())))
    }

    fn count(&self, directory: &str) -> Result<usize> {
        let path = self.world.daemon.directories().state.join(directory);
        Ok(fs_err::read_dir(path)?.count())
    }

    fn hydrant(&self, arguments: &[&str]) -> Result<String> {
        let done = self.world.daemon.check(arguments);
        Ok(done.with_context(|| self.world.daemon.log_tail(40))?.text())
    }

    fn image(&self, reference: &str) -> Result<hydrant_api::Image> {
        let images: Vec<hydrant_api::Image> = self.world.daemon.admin().get("/v1/images")?;
        let found = images.into_iter().find(|image| image.reference == reference);
        found.with_context(|| format!("there is no {reference}"))
    }

    fn wait_for(&self, what: &str, mut is_so: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let done = until(what, PATIENCE, || is_so(self).map(|so| so.then_some(())).transpose());
        done.and_then(|done| done).with_context(|| {
            let names = self.snapshots.names(&[]);
            let images = self.hydrant(&["image", "ls"]);
            format!("{names:?}\n{images:?}\n{}", self.world.daemon.log_tail(60))
        })
    }

    /// Until all of an image is here and proved.
    fn wait_until_proved(&self, reference: &str) -> Result<()> {
        self.wait_for("all layers are proved", |host| {
            let image = host.image(reference)?;
            Ok(image.unproved == 0 && image.present_bytes == image.segment_bytes)
        })
    }

    /// That the tree of the only image of a namespace is as it should be.
    fn expect_tree(&self, name: &str) -> Result<()> {
        let expected = self.registry.unpacked(name)?;
        let view = self.containerd.look(CRI, "hydrant")?;
        same_list(&expected, &listed(view.path())?)
    }

    fn run(&self, image: &str, name: &str, command: &[&str]) -> Result<String> {
        self.containerd.run(CRI, "hydrant", image, name, command)
    }
}

/// A container of an image whose name is trusted runs when next to nothing of it is here; what it reads comes then.
#[test]
#[ignore = "needs root"]
fn root_a_trusted_image_runs_before_it_is_pulled() -> Result<()> {
    let host = Host::new("lazy-trusted", "background_fill = false\ntrace = false\n")?;
    let (image, _) = host.push("app", "app-estargz")?;
    host.containerd.pull_by_cri(&image)?;
    ensure!(host.count("layers")? == 2 && host.count("snapshots")? == 0, "it was unpacked");
    let size = host.image(&image)?.segment_bytes;
    ensure!(size > 16 << 20, "{size} bytes are no large image");
    let pulled = host.trusted.traffic().down_bytes;
    ensure!(pulled < size / 16, "a pull of {size} bytes took {pulled}");
    let said = host.run(&image, "c1", &["/bin/busybox", "echo", "hello"])?;
    ensure!(said == "hello", "{said}");
    // the shell is what was read of it, and that in whole chunks
    let run = host.trusted.traffic().down_bytes;
    ensure!(run < size / 4, "a container that says hello took {run} of {size} bytes");
    host.expect_tree("app")
}

/// Nobody reads it, and all of it comes; then no registry is needed. Once it was proved, what is evicted of it comes
/// by its own index for every name, and by itself.
#[test]
#[ignore = "needs root"]
fn root_the_rest_comes_by_itself() -> Result<()> {
    let mut host = Host::new("lazy-fill", "")?;
    let (image, other) = host.push("app", "app-estargz")?;
    host.containerd.pull_by_cri(&image)?;
    ensure!(host.count("layers")? == 2 && host.count("snapshots")? == 0, "it was unpacked");
    host.wait_until_proved(&image)?;
    host.expect_tree("app")?;

    // a proved layer is everybody's
    host.hydrant(&["image", "pull", &other])?;
    ensure!(host.image(&other)?.unproved == 0 && host.count("trees")? == 2);
    host.containerd.remove_images(CRI)?;
    host.wait_for("containerd has nothing", |host| Ok(host.snapshots.list(&[])?.is_empty()))?;
    host.wait_for("all is evicted", |host| {
        host.hydrant(&["image", "evict", &other])?;
        Ok(host.image(&other)?.present_bytes == 0)
    })?;
    host.containerd.pull_by_cri(&other)?;
    ensure!(host.count("layers")? == 2 && host.count("snapshots")? == 0, "it was unpacked");
    host.wait_until_proved(&other)?;
    host.expect_tree("app")?;
    host.registry.stop();
    let said = host.run(&other, "c1", &["/bin/busybox", "echo", "hello"])?;
    ensure!(said == "hello", "{said}");
    Ok(())
}

/// By a name that is not trusted, such an image is unpacked, and what is on top of it too.
#[test]
#[ignore = "needs root"]
fn root_an_image_that_is_not_trusted_is_unpacked() -> Result<()> {
    let host = Host::new("lazy-untrusted", "background_fill = false\n")?;
    let (_, image) = host.push("app", "app-estargz")?;
    host.containerd.pull_by_cri(&image)?;
    ensure!(host.count("layers")? == 0 && host.count("snapshots")? == 2);
    let said = host.run(&image, "c1", &["/bin/busybox", "echo", "hello"])?;
    ensure!(said == "hello", "{said}");
    Ok(())
}

/// A layer that turns out not to be what a trusted image says: its readers get errors, nothing is made on top of it, and
/// whoever asks is told; also after a restart.
#[test]
#[ignore = "needs root"]
fn root_a_lie_that_was_believed() -> Result<()> {
    let mut host = Host::new("lazy-lie", "background_fill = false\n")?;
    let (image, _) = host.push("app", "app-unproved")?;
    host.containerd.pull_by_cri(&image)?;
    ensure!(host.count("layers")? == 2 && host.count("snapshots")? == 0, "it was unpacked");
    let found_by_containerd = |host: &Host| {
        let found = host.snapshots.list(&["labels.\"containerd.io/snapshot.ref\""])?;
        Ok::<_, anyhow::Error>(found.len())
    };
    ensure!(found_by_containerd(&host)? == 2, "{:?}", host.snapshots.list(&[]));
    let wait = [
        "/bin/sh",
        "-c",
        "/bin/busybox cat /d1/* /stargz.index.json >/dev/null; /bin/busybox sleep 3600",
    ];
    host.containerd.run_detached(CRI, None, &image, "c1", &wait)?;
    let refuted = |host: &Host| Ok::<_, anyhow::Error>(host.image(&image)?.refuted);
    host.wait_for("the lie is found", |host| Ok(!refuted(host)?.is_empty()))?;
    let said = refuted(&host)?.join("\n");
    ensure!(said.contains("has the digest"), "{said}");
    ensure!(found_by_containerd(&host)? == 1, "{:?}", host.snapshots.list(&[]));
    let shown = host.hydrant(&["image", "ls"])?;
    ensure!(shown.contains("not what its image says"), "{shown}");
    let read = ["/bin/busybox", "sh", "-c", "/bin/busybox cat /d1/f05 >/dev/null; echo $?"];
    let tries = std::cell::Cell::new(0);
    let is_refused = |host: &Host| {
        tries.set(tries.get() + 1);
        // a command that can't be run now says nothing
        let said = host.containerd.exec(CRI, "c1", &format!("look-{}", tries.get()), &read);
        Ok(said.is_ok_and(|said| said.trim() == "1"))
    };
    host.wait_for("its readers get errors", is_refused)?;
    let more = format!("{:#?}", host.run(&image, "c2", &["/bin/busybox", "true"]));
    ensure!(
        more.contains("is not what its image says"),
        "another container was made of it: {more}"
    );
    // the next supervisor knows it, too
    let killed = host.world.daemon.kill_supervisor()?;
    until("another supervisor answers", PATIENCE, || {
        let status = host.world.daemon.status().ok()?;
        (status.pid != killed.as_raw()).then_some(())
    })?;
    host.wait_for("its readers still get errors", is_refused)?;
    host.wait_for("containerd reaches the snapshotter again", |host| {
        Ok(host.containerd.tops(CRI, "hydrant").is_ok())
    })?;
    host.containerd.end(CRI, "c1")?;
    host.containerd.remove_images(CRI)?;
    host.wait_for("nothing is left", |host| Ok(host.count("trees")? + host.count("pools")? == 0))?;
    host.world.daemon.stop()
}

/// Images that say that their layer is another image's: with other content, and with the same but an index that shows it
/// otherwise; also where nobody can tell. None gets into the other's place, complete or not.
#[test]
#[ignore = "needs root"]
fn root_no_image_is_shown_for_another() -> Result<()> {
    let host = Host::new("lazy-impostor", "")?;
    let lies = [
        ("impostor", "has the digest"),
        ("liar", "\"f05\""),
        // its archive can't even be told from its segment
        ("unprovable", "can't be proved"),
    ];
    for (kind, why) in lies {
        let (_, name) = host.push(kind, kind)?;
        let tree = host.world.path(kind);
        let tree = tree.to_str().context("not UTF-8")?;
        host.hydrant(&["mount", &format!("oci://{name}"), tree])?;
        host.wait_for("the lie is found", |host| {
            Ok(host.image(&name)?.refuted.iter().any(|refuted| refuted.contains(why)))
        })?;
        ensure!(host.world.daemon.mount_of(Path::new(tree))?.complete_segments == 0);
    }
    let (victim, _) = host.push("victim", "victim")?;
    host.containerd.pull_by_cri(&victim)?;
    host.expect_tree("victim")
}
