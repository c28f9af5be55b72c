//! The files that a sandboxed process may open, by Landlock (landlock(7)). Nothing is said here about
//! file descriptors that it is given: they keep the rights that they were opened with.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

use super::SandboxSpec;

/// The newest version of the kernel's interface that this was written for; on older kernels what they
/// do not know is left out.
const INTERFACE: ABI = ABI::V9;

/// Read by glibc's resolver, the dynamic loader (name service modules are loaded at the first look-up)
/// and TLS. What is not there is left out.
///
/// `/etc` as a whole, not `resolv.conf` and its likes by name: a rule is bound to the inode, and DHCP
/// clients and package managers *replace* these files, after which a worker could resolve no name any
/// more. What is secret there is not readable for others.
const READABLE: [&str; 17] = [
    "/etc",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/share/pki",
    "/var/lib/ca-certificates",
    "/usr/share/zoneinfo",
    "/dev/urandom",
    "/dev/null",
    // Where resolv.conf points to, by who writes it.
    "/run/systemd/resolve",
    "/run/NetworkManager",
    "/run/resolvconf",
    // nscd(8)'s socket, which glibc asks first.
    "/run/nscd",
];

/// The rules for a process, not in force yet.
pub fn ruleset(spec: &SandboxSpec<'_>) -> Result<RulesetCreated, RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(INTERFACE))?
        // Connecting is what they are there for, to whatever port an origin has; listening is not.
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?;
    let usual = READABLE.iter().map(PathBuf::from).chain(resolver_directory());
    for path in usual.chain(spec.readable.iter().cloned()) {
        // No such file: nothing to allow.
        if let Ok(fd) = PathFd::new(&path) {
            let access = reading(&path);
            rules = rules.add_rule(PathBeneath::new(fd, access))?;
        }
    }
    if let Some(directory) = spec.event_files {
        let access = AccessFs::ReadFile | AccessFs::WriteFile;
        rules = rules.add_rule(PathBeneath::new(directory, access))?;
    }
    if let Some(directory) = spec.spool_dir {
        rules = rules.add_rule(PathBeneath::new(directory, spooling()))?;
    }
    Ok(rules)
}

/// The directory of the file that `/etc/resolv.conf` is a link to, whoever made it.
fn resolver_directory() -> Option<PathBuf> {
    let file = fs_err::canonicalize("/etc/resolv.conf").ok()?;
    file.parent().filter(|directory| *directory != Path::new("/")).map(Path::to_owned)
}

fn reading(path: &Path) -> BitFlags<AccessFs> {
    let file: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ResolveUnix;
    if path.is_dir() { file | AccessFs::ReadDir } else { file }
}

fn spooling() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::ReadDir
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::Truncate
}
