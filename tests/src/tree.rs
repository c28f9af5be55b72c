//! Compares trees as a user sees them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::process::Run;

/// What `lstat` and `readlink` say of a name. No times, no inode numbers, no owners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub kind: &'static str,
    /// Permission bits.
    pub mode: u32,
    /// Of a file, in bytes.
    pub size: u64,
    pub target: Option<PathBuf>,
}

/// Every name below `root`, without a `.git` at the top, and its entry.
pub fn entries(root: &Path) -> Result<BTreeMap<PathBuf, Entry>> {
    let mut found = BTreeMap::new();
    let mut open = vec![PathBuf::new()];
    while let Some(directory) = open.pop() {
        for entry in fs_err::read_dir(root.join(&directory))? {
            let entry = entry?;
            let name: OsString = entry.file_name();
            let path = directory.join(&name);
            if path == Path::new(".git") {
                continue;
            }
            let metadata = fs_err::symlink_metadata(entry.path())?;
            let file_type = metadata.file_type();
            let kind = match () {
                () if file_type.is_dir() => "directory",
                () if file_type.is_symlink() => "link",
                () if file_type.is_file() => "file",
                () if file_type.is_char_device() => "device",
                () => "other",
            };
            if file_type.is_dir() {
                open.push(path.clone());
            }
            let link = file_type.is_symlink();
            found.insert(
                path,
                Entry {
                    kind,
                    mode: metadata.permissions().mode() & 0o7777,
                    size: if file_type.is_file() { metadata.size() } else { 0 },
                    target: if link { Some(fs_err::read_link(entry.path())?) } else { None },
                },
            );
        }
    }
    Ok(found)
}

/// That two trees have the same names, kinds, modes, sizes and link targets. Reads no content.
pub fn same_metadata(left: &Path, right: &Path) -> Result<usize> {
    let (a, b) = (entries(left)?, entries(right)?);
    let mut differences = Vec::new();
    for (path, entry) in &a {
        if b.get(path) != Some(entry) {
            differences.push(format!("{path:?}: {entry:?} and {:?}", b.get(path)));
        }
    }
    for (path, entry) in b.iter().filter(|(path, _)| !a.contains_key(*path)) {
        differences.push(format!("{path:?}: nothing and {entry:?}"));
    }
    if !differences.is_empty() {
        differences.truncate(20);
        bail!("{} and {} differ:\n{}", left.display(), right.display(), differences.join("\n"));
    }
    Ok(a.len())
}

/// That two trees are the same to `diff -r --no-dereference` and in [`same_metadata`].
pub fn same(left: &Path, right: &Path) -> Result<()> {
    same_metadata(left, right)?;
    let diff = r#"diff -r --no-dereference --exclude=.git "$1" "$2""#;
    let patience = std::time::Duration::from_secs(600);
    let output = Run::shell(diff, &[left, right]).time_out(patience).output()?;
    if !output.status.success() || !output.stdout.is_empty() {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let text: String = text.chars().take(4000).collect();
        bail!("diff says {}:\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn differences_are_found() {
        let scratch = Scratch::new("tree").unwrap();
        let (a, b) = (scratch.make("a").unwrap(), scratch.make("b").unwrap());
        for root in [&a, &b] {
            fs_err::create_dir_all(root.join("sub/.git")).unwrap();
            fs_err::write(root.join("sub/file"), "content").unwrap();
            std::os::unix::fs::symlink("nowhere", root.join("link")).unwrap();
        }
        same(&a, &b).unwrap();
        fs_err::write(b.join("sub/file"), "kontent").unwrap();
        same_metadata(&a, &b).unwrap();
        assert!(same(&a, &b).is_err());
        fs_err::write(b.join("sub/file"), "content").unwrap();
        fs_err::write(b.join("more"), "").unwrap();
        assert!(same_metadata(&a, &b).unwrap_err().to_string().contains("more"));
    }
}
