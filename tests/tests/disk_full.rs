//! Disk full in the state directory: readers get an error, whose reason (`ENOSPC`) is in the log and in
//! `hydrant status`, nothing is corrupt, and it goes on when there is room.
//!
//! The error is `EIO`: the page cache keeps no other one for a page that could not be read
//! (`filemap_read_folio` in `mm/filemap.c`).

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use hydrant_daemon::fanotify::DenyErrno;
use hydrant_daemon::range::ByteRange;
use hydrant_daemon::segment::presence;
use hydrant_daemon::worker::fill;
use hydrant_tests::access::Kind;
use hydrant_tests::reader::{expect_right, expect_some_denied};
use hydrant_tests::scratch::Scratch;
use hydrant_tests::state_fs::{StateFs, mount};
use hydrant_tests::world::{Setting, World};
use nix::fcntl::{FallocateFlags, fallocate};

fn full(state_fs: StateFs) -> Result<()> {
    let setting = Setting { state_fs, state_bytes: 512 << 20, ..Setting::default() };
    let world = World::with(&format!("full-{state_fs}"), setting)?;
    let (tree, files) = world.lonely_tree(20, 8_000_000)?;
    // room for some of the files only
    let ballast = world.fill_disk(40 << 20)?;

    expect_some_denied(&files)?;
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

/// What did not get onto the disk counts as absent, wherever on it there was no more room: a block is absent or right.
#[test]
#[ignore = "needs root"]
fn root_blocks_are_absent_or_right() -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let scratch = Scratch::new("full-blocks")?;
    for kind in [StateFs::Ext4, StateFs::Xfs] {
        let place = scratch.path().join(kind.to_string());
        mount(kind, &place, 512 << 20)?;
        // never removed: xfs gives room back some time later then
        let [ballast, file] = ["ballast", "segment"].map(|name| place.join(name)).map(|path| {
            let mut options = fs_err::OpenOptions::new();
            options.create_new(true).read(true).write(true).open(path)
        });
        let (ballast, file) = (ballast?.into_parts().0, file?.into_parts().0);
        let rooms = (0..24).map(|n| (2 * PIECE) + n * 20_480);
        let ways = [fill::write, fill::write_by_blocks, fill::write_or_undo];
        for (room, write) in rooms.zip(ways.into_iter().cycle()) {
            file.set_len(0)?;
            file.sync_all()?;
            fill_up(&ballast)?;
            ballast.set_len(ballast.metadata()?.len() - room)?;
            ballast.sync_all()?;
            file.set_len(16 * PIECE)?;
            // as reading ahead does: the page cache has zeros for what is absent
            io::copy(&mut &file, &mut io::sink())?;
            (&file).rewind()?;
            let content = vec![0xaa; PIECE as usize];
            let mut offsets = (0..15).map(|n| n * PIECE + 0x1_0000);
            let failed = offsets.find_map(|at| write(&file, &content, at).err());
            let failed = failed.context("there was room for all of it")?;
            ensure!(fill::deny_errno(&failed) == DenyErrno::Enospc, "{failed}");
            for run in presence::data(&file, ByteRange::new(0, 16 * PIECE)) {
                let run = run?;
                let mut found = vec![0; usize::try_from(run.len())?];
                file.read_exact_at(&mut found, run.offset())?;
                let wrong = found.iter().position(|byte| *byte != 0xaa);
                ensure!(wrong.is_none(), "{kind}, room for {room}: {run:?}, {wrong:?}");
            }
        }
    }
    Ok(())
}

/// Makes a file as large as it can be. (How much that is, no number of statvfs(3) says.)
fn fill_up(file: &File) -> Result<()> {
    let mut len = file.metadata()?.len().try_into()?;
    for piece in [64 << 20, 4 << 20, 256 << 10, 16 << 10, 4096] {
        while fallocate(file, FallocateFlags::empty(), len, piece).is_ok() {
            len += piece;
        }
    }
    Ok(file.set_len(len.try_into()?)?)
}
