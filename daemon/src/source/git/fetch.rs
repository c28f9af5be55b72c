//! The command `fetch` (gitprotocol-v2(5)): blobs by id, as one pack.

use std::collections::HashSet;

use bytes::Buf;

use super::pack::{Parser, Step};
use super::pktline::{Packet, text};
use super::transport::{Command, Reply, Transport};
use super::{retry, wrong};
use crate::object::{HashKind, ObjectId};
use crate::source::{Content, FetchError, Sink};

/// Fetches blobs in one request. The raw pack, with `keep_raw`.
pub async fn fetch(
    transport: &Transport,
    hash: HashKind,
    keys: &[ObjectId],
    keep_raw: bool,
    sink: &mut dyn Sink,
) -> Result<Option<Content>, FetchError> {
    let mut seen = HashSet::with_capacity(keys.len());
    let keys: Vec<ObjectId> = keys.iter().copied().filter(|key| seen.insert(*key)).collect();
    if let Some(&key) = keys.iter().find(|key| key.kind() != hash) {
        return Err(FetchError::Missing { key, message: format!("it has {} ids", hash.name()) });
    }
    if keys.is_empty() {
        // a server says nothing at all to that
        return Ok(keep_raw.then(|| Content::Memory(empty_pack(hash))));
    }
    let result = request(transport, hash, &keys, keep_raw, sink).await;
    if let Err(FetchError::Wrong { .. } | FetchError::Refused { .. } | FetchError::Unable { .. }) =
        result
    {
        transport.forget();
    }
    result.map_err(|e| name_the_missing(e, &keys))
}

/// Whether the server gives this blob by its id: [`FetchError::Missing`] if not. It is asked for as by one who has
/// not said yet all that he has. The answer to that is what both have, and no pack.
pub async fn probe(transport: &Transport, hash: HashKind, key: ObjectId) -> Result<(), FetchError> {
    let nothing = "0".repeat(hash.id_len() * 2);
    let arguments = vec![format!("have {nothing}")];
    let command = Command { name: "fetch", arguments, ids: ("want", vec![key]), last: None };
    let ask = async {
        let mut reply = transport.command(hash, &command, &mut 0).await?;
        loop {
            match reply.packet().await? {
                Packet::Data(line) if matches!(&line[..], b"acknowledgments\n" | b"NAK\n") => {}
                Packet::Flush => break reply.end().await,
                // it goes on to send the blob
                _ => break,
            }
        }
        Ok(())
    };
    ask.await.map_err(|error| name_the_missing(error, &[key]))
}

async fn request(
    transport: &Transport,
    hash: HashKind,
    keys: &[ObjectId],
    keep_raw: bool,
    sink: &mut dyn Sink,
) -> Result<Option<Content>, FetchError> {
    // No thin-pack: no base is to be outside. No filter: nothing but what is asked for comes anyway.
    let arguments = vec!["no-progress".to_owned(), "ofs-delta".to_owned()];
    let ids = ("want", keys.to_vec());
    let mut sent = 0;
    let command = Command { name: "fetch", arguments, ids, last: Some("done") };
    let reply = transport.command(hash, &command, &mut sent).await;
    sink.sent(sent);
    let mut reply = reply?;
    to_the_pack(&mut reply).await?;
    let mut parser = Parser::new(hash, keys, keep_raw);
    loop {
        let packet = reply.packet().await;
        sink.received(reply.take_received());
        let mut data = match packet? {
            Packet::Data(data) => data,
            Packet::Flush => break,
            other => return Err(wrong(format!("unexpected {other:?} in a pack"))),
        };
        if data.is_empty() {
            return Err(wrong("a packet without a sideband"));
        }
        match data.get_u8() {
            1 => {}
            2 => continue,
            3 => return Err(failed(&text(&data))),
            band => return Err(wrong(format!("there is no sideband {band}"))),
        }
        parser.push(data);
        while parser.step(sink)? == Step::More {
            tokio::task::yield_now().await;
        }
    }
    let raw = parser.finish()?;
    reply.end().await;
    Ok(raw)
}

fn empty_pack(hash: HashKind) -> Vec<u8> {
    let mut pack = b"PACK\0\0\0\x02\0\0\0\0".to_vec();
    let mut hasher = hash.hasher();
    hasher.update(&pack);
    pack.extend_from_slice(hasher.finish().as_bytes());
    pack
}

/// Reads up to the section `packfile`.
async fn to_the_pack(reply: &mut Reply) -> Result<(), FetchError> {
    loop {
        match reply.packet().await? {
            Packet::Data(line) if &line[..] == b"packfile\n" || &line[..] == b"packfile" => {
                return Ok(());
            }
            // other sections, which we did nothing to get
            Packet::Data(_) | Packet::Delim => {}
            Packet::Flush | Packet::ResponseEnd => return Err(wrong("an answer without a pack")),
        }
    }
}

/// The server died while it made the pack.
fn failed(message: &str) -> FetchError {
    retry(format!("the server failed: {}", message.trim_end()))
}

/// Servers say in words which object they don't have, or don't give to those who ask for it by its id:
/// `upload-pack: not our ref <id>` (C git), `want <id> not valid` (JGit).
fn name_the_missing(error: FetchError, keys: &[ObjectId]) -> FetchError {
    let (FetchError::Retry { message, .. } | FetchError::Refused { message }) = &error else {
        return error;
    };
    if !message.contains("not our ref") && !message.contains("not valid") {
        return error;
    }
    let named = message.split_ascii_whitespace().find_map(|word| {
        let id = ObjectId::from_hex(word.as_bytes()).ok()?;
        keys.contains(&id).then_some(id)
    });
    match named {
        Some(key) => FetchError::Missing { key, message: message.clone() },
        None => error,
    }
}
