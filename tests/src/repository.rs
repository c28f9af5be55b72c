//! Repositories made from a seed: the same bytes, the same ids, on every machine.
//!
//! They are bare, packed, and kept in a cache: `HYDRANT_TEST_CACHE`, or
//! `hydrant-test-repositories` beside the build directory's profiles.

mod generated;
mod import;
mod odd;
mod pages;
mod random;
mod u_boot;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::process::Run;

pub use generated::generated;
pub use import::{Change, Import};
pub use odd::{OddOptions, odd};
pub use pages::{page_path, pages};
pub use random::Random;
pub use u_boot::{CONFIGURE_FILES, u_boot_shape};

/// The branch that every repository has.
pub const MAIN: &str = "main";
/// The branch that differs from [`MAIN`] in some files.
pub const TOPIC: &str = "topic";
/// When the first commit was made; each later one is a minute younger. In the past, so that git
/// never thinks that a file is newer than its index.
const EPOCH: u64 = 1_700_000_000;

/// A bare repository in the cache. Not to be changed: [`copy_to`](Self::copy_to) gives a copy.
#[derive(Debug, Clone)]
pub struct Repository {
    path: PathBuf,
}

impl Repository {
    /// One that a test has made.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `git ARGUMENTS` writes, run in the repository.
    pub fn git(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = Command::new("git");
        command.arg("-C").arg(&self.path).args(arguments);
        Ok(Run::new(command).check()?.stdout)
    }

    /// A copy that may be changed. Packs are hard links: git never writes to one again.
    pub fn copy_to(&self, path: &Path) -> Result<()> {
        let linked = Run::shell(r#"cp -rlT "$1" "$2""#, &[&self.path, path]).output()?;
        if !linked.status.success() {
            let copy = r#"rm -rf "$2" && cp -rT "$1" "$2""#;
            Run::shell(copy, &[&self.path, path]).time_out(Duration::from_secs(300)).check()?;
        }
        Ok(())
    }

    /// Object ids and paths of the blobs of `revision`, in the order of `git ls-tree -r`.
    pub fn blobs(&self, revision: &str) -> Result<Vec<(String, Vec<u8>)>> {
        let listing = self.git(&["ls-tree", "-r", "-z", "--full-tree", revision])?;
        let entries = listing.split(|b| *b == 0).filter(|entry| !entry.is_empty());
        let blobs = entries.filter_map(|entry| {
            let tab = entry.iter().position(|b| *b == b'\t')?;
            let mut words = str::from_utf8(&entry[..tab]).ok()?.split(' ').skip(1);
            let kind = words.next()?;
            let id = words.next()?.to_owned();
            (kind == "blob").then(|| (id, entry[tab + 1..].to_vec()))
        });
        Ok(blobs.collect())
    }
}

/// The repository `name` from the cache, made by `build` in an empty bare repository if it is not
/// there. `name` says everything that the content depends on.
pub fn cached(
    name: &str,
    format: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<Repository> {
    let path = cached_directory(&format!("{name}.git"), |new| {
        let init = ["init", "-q", "--bare", "-b", MAIN, "--object-format", format];
        let mut command = Command::new("git");
        command.args(init).arg(new);
        Run::new(command).check()?;
        build(new)?;
        let repack = "git -C \"$1\" repack -qadb && git -C \"$1\" pack-refs --all \
                      && git -C \"$1\" update-server-info && git -C \"$1\" commit-graph write --reachable";
        let patience = Duration::from_secs(900);
        Run::shell(repack, &[new]).time_out(patience).check()?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        Ok(fs_err::set_permissions(new, mode)?)
    })?;
    Ok(Repository { path })
}

/// A repository with these files in one commit: path, mode, content.
pub fn files(name: &str, files: &[(String, &'static str, Vec<u8>)]) -> Result<Repository> {
    cached(name, "sha1", |path| {
        let mut import = Import::start(path)?;
        let mut changes = Vec::new();
        for (path, mode, content) in files {
            let blob = import.blob(content)?;
            changes.push(Change::File { path: path.clone().into(), mode, blob });
        }
        import.commit(MAIN, None, &changes)?;
        import.finish()
    })
}

/// A repository of `count` files of `bytes` random bytes, each in a directory of its own and with a
/// name of its own, so that reading one is no reason to read another ahead: `lonely_path(n)`.
pub fn lonely(count: usize, bytes: usize) -> Result<Repository> {
    let mut random = Random::new(bytes as u64);
    let content = |n| (lonely_path(n), "100644", random.bytes(bytes));
    files(&format!("lonely-{count}-{bytes}-1"), &(0..count).map(content).collect::<Vec<_>>())
}

/// Where file `n` of [`lonely`] is.
#[must_use]
pub fn lonely_path(n: usize) -> String {
    format!("dir-{n:04}/file-{n:04}.bin")
}

/// A directory that is made once for all tests, by `build`. `name` says everything that its content depends on.
pub(crate) fn cached_directory(
    name: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let cache = cache_directory()?;
    fs_err::create_dir_all(&cache)?;
    let path = cache.join(name);
    // Two tests may want it at once; one makes it.
    let lock = fs_err::File::create(cache.join(format!("{name}.lock")))?.into_parts().0;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("can't lock what tests keep")?;
    if !path.exists() {
        let new = tempfile::Builder::new().prefix("new-").tempdir_in(&cache)?;
        build(new.path())?;
        fs_err::rename(new.keep(), &path)?;
    }
    Ok(path)
}

/// Where what is made once for all tests is kept.
fn cache_directory() -> Result<PathBuf> {
    if let Some(cache) = std::env::var_os("HYDRANT_TEST_CACHE").filter(|v| !v.is_empty()) {
        return Ok(cache.into());
    }
    Ok(crate::daemon::build_directory()?.join("../hydrant-test-repositories"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_has_what_it_says() {
        let repository = odd(OddOptions::default()).unwrap();
        let blobs = repository.blobs(MAIN).unwrap();
        let has = |name: &[u8]| blobs.iter().any(|(_, path)| path == name);
        assert!(has(b"names/two\nlines.txt") && has(b"names/not utf-8 \xff\xfe\x80.txt"));
        assert!(blobs.len() > 3_040, "{}", blobs.len());
        let diff = repository.git(&["diff", "--name-only", MAIN, TOPIC]).unwrap();
        assert_eq!(diff.iter().filter(|b| **b == b'\n').count(), 13);
        repository.git(&["fsck", "--full", "--strict"]).unwrap();
        let sha256 = odd(OddOptions { format: "sha256", ..OddOptions::default() }).unwrap();
        assert_eq!(sha256.blobs(MAIN).unwrap()[0].0.len(), 64);
    }

    #[test]
    fn generated_has_as_many_files_as_asked_for() {
        let repository = generated(2_000).unwrap();
        assert_eq!(repository.blobs(MAIN).unwrap().len(), 2_000);
        let diff = repository.git(&["diff", "--name-only", MAIN, TOPIC]).unwrap();
        assert_eq!(diff.iter().filter(|b| **b == b'\n').count(), 50);
    }
}
