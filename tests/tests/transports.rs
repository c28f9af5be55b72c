//! Ways to an origin that the user's configuration names: ssh, proxies, certificates, redirects. All of them are
//! used twice: by git for the clone, and by a worker for content.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::forward::Forward;
use hydrant_tests::process::until;
use hydrant_tests::reader::{End, end, expect_right, start};
use hydrant_tests::repository::{MAIN, Repository, lonely, lonely_path};
use hydrant_tests::server::{GitCommand, GitServer, Manners, Offers, Request};
use hydrant_tests::sshd::{HOST, Sshd};
use hydrant_tests::tree;
use hydrant_tests::world::{Setting, World};

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

fn configure(world: &World, name: &str, value: &str) -> Result<()> {
    world.git(&world.path("home"), &["config", "--global", name, value]).check()?;
    Ok(())
}

/// That file `n` of a tree of [`lonely`] reads right.
fn read(world: &World, repository: &Repository, tree: &Path, n: usize) -> Result<()> {
    let (file, truth) = world.lonely_files(repository, tree, n..n + 1)?.remove(0);
    expect_right(Kind::Read, &file, &truth)
}

/// What a clone says that fails and leaves nothing.
fn refused(world: &World, url: &str) -> Result<String> {
    let tree = world.path("refused");
    let output = world.daemon.hydrant(&["clone", url, text(&tree)])?.output()?;
    ensure!(!output.status.success() && !tree.exists(), "not refused: {output:?}");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A reader that waits because of what ssh says in these words, and gets its bytes once `mend` has been done.
fn waits(
    world: &World,
    files: &(std::path::PathBuf, std::path::PathBuf),
    words: &str,
    mend: impl FnOnce() -> Result<()>,
) -> Result<()> {
    // those before have connections that are open
    world.daemon.check(&["workers", "restart"])?;
    let reader = start(Kind::Read, &files.0, &files.1)?;
    let mut said = String::new();
    let waited = until("the queue says what ssh says", Duration::from_secs(90), || {
        let queue = world.daemon.admin().queue().ok()?;
        said.clone_from(queue.first()?.reason.as_ref()?);
        said.contains(words).then_some(())
    });
    waited.with_context(|| format!("it says {said:?}\n{}", world.daemon.log_tail(20)))?;
    mend()?;
    let got = end(&reader.wait()?)?;
    ensure!(got == End::Right, "{got:?}");
    Ok(())
}

/// Over a real ssh: the user's `core.sshCommand`, its configuration with a name for the host, and keys. A key that is
/// lost, and a host that is another one, are said in ssh's words; readers wait for them to be put right.
#[test]
#[ignore = "needs root"]
fn root_ssh_keys() -> Result<()> {
    let world = World::new("transports-keys")?;
    let sshd = Sshd::start(&world.scratch.make("ssh")?, "AcceptEnv GIT_PROTOCOL\n")?;
    let repository = lonely(12, 3000)?;
    let bare = world.server.add(&repository, "repo", Offers::default())?;
    configure(&world, "core.sshCommand", &sshd.command())?;
    let url = format!("{HOST}:{}", bare.display());
    let tree = world.path("tree");
    world.clone_url(&url, &tree, &["--history=none"])?;
    read(&world, &repository, &tree, 0)?;

    let files = world.lonely_files(&repository, &tree, 0..12)?;
    sshd.let_in(false)?;
    waits(&world, &files[1], "Permission denied (publickey)", || {
        let said = refused(&world, &url)?;
        ensure!(said.contains("Permission denied (publickey)"), "{said}");
        sshd.let_in(true)
    })?;
    sshd.known_as_itself(false)?;
    waits(&world, &files[2], "Host key verification failed", || {
        let said = refused(&world, &url)?;
        ensure!(said.contains("Host key verification failed"), "{said}");
        sshd.known_as_itself(true)
    })?;
    let plain = world.clone_plain("repo", "plain", &[])?;
    tree::same(&plain, &tree)
}

/// `GIT_SSH_COMMAND` of who clones counts for readers too, and `url.<base>.insteadOf` that leads from a web address to
/// ssh; both also with the next daemon.
#[test]
#[ignore = "needs root"]
fn root_ssh_by_other_names() -> Result<()> {
    let mut world = World::new("transports-names")?;
    let sshd = Sshd::start(&world.scratch.make("ssh")?, "AcceptEnv GIT_PROTOCOL\n")?;
    let repository = lonely(12, 3000)?;
    let bare = world.server.add(&repository, "repo", Offers::default())?;
    configure(&world, &format!("url.ssh://{HOST}/.insteadOf"), "https://nowhere.invalid/")?;
    let mut trees = Vec::new();
    for (n, base) in [format!("ssh://{HOST}"), "https://nowhere.invalid".into()].iter().enumerate()
    {
        let tree = world.path(&format!("tree-{n}"));
        let url = format!("{base}{}", bare.display());
        let clone = world.daemon.hydrant(&["clone", "--history=none", &url, text(&tree)])?;
        clone.env("GIT_SSH_COMMAND", sshd.command()).check()?;
        read(&world, &repository, &tree, 0)?;
        trees.push(tree);
    }
    world.daemon.stop()?;
    world.daemon.start()?;
    for tree in trees {
        read(&world, &repository, &tree, 1)?;
    }
    Ok(())
}

/// A server that does not let `GIT_PROTOCOL` through, as most are set up: its shell takes it as part of the command.
/// Without a shell it is refused with what helps.
#[test]
#[ignore = "needs root"]
fn root_ssh_without_the_variable() -> Result<()> {
    let mut world = World::new("transports-variable")?;
    let repository = lonely(12, 3000)?;
    let bare = world.server.add(&repository, "repo", Offers::default())?;
    let url = format!("ssh://{HOST}{}", bare.display());

    let no_shell = "ForceCommand git-shell -c \"$SSH_ORIGINAL_COMMAND\"\n";
    let sshd = Sshd::start(&world.scratch.make("ssh-without-shell")?, no_shell)?;
    configure(&world, "core.sshCommand", &sshd.command())?;
    let said = refused(&world, &url)?;
    ensure!(said.contains("`AcceptEnv GIT_PROTOCOL`"), "{said}");

    let sshd = Sshd::start(&world.scratch.make("ssh")?, "")?;
    configure(&world, "core.sshCommand", &sshd.command())?;
    let tree = world.path("tree");
    world.clone_url(&url, &tree, &["--history=none"])?;
    read(&world, &repository, &tree, 0)?;
    world.daemon.stop()?;
    world.daemon.start()?;
    read(&world, &repository, &tree, 1)
}

/// A server that nobody but the proxy knows, over HTTP and in a tunnel over TLS; with a certificate that is signed by
/// nobody but itself, which the user's `http.sslCAInfo` names, and not without.
#[test]
#[ignore = "needs root"]
fn root_proxy_and_certificate() -> Result<()> {
    let tls = Some("inside.invalid");
    let world = World::with("transports-proxy", Setting { tls, ..Setting::default() })?;
    let proxy = Forward::start(world.server.port(), world.server.tls_port()?)?;
    let repository = lonely(12, 3000)?;
    world.serve(&repository, "repo")?;
    configure(&world, "http.proxy", &proxy.url())?;

    let tree = world.path("plain-text");
    world.clone_url("http://inside.invalid/repo.git", &tree, &["--history=none"])?;
    let _ = proxy.asked();
    world.server.new_requests()?;
    read(&world, &repository, &tree, 0)?;
    let asked = proxy.asked();
    ensure!(
        asked.iter().all(|line| line.contains(" http://inside.invalid/repo.git/")),
        "{asked:?}"
    );
    ensure!(!asked.is_empty() && world.fetched_blobs(&repository, &[MAIN])?.len() == 1);

    let url = "https://inside.invalid/repo.git";
    let said = refused(&world, url)?;
    ensure!(said.contains("certificate") && said.contains("http.sslCAInfo"), "{said}");
    configure(&world, "http.sslCAInfo", text(&world.server.certificate()))?;
    let tree = world.path("tunnel");
    world.clone_url(url, &tree, &["--history=none"])?;
    let _ = proxy.asked();
    world.server.new_requests()?;
    read(&world, &repository, &tree, 1)?;
    let asked = proxy.asked();
    ensure!(asked.iter().all(|line| line.starts_with("CONNECT inside.invalid:443 ")), "{asked:?}");
    ensure!(!asked.is_empty() && world.fetched_blobs(&repository, &[MAIN])?.len() == 1);
    Ok(())
}

/// A server that wants a password and sends on to another host: the password stays with the first one.
#[test]
#[ignore = "needs root"]
fn root_redirect_to_another_host() -> Result<()> {
    let world = World::new("transports-redirect")?;
    let repository = lonely(12, 3000)?;
    world.serve(&repository, "repo")?;
    let elsewhere = format!("http://localhost:{}", world.server.port());
    let manners = Manners {
        password: Some(("user", "secret")),
        elsewhere: Some(&elsewhere),
        ..Manners::default()
    };
    let first = GitServer::start_with(&world.scratch.make("first")?, manners)?;
    // git itself follows no redirect that comes after the password of a credential helper
    let url = first.url("repo").replace("://", "://user:secret@");
    let tree = world.path("tree");
    world.clone_url(&url, &tree, &["--history=none"])?;
    for n in [2, 7] {
        read(&world, &repository, &tree, n)?;
    }
    let authorized = |requests: &[Request]| requests.iter().filter(|r| r.authorized).count();
    let at_first = first.requests()?;
    ensure!(authorized(&at_first) >= 2, "git and a worker are known there: {at_first:?}");
    let there = world.server.requests()?;
    let wanted = there.iter().flat_map(Request::wants).collect::<Vec<_>>();
    for n in [2, 7] {
        let id = repository.git(&["rev-parse", &format!("{MAIN}:{}", lonely_path(n))])?;
        let id = String::from_utf8(id)?;
        ensure!(wanted.iter().any(|want| **want == id.trim()), "{n} was not fetched there");
    }
    // git itself asks for refs, commits and trees, and takes the password along; we ask for the rest
    let gits = |request: &Request| match &request.command {
        GitCommand::LsRefs => true,
        GitCommand::Fetch { filter, .. } => filter.is_some(),
        _ => false,
    };
    let ours: Vec<_> = there.into_iter().filter(|request| !gits(request)).collect();
    ensure!(ours.iter().any(|request| matches!(request.command, GitCommand::ObjectInfo { .. })));
    ensure!(authorized(&ours) == 0, "the password went to another host: {ours:?}");
    Ok(())
}
