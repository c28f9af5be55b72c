//! URLs as `git clone` takes them: what is a local path, and the name of the directory.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::failure::Failure;

/// What `hydrant clone` was given, as the daemon gets it: a URL as it is, a local path absolute.
///
/// A repository that exists under the name comes first, then a name with a colon in it is a URL or
/// `host:path` (git-clone(1), "GIT URLS").
pub fn resolve(text: &str) -> Result<String, Failure> {
    if text.starts_with('-') || text.is_empty() {
        return Err(Failure::usage(format!("{text:?} is not the URL of a repository")));
    }
    let path = Path::new(text);
    if is_repository(path) {
        let path =
            absolute(path).map_err(|error| Failure::new(format!("can't find {text}: {error}")))?;
        return path.into_os_string().into_string().map_err(|path| {
            Failure::new(format!("{} is not UTF-8, which a URL has to be", path.display()))
        });
    }
    if has_scheme(text) || is_scp_like(text) {
        return Ok(text.to_owned());
    }
    let failure = Failure::new(format!("the repository {text} does not exist"));
    Err(match path.exists() {
        true => failure.hint("there is no .git in it, and it is not a bare repository"),
        false => failure.hint("a URL looks like https://host/path or host:path"),
    })
}

/// The directory that `git clone` would make: the last part of the path without `.git`, or the
/// host where there is no path. `None` where nothing is left.
pub fn directory_name(url: &str) -> Option<String> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    // User and password, up to the last `@` in the first part.
    let host_end = rest.find('/').unwrap_or(rest.len());
    let start = rest.get(..host_end).and_then(|host| host.rfind('@')).map_or(0, |at| at + 1);
    let rest = rest.get(start..).unwrap_or_default();

    let end = |c: char| c == '/' || c.is_ascii_whitespace();
    let mut rest = rest.trim_end_matches(end);
    if let Some(shorter) = rest.strip_suffix("/.git").filter(|shorter| !shorter.is_empty()) {
        rest = shorter.trim_end_matches('/');
    }
    // Only a host: without its port.
    if !rest.contains('/')
        && let Some((host, port)) = rest.rsplit_once(':')
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        rest = host;
    }
    let last = rest.rsplit(['/', ':']).next().unwrap_or_default();
    let name = last.strip_suffix(".git").unwrap_or(last);
    let space = |c: char| c.is_ascii_control() || c.is_ascii_whitespace();
    let words: Vec<&str> = name.split(space).filter(|word| !word.is_empty()).collect();
    let name = words.join(" ");
    (!matches!(name.as_str(), "" | "." | "..")).then_some(name)
}

/// Whether git finds a repository under this path: there, with `.git` in it, or with `.git` after it.
fn is_repository(path: &Path) -> bool {
    let is_git_dir = |path: &Path| {
        path.join("HEAD").symlink_metadata().is_ok()
            && path.join("objects").is_dir()
            && path.join("refs").is_dir()
    };
    let mut with_suffix = path.as_os_str().to_owned();
    with_suffix.push(".git");
    let with_suffix = PathBuf::from(with_suffix);
    [path.join(".git"), path.to_owned(), with_suffix.join(".git"), with_suffix]
        .iter()
        // A `.git` file names the directory: a worktree, a submodule.
        .any(|candidate| is_git_dir(candidate) || (candidate.is_file() && is_git_file(candidate)))
}

fn is_git_file(path: &Path) -> bool {
    use io::Read;
    let mut start = [0; 8];
    fs_err::File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok()
        && &start == b"gitdir: "
}

fn absolute(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    if absolute.components().any(|c| c == Component::ParentDir) {
        return path.canonicalize();
    }
    Ok(absolute)
}

/// `scheme://`, or `helper::address` (gitremote-helpers(7)).
fn has_scheme(text: &str) -> bool {
    let name_before = |separator| {
        text.split_once(separator).is_some_and(|(name, _)| {
            !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
        })
    };
    name_before("://") || name_before("::")
}

/// `host:path`: a colon before the first slash.
fn is_scp_like(text: &str) -> bool {
    text.split('/').next().is_some_and(|first| first.contains(':'))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::failure::Kind;

    #[test]
    fn directories_are_named_as_git_names_them() {
        for (url, name) in [
            ("https://example.org/a/b.git", "b"),
            ("https://example.org/a/b.git/", "b"),
            ("https://example.org/a/b", "b"),
            ("https://user:p@ss@example.org/b.git", "b"),
            ("https://example.org", "example.org"),
            ("https://example.org:8080/", "example.org"),
            ("ssh://host:1234/~/b", "b"),
            ("host:b.git", "b"),
            ("user@host:a/b.git", "b"),
            ("/srv/a.git", "a"),
            ("/srv/a/.git", "a"),
            ("/srv/a/.git/", "a"),
            ("/srv/a//", "a"),
            ("../a", "a"),
            ("host:1234", "host"),
            ("/foo/bar:2222.git", "2222"),
            ("https://example.org/with  space.git", "with space"),
            ("https://example.org/a.git.git", "a.git"),
            ("file:///srv/a.bundle", "a.bundle"),
        ] {
            assert_eq!(directory_name(url).as_deref(), Some(name), "{url}");
        }
        for url in ["https://", "/", "https://example.org/.git", "..", "."] {
            let name = directory_name(url);
            assert!(matches!(name.as_deref(), None | Some("example.org")), "{url}: {name:?}");
        }
    }

    /// git says the name before it looks whether it may use the protocol, which here it may not.
    fn name_by_git(url: &str, place: &Path) -> Option<String> {
        let output = Command::new("git")
            .args(["clone", "--", url])
            .env("GIT_ALLOW_PROTOCOL", "none")
            .env("LC_ALL", "C")
            .current_dir(place)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let (_, rest) = said.split_once("Cloning into '")?;
        Some(rest.split_once("'...").unwrap().0.to_owned())
    }

    #[test]
    fn git_agrees() {
        let root = tempfile::tempdir().unwrap();
        for url in [
            "https://example.org/a/b.git",
            "https://example.org/a/b.git//",
            "https://example.org/a/b/.git",
            "https://user:p@ss@example.org/b.git",
            "https://user:p@ss@example.org",
            "https://example.org",
            "https://example.org:8080/",
            "ssh://host:1234/~/b",
            "host:b.git",
            "host:1234",
            "host:/a/b",
            "user@host:a/b.git",
            "https://example.org/with  space .git",
            "https://example.org/a.git.git",
            "https://example.org/foo:2222.git",
            "https://example.org/",
            "https://",
            "https://example.org/a\tb",
            "ssh://host/ a ",
        ] {
            assert_eq!(directory_name(url), name_by_git(url, root.path()), "{url}");
        }
    }

    #[test]
    fn urls_stay_as_they_are() {
        for url in [
            "https://example.org/a.git",
            "git@example.org:a/b.git",
            "host:path",
            "[::1]:path",
            "file:///srv/a.git",
            "ext::sh -c true",
        ] {
            assert_eq!(resolve(url).unwrap(), url);
        }
        for text in ["no/such/path", "./no:colon", "/no/such:path"] {
            let failure = resolve(text).unwrap_err();
            assert!(failure.message.contains("does not exist"), "{failure:?}");
        }
        assert_eq!(resolve("--upload-pack=x").unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn local_repositories_become_absolute() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let git = |args: &[&str]| {
            let status = Command::new("git").args(args).current_dir(&root).status().unwrap();
            assert!(status.success());
        };
        git(&["init", "-q", "work"]);
        git(&["init", "-q", "--bare", "bare.git"]);
        git(&["init", "-q", "with:colon"]);
        for name in ["work", "work/.git", "bare.git", "bare", "with:colon"] {
            let path = root.join(name);
            let text = path.to_str().unwrap();
            assert_eq!(resolve(text).unwrap(), text);
            let detour = format!("{}/work/../{name}", root.display());
            // `bare` is what git finds as bare.git; it does not exist by itself.
            if path.exists() {
                assert_eq!(resolve(&detour).unwrap(), text);
            }
        }
        std::fs::create_dir(root.join("empty")).unwrap();
        let failure = resolve(root.join("empty").to_str().unwrap()).unwrap_err();
        assert!(failure.hint.unwrap().contains("no .git"), "{}", failure.message);
    }
}
