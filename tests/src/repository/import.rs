//! Writes a history through `git fast-import`.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::EPOCH;

/// A running `git fast-import`.
#[derive(Debug)]
pub struct Import {
    child: Child,
    pipe: BufWriter<ChildStdin>,
    marks: u64,
    commits: u64,
}

/// One change of a commit. Paths are bytes.
#[derive(Debug, Clone)]
pub enum Change {
    /// `mode` is `100644`, `100755` or `120000`, `blob` a mark.
    File {
        path: Vec<u8>,
        mode: &'static str,
        blob: u64,
    },
    Gitlink {
        path: Vec<u8>,
        commit: String,
    },
    Delete {
        path: Vec<u8>,
    },
}

impl Change {
    #[must_use]
    pub fn file(path: impl Into<Vec<u8>>, blob: u64) -> Self {
        Self::File { path: path.into(), mode: "100644", blob }
    }
}

impl Import {
    pub fn start(repository: &Path) -> Result<Self> {
        let mut child = Command::new("git")
            .arg("-C")
            .arg(repository)
            .args(["fast-import", "--quiet", "--done"])
            .stdin(Stdio::piped())
            .spawn()
            .context("can't start git fast-import")?;
        let pipe = child.stdin.take().context("git fast-import has no input")?;
        let pipe = BufWriter::with_capacity(1 << 20, pipe);
        Ok(Self { child, pipe, marks: 0, commits: 0 })
    }

    /// A blob; gives its mark.
    pub fn blob(&mut self, content: &[u8]) -> Result<u64> {
        self.marks += 1;
        write!(self.pipe, "blob\nmark :{}\ndata {}\n", self.marks, content.len())?;
        self.pipe.write_all(content)?;
        self.pipe.write_all(b"\n")?;
        Ok(self.marks)
    }

    /// A commit on `branch`, after the branch's last one of this import or after mark `from`; gives its mark.
    pub fn commit(&mut self, branch: &str, from: Option<u64>, changes: &[Change]) -> Result<u64> {
        self.marks += 1;
        self.commits += 1;
        let (mark, number) = (self.marks, self.commits);
        let message = format!("Commit {number}\n");
        write!(
            self.pipe,
            "commit refs/heads/{branch}\nmark :{mark}\n\
             author A U Thor <author@example.org> {0} +0000\n\
             committer A U Thor <author@example.org> {0} +0000\ndata {1}\n{message}",
            EPOCH + 60 * number,
            message.len()
        )?;
        if let Some(from) = from {
            writeln!(self.pipe, "from :{from}")?;
        }
        for change in changes {
            match change {
                Change::File { path, mode, blob } => {
                    writeln!(self.pipe, "M {mode} :{blob} {}", quoted(path))?;
                }
                Change::Gitlink { path, commit } => {
                    writeln!(self.pipe, "M 160000 {commit} {}", quoted(path))?;
                }
                Change::Delete { path } => writeln!(self.pipe, "D {}", quoted(path))?,
            }
        }
        self.pipe.write_all(b"\n")?;
        Ok(mark)
    }

    pub fn finish(mut self) -> Result<()> {
        self.pipe.write_all(b"done\n")?;
        self.pipe.flush()?;
        drop(self.pipe);
        let status = self.child.wait()?;
        if !status.success() {
            bail!("git fast-import: {status}");
        }
        Ok(())
    }
}

/// A path as git-fast-import(1) takes any bytes: a C string.
fn quoted(path: &[u8]) -> String {
    let mut quoted = String::from("\"");
    for &byte in path {
        match byte {
            b'"' | b'\\' => quoted.extend(['\\', char::from(byte)]),
            0x20..0x7f => quoted.push(char::from(byte)),
            _ => quoted += &format!("\\{byte:03o}"),
        }
    }
    quoted + "\""
}
