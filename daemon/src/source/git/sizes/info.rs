//! The command `object-info` (gitprotocol-v2(5)).

use std::collections::HashSet;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::object::{HashKind, ObjectId};
use crate::source::FetchError;
use crate::source::git::pktline::Packet;
use crate::source::git::transport::{Command, Transport};
use crate::source::git::wrong;

/// As many ids as git's own client puts in one request.
const CHUNK: usize = 10_000;

/// Requests at the same time.
const IN_FLIGHT: usize = 4;

/// The sizes of those objects that the server has; `ids` has each once.
pub async fn object_info(
    transport: &Transport,
    hash: HashKind,
    ids: &[ObjectId],
    connections: usize,
) -> Result<Vec<(ObjectId, u64)>, FetchError> {
    let chunks: Vec<Vec<ObjectId>> = ids.chunks(CHUNK).map(<[ObjectId]>::to_vec).collect();
    stream::iter(chunks.into_iter().map(|ids| chunk(transport.clone(), hash, ids)))
        .buffer_unordered(IN_FLIGHT.min(connections))
        .try_fold(Vec::with_capacity(ids.len()), |mut all, some| async move {
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
    let arguments = vec!["size".to_owned()];
    let command = Command { name: "object-info", arguments, ids: ("oid", ids), last: None };
    let mut reply = transport.command(hash, &command, &mut 0).await?;
    let mut asked = Asked { ids: &command.ids.1, rest: None };
    let mut sizes = Vec::with_capacity(asked.ids.len());
    let mut attributes = false;
    loop {
        let line = match reply.packet().await? {
            Packet::Data(line) => line,
            Packet::Flush => break,
            other => return Err(wrong(format!("unexpected {other:?} in object-info"))),
        };
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        if !attributes {
            if line != b"size" {
                return Err(wrong("object-info does not tell the size"));
            }
            attributes = true;
            continue;
        }
        let space = line.iter().position(|byte| *byte == b' ');
        let parsed = space.and_then(|space| line.split_at_checked(space)).and_then(|(id, size)| {
            let id = ObjectId::from_hex(id).ok()?;
            // nothing after the space: an object that the server does not have
            let size = match size {
                b" " => None,
                size => Some(decimal(size.strip_prefix(b" ")?)?),
            };
            Some((id, size))
        });
        let (id, size) = parsed.ok_or_else(|| wrong("object-info has a line of no known form"))?;
        if !asked.take(&id) {
            return Err(wrong(format!("object-info tells of {id}, which was not asked for")));
        }
        sizes.extend(size.map(|size| (id, size)));
    }
    reply.end().await;
    Ok(sizes)
}

/// Digits only, as [`str::parse`] takes a sign too.
fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The ids that an answer may still have, each once.
struct Asked<'a> {
    /// While the answer has the order of the question, as git's does.
    ids: &'a [ObjectId],
    /// Once it has not.
    rest: Option<HashSet<&'a ObjectId>>,
}

impl Asked<'_> {
    fn take(&mut self, id: &ObjectId) -> bool {
        if let Some(rest) = &mut self.rest {
            return rest.remove(id);
        }
        if let Some((first, others)) = self.ids.split_first()
            && first == id
        {
            self.ids = others;
            return true;
        }
        self.rest.insert(self.ids.iter().collect()).remove(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_counts_once_in_any_order() {
        let ids: Vec<_> = (0..5).map(|n| ObjectId::of_blob(HashKind::Sha1, &[n])).collect();
        let other = ObjectId::of_blob(HashKind::Sha1, b"other");
        for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 3, 2, 4]] {
            let mut asked = Asked { ids: &ids, rest: None };
            for at in order {
                assert!(asked.take(&ids[at]));
                assert!(!asked.take(&ids[at]) && !asked.take(&other), "{order:?}");
            }
        }
    }
}
