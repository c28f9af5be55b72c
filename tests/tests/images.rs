//! Container images: what is mounted is what unpacking the layers one on top of the other gives, whatever is in
//! them, and stays so without a registry, and through crashes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::process::until;
use hydrant_tests::proxy::{Proxy, Quality};
use hydrant_tests::reader::{Crowd, End, end, expect_right, expect_some_denied, start};
use hydrant_tests::registry::{Front, Registry, listed, same_list};
use hydrant_tests::state_fs::StateFs;
use hydrant_tests::world::{Setting, World};
use nix::sys::signal::{Signal, kill};

struct Images {
    world: World,
    registry: Registry,
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a directory of a test is UTF-8")
}

impl Images {
    fn new(name: &str) -> Result<Self> {
        Self::with(name, "")
    }

    /// With lines of the daemon's configuration.
    fn with(name: &str, configuration: &'static str) -> Result<Self> {
        Self::set(name, Setting { configuration, ..Setting::default() })
    }

    fn set(name: &str, setting: Setting) -> Result<Self> {
        let world = World::with(name, setting)?;
        let registry = Registry::start(&world.path("registry"))?;
        Ok(Self { world, registry })
    }

    fn reference(&self, port: u16, name: &str) -> String {
        format!("127.0.0.1:{port}/{name}:v1")
    }

    /// `hydrant ARGUMENTS`, which has to do it.
    fn hydrant(&self, arguments: &[&str]) -> Result<String> {
        let done = self.world.daemon.check(arguments);
        Ok(done.with_context(|| self.world.daemon.log_tail(40))?.text())
    }

    /// `hydrant ARGUMENTS`, which has to refuse it; gives what it says.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let output = self.world.daemon.hydrant(arguments)?.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{arguments:?} was done");
        Ok(said)
    }

    /// `hydrant mount oci://REFERENCE` in a new directory.
    fn mount(&self, reference: &str, directory: &str) -> Result<PathBuf> {
        let at = self.world.path(directory);
        self.hydrant(&["mount", &format!("oci://{reference}"), text(&at)?])?;
        Ok(at)
    }

    /// Pulled through a proxy, its content dropped again, and mounted. Gives the tree, and files of it with their
    /// truth.
    fn lazy(&self, proxy: &Proxy) -> Result<(PathBuf, Vec<(PathBuf, PathBuf)>)> {
        self.registry.push("big", "v1", "big")?;
        let reference = self.reference(proxy.port(), "big");
        self.hydrant(&["image", "pull", &reference])?;
        self.hydrant(&["image", "evict", &reference])?;
        let tree = self.mount(&reference, "tree")?;
        self.registry.unpacked("big")?;
        let truth = self.world.path("registry/unpacked/big");
        let names = (1..=2).flat_map(|d| (0..16).map(move |f| format!("d{d}/f{f:02}")));
        Ok((tree.clone(), names.map(|name| (tree.join(&name), truth.join(&name))).collect()))
    }
}

/// An index of two platforms; layers packed by gzip, zstd and not at all; whiteouts, opaque directories, hard
/// links, devices, set-uid files, attributes, long and odd names. The registry is gone once it is pulled.
#[test]
#[ignore = "needs root"]
fn root_odd_image() -> Result<()> {
    let mut images = Images::new("images-odd")?;
    images.registry.push("odd", "v1", "index")?;
    let reference = images.reference(images.registry.port(), "odd");
    images.hydrant(&["image", "pull", &reference])?;
    let expected = images.registry.unpacked("odd")?;
    images.registry.stop();
    let listed_images = images.hydrant(&["image", "ls"])?;
    ensure!(listed_images.contains(&reference), "{listed_images}");
    let tree = images.mount(&reference, "tree")?;
    same_list(&expected, &listed(&tree)?)?;
    let read_only = images.world.path("ro");
    let oci = format!("oci://{reference}");
    images.hydrant(&["mount", &oci, text(&read_only)?, "--read-only"])?;
    ensure!(fs_err::write(read_only.join("x"), b"x").is_err(), "a read-only tree was written to");

    // a change is a change
    fs_err::write(tree.join("etc/passwd"), b"changed")?;
    fs_err::remove_file(tree.join("home/twice"))?;
    images.hydrant(&["umount", text(&tree)?])?;
    images.world.daemon.mount_again(&tree)?;
    ensure!(fs_err::read(tree.join("etc/passwd"))? == b"changed", "a change is lost");
    ensure!(!tree.join("home/twice").exists(), "a removed file is back");
    let said = images.refused(&["rm", text(&tree)?])?;
    ensure!(said.contains("has changes"), "{said}");
    let said = images.refused(&["image", "rm", &reference])?;
    ensure!(said.contains("in use"), "{said}");
    images.hydrant(&["rm", text(&tree)?, "--discard"])?;
    images.hydrant(&["rm", text(&read_only)?])?;
    images.hydrant(&["image", "rm", &reference])?;
    let state = &images.world.daemon.directories().state;
    let left = fs_err::read_dir(state.join("trees"))?.count();
    ensure!(left == 0, "{left} images of layers are left");
    Ok(())
}

/// Two images share the layers that they have in common.
#[test]
#[ignore = "needs root"]
fn root_layers_are_shared() -> Result<()> {
    let images = Images::new("images-shared")?;
    let mut references = Vec::new();
    for (name, kind) in [("one", "plain"), ("two", "docker")] {
        images.registry.push(name, "v1", kind)?;
        let reference = images.reference(images.registry.port(), name);
        images.hydrant(&["image", "pull", &reference])?;
        references.push(reference);
    }
    let trees = images.world.daemon.directories().state.join("trees");
    ensure!(fs_err::read_dir(&trees)?.count() == 1, "the layer is there twice");
    images.hydrant(&["image", "rm", &references[0]])?;
    let tree = images.mount(&references[1], "tree")?;
    ensure!(fs_err::read(tree.join("hello"))? == b"hello\n", "the layer went with the first image");
    same_list(&images.registry.unpacked("two")?, &listed(&tree)?)
}

/// What can't be, or is not what it is said to be, is refused, and leaves nothing.
#[test]
#[ignore = "needs root"]
fn root_what_is_wrong_is_refused() -> Result<()> {
    let images = Images::new("images-wrong")?;
    for (kind, expected) in [
        ("wrong-diff", "has the digest"),
        ("foreign", "foreign"),
        ("other-platform", "it has nothing for"),
    ] {
        images.registry.push(kind, "v1", kind)?;
        let said =
            images.refused(&["image", "pull", &images.reference(images.registry.port(), kind)])?;
        ensure!(said.contains(expected), "{kind}: {said}");
    }
    images.registry.push("damaged", "v1", "big")?;
    images.registry.damage_longest_blob()?;
    let reference = images.reference(images.registry.port(), "damaged");
    images.refused(&["image", "pull", &reference])?;
    let said = images.refused(&["image", "pull", &reference.replace(":v1", ":v2")])?;
    ensure!(said.contains("has no"), "{said}");
    let state = &images.world.daemon.directories().state;
    let left = fs_err::read_dir(state.join("trees"))?.count();
    ensure!(left == 0, "{left} images of layers are left");
    let listed_images = images.hydrant(&["image", "ls"])?;
    ensure!(listed_images == "no images", "{listed_images}");
    Ok(())
}

/// A registry that wants tokens, which run out, and that sends clients elsewhere for blobs; a lie of a blob store about a
/// range is an error, and no data.
#[test]
#[ignore = "needs root"]
fn root_tokens_and_redirects() -> Result<()> {
    let images = Images::new("images-token")?;
    images.registry.push("big", "v1", "big")?;
    let front = Front::start(&images.world.path("front"), images.registry.port())?;
    let reference = images.reference(front.port, "big");
    let said = images.refused(&["image", "pull", &reference])?;
    ensure!(said.contains("log in") && said.contains("config.json"), "{said}");
    let docker = images.world.path("home/.docker");
    fs_err::create_dir_all(&docker)?;
    // user:secret
    let auths =
        format!(r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "dXNlcjpzZWNyZXQ="}}}}}}"#, front.port);
    fs_err::write(docker.join("config.json"), auths)?;
    images.hydrant(&["image", "pull", &reference])?;
    images.hydrant(&["image", "evict", &reference])?;
    let tree = images.mount(&reference, "tree")?;
    let expected = images.registry.unpacked("big")?;
    let truth = images.world.path("registry/unpacked/big");
    fs_err::write(front.directory.join("lie"), b"")?;
    ensure!(fs_err::read(tree.join("d1/f00")).is_err(), "what the store lied about was read");
    fs_err::remove_file(front.directory.join("lie"))?;
    until("the bytes are right again", Duration::from_secs(120), || {
        expect_right(Kind::Read, &tree.join("d1/f00"), &truth.join("d1/f00")).ok()
    })?;
    same_list(&expected, &listed(&tree)?)?;
    front.check()?;
    let log = front.log()?;
    let tokens = log.iter().filter(|line| line.starts_with("/token")).count();
    ensure!(tokens >= 3, "a token was used for ever: {log:?}");
    ensure!(log.iter().any(|line| line.contains("bytes=")), "nothing was asked for in part");
    Ok(())
}

/// An evicted layer comes back in parts: one file costs a part of the layer. Complete again, it raises no events.
#[test]
#[ignore = "needs root"]
fn root_evicted_layers_come_back_in_parts() -> Result<()> {
    let images = Images::new("images-evict")?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let (tree, files) = images.lazy(&proxy)?;
    let before = images.world.daemon.mount_of(&tree)?;
    ensure!(before.present_bytes == 0, "not all was evicted: {before:?}");
    let (file, truth) = &files[9];
    expect_right(Kind::MmapPrivate, file, truth)?;
    let counters = images.world.daemon.status()?.counters;
    ensure!(counters.received_bytes < before.segment_bytes / 3, "{counters:?} of {before:?}");
    let expected = images.registry.unpacked("big")?;
    same_list(&expected, &listed(&tree)?)?;
    images.hydrant(&["prefetch", text(&tree)?])?;
    until("both layers are complete", Duration::from_secs(60), || {
        let mount = images.world.daemon.mount_of(&tree).ok()?;
        (mount.complete_segments == 2).then_some(())
    })
}

/// What is behind the file that is read comes with it, unless there is to be no read-ahead.
#[test]
#[ignore = "needs root"]
fn root_what_is_behind_comes_along() -> Result<()> {
    for (name, configuration, expected) in [
        ("images-behind", "", 3 << 20..10 << 20),
        ("images-exact", "read_ahead = false\n", 1 << 20..5 << 19),
    ] {
        let images = Images::with(name, configuration)?;
        let proxy = Proxy::start(images.registry.port(), Quality::default())?;
        let (tree, files) = images.lazy(&proxy)?;
        let (file, truth) = &files[2];
        expect_right(Kind::Read, file, truth)?;
        let mut present = 0;
        until("what comes along is here", Duration::from_secs(60), || {
            present = images.world.daemon.mount_of(&tree).ok()?.present_bytes;
            (present >= expected.start).then_some(())
        })
        .with_context(|| images.world.daemon.log_tail(40))?;
        ensure!(present < expected.end, "{name}: {present} bytes are here");
    }
    Ok(())
}

/// With a full disk, readers of layers get an error whose reason is told, never wrong bytes. It goes on when there is
/// room.
#[test]
#[ignore = "needs root"]
fn root_a_full_disk() -> Result<()> {
    let configuration = "[images]\nbackground_fill = false\n";
    let (state_fs, state_bytes) = (StateFs::Ext4, 512 << 20);
    let setting = Setting { configuration, state_fs, state_bytes, ..Setting::default() };
    let images = Images::set("images-full", setting)?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let (tree, files) = images.lazy(&proxy)?;
    let segment_bytes = images.world.daemon.mount_of(&tree)?.segment_bytes;
    let ballast = images.world.fill_disk(segment_bytes / 2)?;
    expect_some_denied(&files)?;
    let reason = "No space left on device";
    let trouble = images.world.daemon.mount_of(&tree)?.trouble.unwrap_or_default();
    ensure!(trouble.contains(reason), "status says {trouble:?}");
    fs_err::remove_file(&ballast)?;
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::MmapPrivate, file, truth))?;
    images.hydrant(&["prefetch", text(&tree)?])?;
    until("both layers are complete", Duration::from_secs(60), || {
        let mount = images.world.daemon.mount_of(&tree).ok()?;
        (mount.complete_segments == 2).then_some(())
    })
}

/// SIGKILL of workers while layers are read over a slow line: nobody gets an error or wrong bytes.
#[test]
#[ignore = "needs root"]
fn root_killed_workers_while_layers_are_read() -> Result<()> {
    let images = Images::new("images-workers")?;
    let slow = Quality {
        delay: Duration::from_millis(20),
        bytes_per_second: Some(8 << 20),
        ..Quality::default()
    };
    let proxy = Proxy::start(images.registry.port(), slow)?;
    let (_, files) = images.lazy(&proxy)?;
    let crowds: Vec<Crowd> = [Kind::Read, Kind::MmapPrivate, Kind::Pread]
        .into_iter()
        .map(|kind| Crowd::start(kind, &files))
        .collect::<Result<_>>()?;
    // an event that kills three workers is given up: two are no reason
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(500));
        for worker in images.world.daemon.workers()? {
            // it may have died a moment ago
            let _ = kill(worker, Signal::SIGKILL);
        }
    }
    crowds.into_iter().try_for_each(Crowd::expect_right)
}

/// What a command reads in an image is recorded, whatever was recorded before, and of what is here already.
#[test]
#[ignore = "needs root"]
fn root_a_command_is_recorded() -> Result<()> {
    let images = Images::with("images-record", "")?;
    images.registry.push("app", "v1", "app")?;
    let reference = images.reference(images.registry.port(), "app");
    images.hydrant(&["image", "pull", &reference])?;
    let record = ["image", "trace", "record", &reference, "--", "/bin/busybox", "cp"];
    for file in ["d1/f02", "d1/f13"] {
        images.hydrant(&[&record[..], &[&format!("/{file}"), "/copy"]].concat())?;
        until("it is recorded", Duration::from_secs(60), || {
            let shown = images.hydrant(&["image", "trace", "show", &reference]).ok()?;
            (shown.contains(file) && shown.contains("bin/busybox")).then_some(())
        })
        .with_context(|| {
            format!("{:?}", images.hydrant(&["image", "trace", "show", &reference]))
        })?;
    }
    ensure!(images.world.daemon.status()?.mounts.is_empty());
    // not of what is in use
    let tree = images.mount(&reference, "tree")?;
    let refused = images.refused(&record[..4])?;
    ensure!(refused.contains("3 layers are mounted"), "{refused}");
    images.hydrant(&["rm", text(&tree)?]).map(drop)
}

/// SIGKILL of the supervisor while somebody waits for a part of a layer, and of its successor's worker.
#[test]
#[ignore = "needs root"]
fn root_killed_supervisor_while_a_layer_is_read() -> Result<()> {
    let images = Images::new("images-supervisor")?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let (tree, files) = images.lazy(&proxy)?;
    proxy.hold();
    let (file, truth) = &files[3];
    let reader = start(Kind::MmapPrivate, file, truth)?;
    let waiting = until("its event is with a worker", Duration::from_secs(60), || {
        let queue = images.world.daemon.admin().queue().ok()?;
        let event = queue.into_iter().find(|event| event.state == "in_flight")?;
        Some((event.path.unwrap_or_default(), event.origin.unwrap_or_default()))
    })?;
    ensure!(waiting.0.starts_with("d1/f0") && waiting.1.starts_with("oci://"), "{waiting:?}");
    let killed = images.world.daemon.kill_supervisor()?;
    until("another supervisor answers", Duration::from_secs(60), || {
        let status = images.world.daemon.status().ok()?;
        (status.pid != killed.as_raw()).then_some(())
    })?;
    proxy.heal();
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    same_list(&images.registry.unpacked("big")?, &listed(&tree)?)
}

/// Layers with an index that the image pins are not streamed: a pull fetches the index, a reader what it reads, and when
/// all is there it is proved to be the layer.
#[test]
#[ignore = "needs root"]
fn root_pinned_layers_are_not_streamed() -> Result<()> {
    let images =
        Images::with("images-pinned", "[images]\nbackground_fill = false\ntrace = false\n")?;
    images.registry.push("big", "v1", "big-estargz")?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let reference = images.reference(proxy.port(), "big");
    images.hydrant(&["image", "pull", &reference])?;
    let pulled = proxy.traffic().down_bytes;
    let tree = images.mount(&reference, "tree")?;
    let before = images.world.daemon.mount_of(&tree)?;
    ensure!(before.present_bytes == 0, "it was streamed: {before:?}");
    ensure!(pulled < before.segment_bytes / 16, "{pulled} bytes of {before:?}");
    let expected = images.registry.unpacked("big")?;
    let truth = images.world.path("registry/unpacked/big");
    expect_right(Kind::MmapPrivate, &tree.join("d2/f09"), &truth.join("d2/f09"))?;
    let read = proxy.traffic().down_bytes - pulled;
    ensure!(read < before.segment_bytes / 6, "one file took {read} bytes of {before:?}");
    same_list(&expected, &listed(&tree)?)?;
    images.hydrant(&["prefetch", text(&tree)?])?;
    until("both layers are proved", Duration::from_secs(120), || {
        let mount = images.world.daemon.mount_of(&tree).ok()?;
        (mount.complete_segments == 2).then_some(())
    })?;
    let whole = proxy.traffic().down_bytes;
    // they may go now, and come back in the same way
    images.hydrant(&["rm", text(&tree)?])?;
    images.hydrant(&["image", "evict", &reference])?;
    let tree = images.mount(&reference, "again")?;
    expect_right(Kind::Read, &tree.join("d1/f02"), &truth.join("d1/f02"))?;
    ensure!(
        proxy.traffic().down_bytes - whole < before.segment_bytes / 6,
        "more than one file came"
    );
    same_list(&expected, &listed(&tree)?)
}

/// What a layer's maker wants to be read first comes by itself, and nothing else does.
#[test]
#[ignore = "needs root"]
fn root_what_is_before_a_landmark_comes_first() -> Result<()> {
    let images = Images::with("images-landmark", "[images]\nbackground_fill = false\n")?;
    images.registry.push("first", "v1", "first-estargz")?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let reference = images.reference(proxy.port(), "first");
    images.hydrant(&["image", "pull", &reference])?;
    let tree = images.mount(&reference, "tree")?;
    let mount = || images.world.daemon.mount_of(&tree);
    let segment = mount()?.segment_bytes;
    until("the first quarter comes", Duration::from_secs(60), || {
        (mount().ok()?.present_bytes >= segment / 4).then_some(())
    })?;
    ensure!(mount()?.present_bytes < segment / 2, "{:?}", mount()?);
    let expected = images.registry.unpacked("first")?;
    let truth = images.world.path("registry/unpacked/first");
    proxy.hold();
    expect_right(Kind::MmapPrivate, &tree.join("d1/f15"), &truth.join("d1/f15"))?;
    proxy.heal();
    same_list(&expected, &listed(&tree)?)
}

/// What is read of a layer that has just been mounted comes by itself the next time, and nothing else does.
#[test]
#[ignore = "needs root"]
fn root_what_was_read_comes_before_it_is_read_again() -> Result<()> {
    let images = Images::new("images-trace")?;
    let proxy = Proxy::start(images.registry.port(), Quality::default())?;
    let (tree, files) = images.lazy(&proxy)?;
    let (file, truth) = &files[25];
    // a MiB long, and not at the start of a chunk of the layer's
    const READ: u64 = 5 * (256 << 10);
    expect_right(Kind::Read, file, truth)?;
    let traced = || {
        let listed: Vec<hydrant_api::Image> = images.world.daemon.admin().get("/v1/images").ok()?;
        Some(listed.first()?.traced_bytes)
    };
    until("what was read is remembered", Duration::from_secs(60), || {
        (traced()? == READ).then_some(())
    })?;
    let reference = images.reference(proxy.port(), "big");
    images.hydrant(&["rm", text(&tree)?])?;
    images.hydrant(&["image", "evict", &reference])?;
    images.mount(&reference, "tree")?;
    // with what is compressed with it
    let all = READ..=READ + (1 << 20);
    until("that comes by itself", Duration::from_secs(60), || {
        let present = images.world.daemon.mount_of(&tree).ok()?.present_bytes;
        all.contains(&present).then_some(())
    })?;
    proxy.hold();
    expect_right(Kind::MmapPrivate, file, truth)?;
    proxy.heal();
    same_list(&images.registry.unpacked("big")?, &listed(&tree)?)
}

/// All that a layer can hold, by each kind of index; what nobody reads comes in the background, and then no registry is needed.
#[test]
#[ignore = "needs root"]
fn root_odd_images_with_an_index() -> Result<()> {
    for kind in ["odd-estargz", "odd-chunked", "odd-soci"] {
        let mut images = Images::new(kind)?;
        images.registry.push("odd", "v1", kind)?;
        let reference = images.reference(images.registry.port(), "odd");
        images.hydrant(&["image", "pull", &reference])?;
        let expected = images.registry.unpacked("odd")?;
        let tree = images.mount(&reference, "tree")?;
        same_list(&expected, &listed(&tree)?)?;
        let log = images.world.daemon.log_tail(1000);
        ensure!(!log.contains(" is not used"), "{log}");
        until("all layers are proved", Duration::from_secs(120), || {
            let mount = images.world.daemon.mount_of(&tree).ok()?;
            (mount.complete_segments == 3).then_some(())
        })
        .with_context(|| images.world.daemon.log_tail(40))?;
        images.registry.stop();
        images.hydrant(&["umount", text(&tree)?])?;
        images.world.daemon.mount_again(&tree)?;
        same_list(&expected, &listed(&tree)?)?;
    }
    Ok(())
}

/// An index that is not the pinned one is of no use, and does no harm. One that lies is believed as far as its digests are
/// right, and a layer that is not what the image says is never taken for proved.
#[test]
#[ignore = "needs root"]
fn root_an_index_that_lies() -> Result<()> {
    let images = Images::new("images-lies")?;
    let mut references = Vec::new();
    for kind in ["other-toc", "wrong-chunk", "unproved"] {
        images.registry.push(kind, "v1", kind)?;
        references.push(images.reference(images.registry.port(), kind));
    }
    let tree = images.mount(&references[0], "other")?;
    let mount = images.world.daemon.mount_of(&tree)?;
    ensure!(mount.complete_segments == 1, "it was not streamed: {mount:?}");
    same_list(&images.registry.unpacked("other-toc")?, &listed(&tree)?)?;

    let tree = images.mount(&references[1], "wrong")?;
    images.registry.unpacked("wrong-chunk")?;
    let truth = images.world.path("registry/unpacked/wrong-chunk");
    expect_right(Kind::Read, &tree.join("d1/f12"), &truth.join("d1/f12"))?;
    ensure!(fs_err::read(tree.join("d1/f03")).is_err(), "bytes with a wrong digest were read");

    let tree = images.mount(&references[2], "unproved")?;
    same_list(&images.registry.unpacked("unproved")?, &listed(&tree)?)?;
    until("the lie is found", Duration::from_secs(120), || {
        images.world.daemon.log_tail(1000).contains("can't count it as complete").then_some(())
    })?;
    let mount = images.world.daemon.mount_of(&tree)?;
    ensure!(mount.complete_segments == 0, "{mount:?}");
    Ok(())
}

/// An image that says of its layer that it is that of another image does not get into the other's place.
#[test]
#[ignore = "needs root"]
fn root_an_impostor_is_nobody_elses_layer() -> Result<()> {
    let images = Images::new("images-impostor")?;
    let mut trees = Vec::new();
    for kind in ["impostor", "victim"] {
        images.registry.push(kind, "v1", kind)?;
        let tree = images.mount(&images.reference(images.registry.port(), kind), kind)?;
        same_list(&images.registry.unpacked(kind)?, &listed(&tree)?)?;
        trees.push(tree);
    }
    // pulled again: what the first image has is still its own
    let again = images.mount(&images.reference(images.registry.port(), "impostor"), "again")?;
    same_list(&listed(&trees[0])?, &listed(&again)?)?;
    ensure!(listed(&trees[0])? != listed(&trees[1])?, "they are the same");
    Ok(())
}

/// Two images with a layer in common, each by what its own maker says of it. Once one of them is all here and proved, the other one
/// is pulled again where it is mounted: its layers are still its own.
#[test]
#[ignore = "needs root"]
fn root_a_mounted_image_is_pulled_again() -> Result<()> {
    let configuration = "[images]\nbackground_fill = false\ntrace = false\n";
    let images = Images::with("images-again", configuration)?;
    let mut trees = Vec::new();
    for kind in ["big-estargz", "app-estargz"] {
        images.registry.push(kind, "v1", kind)?;
        let reference = images.reference(images.registry.port(), kind);
        trees.push((images.mount(&reference, kind)?, reference));
    }
    let listed_images =
        || -> Result<Vec<hydrant_api::Image>> { images.world.daemon.admin().get("/v1/images") };
    let before = listed_images()?;
    ensure!(before.iter().all(|image| image.unproved > 0), "{before:?}");
    let [(first, _), (second, reference)] = &trees[..] else { anyhow::bail!("two") };
    images.hydrant(&["prefetch", text(first)?])?;
    until("the first is proved", Duration::from_secs(60), || {
        let image = listed_images().ok()?.into_iter().find(|i| i.reference != *reference)?;
        (image.unproved == 0).then_some(())
    })?;
    let expected = listed(second)?;
    for _ in 0..2 {
        images.hydrant(&["image", "pull", reference])?;
    }
    images.world.daemon.kill_supervisor()?;
    same_list(&expected, &listed(second)?)?;
    same_list(&images.registry.unpacked("app-estargz")?, &expected)
}
