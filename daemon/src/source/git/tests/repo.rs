//! Repositories made by the real git.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::object::{HashKind, ObjectId};

/// A bare repository `repo.git` in a directory of its own.
pub struct Repo {
    pub dir: TempDir,
    pub hash: HashKind,
}

/// A git that knows nothing of the user's configuration.
pub fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", dir)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "A U Thor");
        command.env(format!("GIT_{who}_EMAIL"), "author@example.com");
        command.env(format!("GIT_{who}_DATE"), "1700000000 +0000");
    }
    command
}

impl Repo {
    pub fn new(hash: HashKind) -> Self {
        let dir = TempDir::new().unwrap();
        let repo = Self { dir, hash };
        let format = format!("--object-format={}", hash.name());
        run(git(repo.dir.path()).args(["init", "-q", "--bare", "-b", "main", &format, "repo.git"]));
        repo.git(&["config", "transfer.advertiseObjectInfo", "true"]);
        repo
    }

    /// With a commit of these files.
    pub fn with_files<'a>(
        hash: HashKind,
        files: impl IntoIterator<Item = (String, &'a [u8])>,
    ) -> Self {
        let repo = Self::new(hash);
        let mut stream =
            b"commit refs/heads/main\ncommitter A <a@b> 1700000000 +0000\ndata 1\nx\n".to_vec();
        for (name, content) in files {
            write!(stream, "M 644 inline {name}\ndata {}\n", content.len()).unwrap();
            stream.extend_from_slice(content);
            stream.push(b'\n');
        }
        feed(git(&repo.path()).args(["fast-import", "--quiet"]), &stream);
        repo
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("repo.git")
    }

    pub fn git(&self, args: &[&str]) -> String {
        String::from_utf8(run(git(&self.path()).args(args))).unwrap().trim_end().to_owned()
    }

    pub fn blob(&self, content: &[u8]) -> ObjectId {
        ObjectId::of_blob(self.hash, content)
    }

    /// Puts a blob into the repository, in no tree.
    pub fn add_blob(&self, content: &[u8]) -> ObjectId {
        let id = feed(git(&self.path()).args(["hash-object", "-w", "--stdin"]), content);
        ObjectId::from_hex(id.trim_ascii()).unwrap()
    }

    pub fn tree(&self) -> ObjectId {
        ObjectId::from_hex(self.git(&["rev-parse", "main^{tree}"]).as_bytes()).unwrap()
    }

    /// `git ls-tree -r -l`: the blobs and their sizes.
    pub fn entries(&self) -> Vec<(ObjectId, u64)> {
        let list = self.git(&["ls-tree", "-r", "-l", "--full-tree", "main"]);
        list.lines()
            .map(|line| {
                let words: Vec<_> = line.split_ascii_whitespace().collect();
                (ObjectId::from_hex(words[2].as_bytes()).unwrap(), words[3].parse().unwrap())
            })
            .collect()
    }
}

pub fn run(command: &mut Command) -> Vec<u8> {
    feed(command, b"")
}

pub fn feed(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{command:?}: {}", output.status);
    output.stdout
}
