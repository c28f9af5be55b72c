//! The daemon's snapshotter as containerd uses it: calls, and the mounts that it is told to make.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hydrant_daemon::snapshotter::METHODS;
use hydrant_daemon::snapshotter::messages::{
    CleanupRequest, CommitRequest, CreateRequest, Empty, FieldMask, Info, InfoResponse, KeyRequest,
    ListRequest, ListResponse, Mount, MountsResponse, UpdateRequest, UsageResponse,
};
use prost::Message;

use crate::grpc::{self, Code, Refusal};
use crate::process::Run;

pub use hydrant_daemon::snapshotter::messages::Kind;

/// The snapshotter of a daemon, or one of containerd's.
#[derive(Debug, Clone)]
pub struct Snapshots {
    socket: PathBuf,
    snapshotter: String,
    namespace: String,
}

/// `labels(&[("a", "b")])`
#[must_use]
pub fn labels(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

impl Snapshots {
    /// Of the daemon with this run directory.
    #[must_use]
    pub fn of(run: &Path) -> Self {
        Self::by(&run.join("containerd.sock"), "hydrant", "default")
    }

    /// A snapshotter that is asked through containerd, which listens on that socket.
    #[must_use]
    pub fn by(containerd: &Path, snapshotter: &str, namespace: &str) -> Self {
        let (snapshotter, namespace) = (snapshotter.to_owned(), namespace.to_owned());
        Self { socket: containerd.to_owned(), snapshotter, namespace }
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn call<Q: Message, A: Message + Default>(&self, method: &str, request: &Q) -> Result<A> {
        let answers =
            grpc::call(&self.socket, &format!("{METHODS}{method}"), &self.namespace, request)?;
        answers.into_iter().next().with_context(|| format!("{method} answers nothing"))
    }

    fn create(
        &self,
        method: &str,
        key: &str,
        parent: &str,
        with: &[(&str, &str)],
    ) -> Result<Vec<Mount>> {
        let (key, parent, labels) = (key.to_owned(), parent.to_owned(), labels(with));
        let request = CreateRequest { snapshotter: self.snapshotter.clone(), key, parent, labels };
        let answer: MountsResponse = self.call(method, &request)?;
        ensure!(!answer.mounts.is_empty(), "no mounts");
        Ok(answer.mounts)
    }

    pub fn prepare(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Result<Vec<Mount>> {
        self.create("Prepare", key, parent, with)
    }

    pub fn view(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Result<Vec<Mount>> {
        self.create("View", key, parent, with)
    }

    fn key(&self, key: &str) -> KeyRequest {
        KeyRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() }
    }

    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        Ok(self.call::<_, MountsResponse>("Mounts", &self.key(key))?.mounts)
    }

    pub fn commit(&self, name: &str, key: &str, with: &[(&str, &str)]) -> Result<()> {
        let (name, key, labels) = (name.to_owned(), key.to_owned(), labels(with));
        let request = CommitRequest { snapshotter: self.snapshotter.clone(), name, key, labels };
        self.call::<_, Empty>("Commit", &request)?;
        Ok(())
    }

    pub fn remove(&self, key: &str) -> Result<()> {
        self.call::<_, Empty>("Remove", &self.key(key))?;
        Ok(())
    }

    pub fn stat(&self, key: &str) -> Result<Info> {
        let answer: InfoResponse = self.call("Stat", &self.key(key))?;
        answer.info.context("nothing is said of it")
    }

    pub fn update(&self, info: Info, paths: &[&str]) -> Result<Info> {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let request = UpdateRequest {
            info: Some(info),
            update_mask: Some(FieldMask { paths }),
            snapshotter: self.snapshotter.clone(),
        };
        self.call::<_, InfoResponse>("Update", &request)?.info.context("nothing is said of it")
    }

    /// What matches one of the filters.
    pub fn list(&self, filters: &[&str]) -> Result<Vec<Info>> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = ListRequest { snapshotter: self.snapshotter.clone(), filters };
        let answers: Vec<ListResponse> =
            grpc::call(&self.socket, &format!("{METHODS}List"), &self.namespace, &request)?;
        Ok(answers.into_iter().flat_map(|answer| answer.info).collect())
    }

    /// The names of what matches, sorted.
    pub fn names(&self, filters: &[&str]) -> Result<Vec<String>> {
        let mut names: Vec<_> = self.list(filters)?.into_iter().map(|info| info.name).collect();
        names.sort();
        Ok(names)
    }

    pub fn usage(&self, key: &str) -> Result<UsageResponse> {
        self.call("Usage", &self.key(key))
    }

    pub fn cleanup(&self) -> Result<()> {
        self.call::<_, Empty>(
            "Cleanup",
            &CleanupRequest { snapshotter: self.snapshotter.clone() },
        )?;
        Ok(())
    }
}

/// Connects to a socket all the time.
#[derive(Debug)]
pub struct Connecting {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<usize>>,
}

impl Connecting {
    #[must_use]
    pub fn to(socket: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (socket, stopped) = (socket.to_owned(), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut count = 0;
            while !stopped.load(Ordering::SeqCst) {
                drop(UnixStream::connect(&socket)?);
                count += 1;
                // nobody may take them for a while
                thread::sleep(Duration::from_millis(20));
            }
            Ok(count)
        });
        Self { stop, thread }
    }

    /// That somebody has listened all the time.
    pub fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let done = self.thread.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))?;
        let count = done.context("nobody listens")?;
        ensure!(count > 0, "it did not connect at all");
        Ok(())
    }
}

/// That a call was refused with this code.
pub fn expect_refused<T: std::fmt::Debug>(done: Result<T>, code: Code) -> Result<()> {
    let error = match done {
        Ok(done) => anyhow::bail!("{code:?} was expected, and it was done: {done:?}"),
        Err(error) => error,
    };
    let found = error.downcast_ref::<Refusal>().map(|refusal| refusal.code);
    ensure!(found == Some(code), "{code:?} was expected: {error:#}");
    Ok(())
}

/// What a snapshot shows, mounted where a test looks at it. Unmounted when dropped.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Makes the mount that the snapshotter says, in a directory that is made for it.
    pub fn new(mounts: &[Mount], at: &Path) -> Result<Self> {
        let [Mount { r#type, source, options, .. }] = mounts else {
            anyhow::bail!("not one mount: {mounts:?}");
        };
        fs_err::create_dir_all(at)?;
        let run = match r#type.as_str() {
            "bind" => {
                let bind = "mount --rbind \"$1\" \"$2\" && if [ \"$3\" = ro ]; then mount -o remount,bind,ro \"$2\"; fi";
                Run::shell(bind, &[Path::new(source), at, Path::new(&options[0])])
            }
            // as containerd does it: the kernel takes a page of options at most
            _ => {
                let (directory, options) = shorter(options)?;
                let mount = "cd \"$1\" && mount -i -t overlay overlay -o \"$2\" \"$3\"";
                Run::shell(mount, &[&directory, Path::new(&options), at])
            }
        };
        run.check().with_context(|| format!("{mounts:?}"))?;
        Ok(Self(at.to_owned()))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(&self.0, nix::mount::MntFlags::empty()) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// A directory, and the options of an overlay with the lower directories relative to it.
fn shorter(options: &[String]) -> Result<(PathBuf, String)> {
    let lower = options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let lower: Vec<_> = lower.context("an overlay of nothing")?.split(':').map(Path::new).collect();
    let mut common = lower.first().and_then(|path| path.parent()).context("no directory")?;
    while !lower.iter().all(|path| path.starts_with(common)) {
        common = common.parent().context("nothing in common")?;
    }
    let lower: Vec<_> = lower
        .iter()
        .map(|path| Ok(path.strip_prefix(common)?.to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    let others = options.iter().filter(|option| !option.starts_with("lowerdir="));
    let mut others: Vec<_> = others.cloned().collect();
    others.push(format!("lowerdir={}", lower.join(":")));
    Ok((common.to_owned(), others.join(",")))
}
