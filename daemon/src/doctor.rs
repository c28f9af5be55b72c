//! `hydrantd doctor`: can Hydrant work here? Every prerequisite is tried, on the file system that the
//! state directory is on; what a kernel or a file system claims to be is not asked.

mod git;
mod image;
mod lazy;
mod room;
mod system;

use std::path::Path;

use hydrant_api::doctor::{Check, CheckResult, Severity};

use room::Room;

/// What a probe found: what was seen, or what is wrong.
type Finding = Result<String, Problem>;

/// A prerequisite that is not met.
#[derive(Debug)]
struct Problem {
    problem: String,
    /// What was tried and seen besides.
    detail: String,
    remedy: String,
}

impl Problem {
    fn new(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { problem: problem.into(), detail: String::new(), remedy: remedy.into() }
    }

    /// A step that failed, with the whole chain of reasons.
    fn step(step: &str, error: &dyn std::error::Error, remedy: impl Into<String>) -> Self {
        Self {
            detail: format!("{step}: {}", chain(error)),
            ..Self::new(format!("cannot {step}"), remedy)
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or(error.to_string(), |source| format!("{error}: {}", chain(source)))
}

/// Tries everything. `state_dir` need not exist: then its nearest ancestor that does is looked at.
/// Leaves nothing behind; takes a second or so, at most half a minute where the kernel misbehaves.
#[must_use]
pub fn run(state_dir: &Path) -> Vec<Check> {
    use Severity::{Recommended, Required};
    let room = Room::new(state_dir);
    let in_room = |probe: fn(&Room) -> Finding| match &room {
        Ok(room) => probe(room),
        Err(error) => Err(Problem::step(
            "make a directory to try things in",
            error,
            "Run as root, or choose another state directory with --state-dir.",
        )),
    };
    let privileges = system::privileges();
    // What needs root says no more than that without it.
    let as_root = |probe: fn(&Room) -> Finding| match &privileges {
        Ok(_) => in_room(probe),
        Err(_) => Err(Problem::new("not tried", "Run `sudo hydrant doctor`.")),
    };
    let findings = [
        ("fanotify", Required, as_root(lazy::fanotify)),
        ("queue", Recommended, as_root(|_| system::queue())),
        ("erofs", Required, as_root(lazy::erofs)),
        ("overlayfs", Required, as_root(lazy::overlayfs)),
        ("sparse-files", Required, in_room(system::sparse_files)),
        ("git", Required, in_room(git::git)),
        ("memfd", Required, system::memfd()),
        ("landlock", Required, system::landlock()),
        ("seccomp", Required, system::seccomp()),
        ("user", Required, system::user()),
        ("open-files", Recommended, system::open_files()),
        ("free-space", Recommended, in_room(system::free_space)),
    ];
    let privileges = ("privileges", Required, privileges);
    [privileges]
        .into_iter()
        .chain(findings)
        .map(|(name, severity, finding)| check(name, severity, finding))
        .collect()
}

fn check(name: &str, severity: Severity, finding: Finding) -> Check {
    let (result, detail) = match finding {
        Ok(detail) => (CheckResult::Ok, detail),
        Err(Problem { problem, detail, remedy }) => {
            (CheckResult::Failed { problem, remedy }, detail)
        }
    };
    Check { name: name.to_owned(), severity, result, detail }
}

#[cfg(test)]
mod tests;
