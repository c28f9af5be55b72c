//! A supervisor and an origin for tests.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::fanotify::Verdict;
use crate::ids::{EventId, PoolId, SegmentId};
use crate::object::{HashKind, ObjectId};
use crate::queue::wire::image::Repository;
use crate::queue::wire::{
    self, Counters, FromQueue, FromWorker, GitOrigin, GitTransport, Limits, MAX_MESSAGE,
    OriginSpec, ToQueue, ToWorker,
};
use crate::range::{BLOCK, ByteRange};
use crate::segment::extents::ExtentsWriter;
use crate::segment::frame::{FIRST_ENTRY, Frame};
use crate::segment::{SegmentKind, pack};
use crate::source::{Content, Fetch, FetchError, SPOOL_FROM, Sink};
use crate::sys::seqpacket::{Seqpacket, pair};
use crate::worker::control::Upcalls;
use crate::worker::pool::holes;
use crate::worker::queue::Queue;
use crate::worker::run::{RunError, Sources, run};

const TIMEOUT: Duration = Duration::from_secs(20);

impl<F: Fetch, S: Fn(PoolId, OriginSpec, Limits, Upcalls) -> F> Sources for S {
    type Source = F;

    fn source(&self, pool: PoolId, origin: OriginSpec, limits: Limits, upcalls: Upcalls) -> F {
        self(pool, origin, limits, upcalls)
    }

    fn preconnect(&self, _: &Repository, _: Limits) {}
}

/// What a request ends in.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    Retry,
    /// After the first object.
    CutShort,
    Wrong,
    Refused,
    /// This object of the segment, if it is asked for.
    Missing(usize),
    /// No room for what came.
    Full,
    Stall,
    /// A byte every 100 ms, so many times, then what was asked for.
    Slow(u32),
    AskTransport,
    AskCredential,
}

#[derive(Debug, Default)]
pub(super) struct Source {
    contents: HashMap<ObjectId, Vec<u8>>,
    keys: Vec<ObjectId>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    faults: VecDeque<Fault>,
    always: Option<Fault>,
    delay: Duration,
    requests: Vec<Vec<ObjectId>>,
}

impl Source {
    pub(super) fn fault(&self, fault: Fault) {
        self.state.lock().unwrap().faults.push_back(fault);
    }

    pub(super) fn all(&self, fault: Fault) {
        self.state.lock().unwrap().always = Some(fault);
    }

    pub(super) fn delay(&self, delay: Duration) {
        self.state.lock().unwrap().delay = delay;
    }

    pub(super) fn requests(&self) -> Vec<Vec<ObjectId>> {
        self.state.lock().unwrap().requests.clone()
    }

    pub(super) fn fetched_more_than_once(&self) -> usize {
        let mut count: HashMap<ObjectId, usize> = HashMap::new();
        for key in self.requests().iter().flatten() {
            *count.entry(*key).or_default() += 1;
        }
        count.values().filter(|count| **count > 1).count()
    }
}

/// One pool's end of the [`Source`].
struct Connection {
    source: Arc<Source>,
    upcalls: Upcalls,
}

impl Fetch for Connection {
    async fn fetch(&self, keys: &[ObjectId], sink: &mut dyn Sink) -> Result<(), FetchError> {
        let (fault, delay) = {
            let mut state = self.source.state.lock().unwrap();
            state.requests.push(keys.to_vec());
            (state.faults.pop_front().or(state.always), state.delay)
        };
        sink.sent(keys.len() as u64);
        tokio::time::sleep(delay).await;
        let wrong = || FetchError::Wrong { message: "another object".into() };
        let retry = |message: &str| FetchError::Retry { message: message.into(), after: None };
        match fault {
            None => {}
            Some(Fault::Retry) => return Err(retry("connection reset")),
            Some(Fault::CutShort) => {
                self.give(keys[0], sink).map_err(FetchError::Sink)?;
                return Err(retry("cut short"));
            }
            Some(Fault::Wrong) => return Err(wrong()),
            Some(Fault::Refused) => {
                return Err(FetchError::Refused { message: "403 Forbidden".into() });
            }
            Some(Fault::Missing(n)) => {
                let key = self.source.keys[n];
                if keys.contains(&key) {
                    return Err(FetchError::Missing { key, message: "not our ref".into() });
                }
            }
            Some(Fault::Full) => {
                return Err(FetchError::Sink(std::io::Error::from_raw_os_error(libc::ENOSPC)));
            }
            Some(Fault::Stall) => std::future::pending().await,
            Some(Fault::Slow(bytes)) => {
                for _ in 0..bytes {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    sink.received(1);
                }
            }
            Some(Fault::AskTransport) => {
                let error = self.upcalls.need_transport().await.unwrap_err();
                return Err(FetchError::Refused { message: error.0 });
            }
            Some(Fault::AskCredential) => {
                let url = "http://origin/".to_owned();
                assert_eq!(self.upcalls.need_credential(url, None).await, Ok(None));
                return Err(FetchError::Refused { message: "no credential".into() });
            }
        }
        for key in keys {
            self.give(*key, sink).map_err(FetchError::Sink)?;
        }
        Ok(())
    }
}

impl Connection {
    fn give(&self, key: ObjectId, sink: &mut dyn Sink) -> std::io::Result<()> {
        let content = self.source.contents[&key].clone();
        sink.received(content.len() as u64);
        let len = content.len() as u64;
        let content = if len > SPOOL_FROM {
            let file = sink.spool()?;
            file.write_all_at(&content, 0)?;
            Content::Spooled { file, len }
        } else {
            Content::Memory(content)
        };
        sink.object(key, content)
    }
}

/// Segment 1 of pool 1, and an origin that has its objects.
pub(super) struct Setup {
    pub(super) data: File,
    pub(super) index: File,
    pub(super) contents: Vec<Vec<u8>>,
    pub(super) keys: Vec<ObjectId>,
    ranges: Vec<ByteRange>,
    pub(super) source: Arc<Source>,
    spool: tempfile::TempDir,
}

impl Setup {
    pub(super) fn new(sizes: &[u64]) -> Self {
        Self::with_gap(sizes, 0)
    }

    /// With so many bytes between one object and the next.
    pub(super) fn with_gap(sizes: &[u64], gap: u64) -> Self {
        let mut writer = ExtentsWriter::new(SegmentId(1), SegmentKind::Data, HashKind::Sha1);
        let (mut contents, mut keys, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0;
        for (n, size) in sizes.iter().enumerate() {
            let mut content: Vec<u8> = (0..*size).map(|at| (at % 253) as u8 ^ n as u8).collect();
            // Different also where the sizes are small.
            for (byte, mark) in content.iter_mut().zip(n.to_le_bytes()) {
                *byte = mark;
            }
            let key = ObjectId::of_blob(HashKind::Sha1, &content);
            let path = format!("d{:02}/f{:02}.c", n / 30, n % 30);
            writer.push_file(at, *size, key, n as u32 / 30, path.as_bytes());
            ranges.push(ByteRange::new(at, *size));
            at += size.next_multiple_of(BLOCK) + gap;
            contents.push(content);
            keys.push(key);
        }
        let data = tempfile::tempfile().unwrap();
        data.set_len(at).unwrap();
        let mut index = tempfile::tempfile().unwrap();
        writer.write(&mut index, at).unwrap();
        let source = Arc::new(Source {
            contents: keys.iter().copied().zip(contents.iter().cloned()).collect(),
            keys: keys.clone(),
            state: Mutex::default(),
        });
        let spool = tempfile::tempdir_in("/var/tmp").unwrap();
        Self { data, index, contents, keys, ranges, source, spool }
    }

    /// A pack segment that repeats all objects, none of them empty: data, index, what it will be.
    pub(super) fn pack(&self, id: u64) -> (File, File, Vec<u8>) {
        let mut writer = ExtentsWriter::new(SegmentId(id), SegmentKind::Pack, HashKind::Sha1);
        let mut expected = vec![0; FIRST_ENTRY as usize];
        for ((key, content), n) in self.keys.iter().zip(&self.contents).zip(0..) {
            let at = expected.len() as u64;
            let range = ByteRange::new(at, pack::padded_len(content.len() as u64));
            writer.push_entry(range, content.len() as u64, *key, SegmentId(1), n);
            let whole = ByteRange::new(0, range.len());
            let entry = pack::compose(content.len() as u64, range.len(), whole, |at, buffer| {
                buffer.copy_from_slice(&content[at as usize..at as usize + buffer.len()]);
                Ok(())
            });
            expected.extend(entry.unwrap());
        }
        let keys = self.keys.iter().copied();
        let frame = Frame::new(HashKind::Sha1, keys, expected.len() as u64);
        expected.resize(frame.size() as usize, 0);
        frame.copy_to(0, &mut expected);
        let data = tempfile::tempfile().unwrap();
        data.set_len(frame.size()).unwrap();
        let mut index = tempfile::tempfile().unwrap();
        writer.write(&mut index, frame.size()).unwrap();
        (data, index, expected)
    }

    /// Each object is there and right, or a hole.
    pub(super) fn assert_present(&self, present: &[bool]) {
        assert_eq!(present.len(), self.ranges.len());
        for (n, range) in self.ranges.iter().enumerate() {
            let blocks = range.to_blocks();
            let holes = holes(&self.data, blocks).unwrap();
            if present[n] {
                assert!(holes.is_empty(), "object {n} has holes {holes:?}");
                let mut bytes = vec![1; blocks.len() as usize];
                self.data.read_exact_at(&mut bytes, range.offset()).unwrap();
                let (content, rest) = bytes.split_at(range.len() as usize);
                assert!(content == self.contents[n], "object {n} is wrong");
                assert!(rest.iter().all(|byte| *byte == 0), "object {n} is not padded");
            } else {
                assert_eq!(holes, [blocks], "object {n} should be absent");
            }
        }
    }

    fn connect(&self) -> impl Fn(PoolId, OriginSpec, Limits, Upcalls) -> Connection + use<> {
        let source = Arc::clone(&self.source);
        move |_, _, _, upcalls| Connection { source: Arc::clone(&source), upcalls }
    }
}

/// The other ends of a worker's sockets.
pub(super) struct Supervisor {
    control: Seqpacket,
    queue: Seqpacket,
    worker: JoinHandle<Result<(), RunError>>,
    /// What the worker said of events, and the reason of the last answer.
    pub(super) waiting: Vec<(u64, String)>,
    pub(super) reason: String,
    /// The sum of all reports.
    pub(super) counters: Counters,
}

impl Supervisor {
    fn spawn(setup: &Setup) -> Self {
        let (control, control_worker) = pair().unwrap();
        let (queue, queue_worker) = pair().unwrap();
        let queue_worker = Queue::new(queue_worker).unwrap();
        let spool = OwnedFd::from(File::open(setup.spool.path()).unwrap());
        let worker = tokio::spawn(run(control_worker, queue_worker, spool, setup.connect()));
        Self {
            control: Seqpacket::new(control).unwrap(),
            queue: Seqpacket::new(queue).unwrap(),
            worker,
            waiting: Vec::new(),
            reason: String::new(),
            counters: Counters::default(),
        }
    }

    /// A worker with the setup's pool and segment, that takes events.
    pub(super) async fn start(setup: &Setup, limits: Limits) -> Self {
        let mut s = Self::spawn(setup);
        s.control(&ToWorker::Hello { version: wire::VERSION }).await;
        assert_eq!(s.next().await, FromWorker::Ready { version: wire::VERSION });
        let origin =
            OriginSpec::Git(GitOrigin { hash: HashKind::Sha1, transport: GitTransport::Pipe });
        s.control(&ToWorker::Pool { pool: PoolId(1), origin, limits, server: None }).await;
        s.attach(1, &setup.data, &setup.index).await;
        s.control(&ToWorker::Start { quarantine: Vec::new() }).await;
        s
    }

    pub(super) async fn version(setup: &Setup, version: u32) -> Result<(), RunError> {
        let s = Self::spawn(setup);
        s.control(&ToWorker::Hello { version }).await;
        s.worker.await.unwrap()
    }

    pub(super) async fn attach(&mut self, id: u64, data: &File, index: &File) {
        self.try_attach(id, data, index).await.unwrap();
    }

    pub(super) async fn try_attach(
        &mut self,
        id: u64,
        data: &File,
        index: &File,
    ) -> Result<(), String> {
        let message = ToWorker::Segment { pool: PoolId(1), segment: SegmentId(id) };
        let bytes = wire::encode(&message).unwrap();
        self.control.send(&bytes, &[data.as_fd(), index.as_fd()]).await.unwrap();
        let attached = self.until(|m| matches!(m, FromWorker::Attached { .. })).await;
        let FromWorker::Attached { result, .. } = attached else { unreachable!() };
        result
    }

    pub(super) async fn control(&self, message: &ToWorker) {
        self.control.send(&wire::encode(message).unwrap(), &[]).await.unwrap();
    }

    async fn next(&mut self) -> FromWorker {
        let mut buffer = vec![0; MAX_MESSAGE];
        let received = tokio::time::timeout(TIMEOUT, self.control.recv(&mut buffer)).await;
        let received = received.expect("a message in time").unwrap().expect("a worker");
        wire::decode(&buffer[..received.length]).unwrap()
    }

    /// The next message of a kind; others are passed over.
    pub(super) async fn until(&mut self, wanted: impl Fn(&FromWorker) -> bool) -> FromWorker {
        loop {
            let message = self.next().await;
            if let FromWorker::Report { counters, .. } = &message {
                self.counters.requests += counters.requests;
                self.counters.objects += counters.objects;
                self.counters.content_bytes += counters.content_bytes;
                self.counters.received_bytes += counters.received_bytes;
                self.counters.sent_bytes += counters.sent_bytes;
            }
            if wanted(&message) {
                return message;
            }
        }
    }

    pub(super) async fn queue(&self, message: &ToQueue) {
        self.queue.send(&wire::encode(message).unwrap(), &[]).await.unwrap();
    }

    pub(super) async fn event(&self, event: u64, segment: u64, range: ByteRange) {
        let (event, segment) = (EventId(event), SegmentId(segment));
        // each by a process of its own
        let pid = i32::try_from(event.0).unwrap();
        self.queue(&ToQueue::Event { event, segment, range, pid }).await;
    }

    pub(super) async fn answer(&mut self) -> (u64, Verdict) {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let received = tokio::time::timeout(TIMEOUT, self.queue.recv(&mut buffer)).await;
            let received = received.expect("an answer in time").unwrap().expect("a worker");
            match wire::decode(&buffer[..received.length]).unwrap() {
                FromQueue::Answer { event, verdict, reason } => {
                    assert_eq!(reason.is_some(), verdict != Verdict::Allow);
                    self.reason = reason.unwrap_or_default();
                    return (event.0, verdict);
                }
                FromQueue::Waiting { event, reason } => self.waiting.push((event.0, reason)),
                FromQueue::Settled { .. } => unreachable!("not its business"),
            }
        }
    }

    pub(super) async fn answers(&mut self, count: usize) -> Vec<(u64, Verdict)> {
        let mut answers = Vec::new();
        while answers.len() < count {
            answers.push(self.answer().await);
        }
        answers
    }

    pub(super) async fn stop(self) {
        self.control(&ToWorker::Stop).await;
        tokio::time::timeout(TIMEOUT, self.worker).await.expect("an end").unwrap().unwrap();
    }

    pub(super) async fn hang_up(self) -> Result<(), RunError> {
        drop(self.control);
        tokio::time::timeout(TIMEOUT, self.worker).await.expect("an end").unwrap()
    }
}
