//! Real mounts, of images that `mkfs.erofs` has made. What they mount is unmounted whatever happens.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use super::private::PrivateMount;
use super::*;

/// A directory with an image `tree.erofs`, its segment `0.data`, `upper`, `work` and a mount point `at`.
struct Room {
    directory: tempfile::TempDir,
    image: PathBuf,
    devices: [PathBuf; 1],
    upper: PathBuf,
    work: PathBuf,
}

const BIG: usize = 3_000_000;

impl Room {
    fn new() -> Self {
        let directory =
            tempfile::Builder::new().prefix("hydrant-mount-").tempdir_in("/var/tmp").unwrap();
        let path = |name| directory.path().join(name);
        let (image, devices) = (path("tree.erofs"), [path("0.data")]);
        let (upper, work) = (path("upper"), path("work"));
        let room = Self { directory, image, devices, upper, work };
        for name in ["upper", "work", "at", "source/dir/sub"] {
            fs_err::create_dir_all(room.path(name)).unwrap();
        }
        fs_err::write(room.path("source/dir/a"), "hello").unwrap();
        fs_err::write(room.path("source/dir/sub/b"), "world").unwrap();
        fs_err::write(room.path("source/big"), big()).unwrap();
        std::os::unix::fs::symlink("big", room.path("source/link")).unwrap();
        let output = Command::new("mkfs.erofs")
            .args(["--chunksize=4096", "-x-1", "-T0", "-U", "a7d1f0cb-7f1e-4d2b-9d0e-8f62d2b0c001"])
            .arg(format!("--blobdev={}", room.path("0.data").display()))
            .args([room.path("tree.erofs"), room.path("source")])
            .output()
            .expect("mkfs.erofs of the package erofs-utils");
        assert!(output.status.success(), "{output:?}");
        room
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The writable tree, for root.
    fn tree(&self) -> TreeMount<'_> {
        let layers = Some(Layers { upper: &self.upper, work: &self.work });
        let (image, devices) = (&self.image, &self.devices);
        TreeMount {
            image,
            devices,
            pack: None,
            below: &[],
            fresh: false,
            layers,
            read_only: false,
            restricted: false,
        }
    }

    fn mount(&self) -> DetachedMount {
        mount(&self.tree()).unwrap()
    }

    fn attach(&self, mount: DetachedMount) -> Result<(), MountError> {
        mount.attach(fs_err::File::open(self.path("at")).unwrap().as_fd())
    }

    fn unmount(&self, how: Unmount) -> Result<(), UnmountError> {
        unmount(&self.path("at"), how, MountPoint::is_hydrant)
    }

    fn unmount_idle(&self) {
        patiently(|| self.unmount(Unmount::Idle));
    }

    /// Mounts with anything to do with this room.
    fn mounts(&self) -> Vec<MountPoint> {
        let ours = |mount: &MountPoint| {
            mount.path.starts_with(self.directory.path())
                || Path::new(&mount.source).starts_with(self.directory.path())
        };
        mounts().unwrap().into_iter().filter(ours).collect()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        while mounted_at(&self.path("at")).ok().flatten().is_some() {
            if sys::mount::unmount(&self.path("at"), true).is_err() {
                break;
            }
        }
    }
}

/// Unmounts what nobody uses. Children that other tests are about to start have copies of our files for a moment.
fn patiently(mut unmount: impl FnMut() -> Result<(), UnmountError>) {
    for _ in 0..600 {
        match unmount() {
            Err(UnmountError::Busy { .. }) => {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            result => return result.unwrap(),
        }
    }
    panic!("it is still in use");
}

fn big() -> Vec<u8> {
    (0..BIG as u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).take(BIG).collect()
}

fn inode(path: &Path) -> u64 {
    fs_err::symlink_metadata(path).unwrap().ino()
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or(error.to_string(), |source| format!("{error}: {}", chain(source)))
}

#[test]
#[ignore = "needs root"]
fn root_a_tree_is_read_through_overlayfs_and_written_above_it() {
    let room = Room::new();
    let mount = room.mount();
    assert_eq!(room.mounts(), [], "it is to be seen nowhere yet");
    room.attach(mount).unwrap();
    let at = room.path("at");
    let point = mounted_at(&at).unwrap().unwrap();
    assert!(point.is_hydrant());
    assert_eq!(
        (point.path.as_path(), point.upper.as_deref()),
        (at.as_path(), Some(room.upper.as_path()))
    );
    assert_eq!(fs_err::read_to_string(at.join("dir/a")).unwrap(), "hello");
    assert_eq!(fs_err::read(at.join("big")).unwrap(), big());
    assert_eq!(fs_err::read_link(at.join("link")).unwrap(), Path::new("big"));

    fs_err::write(at.join("new"), "mine").unwrap();
    fs_err::remove_file(at.join("link")).unwrap();
    fs_err::rename(at.join("dir"), at.join("renamed")).unwrap();
    fs_err::set_permissions(at.join("big"), PermissionsExt::from_mode(0o600)).unwrap();
    // Metadata only: no content was copied.
    assert!(fs_err::metadata(room.path("upper/big")).unwrap().blocks() < 16);
    assert_eq!(fs_err::read(at.join("big")).unwrap(), big());
    room.unmount_idle();
    assert_eq!(room.mounts(), []);

    // All of it is there the next time.
    room.attach(room.mount()).unwrap();
    assert_eq!(fs_err::read_to_string(at.join("new")).unwrap(), "mine");
    assert_eq!(fs_err::read_to_string(at.join("renamed/sub/b")).unwrap(), "world");
    assert!(!at.join("link").is_symlink() && !at.join("dir").exists());
    assert_eq!(fs_err::read(at.join("big")).unwrap(), big());
    room.unmount_idle();
    assert!(matches!(room.unmount(Unmount::Idle), Err(UnmountError::NotOurs { found: None, .. })));
}

#[test]
#[ignore = "needs root"]
fn root_inode_numbers_are_the_images_and_stay() {
    let room = Room::new();
    let (image, at) = (mount(&TreeMount { layers: None, ..room.tree() }).unwrap(), room.path("at"));
    room.attach(image).unwrap();
    let names = ["dir", "dir/a", "dir/sub", "dir/sub/b", "big", "link"];
    let nids: Vec<_> = names.iter().map(|name| inode(&at.join(name))).collect();
    patiently(|| unmount(&at, Unmount::Idle, |mount| mount.kind == "erofs"));

    let mut seen = Vec::new();
    for round in 0..2 {
        room.attach(room.mount()).unwrap();
        if round == 0 {
            let numbers: Vec<_> = names.iter().map(|name| inode(&at.join(name))).collect();
            let expected: Vec<_> = nids.iter().map(|nid| 1 << 63 | nid).collect();
            assert_eq!(numbers, expected);
            // One device for all, whatever layer it comes from.
            fs_err::write(at.join("new"), "").unwrap();
            let devices =
                ["", "dir", "dir/a", "new"].map(|n| fs_err::metadata(at.join(n)).unwrap().dev());
            assert!(devices.iter().all(|device| *device == devices[0]), "{devices:?}");
            fs_err::set_permissions(at.join("big"), PermissionsExt::from_mode(0o600)).unwrap();
            fs_err::rename(at.join("dir"), at.join("dir2")).unwrap();
            fs_err::rename(at.join("dir2/sub/b"), at.join("moved")).unwrap();
            let file = fs_err::OpenOptions::new().append(true).open(at.join("moved")).unwrap();
            // Content comes up now, too.
            file.into_parts().0.write_all(b"!").unwrap();
        }
        let changed = ["dir2", "dir2/a", "dir2/sub", "moved", "big", "link", "new"];
        seen.push(changed.map(|name| inode(&at.join(name))));
        assert_eq!(
            seen[0][..6],
            [nids[0], nids[1], nids[2], nids[3], nids[4], nids[5]].map(|n| 1 << 63 | n)
        );
        room.unmount_idle();
    }
    assert_eq!(seen[0], seen[1]);
}

/// The existence pack is in the tree, the tree's numbers are what they are without it, and what has been changed is
/// found whether it is there or not.
#[test]
#[ignore = "needs root"]
fn root_a_pack_beside_the_tree() {
    let room = Room::new();
    let at = room.path("at");
    fs_err::create_dir_all(room.path("beside/.git/objects")).unwrap();
    fs_err::write(room.path("beside/.git/objects/pack"), big()).unwrap();
    let output = Command::new("mkfs.erofs")
        .args(["--chunksize=4096", "-x-1", "-T0", "-U", "a7d1f0cb-7f1e-4d2b-9d0e-8f62d2b0c002"])
        .arg(format!("--blobdev={}", room.path("1.data").display()))
        .args([room.path("tree.pack.erofs"), room.path("beside")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let pack = Image { image: room.path("tree.pack.erofs"), devices: vec![room.path("1.data")] };
    let names = ["dir", "dir/a", "dir/sub/b", "big", "link"];
    let numbers = || names.map(|name| inode(&at.join(name)));
    room.attach(room.mount()).unwrap();
    let without = numbers();
    fs_err::set_permissions(at.join("big"), PermissionsExt::from_mode(0o600)).unwrap();
    room.unmount_idle();
    // made before, as git does: overlayfs hides what is below a new directory
    fs_err::create_dir_all(room.upper.join(".git/objects")).unwrap();
    for round in 0..3 {
        let pack = Some(&pack).filter(|_| round < 2);
        room.attach(mount(&TreeMount { pack, ..room.tree() }).unwrap()).unwrap();
        assert_eq!(numbers(), without);
        assert_eq!(fs_err::metadata(at.join("big")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs_err::read(at.join("big")).unwrap(), big());
        let read = fs_err::read(at.join(".git/objects/pack")).ok();
        assert_eq!(read.is_some(), pack.is_some());
        assert!(read.is_none_or(|read| read == big()));
        room.unmount_idle();
    }
}

#[test]
#[ignore = "needs root"]
fn root_a_detached_tree_can_be_used_and_vanishes_when_dropped() {
    let room = Room::new();
    let mount = room.mount();
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let file = openat(&mount, "early", flags, Mode::from_bits_retain(0o644)).unwrap();
    std::fs::File::from(file).write_all(b"before").unwrap();
    drop(mount);
    assert_eq!(fs_err::read_to_string(room.path("upper/early")).unwrap(), "before");
    // `upper` is free again at once.
    room.attach(room.mount()).unwrap();
    assert_eq!(fs_err::read_to_string(room.path("at/early")).unwrap(), "before");
}

#[test]
#[ignore = "needs root"]
fn root_trees_for_users_are_restricted_and_read_only_ones_take_no_writes() {
    use nix::sys::statvfs::{FsFlags, statvfs};
    let room = Room::new();
    for layers in [true, false] {
        let tree = room.tree();
        let layers = tree.layers.filter(|_| layers);
        let tree = TreeMount { layers, read_only: true, restricted: true, ..tree };
        room.attach(mount(&tree).unwrap()).unwrap();
        let at = room.path("at");
        let expected = FsFlags::ST_RDONLY | FsFlags::ST_NOSUID | FsFlags::ST_NODEV;
        assert!(statvfs(&at).unwrap().flags().contains(expected));
        assert_eq!(fs_err::read_to_string(at.join("dir/a")).unwrap(), "hello");
        let error = fs_err::write(at.join("new"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        patiently(|| unmount(&at, Unmount::Idle, |_| true));
    }
}

#[test]
#[ignore = "needs root"]
fn root_paths_may_be_longer_than_an_option() {
    let room = Room::new();
    let deep = room.path(&"d".repeat(200)).join("e".repeat(200)).join("f,:\\ \n".repeat(10));
    fs_err::create_dir_all(&deep).unwrap();
    for name in ["tree.erofs", "0.data", "upper", "work"] {
        fs_err::rename(room.path(name), deep.join(name)).unwrap();
    }
    let (image, device) = (deep.join("tree.erofs"), [deep.join("0.data")]);
    let (upper, work) = (deep.join("upper"), deep.join("work"));
    let layers = Some(Layers { upper: &upper, work: &work });
    let tree =
        TreeMount { image: &image, devices: &device, layers, restricted: true, ..room.tree() };
    room.attach(mount(&tree).unwrap()).unwrap();
    assert_eq!(mounted_at(&room.path("at")).unwrap().unwrap().upper, Some(upper.clone()));
    assert_eq!(fs_err::read(room.path("at/big")).unwrap(), big());
    room.unmount_idle();
    room.attach(mount(&TreeMount { layers: None, ..tree }).unwrap()).unwrap();
    assert_eq!(fs_err::read(room.path("at/big")).unwrap(), big());
    let devices = [deep.join("0.data"), deep.join("0.data")];
    let error = mount(&TreeMount { devices: &devices, ..tree }).unwrap_err();
    assert!(matches!(error, MountError::Devices { expected: 1, given: 2, .. }));
}

#[test]
#[ignore = "needs root"]
fn root_failures_at_every_step_leave_nothing_behind() {
    let room = Room::new();
    let garbage = room.path("garbage");
    fs_err::write(&garbage, [0; 8192]).unwrap();
    let missing = room.path("missing");
    let file = room.path("file");
    fs_err::write(&file, "").unwrap();
    let at = room.path("at");

    let error = mount(&TreeMount { image: &garbage, devices: &[], ..room.tree() }).unwrap_err();
    assert!(
        chain(&error).contains("create file system erofs: Invalid argument"),
        "{}",
        chain(&error)
    );
    assert!(matches!(
        mount(&TreeMount { image: &missing, ..room.tree() }),
        Err(MountError::Superblock { .. })
    ));
    // The kernel would take it, and give content from nowhere.
    assert!(matches!(
        mount(&TreeMount { devices: &[], ..room.tree() }),
        Err(MountError::Devices { expected: 1, given: 0, .. })
    ));
    assert!(matches!(
        mount(&TreeMount { layers: Some(Layers { upper: &missing, work: &at }), ..room.tree() }),
        Err(MountError::Open { .. })
    ));
    let error =
        mount(&TreeMount { layers: Some(Layers { upper: &file, work: &at }), ..room.tree() })
            .unwrap_err();
    assert!(chain(&error).contains("is not a directory"), "{}", chain(&error));
    assert!(matches!(error, MountError::Overlay { .. }), "{}", chain(&error));
    assert_eq!(room.mounts(), []);

    fs_err::write(at.join("something"), "").unwrap();
    assert!(matches!(room.attach(room.mount()), Err(MountError::NotEmpty)));
    fs_err::remove_file(at.join("something")).unwrap();
    let target = fs_err::File::open(&file).unwrap();
    assert!(matches!(room.mount().attach(target.as_fd()), Err(MountError::Target(_))));
    assert_eq!(room.mounts(), []);

    // And it works after all that, also through an O_PATH fd.
    let target = open(&at, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    room.mount().attach(target.as_fd()).unwrap();
    drop(target);
    assert_eq!(room.mounts().len(), 1);
    room.unmount_idle();
}

#[test]
#[ignore = "needs root"]
fn root_a_user_mounts_on_directories_of_theirs_only() {
    let room = Room::new();
    let at = room.path("at");
    std::os::unix::fs::chown(&at, Some(61_999), None).unwrap();
    assert!(matches!(open_target(&at, Some(61_998)), Err(MountError::NotTheirs { .. })));
    // Neither a file of theirs nor a link to a directory of theirs.
    for name in ["file", "link"] {
        match name {
            "file" => fs_err::write(room.path(name), "").unwrap(),
            _ => std::os::unix::fs::symlink("at", room.path(name)).unwrap(),
        }
        std::os::unix::fs::lchown(room.path(name), Some(61_999), None).unwrap();
        let target = open_target(&room.path(name), Some(61_999));
        assert!(matches!(target, Err(MountError::NotTheirs { .. })), "{name}");
    }
    let target = open_target(&at, Some(61_999)).unwrap();
    room.mount().attach(target.as_fd()).unwrap();
    assert!(mounted_at(&at).unwrap().unwrap().is_hydrant());
}

#[test]
#[ignore = "needs root"]
fn root_users_of_a_busy_mount_are_named_and_lazy_lets_them_finish() {
    let room = Room::new();
    room.attach(room.mount()).unwrap();
    let at = room.path("at");
    let mut reader = Command::new("/bin/cat")
        .current_dir(at.join("dir"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(fs_err::File::open(at.join("big")).unwrap().into_parts().0)
        .spawn()
        .unwrap();
    let error = room.unmount(Unmount::Idle).unwrap_err();
    let expected = User {
        pid: reader.id() as i32,
        comm: "cat".to_owned(),
        uses: vec![Use::Directory, Use::OpenFile],
    };
    let text = error.to_string();
    let UnmountError::Busy { users, below, .. } = error else { panic!("{text}") };
    assert_eq!((users, below), (vec![expected], vec![]));
    assert!(text.ends_with(&format!("is in use by cat (pid {})", reader.id())), "{text}");

    let nested = at.join("dir/sub");
    nix::mount::mount(
        Some("none"),
        &nested,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let busy = room.unmount(Unmount::Idle).unwrap_err();
    let below = match busy {
        UnmountError::Busy { below, .. } => below,
        other => panic!("{other}"),
    };
    assert_eq!(below, std::slice::from_ref(&nested));
    sys::mount::unmount(&nested, false).unwrap();

    let file = fs_err::File::open(at.join("big")).unwrap();
    room.unmount(Unmount::Lazy).unwrap();
    assert_eq!(room.mounts(), []);
    let mut bytes = Vec::new();
    file.into_parts().0.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, big());
    drop(reader.stdin.take());
    reader.wait().unwrap();
}

#[test]
#[ignore = "needs root"]
fn root_what_is_not_ours_is_not_unmounted() {
    let room = Room::new();
    let at = room.path("at");
    nix::mount::mount(
        Some("theirs"),
        &at,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let error = room.unmount(Unmount::Idle).unwrap_err();
    assert!(matches!(error, UnmountError::NotOurs { found: Some(_), .. }));
    assert_eq!(mounted_at(&at).unwrap().unwrap().source, "theirs");
    // A symlink to a mount is not the mount.
    let link = room.path("link");
    std::os::unix::fs::symlink(&at, &link).unwrap();
    let error = unmount(&link, Unmount::Idle, |_| true).unwrap_err();
    assert!(matches!(error, UnmountError::NotOurs { found: None, .. }));
    assert!(matches!(
        unmount("/".as_ref(), Unmount::Idle, |_| true),
        Err(UnmountError::NotOurs { .. })
    ));
}

#[test]
#[ignore = "needs root"]
fn root_a_private_mount_opens_what_is_beneath_it_only() {
    let room = Room::new();
    fs_err::create_dir(room.path("pools")).unwrap();
    fs_err::write(room.path("secret"), "x").unwrap();
    std::os::unix::fs::symlink("../secret", room.path("pools/link")).unwrap();
    let private = PrivateMount::new(&room.path("pools")).unwrap();
    let create = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR;
    let file = private.open("1.data".as_ref(), create).unwrap();
    std::fs::File::from(file).write_all(b"data").unwrap();
    assert_eq!(fs_err::read(room.path("pools/1.data")).unwrap(), b"data");
    let errno = |path: &str| {
        let error = private.open(path.as_ref(), OFlag::O_RDONLY).unwrap_err();
        error.source.raw_os_error().unwrap()
    };
    assert_eq!(errno("../secret"), libc::EXDEV);
    assert_eq!(errno("/etc/passwd"), libc::EXDEV);
    assert_eq!(errno("link"), libc::ELOOP);
    // It is a mount of its own that is in no table.
    let here = sys::mount::stat_mount(private.as_fd(), c"").unwrap();
    let there =
        sys::mount::stat_mount(fs_err::File::open(room.path("pools")).unwrap().as_fd(), c"")
            .unwrap();
    assert_ne!(here.mount_id, there.mount_id);
    assert!(mounts().unwrap().iter().all(|mount| mount.id != here.mount_id));
}

#[test]
#[ignore = "needs root"]
fn root_layers_are_in_use_until_the_last_user_of_a_lazily_unmounted_tree_ends() {
    let room = Room::new();
    let layers = Layers { upper: &room.upper, work: &room.work };
    assert!(!in_use(layers).unwrap(), "never mounted");
    room.attach(room.mount()).unwrap();
    assert!(in_use(layers).unwrap(), "mounted");
    let user = Command::new("sleep").arg("60").current_dir(room.path("at")).spawn();
    let mut user = user.unwrap();
    room.unmount(Unmount::Lazy).unwrap();
    let with_user = in_use(layers);
    user.kill().unwrap();
    user.wait().unwrap();
    assert!(with_user.unwrap(), "mounted nowhere, but used");
    // the kernel takes it apart a moment later
    let free = (0..600).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        !in_use(layers).unwrap()
    });
    assert!(free);
    // nothing was written by asking
    assert_eq!(fs_err::read_dir(&room.upper).unwrap().count(), 0);
    room.attach(room.mount()).unwrap();
    room.unmount_idle();
}
