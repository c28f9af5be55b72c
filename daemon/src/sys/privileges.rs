//! Giving up privileges for good: user, groups, capabilities (capabilities(7)), and what could bring
//! them back.

use std::ffi::{c_int, c_ulong};
use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// `_LINUX_CAPABILITY_VERSION_3`: two words a set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// `SECBIT_NOROOT`, `SECBIT_KEEP_CAPS_LOCKED`, `SECBIT_NO_CAP_AMBIENT_RAISE` and their locks
/// (`include/uapi/linux/securebits.h`): uid 0 is nobody special, and no set can be filled again.
const SECURE_BITS: c_ulong = 1 | 1 << 1 | 1 << 5 | 1 << 6 | 1 << 7;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// `struct __user_cap_data_struct`.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Which step failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct PrivilegeError {
    pub step: &'static str,
    #[source]
    pub source: io::Error,
}

fn step<T, E: Into<io::Error>>(
    step: &'static str,
    result: Result<T, E>,
) -> Result<T, PrivilegeError> {
    result.map_err(|source| PrivilegeError { step, source: source.into() })
}

/// Becomes `uid` and `gid`, with no other groups, no capabilities in any of the five sets, no way to
/// gain any (`no_new_privs`), not dumpable (nobody with the same uid can trace us), and makes sure of it.
/// For a process with one thread: capabilities are a thread's own.
///
/// The kernel forgets at the change of user that we were to die with our parent
/// (`PR_SET_PDEATHSIG`): it is set again, with SIGKILL. Fails if the parent has ended meanwhile.
pub fn drop_all(uid: u32, gid: u32) -> Result<(), PrivilegeError> {
    let parent = nix::unistd::getppid();
    step("set no_new_privs", nix::sys::prctl::set_no_new_privs())?;
    // Both need CAP_SETPCAP, so they come first.
    step(
        "clear the ambient capabilities",
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong),
    )?;
    step("empty the capability bounding set", empty_bounding_set())?;
    step("set the secure bits", prctl(libc::PR_SET_SECUREBITS, SECURE_BITS))?;

    let (new_uid, new_gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    step("leave all groups", setgroups(&[]))?;
    step("change the group", setresgid(new_gid, new_gid, new_gid))?;
    step("change the user", setresuid(new_uid, new_uid, new_uid))?;
    step("give up capabilities", set_capabilities([CapabilityData::default(); 2]))?;
    step("become undumpable", nix::sys::prctl::set_dumpable(false))?;

    step("die with the parent", prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong))?;
    if nix::unistd::getppid() != parent {
        return step("die with the parent", Err(io::Error::other("it has ended")));
    }
    step("check that privileges are gone", check(uid, gid))
}

/// The number of threads of this process.
pub fn threads() -> io::Result<usize> {
    Ok(fs_err::read_dir("/proc/self/task")?.count())
}

fn check(uid: u32, gid: u32) -> io::Result<()> {
    let users = nix::unistd::getresuid()?;
    let groups = nix::unistd::getresgid()?;
    let expected = (Uid::from_raw(uid), Gid::from_raw(gid));
    let all = [
        (users.real, groups.real),
        (users.effective, groups.effective),
        (users.saved, groups.saved),
    ];
    let right = all.iter().all(|have| *have == expected)
        && nix::unistd::getgroups()?.is_empty()
        && capabilities()? == [CapabilityData::default(); 2]
        && nix::sys::prctl::get_no_new_privs()?;
    if right { Ok(()) } else { Err(io::Error::other("they are not")) }
}

fn empty_bounding_set() -> io::Result<()> {
    // The kernel has at most 64; it says EINVAL for the first that it does not have.
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            Err(error) if capability > 0 && error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn prctl(option: c_int, argument: c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take plain numbers.
    match unsafe { libc::prctl(option, argument, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_capabilities(sets: [CapabilityData; 2]) -> io::Result<()> {
    let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    // SAFETY: header and two words of data for each set, as this version has it; both outlive the call.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn capabilities() -> io::Result<[CapabilityData; 2]> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let mut sets = [CapabilityData::default(); 2];
    // SAFETY: as in `set_capabilities`.
    match unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) } {
        0 => Ok(sets),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether CAP_SYS_ADMIN is in the effective set: mounts and pre-content events need it.
pub fn is_administrator() -> io::Result<bool> {
    const CAP_SYS_ADMIN: u32 = 21;
    Ok(capabilities()?[0].effective & 1 << CAP_SYS_ADMIN != 0)
}
