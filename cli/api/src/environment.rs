//! Which of a caller's environment variables git and ssh get to see.

/// Variables that git, ssh or a credential helper look at, and where registries' credentials are.
const WANTED: &[&str] = &[
    "DOCKER_CONFIG",
    "HOME",
    "LANG",
    "LOGNAME",
    "PATH",
    "REGISTRY_AUTH_FILE",
    "SSH_ASKPASS",
    "SSH_ASKPASS_REQUIRE",
    "SSH_AUTH_SOCK",
    "USER",
    "XDG_CONFIG_HOME",
    "XDG_RUNTIME_DIR",
    "all_proxy",
    "ftp_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "ALL_PROXY",
    "FTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
];

/// Variables of git that name the caller's own repository, or open files where the caller stands.
/// The first ones are what `git rev-parse --local-env-vars` prints.
const UNWANTED: &[&str] = &[
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
    "GIT_DEFAULT_HASH",
    "GIT_EDITOR",
    "GIT_INDEX_VERSION",
    "GIT_NAMESPACE",
    "GIT_PAGER",
    "GIT_QUARANTINE_PATH",
    "GIT_REDIRECT_STDERR",
    "GIT_REDIRECT_STDIN",
    "GIT_REDIRECT_STDOUT",
    "GIT_REFLOG_ACTION",
    "GIT_SEQUENCE_EDITOR",
    "GIT_TEMPLATE_DIR",
];

/// Whether the daemon takes this variable over from a caller for the git that runs on their behalf.
///
/// `HTTP_PROXY` in capitals is left out: git and curl don't look at it either (a CGI program would
/// have it set by its client).
#[must_use]
pub fn is_wanted_variable(name: &str) -> bool {
    if let Some(rest) = name.strip_prefix("GIT_") {
        let plain = rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        return plain && !rest.starts_with("TRACE") && !UNWANTED.contains(&name);
    }
    let locale = name.strip_prefix("LC_").is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
    });
    locale || WANTED.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_git_and_ssh_look_at() {
        for name in [
            "DOCKER_CONFIG",
            "HOME",
            "SSH_AUTH_SOCK",
            "GIT_SSH_COMMAND",
            "GIT_SSL_CAINFO",
            "GIT_CONFIG_COUNT",
            "GIT_CONFIG_KEY_0",
            "GIT_ASKPASS",
            "https_proxy",
            "NO_PROXY",
            "LC_ALL",
        ] {
            assert!(is_wanted_variable(name), "{name}");
        }
        for name in [
            "LD_PRELOAD",
            "GIT_DIR",
            "GIT_TRACE",
            "GIT_TRACE_CURL",
            "LC_",
            "HTTP_PROXY",
            "GIT_A=B",
            "",
        ] {
            assert!(!is_wanted_variable(name), "{name}");
        }
    }
}
