//! What the Hydrant daemon and its clients say to each other: HTTP with JSON bodies over the Unix
//! socket `RUNDIR/hydrantd.sock`.
//!
//! | request | body | response |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `GET /v1/mounts` | | list of [`Mount`] |
//! | `POST /v1/clone` | [`CloneRequest`] | lines of [`Progress`] |
//! | `POST /v1/mount` | [`PathRequest`] | [`Mount`] |
//! | `POST /v1/umount` | [`UmountRequest`] | list of [`Mount`] that were unmounted |
//! | `POST /v1/rm` | [`RmRequest`] | lines of [`Progress`] |
//! | `POST /v1/prefetch` | [`PrefetchRequest`] | lines of [`Progress`] |
//! | `GET /v1/images` | | list of [`Image`] |
//! | `POST /v1/image/pull` | [`PullRequest`] | lines of [`Progress`] |
//! | `POST /v1/image/index` | [`IndexRequest`] | lines of [`Progress`] |
//! | `POST /v1/image/trace` | [`TraceRequest`] | list of [`TracedLayer`] |
//! | `POST /v1/image/mount` | [`MountImageRequest`] | lines of [`Progress`] |
//! | `POST /v1/image/evict` | [`ImageRequest`] | [`Evicted`] |
//! | `POST /v1/image/rm` | [`ImageRequest`] | `{}` |
//! | `GET /v1/queue` | | list of [`QueueEvent`] |
//! | `GET /v1/queue/{id}` | | [`QueueEvent`] |
//! | `POST /v1/queue/{id}/retry` | | `{}` |
//! | `POST /v1/queue/{id}/deny` | | `{}` |
//! | `GET /v1/queue/failed` | | list of [`FailedEvent`] |
//! | `POST /v1/queue/failed/clear` | | [`Cleared`] |
//! | `GET /v1/workers` | | list of [`Worker`] |
//! | `POST /v1/workers/restart` | [`RestartRequest`] | list of [`Worker`]: the new ones |
//! | `POST /v1/reload` | | `{}` |
//! | `POST /v1/stop` | | `{}` |
//!
//! A request that fails is answered with a status of 400 or more and an [`ErrorBody`]. Sizes are in
//! bytes, times in milliseconds, in fields whose names end in `_bytes` and `_ms`. Bytes that are not
//! UTF-8 (paths are bytes) appear as `\xNN`, in requests as well: [`path_to_text`].

pub mod doctor;
mod environment;
mod paths;
mod text;

use serde::{Deserialize, Serialize};

pub use environment::is_wanted_variable;
pub use paths::{
    CONFIG_FILE, ConfiguredDirectories, Directories, RUN_DIR_ENV, STATE_DIR_ENV, cgroup_name,
};
pub use text::{path_from_text, path_to_text};

/// The header of every answer that says which version the daemon has. Fields that are not known are to be
/// overlooked, on both sides.
pub const VERSION_HEADER: &str = "hydrant-version";

/// A header of requests that are only for the daemon of this state directory; others refuse them. Absolute,
/// its bytes as they are.
pub const STATE_DIR_HEADER: &str = "hydrant-state-dir";

/// The exit code of a daemon that finds another one with its state or run directory (sysexits.h's
/// `EX_TEMPFAIL`). Whoever started it can use the other one.
pub const EXIT_ALREADY_RUNNING: u8 = 75;

/// An error as the daemon reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub code: ErrorCode,
    /// What failed, and the chain of reasons.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The kind of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense or names something that can't be.
    Invalid,
    NotFound,
    /// Somebody else's mount, or a directory of somebody else.
    Forbidden,
    /// In use, already there, or changed by the user.
    Conflict,
    /// The origin, or git on our side of it, failed.
    Origin,
    /// The machine can't do it: kernel, file system, disk full.
    Unsupported,
    Internal,
}

/// How much history comes with a clone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum History {
    /// Only the newest commits.
    None,
    /// All of it, fetched once the tree is there.
    #[default]
    Background,
    /// All of it, before the tree is there.
    Full,
}

/// `POST /v1/clone`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneRequest {
    /// As git takes it; a local path is absolute.
    pub url: String,
    /// Absolute; does not exist or is empty.
    pub directory: String,
    /// A branch, tag or commit; the origin's default branch otherwise.
    #[serde(default)]
    pub revision: Option<String>,
    #[serde(default)]
    pub history: History,
    #[serde(default)]
    pub read_only: bool,
    /// The caller's environment as far as git and ssh look at it.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// For whom root asks (`sudo`): the owner of the files. Others ask for themselves.
    #[serde(default)]
    pub owner: Option<Owner>,
}

/// A user and group by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// `POST /v1/mount`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathRequest {
    pub directory: String,
}

/// `POST /v1/umount`: one directory, or all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UmountRequest {
    #[serde(default)]
    pub directory: Option<String>,
    #[serde(default)]
    pub all: bool,
}

/// `POST /v1/rm`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RmRequest {
    pub directory: String,
    /// Throw away what the user changed.
    #[serde(default)]
    pub discard: bool,
    /// Leave an ordinary repository in its place: everything fetched, nothing mounted.
    #[serde(default)]
    pub keep: bool,
}

/// `POST /v1/prefetch`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefetchRequest {
    /// A mount, or a file or directory in one. Everything below it is fetched.
    pub path: String,
}

/// `POST /v1/image/pull`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullRequest {
    /// `[registry/]repository[:tag][@digest]`
    pub reference: String,
    /// The caller's environment as far as it says where credentials are.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// For whom root asks (`sudo`): whose credentials are used.
    #[serde(default)]
    pub owner: Option<Owner>,
}

/// `POST /v1/image/index`: makes indexes of an image's layers that are here.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexRequest {
    pub reference: String,
    /// Put them into the image's repository, signed.
    #[serde(default)]
    pub push: bool,
    /// Not indexes, but what is to be fetched first.
    #[serde(default)]
    pub traces: bool,
    /// A private key: Ed25519, PKCS#8 in PEM.
    #[serde(default)]
    pub key: Option<String>,
    /// As in [`PullRequest`].
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    #[serde(default)]
    pub owner: Option<Owner>,
}

impl std::fmt::Debug for IndexRequest {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { reference, push, .. } = self;
        f.debug_struct("IndexRequest")
            .field("reference", reference)
            .field("push", push)
            .finish_non_exhaustive()
    }
}

/// `POST /v1/image/trace`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    pub reference: String,
    /// Forget what is there, and record the next mount. Of what is here then, nothing is recorded: it is to be evicted before.
    #[serde(default)]
    pub record: bool,
}

/// What is fetched first of a layer when it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedLayer {
    /// The digest of its archive.
    pub layer: String,
    pub bytes: u64,
    /// The first file of each of these pieces, which are 256 KiB long, in the order in which they were read.
    pub files: Vec<String>,
}

/// A layer that is being filled in the background, or was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerFill {
    /// The digest of its archive.
    pub layer: String,
    /// `replaying` what was read before, `filling` in the rest, `waiting` for its turn or for the origin; `done`: nothing comes by
    /// itself any more.
    pub state: String,
    /// Why it waits.
    #[serde(default)]
    pub trouble: Option<String>,
    pub present_bytes: u64,
    pub segment_bytes: u64,
    /// What is fetched first, and how much of it is there.
    pub traced_bytes: u64,
    pub replayed_bytes: u64,
    /// The names of images that have it.
    #[serde(default)]
    pub images: Vec<String>,
}

/// `POST /v1/image/mount`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountImageRequest {
    /// As in [`PullRequest`]; pulled if it is not here.
    pub reference: String,
    /// Absolute; does not exist or is empty.
    pub directory: String,
    #[serde(default)]
    pub read_only: bool,
    /// As in [`PullRequest`].
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    #[serde(default)]
    pub owner: Option<Owner>,
}

/// `POST /v1/image/rm` and `POST /v1/image/evict`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    pub reference: String,
}

/// What an eviction has freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    pub bytes: u64,
    /// Layers that stay, as a mount has them.
    pub in_use: u64,
}

/// A container image, of `GET /v1/images`. Digests are `sha256:` and 64 digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Complete, such as `docker.io/library/busybox:latest`.
    pub reference: String,
    /// Of what the reference leads to, which may be an index of several platforms.
    pub digest: String,
    /// Of this machine's manifest.
    pub manifest: String,
    pub config: String,
    pub layers: u64,
    /// Names in all layers.
    pub files: u64,
    /// What the registry has of it, compressed.
    pub bytes: u64,
    /// Bytes of the layers' segments that are there, and their size.
    pub present_bytes: u64,
    pub segment_bytes: u64,
    /// Of these, what is fetched ahead at a mount, as its readers wanted it before.
    #[serde(default)]
    pub traced_bytes: u64,
    /// Layers that were pulled by an index, and of which nobody has seen yet that they are what this says.
    #[serde(default)]
    pub unproved: u64,
    /// Layers that are not what the image says that they are, and why, for people to read.
    #[serde(default)]
    pub refuted: Vec<String>,
    /// Since the epoch.
    pub pulled_ms: u64,
    /// Where it is mounted.
    pub mounts: Vec<String>,
}

/// One line of the answer to a request that takes its time. The last line is `Done` or `Failed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Progress {
    /// A step has begun: `metadata`, `sizes`, `layers`, `tree`, `mount`, `fetch`, `copy`.
    Step {
        step: String,
    },
    /// Within the step; `total` where it is known.
    Count {
        done: u64,
        total: Option<u64>,
        unit: String,
    },
    /// Something that the user should know, such as a server that can't tell sizes.
    Note {
        message: String,
    },
    Done {
        summary: Summary,
    },
    Failed {
        error: ErrorBody,
    },
}

/// What there is when a request is done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub files: u64,
    pub tree_bytes: u64,
    /// Content fetched for this tree's pool so far.
    pub fetched_bytes: u64,
    pub elapsed_ms: u64,
    /// What else is to be said, such as the place of a repository that was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// A mount, of `GET /v1/mounts` and [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub directory: String,
    pub url: String,
    pub revision: String,
    pub commit: String,
    pub owner: Owner,
    pub read_only: bool,
    pub mounted: bool,
    pub files: u64,
    pub tree_bytes: u64,
    /// Bytes of the pool's segments that are there, and their size.
    pub present_bytes: u64,
    pub segment_bytes: u64,
    pub segments: u64,
    /// Segments that are complete and raise no events any more.
    pub complete_segments: u64,
    pub pool: u64,
    pub shard: u16,
    /// `fetching` while the history comes in the background, `complete`, `shallow`, or why not.
    pub history: String,
    /// The origin's latest trouble.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// `GET /v1/status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Another number for every supervisor, whatever its pid.
    #[serde(default)]
    pub instance: u64,
    pub pid: i32,
    pub state_dir: String,
    pub run_dir: String,
    /// `brokered` or `kernel`.
    pub queue: String,
    pub mounts: Vec<Mount>,
    pub shards: Vec<Shard>,
    pub counters: Counters,
    /// Layers of container images of which something comes by itself.
    #[serde(default)]
    pub layers: Vec<LayerFill>,
}

/// A fanotify group, its queue and its worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    pub shard: u16,
    pub worker_pid: Option<i32>,
    /// Workers that ended without being asked to.
    pub worker_deaths: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_death: Option<WorkerDeath>,
    pub waiting: u64,
    pub in_flight: u64,
    /// How long the oldest event has waited.
    pub longest_wait_ms: u64,
}

/// How a worker ended without being asked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerDeath {
    pub pid: i32,
    pub ago_ms: u64,
    /// Such as `signal: 9 (SIGKILL)` or `killed by the kernel: out of memory (limit 512 MiB)`.
    pub end: String,
}

/// A shard's worker, of `GET /v1/workers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    pub shard: u16,
    pub pid: Option<i32>,
    /// `running`; `starting`; `stopping`, to be replaced; `none` for a moment between two.
    pub state: String,
    /// The process that is ready to be the next one.
    #[serde(default)]
    pub spare_pid: Option<i32>,
    /// Since it was started, or was the spare one.
    pub age_ms: Option<u64>,
    /// Of its cgroup, with the page cache of what it has read and written; of the process, where that is not known.
    pub memory_bytes: Option<u64>,
    /// The limit.
    pub memory_max_bytes: Option<u64>,
    /// Its cgroup's directory.
    pub cgroup: Option<String>,
    /// Workers of this shard that ended without being asked to.
    pub deaths: u64,
    pub last_death: Option<WorkerDeath>,
}

/// `POST /v1/workers/restart`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartRequest {
    /// All of them, one after the other, otherwise.
    #[serde(default)]
    pub shard: Option<u16>,
}

/// Sums since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub events: u64,
    /// Events whose range was there already.
    pub answered_present: u64,
    pub answered_fetched: u64,
    pub denied: u64,
    /// Events that were given to another worker because theirs had died.
    pub requeued: u64,
    pub waiting: u64,
    pub longest_wait_ms: u64,
    pub requests: u64,
    pub retries: u64,
    pub objects: u64,
    pub read_ahead_objects: u64,
    pub content_bytes: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub rejected_objects: u64,
}

/// A reader that waits, of `GET /v1/queue`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueEvent {
    pub id: u64,
    /// `waiting` for a worker, or `in_flight`.
    pub state: String,
    pub age_ms: u64,
    /// Where a tree with the file is mounted, and the path inside the tree.
    pub directory: Option<String>,
    pub path: Option<String>,
    /// The digest of the archive of the layer that the file is in, and the names of the images that have it.
    #[serde(default)]
    pub layer: Option<String>,
    #[serde(default)]
    pub images: Vec<String>,
    pub segment: u64,
    pub offset: u64,
    pub count: u64,
    pub process: Process,
    pub shard: u16,
    pub worker_pid: Option<i32>,
    /// How often it was given to a worker.
    pub attempts: u32,
    /// The origin's URL.
    pub origin: Option<String>,
    /// What keeps it, as the worker said last.
    pub reason: Option<String>,
}

/// An event that was given up because its workers died of it, of `GET /v1/queue/failed`. Its range is
/// in quarantine: readers get an error at once until a pause is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedEvent {
    /// As it was in [`QueueEvent`].
    pub id: u64,
    /// When it was given up, since the epoch.
    pub time_ms: u64,
    /// `quarantined`; `on_trial` (the pause is over, and the next reader's worker is watched); `settled` (it was
    /// read since, or given up anew).
    pub state: String,
    /// How long the quarantine still lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_ms: Option<u64>,
    /// How often in a row this range was given up; the pause doubles each time.
    pub times: u32,
    pub directory: Option<String>,
    pub path: Option<String>,
    pub segment: u64,
    /// The bytes of the segment that are in quarantine: all of the objects that were wanted.
    pub offset: u64,
    pub count: u64,
    /// Who waited.
    pub process: Process,
    pub shard: u16,
    pub attempts: u32,
    pub origin: Option<String>,
    /// How the workers ended that had it.
    pub deaths: Vec<String>,
}

/// `POST /v1/queue/failed/clear`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cleared {
    /// Records that were removed.
    pub cleared: u64,
}

/// The process behind an event, as far as `/proc` tells without waiting for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    pub comm: Option<String>,
    pub uid: Option<u32>,
    pub cgroup: Option<String>,
    /// The id of the container that it is in, as far as the cgroup tells.
    #[serde(default)]
    pub container: Option<String>,
}
