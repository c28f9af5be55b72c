//! Indexes that Hydrant makes of ordinary layers, signs, and puts beside the image: with them a first pull is lazy; without a
//! good signature they are not used.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_daemon::layer::index::Head;
use hydrant_tests::access::Kind;
use hydrant_tests::guest;
use hydrant_tests::process::{Run, require, until};
use hydrant_tests::proxy::{Proxy, Quality};
use hydrant_tests::reader::expect_right;
use hydrant_tests::registry::{Front, Registry, listed, same_list};
use hydrant_tests::snapshots::{Snapshots, labels};
use hydrant_tests::world::{Setting, World};

const PATIENCE: Duration = Duration::from_secs(120);

struct Images {
    world: World,
    registry: Registry,
    /// The private key that is believed, and another one.
    keys: [PathBuf; 2],
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a directory of a test is UTF-8")
}

impl Images {
    fn new(name: &str) -> Result<Self> {
        Self::with(name, "trace = false")
    }

    /// With lines of the daemon's configuration of images.
    fn with(name: &str, images: &str) -> Result<Self> {
        require(&[("openssl", "openssl")])?;
        let mut world = World::with(name, Setting { start: false, ..Setting::default() })?;
        let keys = ["ours.pem", "theirs.pem"].map(|name| world.path(name));
        for key in &keys {
            Run::shell("openssl genpkey -algorithm ed25519 -out \"$1\"", &[key]).check()?;
        }
        let public = Run::shell("openssl pkey -in \"$1\" -pubout", &[&keys[0]]).check()?.text();
        let configuration = format!(
            "[images]\nbackground_fill = false\n{images}\nindex_keys = ['''\n{public}\n''']\n"
        );
        world.daemon.configure(&(guest::configuration() + &configuration))?;
        world.daemon.start()?;
        let registry = Registry::start(&world.path("registry"))?;
        registry.push("big", "v1", "big")?;
        Ok(Self { world, registry, keys })
    }

    fn hydrant(&self, arguments: &[&str]) -> Result<String> {
        let done = self.world.daemon.check(arguments);
        Ok(done.with_context(|| self.world.daemon.log_tail(40))?.text())
    }

    fn index(&self, reference: &str, key: &Path) -> Result<String> {
        self.hydrant(&["image", "index", reference, "--push", "--key", text(key)?])
    }

    /// Pulls an image again; gives how many of its bytes are here, how many it has, and what was said.
    fn pull_again(&self, reference: &str) -> Result<(u64, u64, String)> {
        self.hydrant(&["image", "rm", reference])?;
        let output = self.world.daemon.check(&["image", "pull", reference])?;
        let images: Vec<hydrant_api::Image> = self.world.daemon.admin().get("/v1/images")?;
        let image = images.first().context("it was not pulled")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((image.present_bytes, image.segment_bytes, said))
    }
}

/// Once its index is there, an ordinary image is not streamed: by `hydrant mount`, and by containerd, whatever its name. All of it
/// is as it was, and proved at the end. The registry is Debian's, which has no list of referrers.
#[test]
#[ignore = "needs root"]
fn root_a_first_pull_with_a_signed_index() -> Result<()> {
    let images = Images::new("signed-lazy")?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let reference = format!("127.0.0.1:{}/big:v1", proxy.port());
    images.hydrant(&["image", "pull", &reference])?;
    let listed_only = images.hydrant(&["image", "index", &reference])?;
    ensure!(listed_only.contains("2 indexes"), "{listed_only}");
    let said = images.index(&reference, &images.keys[0])?;
    ensure!(said.contains("2 indexes in sha256:"), "{said}");
    let before = proxy.traffic().down_bytes;
    let (present, size, said) = images.pull_again(&reference)?;
    ensure!(present == 0, "{present} bytes came with the pull: {said}");
    let pulled = proxy.traffic().down_bytes - before;
    ensure!(pulled < size / 16, "a pull of {size} bytes took {pulled}");

    // containerd, which says of which layer of which image it wants a snapshot
    let snapshots = Snapshots::of(&images.world.daemon.directories().run);
    let archive = images.registry.layers("big").join("0.tar");
    let diff = Run::shell("sha256sum \"$1\" | cut -d' ' -f1", &[&archive]).check()?.text();
    let target = format!("sha256:{diff}");
    let asked = [(hydrant_daemon::snapshotter::REF, target.as_str())];
    let prepared = snapshots.prepare("extract", "", &asked);
    ensure!(prepared.is_err(), "it is to be unpacked");
    ensure!(labels(&asked).len() == 1 && snapshots.names(&[])?.contains(&target));
    snapshots.remove(&target)?;

    let tree = images.world.path("tree");
    images.hydrant(&["mount", &format!("oci://{reference}"), text(&tree)?])?;
    let expected = images.registry.unpacked("big")?;
    let truth = images.world.path("registry/unpacked/big");
    expect_right(Kind::MmapPrivate, &tree.join("d2/f09"), &truth.join("d2/f09"))?;
    let read = proxy.traffic().down_bytes - before - pulled;
    ensure!(read < size / 2, "one file took {read} of {size} bytes");
    same_list(&expected, &listed(&tree)?)?;
    images.hydrant(&["prefetch", text(&tree)?])?;
    until("all layers are proved", PATIENCE, || {
        let listed: Vec<hydrant_api::Image> = images.world.daemon.admin().get("/v1/images").ok()?;
        (listed.first()?.unproved == 0).then_some(())
    })
    .with_context(|| images.world.daemon.log_tail(40))
}

/// What was read of an image at one place comes first at another, which has never had it.
#[test]
#[ignore = "needs root"]
fn root_a_trace_is_shared() -> Result<()> {
    let images = Images::with("signed-trace", "trace = true")?;
    let reference = format!("127.0.0.1:{}/big:v1", images.registry.port());
    images.hydrant(&["image", "pull", &reference])?;
    images.index(&reference, &images.keys[0])?;
    images.hydrant(&["image", "evict", &reference])?;
    let oci = format!("oci://{reference}");
    let tree = images.world.path("tree");
    images.hydrant(&["mount", &oci, text(&tree)?])?;
    images.registry.unpacked("big")?;
    let truth = images.world.path("registry/unpacked/big");
    expect_right(Kind::Read, &tree.join("d2/f09"), &truth.join("d2/f09"))?;
    let traced = || -> Result<Vec<hydrant_api::TracedLayer>> {
        let text = images.hydrant(&["image", "trace", "show", &reference, "--json"])?;
        Ok(serde_json::from_str(&text)?)
    };
    // all chunks of the archive, of 256 KiB, that have bytes of the file; before it are a directory and nine files, each with a header
    let len = fs_err::metadata(truth.join("d2/f09"))?.len();
    let start = 512 + 9 * (512 + len.next_multiple_of(512)) + 512;
    let expected = ((start + len - 1) / (256 << 10) - start / (256 << 10) + 1) * (256 << 10);
    until("it is recorded", PATIENCE, || (traced().ok()?.get(1)?.bytes == expected).then_some(()))
        .with_context(|| format!("{:?} instead of {expected}", traced()))?;
    images.hydrant(&["rm", text(&tree)?])?;
    let here = traced()?;
    ensure!(here[0].bytes == 0 && here[1].files.iter().all(|f| f.starts_with("d2/f")), "{here:?}");
    let key = text(&images.keys[0])?;
    images.hydrant(&["image", "trace", "push", &reference, "--key", key])?;

    // as if it had never been here
    images.hydrant(&["image", "trace", "record", &reference])?;
    ensure!(traced()?.iter().all(|layer| layer.bytes == 0 && layer.files.is_empty()));
    let (present, _, said) = images.pull_again(&reference)?;
    ensure!(present == 0, "the index is not used any more: {said}");
    ensure!(traced()?[1].bytes == here[1].bytes, "{:?}", traced()?);
    images.hydrant(&["mount", &oci, text(&tree)?])?;
    until("it comes by itself", PATIENCE, || {
        let layers = images.world.daemon.status().ok()?.layers;
        let fill = layers.iter().find(|fill| fill.layer == here[1].layer)?;
        let all = fill.traced_bytes == here[1].bytes && fill.replayed_bytes == fill.traced_bytes;
        (all && fill.state == "done").then_some(())
    })
    .with_context(|| images.world.daemon.log_tail(40))?;
    let shown = images.hydrant(&["status"])?;
    ensure!(shown.contains("REPLAYED"), "{shown}");
    images.hydrant(&["rm", text(&tree)?]).map(drop)
}

/// Somebody who can push, and has not the key, can't say what is in an image; an index that is damaged is of no use; one
/// that is good counts all the same.
#[test]
#[ignore = "needs root"]
fn root_without_a_good_signature() -> Result<()> {
    let images = Images::new("signed-refused")?;
    let reference = format!("127.0.0.1:{}/big:v1", images.registry.port());
    images.hydrant(&["image", "pull", &reference])?;
    images.index(&reference, &images.keys[1])?;
    let (present, size, said) = images.pull_again(&reference)?;
    ensure!(present == size, "{present} of {size} bytes");
    ensure!(said.contains("is not used: no key that is configured"), "{said}");
    let log = images.world.daemon.log_tail(1000);
    ensure!(log.contains("is not used: no key that is configured"), "{log}");

    // with a good one beside it
    images.index(&reference, &images.keys[0])?;
    images.index(&reference, &images.keys[1])?;
    let (present, _, said) = images.pull_again(&reference)?;
    ensure!(present == 0, "{present} bytes came with the pull: {said}");
    // nothing is sent without a key, and a file that is none is not taken for one
    let refused = images.world.daemon.hydrant(&["image", "index", &reference, "--push"])?;
    ensure!(!refused.output()?.status.success());
    let none = images.world.path("none.pem");
    fs_err::write(&none, "no key")?;
    ensure!(images.index(&reference, &none).is_err());
    Ok(())
}

/// A registry that has a list of what refers to an image is asked for that; who may write is asked for.
#[test]
#[ignore = "needs root"]
fn root_a_registry_with_a_list_of_referrers() -> Result<()> {
    let images = Images::new("signed-referrers")?;
    let front = images.world.path("front");
    let front = Front::with_referrers(&front, images.registry.port())?;
    let host = format!("127.0.0.1:{}", front.port);
    let reference = format!("{host}/big:v1");
    images.hydrant(&["image", "pull", &reference])?;
    ensure!(images.index(&reference, &images.keys[0]).is_err(), "anybody may write");
    let docker = images.world.path("home/.docker");
    fs_err::create_dir_all(&docker)?;
    // user:secret
    let auths = format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"dXNlcjpzZWNyZXQ=\"}}}}}}");
    fs_err::write(docker.join("config.json"), auths)?;
    images.index(&reference, &images.keys[0])?;
    let (present, _, said) = images.pull_again(&reference)?;
    ensure!(present == 0, "{present} bytes came with the pull: {said}");
    let log = front.log()?;
    ensure!(log.iter().any(|line| line.contains("/referrers/")), "{log:?}");
    // that tag is for those without a list
    let put = log.iter().any(|line| line.starts_with("PUT") && line.contains("/manifests/sha256-"));
    ensure!(!put, "{log:?}");
    Ok(())
}

/// An access index of a layer, as the daemon keeps it.
struct Kept {
    windows: String,
    /// So many bytes of its windows are here, of so many.
    here: u64,
    len: u64,
}

impl Images {
    /// Makes an index of the image, and forgets that it was ever here. Gives the digests of the windows; both layers may have the
    /// same.
    fn publish(&self) -> Result<BTreeSet<String>> {
        let reference = format!("127.0.0.1:{}/big:v1", self.registry.port());
        self.hydrant(&["image", "pull", &reference])?;
        self.index(&reference, &self.keys[0])?;
        let windows = self.kept()?.into_iter().map(|kept| kept.windows).collect();
        self.hydrant(&["image", "rm", &reference])?;
        Ok(windows)
    }

    fn kept(&self) -> Result<Vec<Kept>> {
        let mut kept = Vec::new();
        let find = "find \"$1\" -name '*.access'";
        let found = Run::shell(find, &[&self.world.daemon.directories().state]).check()?.text();
        for path in found.lines() {
            let bytes = fs_err::read(path)?;
            let head = Head::parse(&bytes)?;
            let windows = head.windows.context("it says what its windows are")?;
            let here = bytes.len() as u64 - head.windows_at();
            kept.push(Kept { windows: windows.digest.to_string(), here, len: windows.len });
        }
        Ok(kept)
    }

    fn completes(&self, count: usize) -> Result<()> {
        let complete = || {
            let kept = self.kept().ok()?;
            let all = kept.len() == count && kept.iter().all(|kept| kept.here == kept.len);
            all.then_some(())
        };
        until("all windows are here", PATIENCE, complete)
            .with_context(|| self.world.daemon.log_tail(40))
    }

    fn expect_right(&self, tree: &Path, name: &str) -> Result<()> {
        let truth = self.world.path("registry/unpacked/big");
        let right = expect_right(Kind::Read, &tree.join(name), &truth.join(name));
        right.with_context(|| self.world.daemon.log_tail(40))
    }
}

/// The ranges of the windows that were asked for, in this repository.
fn asked(front: &Front, repository: &str, windows: &BTreeSet<String>) -> Result<Vec<String>> {
    let log = front.log()?;
    let is_one = |line: &&String| {
        let of = |digest: &String| format!("/v2/{repository}/blobs/{digest} ");
        windows.iter().any(|digest| line.starts_with(&of(digest)))
    };
    Ok(log.iter().filter(is_one).cloned().collect())
}

/// A pull does not wait for the windows of an index. Readers get those that they need, and all of them come behind the pull, also
/// when the daemon was killed meanwhile: from then on nobody asks for them.
#[test]
#[ignore = "needs root"]
fn root_windows_of_an_index_come_as_they_are_needed() -> Result<()> {
    let mut images = Images::new("signed-windows")?;
    let front = Front::open(&images.world.path("front"), images.registry.port())?;
    let windows = images.publish()?;
    let held: Vec<_> = windows.iter().map(String::as_str).collect();
    front.hold(&held)?;
    images.registry.unpacked("big")?;
    let reference = format!("127.0.0.1:{}/big:v1", front.port);
    images.hydrant(&["image", "pull", &reference])?;
    let kept = images.kept()?;
    ensure!(kept.len() == 2 && kept.iter().all(|kept| kept.here == 0 && kept.len > 0));
    ensure!(windows.len() <= kept.len());
    let tree = images.world.path("tree");
    images.hydrant(&["mount", &format!("oci://{reference}"), text(&tree)?])?;
    images.expect_right(&tree, "d2/f09")?;
    let ranges = || -> Result<Vec<String>> {
        let asked = asked(&front, "big", &windows)?.into_iter();
        Ok(asked.filter(|line| line.contains("bytes=")).collect())
    };
    ensure!(!ranges()?.is_empty(), "{:?}", front.log()?);

    images.world.daemon.kill();
    ensure!(images.kept()?.iter().all(|kept| kept.here == 0), "they were held");
    front.hold(&[])?;
    images.world.daemon.start()?;
    images.completes(2)?;
    let whole = asked(&front, "big", &windows)?;
    ensure!(whole.iter().any(|line| !line.contains("bytes=")), "{whole:?}");
    let seen = ranges()?;
    images.hydrant(&["rm", text(&tree)?])?;
    images.hydrant(&["image", "evict", &reference])?;
    images.hydrant(&["mount", &format!("oci://{reference}"), text(&tree)?])?;
    images.expect_right(&tree, "d2/f09")?;
    images.expect_right(&tree, "d1/f03")?;
    let now = ranges()?;
    ensure!(now == seen, "{now:?}");
    images.hydrant(&["rm", text(&tree)?]).map(drop)
}

/// Another repository has the layers, and nothing beside them. Where the windows can be had they come with the pull, and the layers
/// are shared; otherwise each has its own.
#[test]
#[ignore = "needs root"]
fn root_layers_of_a_repository_without_windows() -> Result<()> {
    let images = Images::new("signed-shared")?;
    let front = Front::open(&images.world.path("front"), images.registry.port())?;
    let windows = images.publish()?;
    let held: Vec<_> = windows.iter().map(String::as_str).collect();
    front.hold(&held)?;
    images.registry.push("other", "v1", "big")?;
    images.registry.unpacked("big")?;
    let [big, other] = ["big", "other"].map(|name| format!("127.0.0.1:{}/{name}:v1", front.port));
    let tree = images.world.path("tree");
    let blobs = |repository: &str| -> Result<usize> {
        let of = format!("/v2/{repository}/blobs/");
        Ok(front.log()?.iter().filter(|line| line.starts_with(&of)).count())
    };

    images.hydrant(&["image", "pull", &big])?;
    ensure!(images.kept()?.iter().all(|kept| kept.here == 0));
    front.hold(&[])?;
    images.hydrant(&["image", "pull", &other])?;
    let kept = images.kept()?;
    ensure!(kept.len() == 2 && kept.iter().all(|kept| kept.here == kept.len));
    images.hydrant(&["mount", &format!("oci://{big}"), text(&tree)?])?;
    let before = [blobs("big")?, blobs("other")?];
    images.expect_right(&tree, "d2/f09")?;
    ensure!(blobs("big")? == before[0] && blobs("other")? > before[1], "who has them was last");
    images.hydrant(&["rm", text(&tree)?])?;
    images.hydrant(&["image", "rm", &big])?;
    images.hydrant(&["image", "rm", &other])?;

    front.hold(&held)?;
    images.hydrant(&["image", "pull", &big])?;
    for digest in &windows {
        let of = "data/docker/registry/v2/repositories/big/_layers/sha256";
        let link = images.world.path("registry").join(of).join(digest.replace("sha256:", ""));
        fs_err::remove_dir_all(link)?;
    }
    front.hold(&[])?;
    let said = images.world.daemon.check(&["image", "pull", &other])?.stderr;
    ensure!(String::from_utf8_lossy(&said).contains("can't be completed"), "{said:?}");
    ensure!(images.kept()?.len() == 4, "they can't share what one of them can't complete");
    images.hydrant(&["mount", &format!("oci://{other}"), text(&tree)?])?;
    images.expect_right(&tree, "d2/f09")?;
    images.hydrant(&["rm", text(&tree)?])?;

    // nor is such an index of use to anybody else
    images.hydrant(&["image", "rm", &other])?;
    let (present, size, said) = images.pull_again(&big)?;
    ensure!(present == size, "{present} of {size} bytes: {said}");
    Ok(())
}
