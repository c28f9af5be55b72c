//! Disk full in the state directory: readers get an error, whose reason (`ENOSPC`) is in the log and in
//! `hydrant status`, nothing is corrupt, and it goes on when there is room.
//!
//! The error is `EIO`: the page cache keeps no other one for a page that could not be read
//! (`filemap_read_folio` in `mm/filemap.c`).

use anyhow::{Result, ensure};
use hydrant_tests::access::Kind;
use hydrant_tests::reader::{End, access, expect_right};
use hydrant_tests::state_fs::StateFs;
use hydrant_tests::world::{Setting, World};

fn full(state_fs: StateFs) -> Result<()> {
    let setting = Setting { state_fs, state_bytes: 512 << 20, ..Setting::default() };
    let world = World::with(&format!("full-{state_fs}"), setting)?;
    let (tree, files) = world.lonely_tree(20, 8_000_000)?;
    // Leave room for some of the files only.
    let state = world.daemon.directories().state.clone();
    let free = nix::sys::statvfs::statvfs(&state)?;
    let free = free.blocks_available() * free.fragment_size();
    let ballast = state.join("ballast");
    let length = (free - (40 << 20)).to_string();
    let allocate = hydrant_tests::process::Run::program(
        "fallocate",
        &["-l", &length, &ballast.to_string_lossy()],
    );
    allocate.check()?;

    let mut denied = 0;
    for (n, (file, truth)) in files.iter().enumerate() {
        let kind = if n % 2 == 0 { Kind::Read } else { Kind::MmapShared };
        match access(kind, file, truth)? {
            End::Right => {}
            End::Errno(libc::ENOSPC | libc::EIO) | End::Signal(libc::SIGBUS) => denied += 1,
            other => anyhow::bail!("{}: {other:?}", file.display()),
        }
    }
    ensure!((1..20).contains(&denied), "{denied} of 20 were denied");
    let reason = "No space left on device";
    ensure!(world.daemon.log_tail(200).contains(reason), "the log does not say why");
    let trouble = world.daemon.mount_of(&tree)?.trouble.unwrap_or_default();
    ensure!(trouble.contains(reason), "status says {trouble:?}");
    fs_err::remove_file(&ballast)?;
    for (file, truth) in &files {
        expect_right(Kind::MmapShared, file, truth)?;
    }
    Ok(())
}

/// On ext4.
#[test]
#[ignore = "needs root"]
fn root_ext4() -> Result<()> {
    full(StateFs::Ext4)
}

/// On xfs.
#[test]
#[ignore = "needs root"]
fn root_xfs() -> Result<()> {
    full(StateFs::Xfs)
}
