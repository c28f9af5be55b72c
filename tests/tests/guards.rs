//! Never zeros: not either where a tree leaves its place while somebody can still see it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::process::{Run, until};
use hydrant_tests::reader::expect_right;
use hydrant_tests::repository::lonely;
use hydrant_tests::world::World;

/// A tree that is unmounted here and still mounted in another mount namespace: the daemon goes on until it
/// is gone there too, and who reads there what has not been fetched gets an error or the right bytes.
#[test]
#[ignore = "needs root"]
fn root_another_namespace_keeps_the_daemon() -> Result<()> {
    let world = World::new("guards-namespace")?;
    let repository = lonely(2, 300_000)?;
    let tree = world.quick(&repository)?;
    let (file, truth) = world.lonely_files(&repository, &tree, 0..1)?.remove(0);
    // waits until the tree is gone outside, then reads
    let script = r#"
        : >"$3.ready"
        for i in $(seq 1200); do [ -e "$3" ] && break; sleep 0.05; done
        cat "$1" >"$3.read" 2>/dev/null || { echo denied; exit; }
        cmp -s "$3.read" "$2" && echo right || echo wrong"#;
    let go = world.path("go");
    let inside = Run::program(
        "unshare",
        &["--mount", "--propagation", "private", "sh", "-c", script, "sh"]
            .into_iter()
            .map(str::to_owned)
            .chain([&file, &truth, &go].map(|path| path.to_string_lossy().into_owned()))
            .collect::<Vec<_>>()
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    )
    .start()?;
    let ready = world.path("go.ready");
    until("the namespace is there", Duration::from_secs(60), || ready.exists().then_some(()))?;
    let stop = world.daemon.hydrant(&["stop"])?.start()?;
    until("it is unmounted here", Duration::from_secs(60), || (!file.exists()).then_some(()))?;
    fs_err::write(&go, "")?;
    let said = inside.wait()?.text();
    ensure!(said == "denied" || said == "right", "{said}");
    ensure!(stop.wait()?.code() == 0, "the daemon stops when the namespace is gone");
    Ok(())
}

/// A tree whose parent directory was renamed is found and unmounted where it is.
#[test]
#[ignore = "needs root"]
fn root_a_moved_tree_is_unmounted() -> Result<()> {
    let world = World::new("guards-moved")?;
    let repository = lonely(2, 300_000)?;
    let old = world.path("old");
    fs_err::create_dir(&old)?;
    world.serve(&repository, "moved")?;
    let tree = old.join("tree");
    world.clone_url(&world.url("moved"), &tree, &[])?;
    let new = world.path("new");
    fs_err::rename(&old, &new)?;
    fs_err::create_dir_all(&tree)?;
    let tree = tree.to_string_lossy().into_owned();
    world.daemon.hydrant(&["umount", &tree])?.check()?;
    let left = fs_err::read_dir(new.join("tree"))?.count();
    ensure!(left == 0, "{left} names are still to be seen where it was moved to");
    world.daemon.mount_again(tree.as_ref())?;
    ensure!(fs_err::read_dir(&tree)?.count() > 0);
    Ok(())
}

/// What is still open when its tree is removed goes later, without a restart.
#[test]
#[ignore = "needs root"]
fn root_what_is_open_goes_later() -> Result<()> {
    let world = World::new("guards-later")?;
    let (tree, _) = world.lonely_tree(2, 300_000)?;
    let pools = world.daemon.directories().state.join("pools");
    let pool = fs_err::read_dir(&pools)?.next().context("no pool")??.path();
    let is_data = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "data");
    let files = || fs_err::read_dir(&pool).into_iter().flatten().flatten().map(|file| file.path());
    let open: Vec<_> = files().filter(is_data).map(fs_err::File::open).collect::<Result<_, _>>()?;
    ensure!(!open.is_empty());
    world.daemon.check(&["rm", &tree.to_string_lossy()])?;
    let logged = || world.daemon.log_tail(40);
    ensure!(logged().contains("goes later"), "{}", logged());
    ensure!(files().filter(is_data).count() == open.len(), "it has gone");
    drop(open);
    until("it goes", Duration::from_secs(60), || (!pool.exists()).then_some(()))
}

fn doctor(world: &World) -> Result<String> {
    Ok(world.daemon.hydrant(&["doctor"])?.output()?.text())
}

/// A tree that was in use when everything was killed is unmounted, and is not mounted a second time as
/// long as somebody goes on using it: two overlays on one `upper` damage it.
#[test]
#[ignore = "needs root"]
fn root_a_tree_in_use_is_not_mounted_twice() -> Result<()> {
    let mut world = World::new("guards-twice")?;
    let (tree, files) = world.lonely_tree(2, 300_000)?;
    let user = Run::program("sleep", &["600"]).current_dir(&tree).start()?;
    until("it is in the tree", Duration::from_secs(30), || {
        let place = fs_err::read_link(format!("/proc/{}/cwd", user.pid())).ok()?;
        (place == tree).then_some(())
    })?;
    let said = doctor(&world)?;
    ensure!(!said.contains("nothing guards"), "{said}");
    world.daemon.kill();
    let name = tree.to_string_lossy().into_owned();
    // nobody runs, and it is mounted
    let said = doctor(&world)?;
    ensure!(said.contains(&format!("nothing guards {name}")), "{said}");
    world.daemon.start()?;
    ensure!(fs_err::read_dir(&tree)?.next().is_none(), "it is still mounted");
    let said = doctor(&world)?;
    ensure!(said.contains(&format!("{name} is not mounted, but in use")), "{said}");
    for _ in 0..2 {
        let refused = world.daemon.hydrant(&["mount", &name])?.output()?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(refused.code() != 0 && said.contains("go on using it"), "{said}");
    }
    drop(user);
    until("it can be mounted", Duration::from_secs(60), || {
        world.daemon.hydrant(&["mount", &name]).ok()?.check().ok()
    })?;
    let said = doctor(&world)?;
    ensure!(!said.contains(&name), "{said}");
    files.iter().try_for_each(|(file, truth)| expect_right(Kind::Read, file, truth))
}
