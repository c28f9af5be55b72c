//! For whom a clone is, and what of the environment goes with it.

use std::env;
use std::ffi::OsString;

use hydrant_api::{Owner, is_wanted_variable};
use nix::unistd::{Uid, User, geteuid};

/// The user behind `sudo`, where root asks on someone's behalf.
pub fn sudo_caller() -> Option<Owner> {
    let number = |name| env::var(name).ok()?.parse().ok();
    let caller = || Some(Owner { uid: number("SUDO_UID")?, gid: number("SUDO_GID")? });
    if geteuid().is_root() { caller().filter(|owner| owner.uid != 0) } else { None }
}

/// The variables that git and ssh look at, as the owner would have them.
pub fn for_git(owner: Option<Owner>) -> Vec<(String, String)> {
    let home = owner.and_then(|owner| {
        let user = User::from_uid(Uid::from_raw(owner.uid)).ok().flatten()?;
        Some((user.name, user.dir.into_os_string().into_string().ok()?))
    });
    select(env::vars_os(), home)
}

/// `owner`: name and home of another user whose variables these become. Values that are not UTF-8 are left out.
fn select(
    variables: impl Iterator<Item = (OsString, OsString)>,
    owner: Option<(String, String)>,
) -> Vec<(String, String)> {
    // sudo leaves root's here.
    let replaced = ["HOME", "USER", "LOGNAME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"];
    let mut selected: Vec<(String, String)> = variables
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| is_wanted_variable(name))
        .filter(|(name, _)| owner.is_none() || !replaced.contains(&name.as_str()))
        .collect();
    if let Some((name, home)) = owner {
        selected.push(("HOME".into(), home));
        selected.push(("USER".into(), name.clone()));
        selected.push(("LOGNAME".into(), name));
    }
    selected.sort();
    selected
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn selected(names: &[&str], owner: Option<(String, String)>) -> Vec<String> {
        let variables = names.iter().map(|name| (OsString::from(name), OsString::from("x")));
        let odd = (OsString::from("LANG"), OsString::from_vec(vec![0xff]));
        let pairs = select(variables.chain([odd]), owner);
        pairs.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    #[test]
    fn what_goes_with_a_clone() {
        let names = ["HOME", "GIT_SSH_COMMAND", "GIT_DIR", "LD_PRELOAD", "XDG_CONFIG_HOME"];
        let own = ["GIT_SSH_COMMAND=x", "HOME=x", "XDG_CONFIG_HOME=x"];
        assert_eq!(selected(&names, None), own);
        let alice = Some(("alice".to_owned(), "/home/alice".to_owned()));
        let others = ["GIT_SSH_COMMAND=x", "HOME=/home/alice", "LOGNAME=alice", "USER=alice"];
        assert_eq!(selected(&names, alice), others);
    }
}
