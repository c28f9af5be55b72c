//! The command `object-info` (gitprotocol-v2(5)).

use std::collections::{HashMap, HashSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::object::{HashKind, ObjectId};
use crate::source::FetchError;
use crate::source::git::pktline::{Packet, text};
use crate::source::git::transport::{Command, Transport};
use crate::source::git::wrong;

/// As many ids as git's own client puts in one request.
const CHUNK: usize = 10_000;

/// Requests at the same time.
const IN_FLIGHT: usize = 4;

/// The sizes of those objects that the server has.
pub async fn object_info(
    transport: &Transport,
    hash: HashKind,
    ids: &[ObjectId],
    connections: usize,
) -> Result<HashMap<ObjectId, u64>, FetchError> {
    let chunks: Vec<Vec<ObjectId>> = ids.chunks(CHUNK).map(<[ObjectId]>::to_vec).collect();
    stream::iter(chunks.into_iter().map(|ids| chunk(transport.clone(), hash, ids)))
        .buffer_unordered(IN_FLIGHT.min(connections))
        .try_fold(HashMap::with_capacity(ids.len()), |mut all, some| async move {
            all.extend(some);
            Ok(all)
        })
        .await
}

async fn chunk(
    transport: Transport,
    hash: HashKind,
    ids: Vec<ObjectId>,
) -> Result<Vec<(ObjectId, u64)>, FetchError> {
    let mut arguments = vec!["size".to_owned()];
    arguments.extend(ids.iter().map(|id| format!("oid {id}")));
    let mut reply =
        transport.command(hash, &Command { name: "object-info", arguments }, &mut 0).await?;
    let mut asked: HashSet<ObjectId> = ids.into_iter().collect();
    let mut sizes = Vec::with_capacity(asked.len());
    let mut attributes = false;
    loop {
        let line = match reply.packet().await? {
            Packet::Data(line) => line,
            Packet::Flush => break,
            other => return Err(wrong(format!("unexpected {other:?} in object-info"))),
        };
        let line = text(&line);
        if !attributes {
            if line != "size" {
                return Err(wrong("object-info does not tell the size"));
            }
            attributes = true;
            continue;
        }
        let parsed = line.split_once(' ').and_then(|(id, size)| {
            let id = ObjectId::from_hex(id.as_bytes()).ok()?;
            // nothing after the space: an object that the server does not have
            let size = if size.is_empty() { None } else { Some(decimal(size)?) };
            Some((id, size))
        });
        let (id, size) = parsed.ok_or_else(|| wrong("object-info has a line of no known form"))?;
        if !asked.remove(&id) {
            return Err(wrong(format!("object-info tells of {id}, which was not asked for")));
        }
        sizes.extend(size.map(|size| (id, size)));
    }
    reply.end().await;
    Ok(sizes)
}

/// Digits only, as [`str::parse`] takes a sign too.
fn decimal(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}
