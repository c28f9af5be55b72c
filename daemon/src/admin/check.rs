//! What can be said of a request without knowing any mount.

use std::path::Path;

use hydrant_api::{CloneRequest, Owner, UmountRequest, is_wanted_variable, path_from_text};

use super::caller::Caller;
use super::error::ApiError;

/// The longest path in bytes (`PATH_MAX`, linux/limits.h, has one more for the NUL).
const MAX_PATH: usize = 4095;
/// Enough for any proxy, token or `GIT_CONFIG_PARAMETERS`; all variables together.
const MAX_ENVIRONMENT: usize = 64 << 10;

/// A path that a request names is absolute and can be one.
pub(super) fn directory(text: &str) -> Result<(), ApiError> {
    let path = path_from_text(text);
    let bytes = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() {
        return Err(ApiError::invalid(format!("{text:?} is not an absolute path")));
    }
    if bytes.contains(&0) || bytes.len() > MAX_PATH {
        return Err(ApiError::invalid(format!("{text:?} can't be a path")));
    }
    if path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(ApiError::invalid(format!("{text:?} has \"..\" in it")));
    }
    if path == Path::new("/") {
        return Err(ApiError::invalid("the root directory can't be a tree"));
    }
    Ok(())
}

/// One directory or all, not both and not none.
pub(super) fn umount(request: &UmountRequest) -> Result<(), ApiError> {
    match (&request.directory, request.all) {
        (Some(text), false) => directory(text),
        (None, true) => Ok(()),
        _ => Err(ApiError::invalid("either a directory or all of them can be unmounted")),
    }
}

/// Takes out of a request what a caller may not ask for, or refuses it.
pub(super) fn clone(caller: &Caller, mut request: CloneRequest) -> Result<CloneRequest, ApiError> {
    directory(&request.directory)?;
    argument("the URL", &request.url)?;
    if let Some(revision) = &request.revision {
        argument("the revision", revision)?;
    }
    caller_or_other(caller, &mut request.owner, "clone")?;
    environment(&mut request.environment)?;
    Ok(request)
}

/// A name of an image, as far as its length goes.
pub(super) fn reference(text: &str) -> Result<(), ApiError> {
    argument("the image's name", text)?;
    match text.len() > 1000 {
        true => Err(ApiError::invalid("the image's name is too long")),
        false => Ok(()),
    }
}

/// What is asked about an image.
pub(super) fn image(
    caller: &Caller,
    name: &str,
    variables: &mut Vec<(String, String)>,
    owner: &mut Option<Owner>,
) -> Result<(), ApiError> {
    reference(name)?;
    caller_or_other(caller, owner, "pull")?;
    environment(variables)
}

/// Only root may ask for others.
fn caller_or_other(caller: &Caller, owner: &mut Option<Owner>, what: &str) -> Result<(), ApiError> {
    match *owner {
        Some(other) if !caller.may_change(other) => {
            return Err(ApiError::forbidden(format!("only root may {what} for another user")));
        }
        Some(_) if !caller.is_root() => *owner = None,
        _ => {}
    }
    Ok(())
}

fn environment(variables: &mut Vec<(String, String)>) -> Result<(), ApiError> {
    variables.retain(|(name, value)| is_wanted_variable(name) && !value.contains('\0'));
    let size: usize = variables.iter().map(|(n, v)| n.len() + v.len()).sum();
    if size > MAX_ENVIRONMENT {
        return Err(ApiError::invalid(format!(
            "the environment has {size} bytes of variables for git, more than {MAX_ENVIRONMENT}"
        )));
    }
    Ok(())
}

/// Words that become arguments of git: none may be taken for an option.
fn argument(what: &str, text: &str) -> Result<(), ApiError> {
    if text.is_empty() || text.starts_with('-') || text.contains(['\0', '\n']) {
        return Err(ApiError::invalid(format!("{what} can't be {text:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hydrant_api::{ErrorCode, History};

    use super::*;

    fn request() -> CloneRequest {
        CloneRequest {
            url: "https://example.org/a.git".into(),
            directory: "/srv/a".into(),
            revision: None,
            history: History::default(),
            read_only: false,
            environment: Vec::new(),
            owner: None,
        }
    }

    const ROOT: Caller = Caller { uid: 0, gid: 0, pid: None };
    const USER: Caller = Caller { uid: 1000, gid: 100, pid: Some(7) };

    #[test]
    fn directories() {
        for good in ["/srv/a", "/srv/a b", r"/srv/\xff"] {
            assert_eq!(directory(good), Ok(()), "{good}");
        }
        let long = format!("/{}", "a".repeat(MAX_PATH));
        for bad in ["", "srv", "/", "//", "/srv/../etc", r"/a\x00b", &long] {
            assert_eq!(directory(bad).unwrap_err().code, ErrorCode::Invalid, "{bad}");
        }
    }

    #[test]
    fn options_are_no_urls() {
        for url in ["--upload-pack=evil", "", "a\nb"] {
            let bad = CloneRequest { url: url.into(), ..request() };
            assert_eq!(clone(&ROOT, bad).unwrap_err().code, ErrorCode::Invalid, "{url}");
        }
        let bad = CloneRequest { revision: Some("-f".into()), ..request() };
        assert!(clone(&USER, bad).is_err());
    }

    #[test]
    fn only_root_clones_for_others() {
        let other = CloneRequest { owner: Some(Owner { uid: 5, gid: 5 }), ..request() };
        assert_eq!(clone(&USER, other.clone()).unwrap_err().code, ErrorCode::Forbidden);
        assert_eq!(clone(&ROOT, other.clone()).unwrap().owner, other.owner);
        // A group that is not theirs does not come with a user's own number.
        let group = CloneRequest { owner: Some(Owner { uid: 1000, gid: 0 }), ..request() };
        assert_eq!(clone(&USER, group).unwrap().owner, None);
    }

    #[test]
    fn the_environment_is_filtered() {
        let variable = |name: &str| (name.to_owned(), "x".to_owned());
        let environment = vec![variable("LD_PRELOAD"), variable("HOME"), variable("GIT_DIR")];
        let checked = clone(&USER, CloneRequest { environment, ..request() }).unwrap();
        assert_eq!(checked.environment, [variable("HOME")]);
        let environment = vec![("HOME".to_owned(), "x".repeat(MAX_ENVIRONMENT))];
        assert!(clone(&USER, CloneRequest { environment, ..request() }).is_err());
    }

    #[test]
    fn one_or_all() {
        let some = |directory: Option<&str>, all| UmountRequest {
            directory: directory.map(str::to_owned),
            all,
        };
        assert!(umount(&some(Some("/a"), false)).is_ok());
        assert!(umount(&some(None, true)).is_ok());
        assert!(umount(&some(Some("/a"), true)).is_err());
        assert!(umount(&some(None, false)).is_err());
    }
}
