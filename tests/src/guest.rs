//! Whether a test runs in the guest kernel (`tests/guest`), and what is different there: a system call
//! takes about 10 µs, fork and exec 12 ms, and the kernel may have no Landlock.

use std::time::Duration;

/// Set by the guest's runner to the kernel's release.
const GUEST: &str = "HYDRANT_GUEST";

/// Whether this is the guest.
#[must_use]
pub fn inside() -> bool {
    std::env::var_os(GUEST).is_some_and(|release| !release.is_empty())
}

/// A size for a test: `here`, or in the guest the other.
#[must_use]
pub fn or<T>(here: T, in_the_guest: T) -> T {
    if inside() { in_the_guest } else { here }
}

/// How long to wait for what should take `time` at most on an ordinary machine.
#[must_use]
pub fn patience(time: Duration) -> Duration {
    time * or(1, 4)
}

/// Lines for the configuration of every daemon.
#[must_use]
pub fn configuration() -> String {
    let without = inside() && !has_landlock();
    if without { "without_landlock = true\n".to_owned() } else { String::new() }
}

/// Asks for the version, with `LANDLOCK_CREATE_RULESET_VERSION` (`linux/landlock.h`).
fn has_landlock() -> bool {
    let version = 1;
    // SAFETY: with this flag the kernel takes no pointer.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, version) >= 1 }
}
