//! What the guest is told, what it reports, and what must be there after a cut.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Fs;

/// What the guest is to do. All paths are as in the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    pub fs: Fs,
    pub disk: PathBuf,
    pub seed: u64,
    /// With the repositories and their truth.
    pub origins: PathBuf,
    /// [`Report`]s go here, a line of JSON each.
    pub report: PathBuf,
    pub trees: Vec<Tree>,
    pub work: Work,
}

/// What a guest does once the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Looks at everything; turns itself off.
    Check,
    /// Looks at everything; works until the power is cut.
    CheckAndLoad,
    /// Makes a tree, reads some of it; turns itself off.
    Clone,
    /// Asks git for the state of the trees, which must fetch nothing. Then as [`Check`](Self::Check).
    Status,
}

/// Whether a tree is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum There {
    /// `hydrant clone` has returned.
    Surely,
    /// The clone or the removal was under way. If it is there, it is whole.
    Perhaps,
    /// `hydrant rm` has returned.
    No,
}

/// A tree, and what its user has written and synced.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tree {
    /// The name of its directory.
    pub name: String,
    pub origin: usize,
    pub revision: usize,
    pub there: There,
    /// The clone has returned.
    pub whole: bool,
    pub files: Vec<UserFile>,
}

/// A file that a user has written whole and synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserFile {
    /// In the tree.
    pub path: PathBuf,
    /// For [`Random`](crate::repository::Random).
    pub seed: u64,
    pub len: usize,
}

/// What the guest says, each before or after it is done, and on the other machine's disk before the guest goes on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Report {
    /// Something is wrong.
    Finding(Finding),
    /// The guest is out of order.
    Failed(Finding),
    /// After the check: what was looked at, and which trees there are.
    Checked {
        figures: Figures,
        present: Vec<String>,
    },
    Cloning {
        name: String,
        origin: usize,
        revision: usize,
    },
    Cloned {
        name: String,
    },
    Removing {
        name: String,
    },
    Removed {
        name: String,
    },
    Wrote {
        name: String,
        file: UserFile,
    },
    /// Files read right under load since it was last said.
    Read(u64),
    /// Segments that are complete by now.
    Complete(u64),
}

/// What a guest has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// For people.
    pub text: String,
    /// Somebody saw other bytes than there should be. No state of a disk is a reason for that.
    pub bytes: bool,
    /// The disk was still on when that had been seen.
    pub disk: bool,
}

impl Finding {
    /// Whether it is a fault of ours: not an error that comes of the missing disk.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.bytes || self.disk
    }
}

/// What was looked at in one check, or in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    pub trees: u64,
    pub files: u64,
    pub bytes: u64,
    /// Of users.
    pub user_files: u64,
    /// Segments that were taken for complete after the cut.
    pub complete_segments: u64,
    /// Bytes of content that were still there, and the size of all segments.
    pub present_bytes: u64,
    pub segment_bytes: u64,
}

impl std::ops::AddAssign for Figures {
    fn add_assign(&mut self, other: Self) {
        self.trees += other.trees;
        self.files += other.files;
        self.bytes += other.bytes;
        self.user_files += other.user_files;
        self.complete_segments += other.complete_segments;
        self.present_bytes += other.present_bytes;
        self.segment_bytes += other.segment_bytes;
    }
}

/// All trees, by what the reports say.
#[derive(Debug, Default)]
pub struct Book {
    pub trees: Vec<Tree>,
}

impl Book {
    /// Takes a report in.
    pub fn note(&mut self, report: &Report) {
        match report {
            Report::Cloning { name, origin, revision } => self.trees.push(Tree {
                name: name.clone(),
                origin: *origin,
                revision: *revision,
                there: There::Perhaps,
                whole: false,
                files: Vec::new(),
            }),
            Report::Cloned { name } => {
                self.set(name, There::Surely);
                self.find(name).into_iter().for_each(|tree| tree.whole = true);
            }
            Report::Removing { name } => self.set(name, There::Perhaps),
            Report::Removed { name } => self.set(name, There::No),
            Report::Wrote { name, file } => {
                self.find(name).into_iter().for_each(|tree| tree.files.push(file.clone()));
            }
            Report::Checked { present, .. } => {
                self.trees.retain(|tree| present.contains(&tree.name));
                self.trees.iter_mut().for_each(|tree| tree.there = There::Surely);
            }
            Report::Finding(_) | Report::Failed(_) | Report::Read(_) | Report::Complete(_) => {}
        }
    }

    fn find(&mut self, name: &str) -> Option<&mut Tree> {
        self.trees.iter_mut().find(|tree| tree.name == name)
    }

    fn set(&mut self, name: &str, there: There) {
        self.find(name).into_iter().for_each(|tree| tree.there = there);
    }
}
