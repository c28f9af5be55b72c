//! The kernel's own queue.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::line::{self, Lines};
use super::{BLOCK_LEN, BLOCKS, Holder, System, holder};
use crate::fanotify::testing::{Disk, sparse};
use crate::fanotify::{Error, Group, mark};

/// A restartable group, which is the control side.
#[derive(Debug)]
pub(super) struct KernelSystem {
    group: Option<Group>,
    lines: Lines,
    segment: PathBuf,
    directory: TempDir,
    _disk: Disk,
}

impl System for KernelSystem {
    const FORGETS_THE_DEAD: bool = true;
    const NEW_IDS: bool = true;

    fn start() -> Self {
        let disk = Disk::mount();
        // the guest, which is ours alone, has too little memory for that many by default
        std::fs::write("/proc/sys/kernel/threads-max", "30000").unwrap();
        let directory = TempDir::with_prefix("hydrant-conformance-").unwrap();
        let lines = Lines::new(directory.path(), "holders");
        let segment = sparse(disk.path(), "segment", BLOCKS * BLOCK_LEN);
        let group = Group::restartable().unwrap();
        mark::add(&group, File::open(&segment).unwrap().as_fd()).unwrap();
        Self { group: Some(group), lines, segment, directory, _disk: disk }
    }

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn segment(&self) -> &Path {
        &self.segment
    }

    /// At once: no waiting for the queue to become free.
    fn open(&mut self) -> Holder {
        let queue = self.group.as_ref().unwrap().open_queue().unwrap();
        let program = line::program(holder::KERNEL, self.lines.path()).fd(queue);
        let (child, line) = self.lines.start(program);
        Holder::new(line, Some(child))
    }

    fn expect_busy(&mut self) {
        let second = self.group.as_ref().unwrap().open_queue();
        assert!(matches!(second, Err(Error::QueueBusy { .. })), "{second:?}");
    }

    fn close_control(&mut self) {
        self.group = None;
    }
}
