//! SOCI's own program, as Debian has it, makes indexes of version 1: artifacts that refer to an image, and that nothing pins.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::containerd::{Containerd, packages, share_mounts};
use hydrant_tests::guest;
use hydrant_tests::process::{Run, until};
use hydrant_tests::reader::expect_right;
use hydrant_tests::registry::{Registry, listed, same_list};
use hydrant_tests::snapshots::Snapshots;
use hydrant_tests::world::{Setting, World};

const PATIENCE: Duration = Duration::from_secs(120);
/// In the namespaces of a containerd: an index of all layers of an image, and its way to the registry. The program keeps what it makes below
/// `/var/lib`.
const INDEX: &str = "mkdir -p \"$1/lib/soci-snapshotter-grpc\"; mount --bind \"$1/lib\" /var/lib; \
    programs=$2 address=$3 image=$4; \
    run() { \"$programs/soci\" --address \"$address\" --namespace plain \"$@\"; }; \
    run create --min-layer-size 0 --span-size 262144 \"$image\"; run push --plain-http \"$image\"";

/// The registry forgets the manifest of what refers to something, and goes on listing it.
const FORGET: &str = "cd \"$1/data/docker/registry/v2\"; \
    for of in $(grep -l '\"subject\"' blobs/sha256/*/*/data); do \
        digest=$(basename \"$(dirname \"$of\")\"); rm -r repositories/big/_manifests/revisions/sha256/$digest; \
    done";

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("not UTF-8")
}

fn present(world: &World) -> Result<(u64, u64, u64)> {
    let images: Vec<hydrant_api::Image> = world.daemon.admin().get("/v1/images")?;
    let image = images.first().context("it was not pulled")?;
    Ok((image.present_bytes, image.segment_bytes, image.unproved))
}

/// They count where that is switched on, and until all of a layer is here for nothing more than the image that they are of; elsewhere the
/// layers are streamed.
#[test]
#[ignore = "needs root"]
fn root_indexes_of_version_1() -> Result<()> {
    let programs = packages(&["soci-snapshotter"])?;
    let mut world = World::with("soci", Setting { start: false, ..Setting::default() })?;
    share_mounts(&world.daemon.directories().state)?;
    world.daemon.start()?;
    let registry = Registry::start(&world.path("registry"))?;
    registry.push("big", "v1", "big")?;
    registry.unpacked("big")?;
    let image = format!("127.0.0.1:{}/big:v1", registry.port());
    let snapshots = Snapshots::of(&world.daemon.directories().run);
    let directory = world.path("containerd");
    let containerd = Containerd::start(&directory, snapshots.socket(), true, None)
        .with_context(|| world.daemon.log_tail(40))?;
    let pull = ["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image];
    containerd.check("plain", &pull)?;
    let (address, place) = (containerd.address(), text(&directory)?);
    let script = ["unshare", "--mount", "sh", "-euc", INDEX, "sh", place, text(&programs)?];
    containerd.inside(&[&script[..], &[text(&address)?, &image]].concat()).check()?;

    let pull = ["image", "pull", &image];
    world.daemon.check(&pull)?;
    let (here, size, unproved) = present(&world)?;
    ensure!((here, unproved) == (size, 0), "{here} of {size} bytes, though nothing pins the index");
    world.daemon.check(&["image", "rm", &image])?;

    world.daemon.stop()?;
    let switched_on = "[images]\nsoci_v1 = true\ntrace = false\nbackground_fill = false\n";
    world.daemon.configure(&(guest::configuration() + switched_on))?;
    world.daemon.start()?;
    world.daemon.check(&pull)?;
    let (here, _, unproved) = present(&world)?;
    ensure!((here, unproved) == (0, 2), "{here} bytes; {}", world.daemon.log_tail(40));
    let tree = world.path("tree");
    let oci = format!("oci://{image}");
    world.daemon.check(&["mount", &oci, text(&tree)?])?;
    let truth = world.path("registry/unpacked/big");
    expect_right(Kind::Read, &tree.join("d2/f09"), &truth.join("d2/f09"))?;
    let (here, ..) = present(&world)?;
    ensure!(here > 0 && here < size / 2, "one file took {here} of {size} bytes");
    same_list(&listed(&truth)?, &listed(&tree)?)?;

    world.daemon.check(&["prefetch", text(&tree)?])?;
    let proved =
        until("all layers are proved", PATIENCE, || (present(&world).ok()?.2 == 0).then_some(()));
    proved.with_context(|| world.daemon.log_tail(40))?;
    world.daemon.check(&["rm", text(&tree)?])?;
    world.daemon.check(&["image", "rm", &image])?;

    // another repository with the very same image does not say it
    world.daemon.check(&pull)?;
    ensure!(present(&world)?.0 == 0);
    registry.push("other", "v1", "big")?;
    let other = format!("127.0.0.1:{}/other:v1", registry.port());
    world.daemon.check(&["image", "pull", &other])?;
    let images: Vec<hydrant_api::Image> = world.daemon.admin().get("/v1/images")?;
    let whole = |name: &str| {
        let found = images.iter().find(|found| found.reference == name);
        found.map(|found| found.present_bytes == found.segment_bytes)
    };
    ensure!((whole(&image), whole(&other)) == (Some(false), Some(true)), "{images:?}");
    ensure!(images[0].manifest == images[1].manifest);
    world.daemon.check(&["image", "rm", &other])?;

    // switched off again, what is not proved stays where it is in use, and is pulled anew otherwise
    world.daemon.check(&["mount", &oci, text(&tree)?])?;
    world.daemon.stop()?;
    let switched_off = "[images]\ntrace = false\nbackground_fill = false\n";
    world.daemon.configure(&(guest::configuration() + switched_off))?;
    world.daemon.start()?;
    let refused = world.daemon.hydrant(&pull)?.output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("is in use"), "{said}");
    expect_right(Kind::Read, &tree.join("d1/f01"), &truth.join("d1/f01"))?;
    world.daemon.check(&["rm", text(&tree)?])?;
    let refused = world.daemon.hydrant(&["mount", &oci, text(&tree)?])?.output()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("nobody who is believed"), "{said}");
    world.daemon.check(&pull)?;
    let (here, size, unproved) = present(&world)?;
    ensure!((here, unproved) == (size, 0), "{here} of {size} bytes");
    world.daemon.check(&["mount", &oci, text(&tree)?])?;
    world.daemon.check(&["rm", text(&tree)?])?;
    world.daemon.check(&["image", "rm", &image])?;

    // an index that is listed, and can't be had, is done without
    let manifest = images[0].manifest.clone();
    Run::shell(FORGET, &[&world.path("registry")]).check()?;
    world.daemon.stop()?;
    world.daemon.configure(&(guest::configuration() + switched_on))?;
    world.daemon.start()?;
    let by_digest = format!("127.0.0.1:{}/big@{manifest}", registry.port());
    let said = world.daemon.check(&["image", "pull", &by_digest])?.stderr;
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(said.contains("no SOCI index"), "{said}");
    let (here, size, unproved) = present(&world)?;
    ensure!((here, unproved) == (size, 0), "{here} of {size} bytes");
    Ok(())
}
