//! Directories as the daemon knows them.

use std::io;
use std::path::{Component, Path, PathBuf};

use hydrant_api::path_to_text;

use crate::failure::Failure;

/// The absolute path of something that need not exist, without symbolic links as far as it does.
pub fn absolute(path: &Path) -> io::Result<PathBuf> {
    if let Ok(found) = path.canonicalize() {
        return Ok(found);
    }
    let path = std::path::absolute(path)?;
    // What does not exist can't be gone up from.
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "a part of the path does not exist"));
    }
    // The longest part that exists, and the rest as it is.
    for ancestor in path.ancestors().skip(1) {
        if let (Ok(found), Ok(rest)) = (ancestor.canonicalize(), path.strip_prefix(ancestor)) {
            return Ok(found.join(rest));
        }
    }
    Ok(path)
}

/// The same as the text of a request.
pub fn request_text(path: &Path) -> Result<String, Failure> {
    absolute(path)
        .map(|path| path_to_text(&path))
        .map_err(|error| Failure::new(format!("can't find {}: {error}", path.display())))
}

/// Whether `path` is `directory` or in it.
pub fn is_within(path: &str, directory: &str) -> bool {
    Path::new(path).starts_with(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolves_what_exists() {
        let root = tempfile::tempdir().unwrap();
        let real = root.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(absolute(&link).unwrap(), real);
        assert_eq!(absolute(&link.join("new")).unwrap(), real.join("new"));
        assert_eq!(absolute(&link.join("new/er")).unwrap(), real.join("new/er"));
        assert_eq!(absolute(&link.join("../real/")).unwrap(), real);
        assert_eq!(absolute(&link.join("new/")).unwrap(), real.join("new"));
        assert!(absolute(&link.join("new/../../x")).is_err());
    }

    #[test]
    fn relative_paths_start_here() {
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert_eq!(absolute(Path::new("no such")).unwrap(), here.join("no such"));
        assert_eq!(absolute(Path::new(".")).unwrap(), here);
    }

    #[test]
    fn within() {
        assert!(is_within("/a/b", "/a") && is_within("/a", "/a"));
        assert!(!is_within("/ab", "/a") && !is_within("/", "/a"));
    }
}
