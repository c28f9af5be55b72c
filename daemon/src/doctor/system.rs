//! What the rest of the system has to offer.

use std::io;
use std::os::unix::fs::FileExt;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    Scope,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Uid, Whence, lseek};

use super::room::Room;
use super::{Finding, Problem};
use crate::fanotify::{self, QueueKind};
use crate::sys::{limits, privileges};
use crate::worker::sandbox;

/// Below this many bytes a real tree's content would soon not fit any more.
const FREE_BYTES: u64 = 1 << 30;

/// Each reader that waits needs one.
const OPEN_FILES: u64 = 65_536;

pub fn privileges() -> Finding {
    let remedy = "Run as root (`sudo`), not in a container without CAP_SYS_ADMIN.";
    if !Uid::effective().is_root() {
        return Err(Problem::new("not root", remedy));
    }
    match privileges::is_administrator() {
        Ok(true) => Ok("root with CAP_SYS_ADMIN".to_owned()),
        Ok(false) => Err(Problem::new("root, but without CAP_SYS_ADMIN", remedy)),
        Err(error) => Err(Problem::step("ask for our capabilities", &error, remedy)),
    }
}

/// Both queues will do; which it is, is good to know.
pub fn queue() -> Finding {
    match fanotify::probe() {
        Ok(QueueKind::Kernel) => {
            Ok("kernel: events that a worker had when it died return to the kernel's queue"
                .to_owned())
        }
        Ok(QueueKind::Stock) => Ok("brokered: the supervisor keeps events, as this kernel has no \
             restartable permission events"
            .to_owned()),
        Err(error) => {
            Err(Problem::step("ask the kernel for its queue", &error, super::lazy::KERNEL))
        }
    }
}

/// A hole is "not fetched", data is "fetched": both must be told and made exactly.
pub fn sparse_files(room: &Room) -> Finding {
    let remedy = "Put the state directory on ext4, xfs or btrfs (--state-dir).";
    let failed = |error: &io::Error| Problem::step("make and look at a sparse file", error, remedy);
    let (found, punched) = try_sparse_file(room).map_err(|error| failed(&error))?;
    if found != (65_536, 65_536 + 4096) {
        let detail = format!("data from {} to {}", found.0, found.1);
        return Err(Problem { detail, ..Problem::new("holes are not told exactly", remedy) });
    }
    if !punched {
        return Err(Problem::new("a hole that was punched is not there", remedy));
    }
    Ok("holes are told exactly and can be punched".to_owned())
}

/// Where data begins and ends in a file with one block of it, and whether it is gone after punching.
fn try_sparse_file(room: &Room) -> io::Result<((i64, i64), bool)> {
    let file = room.file("sparse")?;
    file.set_len(1 << 20)?;
    file.write_all_at(&[1; 4096], 65_536)?;
    let data = lseek(&file, 0, Whence::SeekData)?;
    let hole = lseek(&file, data, Whence::SeekHole)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, 65_536, 4096)?;
    let gone = lseek(&file, 0, Whence::SeekData) == Err(nix::Error::ENXIO);
    Ok(((data, hole), gone))
}

pub fn memfd() -> Finding {
    let file = memfd_create(c"hydrant-doctor", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from);
    file.and_then(|fd| std::fs::File::from(fd).write_all_at(b"x", 0))
        .map(|()| "memory can be shared between our processes".to_owned())
        .map_err(|error| {
            Problem::step("make a memfd", &error, "Use a kernel with CONFIG_MEMFD_CREATE.")
        })
}

/// Makes rules and throws them away again.
pub fn landlock() -> Finding {
    let remedy = "Boot a kernel with CONFIG_SECURITY_LANDLOCK and landlock in the `lsm=` parameter; \
        without it the worker is restricted by its user and seccomp alone, and only if so configured.";
    let rules = || Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let files = rules().handle_access(AccessFs::from_all(ABI::V1)).and_then(Ruleset::create);
    files.map_err(|error: RulesetError| Problem::step("make Landlock rules", &error, remedy))?;
    let ports = rules().handle_access(AccessNet::BindTcp).and_then(Ruleset::create).is_ok();
    let scopes = rules().scope(Scope::Signal).and_then(Ruleset::create).is_ok();
    let also = [(ports, "ports"), (scopes, "signals")];
    let also = also.iter().filter(|(there, _)| *there).map(|(_, what)| format!(" and {what}"));
    Ok(format!("access to files{} can be restricted", also.collect::<String>()))
}

pub fn seccomp() -> Finding {
    let remedy = "Use a kernel with CONFIG_SECCOMP_FILTER.";
    let actions = fs_err::read_to_string("/proc/sys/kernel/seccomp/actions_avail")
        .map_err(|error| Problem::step("see what seccomp can do", &error, remedy))?;
    let actions: Vec<_> = actions.split_whitespace().collect();
    match ["allow", "errno", "kill_process"].iter().find(|action| !actions.contains(action)) {
        None => Ok("system calls can be filtered".to_owned()),
        Some(action) => Err(Problem::new(format!("seccomp can't `{action}`"), remedy)),
    }
}

pub fn user() -> Finding {
    match sandbox::unused_uid() {
        Some((uid, gid)) => Ok(format!("workers run as uid {uid}, gid {gid}")),
        None => Err(Problem::new(
            "there is no unused user for the workers",
            "Make one: `useradd --system --no-create-home --gid nogroup hydrant`.",
        )),
    }
}

pub fn open_files() -> Finding {
    let remedy =
        format!("Set LimitNOFILE={OPEN_FILES} in the service, or `ulimit -Hn {OPEN_FILES}`.");
    match limits::open_files() {
        Ok(limit) if limit.hard >= OPEN_FILES => Ok(format!("at most {} open files", limit.hard)),
        Ok(limit) => Err(Problem {
            detail: "each reader that waits for content needs one".to_owned(),
            ..Problem::new(format!("at most {} open files", limit.hard), remedy)
        }),
        Err(error) => Err(Problem::step("ask for limits", &error, remedy)),
    }
}

pub fn free_space(room: &Room) -> Finding {
    let remedy = "Make room, or put the state directory elsewhere (--state-dir).";
    let parent = room.parent();
    let space =
        statvfs(parent).map_err(|error| Problem::step("ask for free space", &error, remedy))?;
    let bytes = space.blocks_available().saturating_mul(space.fragment_size());
    let found = format!("{} MiB free in {}", bytes >> 20, parent.display());
    // File systems that make inodes as they go say 0 of 0.
    let no_inodes = space.files() > 0 && space.files_available() < 1000;
    if bytes < FREE_BYTES || no_inodes {
        let detail = format!("{} inodes free", space.files_available());
        return Err(Problem { detail, ..Problem::new(found, remedy) });
    }
    Ok(found)
}
