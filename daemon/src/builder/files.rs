//! Files that are complete and durable, or not there.

use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use fs_err::File;
use fs_err::os::unix::fs::OpenOptionsExt;

/// So many files wait for [`Made::settle`] at most: each is open.
const MAX_WAITING: usize = 200;

/// As many files are made durable at the same time. They share the file system's commits.
const SYNCS: usize = 4;

/// The files that a job has made so far. Dropped before [`keep`](Self::keep), it removes them.
#[derive(Debug, Default)]
pub struct Made {
    paths: Vec<PathBuf>,
    waiting: Vec<Waiting>,
}

/// A file that is not durable yet.
#[derive(Debug)]
struct Waiting {
    file: File,
    /// Which of [`Made::paths`] it is, and the name that it gets then.
    name: Option<(usize, PathBuf)>,
}

impl Made {
    /// Makes a file of this mode that was not there, open for reading and writing. A file that was
    /// left there by a job that did not end is removed first.
    pub fn create(&mut self, path: &Path, mode: u32) -> io::Result<File> {
        remove(path)?;
        let mut options = fs_err::OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        let file = options.open(path)?;
        self.paths.push(path.to_owned());
        Ok(file)
    }

    /// Writes a whole file of this mode under another name. [`settle`](Self::settle) gives it its own.
    pub fn write(
        &mut self,
        path: &Path,
        mode: u32,
        content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<()> {
        remove(path)?;
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let mut out = BufWriter::with_capacity(256 << 10, self.create(&new, mode)?);
        content(&mut out)?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        let name = Some((self.paths.len() - 1, path.to_owned()));
        self.wait(Waiting { file, name })
    }

    /// A file that was [created](Self::create) is complete.
    pub fn written(&mut self, file: File) -> io::Result<()> {
        self.wait(Waiting { file, name: None })
    }

    fn wait(&mut self, file: Waiting) -> io::Result<()> {
        self.waiting.push(file);
        if self.waiting.len() > MAX_WAITING { self.settle() } else { Ok(()) }
    }

    /// Makes all files durable, then gives them their names: no file has its name before those that
    /// were written before it are durable. The caller makes the directories durable.
    pub fn settle(&mut self) -> io::Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let share = waiting.len().div_ceil(SYNCS).max(1);
        let sync = |files: &[Waiting]| files.iter().try_for_each(|waiting| waiting.file.sync_all());
        std::thread::scope(|scope| {
            let threads = waiting.chunks(share).map(|files| scope.spawn(move || sync(files)));
            let threads: Vec<_> = threads.collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
            })
        })?;
        for (number, path) in waiting.into_iter().filter_map(|waiting| waiting.name) {
            let Some(made) = self.paths.get_mut(number) else { continue };
            fs_err::rename(&*made, &path)?;
            *made = path;
        }
        Ok(())
    }

    /// What others have made belongs to this, too.
    pub fn take(&mut self, mut others: Self) {
        let first = self.paths.len();
        self.paths.append(&mut others.paths);
        self.waiting.extend(others.waiting.drain(..).map(|mut waiting| {
            waiting.name = waiting.name.map(|(number, path)| (first + number, path));
            waiting
        }));
    }

    /// All is well: the files stay.
    pub fn keep(mut self) {
        debug_assert!(self.waiting.is_empty(), "all is settled");
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

/// Removes a file that a job has left that did not end.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes what was created and renamed in a directory durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
        assert_eq!(names(), 3, "a, b.new, c.new");
        made.settle().unwrap();
        assert!(dir.path().join("b").exists());
        let mut all = Made::default();
        all.create(&dir.path().join("d"), 0o600).unwrap();
        all.take(made);
        let mut others = Made::default();
        others.write(&dir.path().join("e"), 0o600, |out| out.write_all(b"x")).unwrap();
        all.take(others);
        all.settle().unwrap();
        assert!(dir.path().join("e").exists());
        drop(all);
        assert_eq!(names(), 0);
    }

    #[test]
    fn a_left_over_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs_err::write(&path, "old").unwrap();
        let mut made = Made::default();
        made.write(&path, 0o600, |out| out.write_all(b"new")).unwrap();
        assert!(!path.exists());
        made.settle().unwrap();
        made.keep();
        assert_eq!(fs_err::read(&path).unwrap(), b"new");
    }
}
