//! Watching files for changes: one inotify instance, one watch a file, however many ask for it.
//!
//! The kernel's word is only that something has happened; what it was, the file itself tells. So nothing is
//! queued here: between two looks any number of changes are one, and when the kernel's queue overflows
//! everybody looks. A file that is gone is told once and for all.

pub mod cgroup;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::error;

use crate::sys::readable::Readable;

/// Adds to the mask of a watch that is there already. Not among nix's.
const MASK_ADD: AddWatchFlags = AddWatchFlags::from_bits_retain(libc::IN_MASK_ADD);

/// What has become of a file since it was last asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Written to; a directory: a name in it is gone.
    Modified,
    /// It is no more, or cannot be watched any more.
    Gone,
}

/// The inotify instance. Watches live on when this is dropped, and tell nothing any more.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    reader: AbortHandle,
}

/// A watch on a file. The kernel's watch goes with the last one that is dropped.
#[derive(Debug)]
pub struct Watched {
    shared: Arc<Shared>,
    descriptor: WatchDescriptor,
    state: watch::Receiver<State>,
}

/// The lock is never held while waiting. What the kernel says of a watch can't be looked up before it is in the table:
/// a watch is made, and its events are handed out, under the lock.
#[derive(Debug)]
struct Shared {
    inotify: Inotify,
    table: Mutex<HashMap<WatchDescriptor, Entry>>,
}

#[derive(Debug)]
struct Entry {
    state: watch::Sender<State>,
    users: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct State {
    gone: bool,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out what there is.
    fn dispatch(&self) -> io::Result<()> {
        let mut table = self.table();
        for event in self.inotify.read_events()? {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                table.values().for_each(|entry| entry.state.send_modify(|_| {}));
                continue;
            }
            let ends = AddWatchFlags::IN_DELETE_SELF
                | AddWatchFlags::IN_IGNORED
                | AddWatchFlags::IN_UNMOUNT;
            if event.mask.intersects(ends) {
                // the kernel removes the watch itself, and gives its number to no other for long
                if let Some(entry) = table.remove(&event.wd) {
                    entry.state.send_modify(|state| state.gone = true);
                    if !event.mask.contains(AddWatchFlags::IN_IGNORED) {
                        // a name of it may be left
                        self.inotify.rm_watch(event.wd).ok();
                    }
                }
            } else if let Some(entry) = table.get(&event.wd) {
                entry.state.send_modify(|_| {});
            }
        }
        Ok(())
    }
}

impl Watcher {
    /// Starts a task in the present runtime that reads what the kernel says.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let shared = Arc::new(Shared { inotify, table: Mutex::default() });
        let for_reader = Arc::clone(&shared);
        let reader = tokio::spawn(async move {
            if let Err(error) = read(&for_reader).await {
                error!(%error, "can't read what has become of watched files");
                let mut table = for_reader.table();
                table.drain().for_each(|(_, entry)| entry.state.send_modify(|s| s.gone = true));
            }
        });
        Ok(Self { shared, reader: reader.abort_handle() })
    }

    /// Watches a file for being written to.
    pub fn file(&self, path: &Path) -> io::Result<Watched> {
        self.add(path, AddWatchFlags::IN_MODIFY)
    }

    /// Watches a directory for names in it that go.
    pub fn directory(&self, path: &Path) -> io::Result<Watched> {
        let gone = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM;
        self.add(path, gone | AddWatchFlags::IN_ONLYDIR)
    }

    fn add(&self, path: &Path, mask: AddWatchFlags) -> io::Result<Watched> {
        // the file may have a watch: all that was asked for counts
        let mask = mask | AddWatchFlags::IN_DELETE_SELF | MASK_ADD;
        let mut table = self.shared.table();
        let descriptor = self.shared.inotify.add_watch(path, mask)?;
        let entry = table
            .entry(descriptor)
            .or_insert_with(|| Entry { state: watch::Sender::new(State::default()), users: 0 });
        entry.users += 1;
        let state = entry.state.subscribe();
        Ok(Watched { shared: Arc::clone(&self.shared), descriptor, state })
    }

    /// How many files the kernel watches for us.
    #[must_use]
    pub fn watches(&self) -> usize {
        self.shared.table().len()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Watched {
    /// Waits for the next change since the last call, or since the watch was made. `Gone` for ever once it was.
    /// Can be cancelled and called again.
    pub async fn next(&mut self) -> Change {
        if !self.state.borrow().gone {
            // an error: the sender went with the table's entry, and that is when it is gone
            self.state.changed().await.ok();
        }
        if self.state.borrow_and_update().gone { Change::Gone } else { Change::Modified }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut table = self.shared.table();
        let Some(entry) = table.get_mut(&self.descriptor) else { return };
        if !self.state.same_channel(&entry.state.subscribe()) {
            return;
        }
        entry.users -= 1;
        if entry.users == 0 {
            table.remove(&self.descriptor);
            self.shared.inotify.rm_watch(self.descriptor).ok();
        }
    }
}

async fn read(shared: &Shared) -> io::Result<()> {
    let ready = Readable::new(shared.inotify.as_fd().try_clone_to_owned()?)?;
    loop {
        match ready.read(|| shared.dispatch()).await {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => result?,
        }
    }
}
