//! Layers whose index has come without its windows.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{layer as layer_of, *};
use crate::source::oci::fetch::windows::{GROUP, PATIENCE};

const CHUNKS: usize = 36;

/// A layer of some groups of spans at as many hosts, all of which have the windows; its keys, and all of the index.
struct Windowless {
    servers: Vec<Server>,
    source: LayerSource,
    keys: Vec<ObjectId>,
    segment: Vec<u8>,
    index: Index,
}

impl Windowless {
    async fn new(hosts: usize) -> Self {
        let segment = noise(CHUNKS * CHUNK as usize, 1);
        let blob = gzip(&segment);
        let (index, _) = index_by(Indexer::new(CHUNK / 8), &blob, 1 << 16).unwrap();
        assert!(index.spans().len().div_ceil(GROUP) > 2);
        let mut servers = Vec::new();
        for _ in 0..hosts {
            let server = Server::new(blob.clone()).await;
            *server.shared.windows.lock().unwrap() = Some(index.windows().to_vec());
            servers.push(server);
        }
        let mut head = Vec::new();
        index.write_head(&mut head).unwrap();
        let without = Index::parse(&head).unwrap().into_pinned();
        let (source, keys) = layer_of(without, &segment, &servers.iter().collect::<Vec<_>>());
        Self { servers, source, keys, segment, index }
    }

    async fn fetch(&self, number: usize) -> Result<(), FetchError> {
        let content = self.source.chunks(&self.keys[number..number + 1]).await?;
        assert!(content[0] == chunk(&self.segment, number), "{number}");
        Ok(())
    }

    fn spans(&self, number: usize) -> Range<usize> {
        self.index.spans_for(ByteRange::new(number as u64 * CHUNK, CHUNK))
    }

    fn frames(&self, number: usize) -> ByteRange {
        self.index.frames_at(self.spans(number))
    }

    /// What is asked for with a chunk.
    fn group(&self, number: usize) -> ByteRange {
        let group = self.spans(number).start / GROUP * GROUP;
        self.index.frames_at(group..(group + GROUP).min(self.index.spans().len()))
    }

    /// Brings the windows where they belong.
    fn complete(&self) {
        let file = &self.source.access.get().unwrap().file;
        file.write_all_at(self.index.windows(), self.index.windows_at()).unwrap();
    }

    fn damage(&self, server: usize) {
        for byte in self.servers[server].shared.windows.lock().unwrap().iter_mut().flatten() {
            *byte ^= 1;
        }
    }
}

impl Server {
    fn windows_seen(&self) -> Vec<ByteRange> {
        self.shared.windows_seen.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn the_windows_of_what_is_asked_for_come_with_those_of_its_neighbours() {
    let layer = Windowless::new(1).await;
    for number in [20, 4, 21, 3] {
        layer.fetch(number).await.unwrap();
    }
    let seen = layer.servers[0].windows_seen();
    assert_eq!(seen, [20, 4].map(|number| layer.group(number)));
    let len = layer.index.windows_blob().unwrap().len;
    assert!(seen.iter().map(|range| range.len()).sum::<u64>() < len / 2, "{seen:?} of {len}");
    // no more, once they are here
    layer.complete();
    for number in 0..CHUNKS {
        layer.fetch(number).await.unwrap();
    }
    assert_eq!(layer.servers[0].windows_seen(), seen);
}

#[tokio::test]
async fn who_needs_windows_that_are_coming_waits_but_not_for_long() {
    let layer = Windowless::new(1).await;
    let server = &layer.servers[0];
    server.hold(true);
    let started = tokio::time::Instant::now();
    let second = async {
        while server.windows_seen().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        layer.fetch(4).await
    };
    let both = async { tokio::join!(layer.fetch(2), second) };
    tokio::pin!(both);
    let asked = async {
        while server.windows_seen().len() < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = &mut both => panic!("nothing has come"),
        () = asked => {}
    }
    assert!(started.elapsed() >= PATIENCE);
    assert_eq!(server.windows_seen(), [layer.group(2), layer.frames(4)]);
    (0..4).for_each(|_| server.release());
    let (first, second) = both.await;
    first.unwrap();
    second.unwrap();
}

#[tokio::test]
async fn all_groups_of_what_is_asked_for_come_once() {
    let layer = Windowless::new(1).await;
    let content = layer.source.chunks(&layer.keys).await.unwrap();
    assert!(content.concat() == layer.segment);
    assert_eq!(layer.servers[0].windows_seen().len(), layer.index.spans().len().div_ceil(GROUP));
}

/// Some spans lie across the edge of a chunk.
#[tokio::test]
async fn what_is_kept_of_a_span_has_its_window() {
    let layer = Windowless::new(1).await;
    for number in 0..CHUNKS {
        layer.fetch(number).await.unwrap();
    }
    let [seen, windows] = [layer.servers[0].seen(), layer.servers[0].windows_seen()];
    let bytes = |ranges: &[ByteRange]| ranges.iter().map(|range| range.len()).sum::<u64>();
    // neighbours may share a byte
    assert!(bytes(&seen) <= layer.servers[0].shared.blob.len() as u64 + CHUNKS as u64);
    assert_eq!(bytes(&windows), layer.index.windows_blob().unwrap().len, "each once");
}

#[tokio::test]
async fn windows_are_asked_for_side_by_side_with_the_spans() {
    let layer = Windowless::new(1).await;
    let server = &layer.servers[0];
    server.hold(true);
    let fetch = layer.fetch(7);
    tokio::pin!(fetch);
    let both = async {
        server.has_seen(1).await;
        while server.windows_seen().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = &mut fetch => panic!("nothing has come"),
        () = both => {}
    }
    server.release();
    server.release();
    fetch.await.unwrap();
}

#[tokio::test]
async fn windows_that_are_wrong_come_from_another_host() {
    let layer = Windowless::new(2).await;
    layer.damage(0);
    layer.fetch(7).await.unwrap();
    assert_eq!(layer.servers[0].windows_seen(), layer.servers[1].windows_seen());
    assert_eq!(layer.servers[0].seen().len(), 1);
    // nowhere else
    layer.damage(1);
    let error = layer.fetch(30).await.unwrap_err();
    assert!(matches!(error, FetchError::Wrong { .. }), "{error}");
}

/// As a mirror that has images, and nothing that is beside them.
#[tokio::test]
async fn a_host_without_windows_may_have_the_layer() {
    let layer = Windowless::new(2).await;
    *layer.servers[0].shared.windows.lock().unwrap() = None;
    for number in [7, 20] {
        layer.fetch(number).await.unwrap();
    }
    assert_eq!(layer.servers[0].seen().len(), 2, "it is not blamed");
    assert_eq!(layer.servers[1].seen(), []);
    assert_eq!(layer.servers[1].windows_seen().len(), 2);
    // somebody has removed them
    *layer.servers[1].shared.windows.lock().unwrap() = None;
    let error = layer.fetch(30).await.unwrap_err();
    assert!(error.to_string().contains("what the layer's index needs"), "{error}");
    layer.complete();
    layer.fetch(30).await.unwrap();
}

/// As of SOCI: the digests are of the compressed bytes, and any window makes something of these.
#[tokio::test]
async fn where_a_window_decides_it_is_not_fetched() {
    let layer = Windowless::new(1).await;
    let blob = &layer.servers[0].shared.blob;
    let part = |(number, span): (usize, &Span)| {
        let at = span.compressed;
        let digest = Digest::of(&blob[at.offset() as usize..at.end() as usize]);
        let span = Span { digest, proof: Proof::Compressed, ..span.clone() };
        (span, layer.index.window(number).unwrap())
    };
    let parts = layer.index.spans().iter().enumerate().map(part).collect();
    let index = pinned_index(parts, blob, &layer.segment);
    let (source, keys) = layer_of(index.clone(), &layer.segment, &[&layer.servers[0]]);
    let content = source.chunks(&keys[7..8]).await.unwrap();
    assert!(content[0] == chunk(&layer.segment, 7));
    let at = index.windows_at() + index.frames_at(0..index.spans().len()).len() / 2;
    let (source, keys) = layer_of(index, &layer.segment, &[&layer.servers[0]]);
    source.access.get().unwrap().file.write_all_at(&[0; 1 << 12], at).unwrap();
    let error = source.chunks(&keys).await.unwrap_err();
    assert!(error.to_string().contains("damaged; remove its images"), "{error}");
    assert!(layer.servers[0].windows_seen().is_empty());
}

#[tokio::test]
async fn windows_that_are_damaged_here_come_from_the_registry() {
    let layer = Windowless::new(1).await;
    layer.complete();
    let at = layer.index.windows_at() + layer.frames(7).offset();
    layer.source.access.get().unwrap().file.write_all_at(&[0; 16], at).unwrap();
    layer.fetch(7).await.unwrap();
    assert_eq!(layer.servers[0].windows_seen(), [layer.group(7)]);
}
