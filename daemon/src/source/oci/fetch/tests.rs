mod windows;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, Uri};
use axum::serve::ListenerExt;
use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;

use super::*;
use crate::layer::digest::Digest;
use crate::layer::indexer::Indexer;
use crate::layer::span::{Codec, Proof, Span, TRAILER};
use crate::layer::tests::{index_by, noise, pinned_index};
use crate::queue::wire::HttpTransport;
use crate::queue::wire::image::{self as wire, Repository};
use crate::source::Content;
use crate::source::git::Nobody;
use crate::source::oci::digest;
use crate::source::oci::spans::Encoded;

/// A host that has a layer's blob, and perhaps the windows of its index.
struct Server {
    url: String,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    blob: Vec<u8>,
    seen: Mutex<Vec<ByteRange>>,
    windows: Mutex<Option<Vec<u8>>>,
    windows_seen: Mutex<Vec<ByteRange>>,
    /// Requests are answered only with a permit.
    held: AtomicBool,
    /// So many bytes of an answer come without one; what is behind them never, if it `breaks` there.
    stops_after: AtomicUsize,
    breaks: AtomicBool,
    permits: Semaphore,
    connections: AtomicUsize,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn new(blob: Vec<u8>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v2/", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            blob,
            seen: Mutex::default(),
            windows: Mutex::default(),
            windows_seen: Mutex::default(),
            held: AtomicBool::new(false),
            stops_after: AtomicUsize::new(usize::MAX),
            breaks: AtomicBool::new(false),
            permits: Semaphore::new(0),
            connections: AtomicUsize::new(0),
        });
        let counted = Arc::clone(&shared);
        let listener =
            listener.tap_io(move |_| _ = counted.connections.fetch_add(1, Ordering::Relaxed));
        let app = axum::Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared, task }
    }

    fn seen(&self) -> Vec<ByteRange> {
        self.shared.seen.lock().unwrap().clone()
    }

    fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Relaxed);
    }

    /// Answers one of the requests that are held.
    fn release(&self) {
        self.shared.permits.add_permits(1);
    }

    async fn has_seen(&self, count: usize) {
        while self.seen().len() < count {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
}

async fn answer(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap) -> Response<Body> {
    if uri.path() == "/v2/" {
        return Response::builder().status(StatusCode::UNAUTHORIZED).body(Body::empty()).unwrap();
    }
    let is_layer = uri.path().ends_with(&digest::text(&layer_digest()));
    let (blob, seen) = match is_layer {
        true => (Some(shared.blob.clone()), &shared.seen),
        false => (shared.windows.lock().unwrap().clone(), &shared.windows_seen),
    };
    let range = headers["range"].to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (from, last) = range.split_once('-').unwrap();
    let (from, to): (usize, usize) = (from.parse().unwrap(), last.parse::<usize>().unwrap() + 1);
    seen.lock().unwrap().push(ByteRange::between(from as u64, to as u64));
    let Some(blob) = blob else {
        return Response::builder().status(StatusCode::NOT_FOUND).body(Body::empty()).unwrap();
    };
    if shared.held.load(Ordering::Relaxed) {
        shared.permits.acquire().await.unwrap().forget();
    }
    let stop = to.min(from.saturating_add(shared.stops_after.load(Ordering::Relaxed)));
    let [start, rest] = [from..stop, stop..to].map(|range| blob[range].to_vec());
    let response = Response::builder().status(StatusCode::PARTIAL_CONTENT);
    let response = response.header("content-range", format!("bytes {range}/{}", blob.len()));
    let rest = async move {
        if rest.is_empty() {
            return Ok(rest);
        }
        if shared.breaks.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("broken"));
        }
        shared.permits.acquire().await.unwrap().forget();
        Ok(rest)
    };
    let body = stream::iter([Ok(start)]).chain(stream::once(rest));
    response.header("content-length", to - from).body(Body::from_stream(body)).unwrap()
}

/// Chunks by their places.
#[derive(Default)]
struct Chunks(BTreeMap<ObjectId, Vec<u8>>);

impl Sink for Chunks {
    fn object(&mut self, key: ObjectId, content: Content) -> std::io::Result<()> {
        let Content::Memory(content) = content else { panic!("in memory") };
        assert!(self.0.insert(key, content).is_none(), "once");
        Ok(())
    }

    fn spool(&mut self) -> std::io::Result<File> {
        Err(std::io::Error::other("there is none"))
    }

    fn received(&mut self, _: u64) {}
}

/// Tells of chunks as they come.
struct Told(tokio::sync::mpsc::UnboundedSender<ObjectId>);

impl Sink for Told {
    fn object(&mut self, key: ObjectId, _: Content) -> std::io::Result<()> {
        self.0.send(key).map_err(std::io::Error::other)
    }

    fn spool(&mut self) -> std::io::Result<File> {
        Err(std::io::Error::other("there is none"))
    }

    fn received(&mut self, _: u64) {}
}

fn layer_digest() -> ObjectId {
    digest::sha256(b"blob")
}

fn repository(hosts: &[&Server]) -> Repository {
    let host = |server: &&Server| wire::Host {
        http: HttpTransport { url: server.url.clone(), ..HttpTransport::default() },
        mirror: false,
        resolves: true,
        pulls: true,
    };
    Repository {
        registry: "registry".into(),
        name: "image".into(),
        hosts: hosts.iter().map(host).collect(),
    }
}

/// A layer with this index at these hosts, and the keys of its chunks in order.
fn layer(index: Index, segment: &[u8], hosts: &[&Server]) -> (LayerSource, Vec<ObjectId>) {
    layer_by(&Clients::default(), index, segment, hosts)
}

fn layer_by(
    clients: &Clients,
    index: Index,
    segment: &[u8],
    hosts: &[&Server],
) -> (LayerSource, Vec<ObjectId>) {
    let layer = Layer {
        digest: layer_digest(),
        size: index.compressed_len(),
        codec: wire::Codec::Gzip,
        diff_id: digest::sha256(segment),
    };
    let origin = LayerOrigin { repository: repository(hosts), layer };
    let nobody: Arc<dyn Credentials> = Arc::new(Nobody);
    let mut source = LayerSource::new(&origin, Limits::default(), &nobody, clients).unwrap();
    let pieces = segment.chunks(CHUNK as usize).zip(0u64..).map(|(content, number)| {
        let place = ByteRange::new(number * CHUNK, content.len() as u64);
        (chunk_key(place.offset(), content), place)
    });
    let chunks: Vec<_> = pieces.collect();
    let keys = chunks.iter().map(|(key, _)| *key).collect();
    let mut file = tempfile::tempfile().unwrap();
    index.write(&mut file).unwrap();
    let access = Access { index, file: Arc::new(file), chunks: chunks.into_iter().collect() };
    source.access = tokio::sync::OnceCell::from(Arc::new(access));
    (source, keys)
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn what_is_asked_for_comes_by_connections_that_were_opened_before() {
    let segment = noise(2 * CHUNK as usize, 1);
    let server = Server::new(gzip(&segment)).await;
    let connections = || server.shared.connections.load(Ordering::Relaxed);
    let (clients, nobody): (_, Arc<dyn Credentials>) = (Clients::default(), Arc::new(Nobody));
    let registry = Registry::new(&repository(&[&server]), Limits::default(), &nobody, &clients);
    let registry = registry.unwrap();
    registry.preconnect().await;
    // they are free a little later
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let opened = connections();
    assert!(opened > 1, "{opened}");
    let (index, _) = index_by(Indexer::new(CHUNK), &server.shared.blob, 1 << 16).unwrap();
    let (source, keys) = layer_by(&clients, index, &segment, &[&server]);
    let (first, second) = (source.chunks(&keys[..1]), source.chunks(&keys[1..]));
    let (first, second) = tokio::join!(first, second);
    assert!([first.unwrap(), second.unwrap()].concat().concat() == segment);
    assert_eq!(connections(), opened);
}

/// A layer of 8 chunks in 7 spans or so; none of these ends with a chunk.
async fn eight_chunks() -> (Server, LayerSource, Vec<ObjectId>, Vec<u8>) {
    let segment = noise(8 * CHUNK as usize - 1000, 1);
    let server = Server::new(gzip(&segment)).await;
    let (index, _) = index_by(Indexer::new(CHUNK * 5 / 4), &server.shared.blob, 1 << 16).unwrap();
    assert!((5..8).contains(&index.spans().len()), "{:?}", index.spans());
    let (source, keys) = layer(index, &segment, &[&server]);
    (server, source, keys, segment)
}

impl LayerSource {
    async fn chunks(&self, keys: &[ObjectId]) -> Result<Vec<Vec<u8>>, FetchError> {
        let mut sink = Chunks::default();
        self.fetch(keys, &mut sink).await?;
        Ok(keys.iter().map(|key| sink.0.remove(key).unwrap()).collect())
    }

    fn span(&self, number: usize) -> Span {
        self.access.get().unwrap().index.spans()[number].clone()
    }

    /// Half of this span has been fetched, with these compressed bytes.
    fn keep(&self, number: usize, bytes: &[u8]) {
        let len = self.span(number).uncompressed.len();
        let index = &self.access.get().unwrap().index;
        let at = index.frames_at(number..number + 1);
        let frame = &index.windows()[at.offset() as usize..at.end() as usize];
        let [bytes, frame] = [bytes, frame].map(Bytes::copy_from_slice);
        let encoded = Encoded { bytes, frame };
        self.spans.claim(&[Need { number, asked: len / 2, len }]).deliver(number, encoded);
    }
}

fn chunk(segment: &[u8], number: usize) -> &[u8] {
    segment.chunks(CHUNK as usize).nth(number).unwrap()
}

#[tokio::test]
async fn chunk_by_chunk_every_span_is_fetched_once() {
    for order in [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7]] {
        let (server, source, keys, segment) = eight_chunks().await;
        for number in order {
            let content = source.chunks(&[keys[number]]).await.unwrap();
            assert!(content[0] == chunk(&segment, number));
        }
        let received: u64 = server.seen().iter().map(|range| range.len()).sum();
        // neighbours may share a byte
        assert!(received <= server.shared.blob.len() as u64 + 8, "{order:?}: {received}");
    }
}

#[tokio::test]
async fn what_a_neighbour_is_fetching_is_not_fetched_again() {
    let (server, source, keys, segment) = eight_chunks().await;
    server.hold(true);
    // chunk 1 begins in the span with which chunk 0 ends
    let (first, second) = ([keys[0]], [keys[1]]);
    let (first, second) = (source.chunks(&first), source.chunks(&second));
    tokio::pin!(first, second);
    tokio::select! {
        _ = &mut first => panic!("nothing has come"),
        () = server.has_seen(1) => {}
    }
    tokio::select! {
        _ = &mut second => panic!("nothing has come"),
        () = server.has_seen(2) => {}
    }
    server.release();
    assert!(first.await.unwrap()[0] == chunk(&segment, 0));
    server.release();
    assert!(second.await.unwrap()[0] == chunk(&segment, 1));
    assert_eq!(server.seen(), [source.span(0).compressed, source.span(1).compressed]);
}

#[tokio::test]
async fn who_waits_for_the_first_chunk_does_not_wait_for_the_last() {
    let (server, source, keys, _) = eight_chunks().await;
    // one byte is missing
    let stop = source.span(3).compressed.end() - 1;
    server.shared.stops_after.store(stop as usize, Ordering::Relaxed);
    let (told, mut came) = tokio::sync::mpsc::unbounded_channel();
    let mut sink = Told(told);
    let fetch = source.fetch(&keys, &mut sink);
    tokio::pin!(fetch);
    let end = source.span(3).uncompressed.offset();
    let mut seen = 0;
    for key in keys.iter().zip(1u64..).filter(|(_, number)| number * CHUNK <= end).map(|of| of.0) {
        tokio::select! {
            _ = &mut fetch => panic!("not all has come"),
            next = came.recv() => assert_eq!(next.as_ref(), Some(key)),
        }
        seen += 1;
    }
    assert!((2..7).contains(&seen) && came.try_recv().is_err(), "{seen}");
    server.release();
    fetch.await.unwrap();
    while came.try_recv().is_ok() {
        seen += 1;
    }
    assert_eq!(seen, keys.len());
}

/// Another host goes on with the chunk that was not complete.
#[tokio::test]
async fn what_has_come_of_an_answer_that_breaks_off_does_not_come_again() {
    let (good, source, _, segment) = eight_chunks().await;
    let index = source.access.get().unwrap().index.clone();
    let broken = Server::new(good.shared.blob.clone()).await;
    let at = source.span(3).compressed.end();
    broken.shared.stops_after.store(at as usize + 10, Ordering::Relaxed);
    broken.shared.breaks.store(true, Ordering::Relaxed);
    let (source, keys) = layer(index, &segment, &[&broken, &good]);
    let came = source.chunks(&keys).await.unwrap();
    assert!(came.iter().enumerate().all(|(number, came)| came == chunk(&segment, number)));
    assert_eq!(broken.seen().len(), 1);
    let last = source.span(3).uncompressed;
    // in it ends the last chunk that the first host gave
    assert!(!last.end().is_multiple_of(CHUNK));
    let from = source.span(3).compressed.offset();
    assert_eq!(good.seen(), [ByteRange::between(from, good.shared.blob.len() as u64)]);
}

#[tokio::test]
async fn a_request_that_was_dropped_leaves_nothing_behind() {
    let (server, source, keys, segment) = eight_chunks().await;
    server.hold(true);
    {
        let first = [keys[1]];
        let first = source.chunks(&first);
        tokio::select! {
            _ = first => panic!("nothing has come"),
            () = server.has_seen(1) => {}
        }
    }
    server.hold(false);
    let second = source.chunks(&[keys[1]]).await.unwrap();
    assert!(second[0] == chunk(&segment, 1));
    assert_eq!(server.seen()[0], server.seen()[1], "the same again");
}

#[tokio::test]
async fn a_slow_neighbour_is_not_waited_for() {
    let (server, source, keys, segment) = eight_chunks().await;
    server.hold(true);
    let first = [keys[0]];
    let first = source.chunks(&first);
    tokio::pin!(first);
    tokio::select! {
        _ = &mut first => panic!("nothing has come"),
        () = server.has_seen(1) => {}
    }
    server.hold(false);
    // the first request is not even looked at meanwhile
    let second = source.chunks(&[keys[1]]).await.unwrap();
    assert!(second[0] == chunk(&segment, 1));
    let (span, next) = (source.span(0).compressed, source.span(1).compressed);
    assert_eq!(server.seen(), [span, next, span]);
    server.release();
    assert!(first.await.unwrap()[0] == chunk(&segment, 0));
}

#[tokio::test]
async fn all_at_once_all_are_right() {
    let (server, source, keys, segment) = eight_chunks().await;
    let requests: Vec<_> = keys.chunks(1).chain(keys.chunks(3)).collect();
    let found = join_all(requests.iter().map(|keys| source.chunks(keys))).await;
    for (keys_of, content) in requests.into_iter().zip(found) {
        for (key, content) in keys_of.iter().zip(content.unwrap()) {
            let number = keys.iter().position(|other| other == key).unwrap();
            assert!(content == chunk(&segment, number));
        }
    }
    assert!(server.seen().len() >= 5);
}

#[tokio::test]
async fn what_was_kept_and_is_damaged_is_fetched_anew() {
    let (server, source, keys, segment) = eight_chunks().await;
    let (right, other) = (source.span(0).compressed, source.span(1).compressed);
    let bytes =
        |range: ByteRange| &server.shared.blob[range.offset() as usize..][..range.len() as usize];
    for wrong in [&[][..], &bytes(right)[1..], bytes(other)] {
        source.keep(0, wrong);
        let content = source.chunks(&[keys[0], keys[1]]).await.unwrap();
        assert!(content[0] == chunk(&segment, 0) && content[1] == chunk(&segment, 1));
    }
    assert_eq!(server.seen().len(), 3);
}

/// A layer of 2.5 chunks in two gzip members, whose ends are not proved by the index alone; and the same blob with
/// another end of the first, of the same length.
fn unproved_ends() -> (Index, Vec<u8>, [Vec<u8>; 2]) {
    let lengths = [CHUNK as usize * 3 / 2, CHUNK as usize];
    let (mut segment, mut blobs) = (Vec::new(), [Vec::new(), Vec::new()]);
    let mut members = Vec::new();
    for (number, len) in lengths.into_iter().enumerate() {
        // stored as they are, so that both are of the same length
        let stored = |content: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap()
        };
        let content = noise(len - 100, number as u64);
        let mut others = content.clone();
        if number == 0 {
            others.last_mut().into_iter().for_each(|byte| *byte ^= 1);
        }
        let (start, compressed) = (segment.len() as u64, blobs[0].len() as u64);
        blobs[0].extend(stored(&content));
        blobs[1].extend(stored(&others));
        assert_eq!(blobs[0].len(), blobs[1].len());
        segment.extend_from_slice(&content);
        segment.resize(start as usize + len - TRAILER as usize, 0);
        segment.extend_from_slice(&(content.len() as u64).to_le_bytes());
        let proved = content.len() - 10;
        let span = Span {
            uncompressed: ByteRange::new(start, len as u64),
            compressed: ByteRange::between(compressed, blobs[0].len() as u64),
            codec: Codec::Gzip,
            digest: Digest::of(&content[..proved]),
            proof: Proof::Start(proved as u64),
        };
        members.push((span, Vec::new()));
    }
    let index = pinned_index(members, &blobs[0], &segment);
    (index, segment, blobs)
}

#[tokio::test]
async fn no_chunk_is_lost_to_what_was_kept() {
    let (index, segment, [right, wrong]) = unproved_ends();
    let server = Server::new(right).await;
    let (source, keys) = layer(index, &segment, &[&server]);
    let span = source.span(0).compressed;
    source.keep(0, &wrong[..span.len() as usize]);
    let content = source.chunks(&keys[1..2]).await.unwrap();
    assert!(content[0] == chunk(&segment, 1));
    // the other half of it, and then all anew
    let both = ByteRange::between(0, source.span(1).compressed.end());
    assert_eq!(server.seen(), [source.span(1).compressed, both]);
}

#[tokio::test]
async fn another_mirror_is_asked_before_a_chunk_is_given_up() {
    let (index, segment, [right, wrong]) = unproved_ends();
    let (right, wrong) = (Server::new(right).await, Server::new(wrong).await);
    let (source, keys) = layer(index.clone(), &segment, &[&wrong, &right]);
    // nothing is wrong with the part that this chunk has of it, and it is kept
    let content = source.chunks(&keys[..1]).await.unwrap();
    assert!(content[0] == chunk(&segment, 0) && right.seen().is_empty());
    let content = source.chunks(&keys[1..2]).await.unwrap();
    assert!(content[0] == chunk(&segment, 1));
    assert_eq!((wrong.seen().len(), right.seen().len()), (3, 1));
    // where there is none, it is wrong
    let (source, keys) = layer(index, &segment, &[&wrong]);
    source.chunks(&keys[..1]).await.unwrap();
    let error = source.chunks(&keys[1..2]).await.unwrap_err();
    assert!(matches!(error, FetchError::Wrong { .. }), "{error}");
}

#[test]
fn the_place_is_a_part_of_a_chunks_name() {
    assert_ne!(chunk_key(0, b"x"), chunk_key(1, b"x"));
}
