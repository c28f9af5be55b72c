//! What happens in a control group, and its end.
//!
//! The kernel says `IN_MODIFY` of `memory.events` and `cgroup.events`. Of a group's end it says
//! `IN_DELETE_SELF` and `IN_IGNORED` from Linux 7.3 on (`fs/kernfs/dir.c:kernfs_clear_inode_nlink`), unless somebody has that
//! file open; before, nothing, but that a name in the directory above is gone.

use std::io;
use std::path::{Path, PathBuf};

use super::{Change, Watched, Watcher};
use crate::sys::cgroup::{self, MemoryEvents};

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupEvent {
    /// Processes ran out of memory. Sums since the group was made.
    Memory(MemoryEvents),
    /// Its first process came, or its last one went.
    Populated(bool),
    /// It is no more.
    Gone,
}

/// A watch on a control group.
#[derive(Debug)]
pub struct CgroupWatch {
    directory: PathBuf,
    /// `None` where there is no memory controller.
    memory: Option<Watched>,
    events: Watched,
    above: Watched,
    last_memory: MemoryEvents,
    last_populated: Option<bool>,
}

impl CgroupWatch {
    pub fn new(watcher: &Watcher, directory: &Path) -> io::Result<Self> {
        let memory = match watcher.file(&directory.join("memory.events")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            memory => Some(memory?),
        };
        let events = watcher.file(&directory.join("cgroup.events"))?;
        let above = watcher.directory(directory.parent().unwrap_or(directory))?;
        let directory = directory.to_owned();
        let last_memory = MemoryEvents::default();
        Ok(Self { directory, memory, events, above, last_memory, last_populated: None })
    }

    /// Waits for the next event; the first is how many processes there are. `Gone` for ever once it was.
    pub async fn next(&mut self) -> CgroupEvent {
        loop {
            if let Some(event) = self.look() {
                return event;
            }
            let memory = async {
                match &mut self.memory {
                    Some(memory) => memory.next().await,
                    None => std::future::pending().await,
                }
            };
            let change = tokio::select! {
                change = memory => change,
                change = self.events.next() => change,
                // the directory above may go only after this one
                change = self.above.next() => change,
            };
            if change == Change::Gone {
                return CgroupEvent::Gone;
            }
        }
    }

    /// What is new.
    fn look(&mut self) -> Option<CgroupEvent> {
        if self.memory.is_some() {
            // as long as there is a group, its files can be read
            let Ok(memory) = MemoryEvents::read(&self.directory) else {
                return Some(CgroupEvent::Gone);
            };
            if std::mem::replace(&mut self.last_memory, memory) != memory {
                return Some(CgroupEvent::Memory(memory));
            }
        }
        let Ok(populated) = cgroup::is_populated(&self.directory) else {
            return Some(CgroupEvent::Gone);
        };
        (self.last_populated.replace(populated) != Some(populated))
            .then_some(CgroupEvent::Populated(populated))
    }
}
