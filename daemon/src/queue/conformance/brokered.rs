//! The brokered queue: a supervisor's shard, with holders in the place of its workers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::line::{self, Line, Lines};
use super::{BLOCK_LEN, BLOCKS, Block, Holder, System, holder};
use crate::fanotify::QueueKind;
use crate::fanotify::testing::{LIMIT, directory, sparse};
use crate::ids::{PoolId, SegmentId, ShardId};
use crate::object::HashKind;
use crate::queue::wire::{GitOrigin, GitTransport, Limits, OriginSpec};
use crate::supervisor::KeptShard;
use crate::supervisor::origins::Origins;
use crate::supervisor::shard::{Command, Hooks, Rules, Shard, ShardHandle};
use crate::supervisor::store::{Store, WorkerUser};
use crate::sys::limits;
use crate::sys::spawn::{Child, STAND_IN, Spawn};

pub(super) const ROLE: &str = "supervisor";

/// Where the supervisor has its state, and where the holders report.
pub(super) const DIRECTORY: &str = "HYDRANT_CONFORMANCE_DIRECTORY";
const HOLDERS: &str = "holders";

pub(super) const POOL: PoolId = PoolId(1);
const SEGMENT: SegmentId = SegmentId(1);

/// A supervisor, which is the control side: a process of its own, because all its fds are its shard's, and
/// because it is killed.
#[derive(Debug)]
pub(super) struct BrokeredSystem {
    supervisor: Option<(Child, Line)>,
    holders: Lines,
    segment: PathBuf,
    directory: TempDir,
}

impl System for BrokeredSystem {
    const FORGETS_THE_DEAD: bool = false;
    const NEW_IDS: bool = false;

    fn start() -> Self {
        let directory = directory();
        let segment = prepare(directory.path(), BLOCKS);
        let holders = Lines::new(directory.path(), HOLDERS);
        let lines = Lines::new(directory.path(), "supervisor");
        let program = line::program(ROLE, lines.path()).variable(DIRECTORY, directory.path());
        let (child, mut line) = lines.start(program);
        let () = line.recv().expect("the segment is guarded");
        Self { supervisor: Some((child, line)), holders, segment, directory }
    }

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn segment(&self) -> &Path {
        &self.segment
    }

    /// The shard starts a worker by itself, once the one before is gone.
    fn open(&mut self) -> Holder {
        Holder::new(self.holders.accept(), None)
    }

    fn expect_busy(&mut self) {
        let second = self.holders.accept_within(Duration::from_millis(200));
        assert!(second.is_none(), "two workers at once");
    }

    fn close_control(&mut self) {
        let (mut child, _line) = self.supervisor.take().unwrap();
        child.kill().unwrap();
        child.wait_blocking().unwrap();
    }
}

/// The program.
pub(super) fn supervise() {
    let mut line = Line::connect();
    limits::raise_open_files().unwrap();
    let _shard = guard(None, Arc::default(), worker);
    line.send(&());
    let _: Option<()> = line.recv();
}

/// What a supervisor's life is about, for the one segment. `worker`: who is in the worker's place.
pub(super) fn guard(
    kept: Option<KeptShard>,
    origins: Arc<Origins>,
    worker: fn() -> Spawn,
) -> (Runtime, ShardHandle) {
    STAND_IN.set(worker).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let shard = runtime.block_on(async {
        let user = WorkerUser { uid: 0, gid: 0, without_landlock: true };
        let store = Arc::new(Store::open(&state(), user).unwrap());
        let hooks = Hooks {
            on_complete: Arc::new(|_, _| ()),
            on_refuted: Arc::new(|_, _| ()),
            on_given_up: Arc::new(|given_up| panic!("{given_up:?}")),
            on_settled: Arc::new(|_, _| ()),
            on_touched: Arc::new(|_, _| ()),
        };
        let kind = QueueKind::Stock;
        let rules = Rules { patience: LIMIT, cgroups: Arc::default(), spare: false };
        let shard = Shard::start(ShardId(0), kind, kept, store, origins, rules, hooks).unwrap();
        let transport = GitTransport::Pipe;
        let origin = OriginSpec::Git(GitOrigin { hash: HashKind::Sha1, transport });
        shard.send(Command::Pool { pool: POOL, origin, limits: Limits::default() });
        let (reply, attached) = oneshot::channel();
        shard.send(Command::Attach { pool: POOL, segment: SEGMENT, reply });
        // the first worker takes it when it likes to
        tokio::spawn(async { attached.await.unwrap().expect("the segment is served") });
        shard.send(Command::Serve);
        let (reply, done) = oneshot::channel();
        shard.send(Command::Snapshot { reply });
        done.await.unwrap();
        shard
    });
    (runtime, shard)
}

/// Where a supervisor has its state.
pub(super) fn state() -> PathBuf {
    PathBuf::from(std::env::var_os(DIRECTORY).unwrap())
}

/// Makes that state, with a segment of `blocks` blocks. Gives the segment's path.
pub(super) fn prepare(directory: &Path, blocks: Block) -> PathBuf {
    let pool = directory.join(format!("pools/{POOL}"));
    std::fs::create_dir_all(&pool).unwrap();
    sparse(&pool, &format!("{SEGMENT}.extents"), 0);
    sparse(&pool, &format!("{SEGMENT}.data"), blocks * BLOCK_LEN)
}

/// Lives on after the supervisor, to see the end of the queue. It ends with its line.
fn worker() -> Spawn {
    line::program(holder::BROKERED, &state().join(HOLDERS)).outlives_us()
}
