//! What supervisor and worker say to each other.
//!
//! Two `SOCK_SEQPACKET` sockets, one message a packet, postcard-encoded. On the *control* socket
//! go segments (with their fds), credentials and reports; on the *queue* socket events and answers.
//! With the kernel's queue these two go by an fd of the kernel's, and on the socket what is to be
//! said about them. The supervisor takes
//! the worker's word for nothing that could hurt others: it checks every number it gets.

pub mod image;

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::fanotify::{DenyErrno, Verdict};
use crate::ids::{EventId, PoolId, SegmentId};
use crate::importer::attributes;
use crate::object::{HashKind, ObjectId};
use crate::queue::quarantine::Quarantined;
use crate::range::ByteRange;
use crate::source::git::Capabilities;

/// The version of the protocols. Both ends are the same program, the very file that the supervisor runs, and the one does not
/// outlive the other: no other version can come along. Should it do so, it is refused: the supervisor
/// replaces such a worker, and the next one gets its events.
pub const VERSION: u32 = 3;

/// Why `who` can't be talked to.
#[must_use]
pub fn other_version(who: &str, version: u32) -> String {
    format!(
        "the {who} speaks version {version} of the protocol, and this process version {VERSION}"
    )
}

/// The longest message in bytes: room for a bundle of certificates. The sockets' buffers are larger
/// ([`crate::sys::seqpacket`]).
pub const MAX_MESSAGE: usize = 640 << 10;

/// From the supervisor, on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first message.
    Hello { version: u32 },
    /// A pool whose segments follow. `server`: what a worker before this one [has found out](FromWorker::Met).
    Pool { pool: PoolId, origin: OriginSpec, limits: Limits, server: Option<Box<Capabilities>> },
    /// A segment, with two fds: the data, open for reading and writing in a way that raises no
    /// events, and its extent index; and for a layer a third, its access index. Answered with [`FromWorker::Attached`].
    Segment { pool: PoolId, segment: SegmentId },
    /// The pool is not served any more: finish with it and close its fds.
    Detach { pool: PoolId },
    /// All that there was at the start has been sent: take events from now on. With two fds, the
    /// kernel's queue and the in-flight table: from there, and the worker itself denies what is in
    /// quarantine.
    Start { quarantine: Vec<Quarantined> },
    /// The answer to [`FromWorker::NeedTransport`]. With two fds: a stream socket to a
    /// `git upload-pack` in protocol version 2 that has not said anything yet, and one from which can
    /// be read, once it has ended, why it has failed.
    Transport { request: u64, result: Result<(), String> },
    /// The answer to [`FromWorker::NeedCredential`].
    Credential { request: u64, result: Result<Option<Credential>, String> },
    /// Fetch these records of this segment, or of a layer's these chunks, in this order; answered with
    /// [`FromWorker::PrefetchDone`].
    Prefetch { request: u64, segment: SegmentId, runs: Vec<Run> },
    /// An image is being pulled from there: its layers will soon be asked for.
    Preconnect { repository: Box<image::Repository>, limits: Limits },
    /// Answer or give up what is in hand, then exit.
    Stop,
}

/// Consecutive records of a segment, or chunks of a layer's segment ([`CHUNK`](crate::source::oci::fetch::CHUNK) bytes each).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub first: u32,
    pub count: u32,
}

impl Run {
    #[must_use]
    pub fn one(record: u32) -> Self {
        Self { first: record, count: 1 }
    }

    /// All of them; what would be beyond the last number there is is left out.
    #[must_use]
    pub fn range(self) -> Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }

    /// Takes the record in if it is the next.
    pub fn take(&mut self, record: u32) -> bool {
        let is_next = self.first.checked_add(self.count) == Some(record);
        self.count += u32::from(is_next);
        is_next
    }
}

/// From the worker, on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromWorker {
    /// The answer to [`ToWorker::Hello`], sent once the worker has given up its privileges.
    Ready {
        version: u32,
    },
    Attached {
        segment: SegmentId,
        result: Result<(), String>,
    },
    /// Start a `git upload-pack` for the pool as its owner and send a socket to it.
    NeedTransport {
        request: u64,
        pool: PoolId,
    },
    /// The origin asks who we are. `rejected`: what it has just refused.
    NeedCredential {
        request: u64,
        pool: PoolId,
        url: String,
        rejected: Option<Credential>,
    },
    /// What the pool's server can do, for the next worker.
    Met {
        pool: PoolId,
        server: Box<Capabilities>,
    },
    /// Every block of the segment is there.
    Complete {
        segment: SegmentId,
    },
    PrefetchDone {
        request: u64,
        result: Result<(), String>,
    },
    /// Readers of a layer wanted these chunks, each for the first time and in this order.
    Touched {
        segment: SegmentId,
        records: Vec<u32>,
    },
    /// What was done since the last report.
    Report {
        pool: PoolId,
        counters: Counters,
    },
    /// Something that an administrator should know of: the origin's latest trouble.
    Trouble {
        pool: PoolId,
        message: String,
    },
}

/// From the supervisor, on the queue's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToQueue {
    /// A reader waits for `range`, which is within the segment, not empty, in whole blocks.
    Event {
        event: EventId,
        segment: SegmentId,
        range: ByteRange,
        /// Who waits. Only to tell readers apart.
        pid: i32,
    },
    /// A reader was just given `range`, which was there: read-ahead pays, or a range is done.
    Touched { segment: SegmentId, range: ByteRange },
    /// Nobody waits any more: the event has been answered by the administrator.
    Cancelled { event: EventId },
    /// Of the kernel's queue: answer the event with this errno.
    Deny { event: EventId, errno: DenyErrno },
    /// Of the kernel's queue: begin the event anew.
    Retry { event: EventId },
    /// Of the kernel's queue: nothing is in quarantine any more.
    ClearQuarantine,
}

/// From the worker, on the queue's socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromQueue {
    /// `reason` says why, where the verdict is a denial. Not with the kernel's queue.
    Answer { event: EventId, verdict: Verdict, reason: Option<String> },
    /// Not an answer: what keeps it, shown by `hydrant queue`.
    Waiting { event: EventId, reason: String },
    /// Of the kernel's queue: the bytes of a range in quarantine have come.
    Settled { segment: SegmentId, range: ByteRange },
}

/// From the supervisor to an importer, on its control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToImporter {
    /// The first message: where the repository is. `web`: where a forge has it for everybody, too, if it
    /// is one that is reached over a pipe.
    Origin {
        version: u32,
        transport: Box<GitTransport>,
        web: Option<Box<HttpTransport>>,
        limits: Limits,
    },
    /// The second, which may take its time: what is to be imported.
    Job {
        commit: ObjectId,
        tree: ObjectId,
        /// The committer's time, in seconds since the epoch.
        time: i64,
        conversion: attributes::Config,
        /// The origin of content gives nothing by its id: what is asked instead is the repository itself, for all
        /// files, and for no sizes.
        whole: bool,
    },
    /// As [`ToWorker::Transport`].
    Transport { request: u64, result: Result<(), String> },
    /// As [`ToWorker::Credential`].
    Credential { request: u64, result: Result<Option<Credential>, String> },
    /// The answer to [`FromImporter::Eager`]: the attributes of the paths can be read now. `false`:
    /// there are none to be read.
    Attributes { listed: bool },
}

/// From an importer, on its control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromImporter {
    NeedTransport {
        request: u64,
    },
    NeedCredential {
        request: u64,
        url: String,
        rejected: Option<Credential>,
    },
    /// The pack of the objects that git itself looks at is there. `attributes`: the tree
    /// has attributes that matter, so the supervisor is to list them once it is in the repository.
    Eager {
        attributes: bool,
    },
    Progress {
        step: String,
        done: u64,
        total: u64,
    },
    /// The manifest is complete.
    Done(Imported),
    /// There will be no manifest.
    Failed {
        message: String,
        hint: Option<String>,
    },
    /// The same: no files can be had of the origin by their ids. Why, and what would help.
    Withheld {
        message: String,
    },
}

/// What an importer found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Names in the tree.
    pub names: u64,
    /// Files that had to be fetched, because the origin doesn't tell their sizes; their bytes.
    pub fetched_files: u64,
    pub fetched_bytes: u64,
    /// How the sizes became known, for the log.
    pub sizes: String,
    /// What the origin's administrator could switch on.
    pub advice: Option<String>,
}

/// Where the content of a pool comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OriginSpec {
    Git(GitOrigin),
    /// One layer of container images.
    Layer(Box<image::LayerOrigin>),
}

/// A git repository that speaks protocol version 2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitOrigin {
    pub hash: HashKind,
    pub transport: GitTransport,
}

/// How a repository is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GitTransport {
    /// Smart HTTP, done by the worker itself. `url` after `insteadOf`, without user and password.
    Http(HttpTransport),
    /// `git upload-pack` at the other end of a pipe that the supervisor opens as the user: local
    /// paths and ssh.
    Pipe,
}

/// What the user's git configuration says of one URL (`git config --get-urlmatch http <url>`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpTransport {
    pub url: String,
    /// `http.proxy`; else what the environment says.
    pub proxy: Option<String>,
    /// `http.extraHeader`, each `Name: value`.
    pub extra_headers: Vec<String>,
    /// What is in `http.sslCAInfo` and `http.sslCAPath`: certificates in PEM that are trusted besides
    /// the system's.
    pub ca_pem: Option<String>,
    /// `http.sslCert` and `http.sslKey`
    pub client_certificate: Option<Box<ClientCertificate>>,
    /// `http.sslVerify` is false.
    pub insecure: bool,
    /// `http.userAgent`
    pub user_agent: Option<String>,
    /// A user and password that stood in the URL.
    pub credential: Option<Credential>,
}

/// A certificate to show to servers, and its key, in PEM. Its [`Debug`] doesn't show the key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientCertificate {
    pub certificate: String,
    pub key: String,
}

impl std::fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientCertificate").finish_non_exhaustive()
    }
}

/// A user name and a password or token. Its [`Debug`] doesn't show the password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential").field("username", &self.username).finish_non_exhaustive()
    }
}

/// The longest that a reader waits for bytes that keep coming.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30 * 60);

/// How long a reader may wait, and how hard an origin may be pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// A reader gets its bytes or an errno after this many seconds without a byte for it
    /// ([`LONGEST_WAIT`] at most).
    pub deadline_secs: u64,
    /// No byte of a response for so long: the request is given up and tried again.
    pub stall_secs: u64,
    /// Requests to one origin at the same time.
    pub connections: u32,
    /// Read objects that nobody has asked for yet.
    pub read_ahead: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { deadline_secs: 120, stall_secs: 30, connections: 6, read_ahead: true }
    }
}

/// What a worker did for a pool. All are sums.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub requests: u64,
    pub retries: u64,
    /// Objects fetched and written, and among them those that nobody waited for.
    pub objects: u64,
    pub read_ahead_objects: u64,
    /// Bytes of content written to segments.
    pub content_bytes: u64,
    /// Bytes received from the origin.
    pub received_bytes: u64,
    /// Bodies of requests, in bytes.
    pub sent_bytes: u64,
    /// Objects that failed verification.
    pub rejected_objects: u64,
}

/// A message as bytes.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_stdvec(message)
}

/// Bytes as a message. Bytes left over are an error.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(bytes)? {
        (message, []) => Ok(message),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}
