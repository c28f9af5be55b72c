//! A directory to try things in, on the state directory's file system.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a program that a probe starts may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A directory that is removed with all that is in it.
#[derive(Debug)]
pub struct Room {
    path: PathBuf,
}

impl Room {
    /// In `directory`, or in the nearest directory above it that exists.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let existing = directory.ancestors().find(|path| path.is_dir()).unwrap_or(directory);
        let path = existing.join(format!(".hydrant-doctor-{}", std::process::id()));
        // Left by a process of the same number that was killed, or made by another probe of this one.
        let free = (0..100).map(|attempt| path.with_extension(attempt.to_string()));
        for path in free {
            match fs_err::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("there are too many directories of ours"))
    }

    /// What it is in.
    pub fn parent(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory.
    pub fn directory(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path(name);
        fs_err::create_dir_all(&path)?;
        Ok(path)
    }

    /// Makes a file, for reading and writing.
    pub fn file(&self, name: &str) -> io::Result<File> {
        let mut options = fs_err::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(self.path(name))?;
        Ok(file.into_parts().0)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs_err::remove_dir_all(&self.path);
    }
}

/// Runs a program whose output is short, calling `meanwhile` about every 10 ms, for [`PATIENCE`] at
/// most; then it is killed and the result is `TimedOut`.
pub fn run<E: From<io::Error>>(
    command: &mut Command,
    mut meanwhile: impl FnMut() -> Result<(), E>,
) -> Result<Output, E> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let start = Instant::now();
    let result = loop {
        match child.try_wait() {
            Ok(Some(_)) => break Ok(()),
            Ok(None) => {}
            Err(error) => break Err(error.into()),
        }
        if start.elapsed() > PATIENCE {
            break Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        if let Err(error) = meanwhile() {
            break Err(error);
        }
    };
    if result.is_err() {
        // A reader that waits for us can be killed. Do not wait for one that can't.
        let _ = child.kill();
        std::thread::sleep(Duration::from_millis(50));
        let _ = child.try_wait();
    }
    result?;
    Ok(child.wait_with_output()?)
}
