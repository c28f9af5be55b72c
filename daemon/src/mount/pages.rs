//! Mounting an image of which the kernel reads the pages that are asked for, and none around them.
//!
//! How much it reads ahead is a matter of the *backing device* of a file system, of which EROFS makes one for
//! each image that it takes out of a file (`super_setup_bdi` in `fs/super.c`). It is to be seen as
//! `/sys/class/bdi/erofs-N`, where nothing says which file system it belongs to. Numbers are given once, so it is
//! the one that was not there before; should somebody else have mounted EROFS in that moment, there are two
//! and it is tried again.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use super::MountError;

const DEVICES: &str = "/sys/class/bdi";
/// So often it is tried while others mount EROFS, too.
const TRIES: u32 = 20;

/// Mounts something of EROFS in such a way. Where that can't be had, it is mounted as usual, and the log says so once.
pub(super) fn mount_by_pages(
    mount: impl Fn() -> Result<OwnedFd, MountError>,
) -> Result<OwnedFd, MountError> {
    let mut attempt = 1;
    loop {
        let before = devices();
        let mounted = mount()?;
        let new = before.and_then(|before| Ok(devices()?.difference(&before).cloned().collect()));
        let new: Vec<OsString> = match new {
            Ok(new) => new,
            Err(error) => {
                complain(&error);
                return Ok(mounted);
            }
        };
        match &new[..] {
            [device] => {
                let file = Path::new(DEVICES).join(device).join("read_ahead_kb");
                if let Err(error) = std::fs::write(file, page_kb().to_string()) {
                    complain(&error);
                }
                return Ok(mounted);
            }
            several if several.len() > 1 && attempt < TRIES => {
                drop(mounted);
                // no two that are in each other's way go on at the same pace
                let pace = std::process::id() % 7 + attempt;
                std::thread::sleep(Duration::from_millis(pace.into()));
                attempt += 1;
            }
            _ => {
                let several = format!("{} new devices in {DEVICES}", new.len());
                complain(&io::Error::other(several));
                return Ok(mounted);
            }
        }
    }
}

/// The backing devices of EROFS.
fn devices() -> io::Result<HashSet<OsString>> {
    let entries = std::fs::read_dir(DEVICES)?;
    let names = entries.map(|entry| Ok(entry?.file_name()));
    let erofs = |name: &OsString| name.as_encoded_bytes().starts_with(b"erofs-");
    names.filter(|name| name.as_ref().map_or(true, erofs)).collect()
}

/// A page, in KiB: nothing at all would also cut a read(2) of many pages into pages.
fn page_kb() -> i64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    size.ok().flatten().unwrap_or(4096) / 1024
}

fn complain(error: &io::Error) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::warn!(%error, "can't tell the kernel to read single pages of existence packs: \
            git fetches up to 128 KiB around each old object that it reads");
    });
}
