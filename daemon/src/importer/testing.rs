//! A real git repository for tests, and an origin on top of it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::importer::listing::Listing;
use crate::importer::{Importer, Origin, Revision, Spool};
use crate::object::{HashKind, ObjectId};
use crate::source::{Content, Fetch, FetchError, Sink};

/// A `git` command that no configuration of the machine or the user changes.
pub fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(dir).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.args(["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "gc.auto=0"]);
    command.args(["-c", "maintenance.auto=false", "-c", "protocol.file.allow=always"]);
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    command.env("GIT_AUTHOR_DATE", "1700000000 +0000");
    command.env("GIT_COMMITTER_DATE", "1700000000 +0000");
    command
}

/// Runs a command with this input; fails unless it succeeds. Returns what it wrote.
pub fn run_with(command: &mut Command, input: &[u8]) -> Vec<u8> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    output.stdout
}

/// Runs `git` with these arguments.
pub fn run(dir: &Path, args: &[&str]) -> String {
    String::from_utf8_lossy(&run_with(git(dir).args(args), b"")).trim_end().to_owned()
}

/// A repository with a working tree.
#[derive(Debug)]
pub struct Repository {
    pub dir: PathBuf,
    pub hash: HashKind,
}

impl Repository {
    pub fn new(dir: PathBuf, hash: HashKind) -> Self {
        fs_err::create_dir_all(&dir).unwrap();
        run(&dir, &["init", "-q", "-b", "main", &format!("--object-format={}", hash.name())]);
        run(&dir, &["config", "uploadpack.allowFilter", "true"]);
        run(&dir, &["config", "uploadpack.allowAnySHA1InWant", "true"]);
        Self { dir, hash }
    }

    pub fn commit(&self) {
        run(&self.dir, &["add", "-A"]);
        run(&self.dir, &["commit", "-qm", "a commit", "--allow-empty"]);
    }

    pub fn id(&self, revision: &str) -> ObjectId {
        ObjectId::from_hex(run(&self.dir, &["rev-parse", revision]).as_bytes()).unwrap()
    }

    pub fn revision(&self) -> Revision {
        let time = run(&self.dir, &["log", "-1", "--format=%ct"]).parse().unwrap();
        Revision { commit: self.id("HEAD"), tree: self.id("HEAD^{tree}"), time }
    }

    pub fn listing(&self) -> Listing {
        let mut command = git(&self.dir);
        command.args(["ls-tree", "-r", "-t", "-z", "--full-tree", "HEAD"]);
        Listing::read(self.hash, &run_with(&mut command, b"")[..]).unwrap()
    }

    pub fn importer(&self) -> Importer<Vec<u8>> {
        Importer::new(self.listing(), Vec::new(), Spool::new(tempfile::tempfile))
    }
}

/// An origin that reads a repository with git's own commands.
#[derive(Debug)]
pub struct TestOrigin {
    pub dir: PathBuf,
    /// It tells sizes.
    pub object_info: bool,
    /// Each is the answer to one request, instead of what was asked for.
    pub faults: Mutex<Vec<FetchError>>,
    /// All keys of all requests for objects.
    pub fetched: Mutex<Vec<ObjectId>>,
    /// Those of all probes.
    pub probed: Mutex<Vec<ObjectId>>,
}

impl TestOrigin {
    pub fn new(dir: &Path) -> Self {
        let (faults, fetched, probed) = Default::default();
        Self { dir: dir.to_owned(), object_info: true, faults, fetched, probed }
    }

    fn fault(&self) -> Result<(), FetchError> {
        self.faults.lock().unwrap().pop().map_or(Ok(()), Err)
    }
}

fn lines(keys: &[ObjectId]) -> Vec<u8> {
    keys.iter().flat_map(|key| format!("{key}\n").into_bytes()).collect()
}

impl Fetch for TestOrigin {
    async fn fetch(&self, keys: &[ObjectId], sink: &mut dyn Sink) -> Result<(), FetchError> {
        self.fetched.lock().unwrap().extend_from_slice(keys);
        let out = run_with(git(&self.dir).args(["cat-file", "--batch"]), &lines(keys));
        let mut out = BufReader::new(&out[..]);
        let fault = self.fault();
        // with a fault, only the first object comes
        let count = if fault.is_err() { 1 } else { keys.len() };
        for key in &keys[..count] {
            let mut head = String::new();
            out.read_line(&mut head).unwrap();
            let len: u64 = head.trim().rsplit(' ').next().unwrap().parse().unwrap();
            let content = if len > 1 << 20 {
                let mut file = sink.spool().unwrap();
                io::copy(&mut out.by_ref().take(len), &mut file).unwrap();
                Content::Spooled { file, len }
            } else {
                let mut content = vec![0; len as usize];
                out.read_exact(&mut content).unwrap();
                Content::Memory(content)
            };
            out.read_exact(&mut [0]).unwrap();
            sink.object(*key, content).map_err(FetchError::Sink)?;
        }
        fault
    }
}

impl Origin for TestOrigin {
    async fn sizes(&self, keys: &[ObjectId]) -> Result<Vec<(ObjectId, u64)>, FetchError> {
        self.fault()?;
        if !self.object_info {
            return Ok(Vec::new());
        }
        let check = "--batch-check=%(objectsize)";
        let out = run_with(git(&self.dir).args(["cat-file", check]), &lines(keys));
        let sizes = std::str::from_utf8(&out).unwrap().lines();
        Ok(keys.iter().copied().zip(sizes.map(|size| size.parse().unwrap())).collect())
    }

    async fn probe(&self, key: ObjectId) -> Result<(), FetchError> {
        self.probed.lock().unwrap().push(key);
        self.fault()
    }

    async fn fetch_pack(
        &self,
        keys: &[ObjectId],
        pack: &mut (dyn Write + Send),
        sink: &mut dyn Sink,
    ) -> Result<(), FetchError> {
        self.fetch(keys, sink).await?;
        let bytes = run_with(git(&self.dir).args(["pack-objects", "-q", "--stdout"]), &lines(keys));
        pack.write_all(&bytes).map_err(FetchError::Sink)
    }
}

/// Runs a future to its end.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().build().unwrap().block_on(future)
}
