//! Mirrors of registries, as containerd's `hosts.toml` names them: whoever has the right bytes gives them, and who has not
//! does no harm.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::guest;
use hydrant_tests::process::until;
use hydrant_tests::reader::expect_right;
use hydrant_tests::registry::{Front, Registry, listed, same_list};
use hydrant_tests::server::free_port;
use hydrant_tests::world::{Setting, World};

struct Mirrors {
    world: World,
    registry: Registry,
}

impl Mirrors {
    /// A registry that has the image `big`, and a daemon that looks for mirrors in `certs.d`.
    fn new(name: &str) -> Result<Self> {
        let mut world = World::with(name, Setting { start: false, ..Setting::default() })?;
        let hosts = world.path("certs.d");
        let lines = format!("[images]\nhosts_dir = {:?}\n", hosts.display().to_string());
        world.daemon.configure(&(guest::configuration() + &lines))?;
        world.daemon.start()?;
        let registry = Registry::start(&world.path("registry"))?;
        registry.push("big", "v1", "big")?;
        Ok(Self { world, registry })
    }

    /// What is said of the registry on `port`.
    fn configure(&self, port: u16, hosts: &str) -> Result<()> {
        let directory = self.world.path("certs.d").join(format!("127.0.0.1_{port}_"));
        fs_err::create_dir_all(&directory)?;
        Ok(fs_err::write(directory.join("hosts.toml"), hosts)?)
    }

    fn hydrant(&self, arguments: &[&str]) -> Result<String> {
        let done = self.world.daemon.check(arguments);
        Ok(done.with_context(|| self.world.daemon.log_tail(40))?.text())
    }

    /// Mounts an image, after a pull if it is not here.
    fn mount(&self, reference: &str, directory: &str) -> Result<PathBuf> {
        let at = self.world.path(directory);
        self.hydrant(&["mount", &format!("oci://{reference}"), &at.display().to_string()])?;
        Ok(at)
    }

    fn expect_whole(&self, tree: &std::path::Path) -> Result<()> {
        same_list(&self.registry.unpacked("big")?, &listed(tree)?)
    }
}

/// The first mirror is dead, the second wants an identity token and gives all; then it lies, and goes: the registry is asked. It
/// sees no credential of the mirror's.
#[test]
#[ignore = "needs root"]
fn root_mirrors_are_asked_first() -> Result<()> {
    let mirrors = Mirrors::new("mirrors")?;
    let mirror = Front::start(&mirrors.world.path("mirror"), mirrors.registry.port())?;
    let origin = Front::open(&mirrors.world.path("origin"), mirrors.registry.port())?;
    mirrors.configure(
        origin.port,
        &format!(
            "[host.\"http://127.0.0.1:{}\"]\n[host.\"http://127.0.0.1:{}\"]\n\
             [host.\"http://127.0.0.1:{1}\".header]\nx-test = \"one\"\n",
            free_port()?,
            mirror.port
        ),
    )?;
    let docker = mirrors.world.path("home/.docker");
    fs_err::create_dir_all(&docker)?;
    let auths = format!(
        r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "", "identitytoken": "refresh"}}}}}}"#,
        mirror.port
    );
    fs_err::write(docker.join("config.json"), auths)?;

    let reference = format!("127.0.0.1:{}/big:v1", origin.port);
    mirrors.hydrant(&["image", "pull", &reference])?;
    ensure!(origin.log()?.is_empty(), "the registry was asked: {:?}", origin.log()?);
    let asked = mirror.log()?;
    ensure!(asked.iter().any(|line| line.starts_with("/token ")), "no token was asked for");
    let namespace = format!("ns=127.0.0.1%3A{}", origin.port);
    for line in asked.iter().filter(|line| line.starts_with("/v2/")) {
        ensure!(line.contains(&namespace) && line.ends_with(" one"), "{line}");
    }

    mirrors.hydrant(&["image", "evict", &reference])?;
    let tree = mirrors.mount(&reference, "tree")?;
    mirrors.registry.unpacked("big")?;
    let truth = mirrors.world.path("registry/unpacked/big");
    fs_err::write(mirror.directory.join("lie"), b"")?;
    expect_right(Kind::Read, &tree.join("d1/f00"), &truth.join("d1/f00"))?;
    let ranges = |front: &Front| {
        Ok::<_, anyhow::Error>(front.log()?.iter().filter(|l| l.contains("bytes=")).count())
    };
    ensure!(ranges(&mirror)? > 0, "the mirror was not asked for a part");
    ensure!(ranges(&origin)? > 0, "the registry was not asked for what the mirror had wrong");
    drop(mirror);
    mirrors.expect_whole(&tree)?;
    origin.check()?;
    ensure!(origin.log()?.iter().all(|line| !line.contains("ns=")), "{:?}", origin.log()?);
    Ok(())
}

/// A mirror with a damaged layer: it is found when all of it has come, and another host is asked for it.
#[test]
#[ignore = "needs root"]
fn root_a_mirror_with_a_damaged_layer() -> Result<()> {
    let mirrors = Mirrors::new("mirrors-damaged")?;
    let damaged = Registry::start(&mirrors.world.path("damaged"))?;
    damaged.push("big", "v1", "big")?;
    damaged.damage_longest_blob()?;
    let port = mirrors.registry.port();
    let mirror = format!(
        "server = \"http://127.0.0.1:{port}\"\n[host.\"http://127.0.0.1:{}\"]\n",
        damaged.port()
    );
    mirrors.configure(port, &mirror)?;
    let tree = mirrors.mount(&format!("127.0.0.1:{port}/big:v1"), "tree")?;
    mirrors.expect_whole(&tree)?;
    until("the log says that the mirror was wrong", Duration::from_secs(60), || {
        mirrors.world.daemon.log_tail(1000).contains("of another host").then_some(())
    })
}

/// A registry with certificates of its own, for itself and for its clients; the settings are looked at anew at each mount.
#[test]
#[ignore = "needs root"]
fn root_a_registry_with_its_own_ca() -> Result<()> {
    let mirrors = Mirrors::new("mirrors-tls")?;
    let tls = mirrors.registry.with_tls(&mirrors.world.path("tls"))?;
    let reference = format!("127.0.0.1:{}/big:v1", tls.port());
    let place = mirrors.world.path("tls").display().to_string();
    let server = format!("server = \"https://127.0.0.1:{}\"\n", tls.port());
    let client = format!("client = [[\"{place}/client.pem\", \"{place}/client.key\"]]\n");
    let pull = || mirrors.world.daemon.hydrant(&["image", "pull", &reference])?.output();
    for settings in [&server, &format!("{server}{client}")] {
        mirrors.configure(tls.port(), settings)?;
        let said = String::from_utf8_lossy(&pull()?.stderr).into_owned();
        ensure!(said.contains("certificate"), "its certificate was believed: {said}");
    }
    mirrors.configure(tls.port(), &format!("{server}{client}ca = \"{place}/ca.pem\"\n"))?;
    mirrors.hydrant(&["image", "pull", &reference])?;
    mirrors.hydrant(&["image", "evict", &reference])?;
    mirrors.configure(tls.port(), &format!("{server}{client}skip_verify = true\n"))?;
    let tree = mirrors.mount(&reference, "tree")?;
    mirrors.expect_whole(&tree)
}
