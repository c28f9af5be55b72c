//! Files that are complete or not there.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use fs_err::File;
use fs_err::os::unix::fs::OpenOptionsExt;

/// The files that a job has made so far. Dropped before [`keep`](Self::keep), it removes them.
#[derive(Debug, Default)]
pub struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Makes a file of this mode that was not there, open for reading and writing. A file that was
    /// left there by a job that did not end is removed first.
    pub fn create(&mut self, path: &Path, mode: u32) -> io::Result<File> {
        match fs_err::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = fs_err::OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        let file = options.open(path)?;
        self.paths.push(path.to_owned());
        Ok(file)
    }

    /// Writes a whole file of this mode: under another name, made durable, then renamed.
    /// The caller makes the directory durable.
    pub fn write(
        &mut self,
        path: &Path,
        mode: u32,
        content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let mut out = BufWriter::with_capacity(256 << 10, self.create(&new, mode)?);
        content(&mut out)?;
        out.flush()?;
        out.get_ref().sync_all()?;
        fs_err::rename(&new, path)?;
        if let Some(last) = self.paths.last_mut() {
            path.clone_into(last);
        }
        Ok(())
    }

    /// All is well: the files stay.
    pub fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = fs_err::remove_file(path) {
                tracing::warn!(%error, "can't remove a file of a tree that could not be built");
            }
        }
    }
}

/// Makes what was created and renamed in a directory durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let names = || fs_err::read_dir(dir.path()).unwrap().count();
        let mut made = Made::default();
        made.create(&dir.path().join("a"), 0o600).unwrap();
        made.write(&dir.path().join("b"), 0o600, |out| out.write_all(b"x")).unwrap();
        let fails = |_: &mut BufWriter<File>| Err(io::Error::other("full"));
        made.write(&dir.path().join("c"), 0o600, fails).unwrap_err();
        assert_eq!(names(), 3, "a, b, c.new");
        drop(made);
        assert_eq!(names(), 0);
    }

    #[test]
    fn a_left_over_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs_err::write(&path, "old").unwrap();
        let mut made = Made::default();
        made.write(&path, 0o600, |out| out.write_all(b"new")).unwrap();
        made.keep();
        assert_eq!(fs_err::read(&path).unwrap(), b"new");
    }
}
