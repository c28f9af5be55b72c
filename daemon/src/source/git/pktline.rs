//! pkt-lines (gitprotocol-common(5)): four hexadecimal digits of length, then the payload.

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

use crate::object::ObjectId;

/// The longest packet in bytes, with its four digits (`LARGE_PACKET_MAX`).
pub const MAX_PACKET: usize = 65520;

/// One packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// At most [`MAX_PACKET`] - 4 bytes, as they came: a line's newline is still there.
    Data(Bytes),
    /// `0000`, the end of a message.
    Flush,
    /// `0001`, between the sections of a message.
    Delim,
    /// `0002`, the end of a response where the connection is not enough to tell.
    ResponseEnd,
}

/// Bytes that are no pkt-line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not the length of a pkt-line")]
pub struct NotAPktLine(pub String);

/// Finds packets in bytes as they arrive. Holds at most one packet and what came with its end.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Bytes that have just arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Where a reader can append bytes that have just arrived.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next packet, or `None` until more bytes are there.
    pub fn packet(&mut self) -> Result<Option<Packet>, NotAPktLine> {
        let Some(digits) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = length(digits)?;
        let special = match length {
            0 => Packet::Flush,
            1 => Packet::Delim,
            2 => Packet::ResponseEnd,
            _ if self.buffer.len() < length => return Ok(None),
            _ => {
                let mut packet = self.buffer.split_to(length);
                packet.advance(4);
                return Ok(Some(Packet::Data(packet.freeze())));
            }
        };
        self.buffer.advance(4);
        Ok(Some(special))
    }

    /// Nothing is left over.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

fn length(digits: &[u8; 4]) -> Result<usize, NotAPktLine> {
    let wrong = || NotAPktLine(String::from_utf8_lossy(digits).into_owned());
    let mut length = 0;
    for &digit in digits {
        length = length << 4 | (digit as char).to_digit(16).ok_or_else(wrong)? as usize;
    }
    match length {
        3 => Err(wrong()),
        _ if length > MAX_PACKET => Err(wrong()),
        _ => Ok(length),
    }
}

/// A message in the making.
#[derive(Debug, Default)]
pub struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// A line of text; the newline is added. Lines are made of ids and short words.
    pub fn line(&mut self, text: &str) {
        debug_assert!(text.len() + 5 <= MAX_PACKET, "a line too long for a packet");
        self.bytes.extend_from_slice(format!("{:04x}{text}\n", text.len() + 5).as_bytes());
    }

    /// A line for each id, behind the same word.
    pub fn ids(&mut self, word: &str, ids: &[ObjectId]) {
        let Some(first) = ids.first() else { return };
        let len = word.len() + 2 * first.as_bytes().len() + 6;
        let start = format!("{len:04x}{word} ");
        self.bytes.reserve(ids.len() * len);
        for id in ids {
            debug_assert_eq!(id.kind(), first.kind());
            self.bytes.extend_from_slice(start.as_bytes());
            id.append_hex(&mut self.bytes);
            self.bytes.push(b'\n');
        }
    }

    pub fn delim(&mut self) {
        self.bytes.extend_from_slice(b"0001");
    }

    /// Ends the message.
    #[must_use]
    pub fn flush(mut self) -> Bytes {
        self.bytes.extend_from_slice(b"0000");
        self.bytes.into()
    }
}

/// The text of a line, without its newline.
#[must_use]
pub fn text(line: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::object::HashKind;

    fn decode(bytes: &[u8], step: usize) -> Result<Vec<Packet>, NotAPktLine> {
        let mut decoder = Decoder::default();
        let mut packets = Vec::new();
        for chunk in bytes.chunks(step.max(1)) {
            decoder.push(chunk);
            while let Some(packet) = decoder.packet()? {
                packets.push(packet);
            }
        }
        Ok(packets)
    }

    #[test]
    fn examples_of_the_manual() {
        // gitprotocol-common(5)
        let bytes = b"0006a\n0005a000bfoobar\n0004000100020000";
        let data = |b: &'static [u8]| Packet::Data(Bytes::from_static(b));
        for step in 1..bytes.len() {
            assert_eq!(
                decode(bytes, step).unwrap(),
                [
                    data(b"a\n"),
                    data(b"a"),
                    data(b"foobar\n"),
                    data(b""),
                    Packet::Delim,
                    Packet::ResponseEnd,
                    Packet::Flush
                ]
            );
        }
    }

    #[test]
    fn limits() {
        assert!(decode(b"0003", 4).is_err());
        assert!(decode(b"fff1", 4).is_err());
        assert!(decode(b"<htm", 4).is_err());
        assert!(decode(b"+005", 4).is_err());
        let mut longest = b"fff0".to_vec();
        longest.resize(MAX_PACKET, b'x');
        assert_eq!(decode(&longest, 1000).unwrap().len(), 1);
        assert_eq!(decode(&longest[..MAX_PACKET - 1], 1000).unwrap().len(), 0);
    }

    #[test]
    fn encoded_lines_come_back() {
        let mut encoder = Encoder::default();
        encoder.line("command=fetch");
        encoder.delim();
        let ids = [HashKind::Sha1; 2].map(|kind| ObjectId::of_blob(kind, b""));
        encoder.ids("want", &ids);
        encoder.ids("want", &[]);
        let line = "0032want e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\n";
        let whole = format!("0012command=fetch\n0001{line}{line}0000");
        assert_eq!(encoder.flush(), whole.as_bytes());
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>, step in 1usize..64) {
            let _ = decode(&bytes, step);
        }
    }
}
