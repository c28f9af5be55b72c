//! Where HTTP/1.1 messages begin and end (RFC 9112), no more.

use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;

/// Reads messages off a connection as they are.
pub(crate) struct Reader {
    stream: TcpStream,
    /// Read but not handed out.
    buffer: Vec<u8>,
}

enum Framing {
    Length(usize),
    Chunked,
    /// Until the connection ends.
    Close,
}

pub(crate) type Take<'a> = &'a mut dyn FnMut(&[u8]) -> bool;

fn cut_short() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "the connection ended within a message")
}

impl Reader {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// More bytes; whether there were any.
    fn fill(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 64 << 10];
        let count = self.stream.read(&mut bytes)?;
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(count > 0)
    }

    /// Waits for the first bytes of a message; `None` at the end of the connection.
    pub(super) fn peek(&mut self) -> io::Result<Option<&[u8]>> {
        if self.buffer.is_empty() && !self.fill()? {
            return Ok(None);
        }
        Ok(Some(&self.buffer))
    }

    fn head(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                return Ok(Some(self.buffer.drain(..end + 4).collect()));
            }
            if !self.fill()? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(cut_short()) };
            }
        }
    }

    /// A whole request, head and body; `None` at the end of the connection.
    pub(crate) fn request(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(head) = self.head()? else { return Ok(None) };
        let framing = match framing(&head) {
            Framing::Close => Framing::Length(0),
            framing => framing,
        };
        let mut request = head;
        self.body(framing, &mut |bytes| {
            request.extend_from_slice(bytes);
            true
        })?;
        Ok(Some(request))
    }

    /// A response, handed out piece by piece until `take` says no.
    pub(crate) fn response(&mut self, take: Take<'_>) -> io::Result<()> {
        let head = self.head()?.ok_or_else(cut_short)?;
        let none =
            [b" 204 ".as_slice(), b" 304 ", b" 100 "].iter().any(|c| head[8..].starts_with(c));
        let framing = if none { Framing::Length(0) } else { framing(&head) };
        if take(&head) { self.body(framing, take) } else { Ok(()) }
    }

    /// A response to `HEAD`: no body comes, whatever it says of one.
    pub(super) fn response_without_body(&mut self, take: Take<'_>) -> io::Result<()> {
        let head = self.head()?.ok_or_else(cut_short)?;
        take(&head);
        Ok(())
    }

    fn body(&mut self, framing: Framing, take: Take<'_>) -> io::Result<()> {
        match framing {
            Framing::Length(length) => self.stretch(length, take).map(drop),
            Framing::Chunked => loop {
                let end = loop {
                    match find(&self.buffer, b"\r\n") {
                        Some(end) => break end + 2,
                        None if !self.fill()? => return Err(cut_short()),
                        None => {}
                    }
                };
                let size = chunk_size(&self.buffer[..end])?;
                // Size line, data and line break; the last chunk has no trailers here.
                if !self.stretch(end + size + 2, take)? || size == 0 {
                    return Ok(());
                }
            },
            Framing::Close => loop {
                let bytes = std::mem::take(&mut self.buffer);
                if !bytes.is_empty() && !take(&bytes) || !self.fill()? {
                    return Ok(());
                }
            },
        }
    }

    /// Hands out `left` bytes as they come; whether `take` wants more.
    fn stretch(&mut self, mut left: usize, take: Take<'_>) -> io::Result<bool> {
        while left > 0 {
            if self.buffer.is_empty() && !self.fill()? {
                return Err(cut_short());
            }
            let now = left.min(self.buffer.len());
            let more = take(&self.buffer[..now]);
            self.buffer.drain(..now);
            left -= now;
            if !more {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn chunk_size(line: &[u8]) -> io::Result<usize> {
    let digits = line.split(|b| b";\r".contains(b)).next().unwrap_or_default();
    let digits = str::from_utf8(digits).unwrap_or("none");
    usize::from_str_radix(digits.trim(), 16).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))
}

fn framing(head: &[u8]) -> Framing {
    let mut framing = Framing::Close;
    for line in String::from_utf8_lossy(head).to_ascii_lowercase().lines() {
        match line.split_once(':') {
            Some(("content-length", value)) => {
                framing = Framing::Length(value.trim().parse().unwrap_or(0));
            }
            Some(("transfer-encoding", value)) if value.contains("chunked") => {
                return Framing::Chunked;
            }
            _ => {}
        }
    }
    framing
}

/// The head, and the body without its transfer encoding, of a whole message.
pub(crate) fn plain(message: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let end = find(message, b"\r\n\r\n").map_or(message.len(), |end| end + 4);
    let (head, mut rest) = message.split_at(end);
    if !matches!(framing(head), Framing::Chunked) {
        return (head.to_vec(), rest.to_vec());
    }
    let mut body = Vec::new();
    while let Some(line) = find(rest, b"\r\n") {
        let size = chunk_size(&rest[..line + 2]).unwrap_or(0);
        let data = line + 2..line + 2 + size;
        let Some(chunk) = rest.get(data.clone()).filter(|_| size > 0) else { break };
        body.extend_from_slice(chunk);
        rest = rest.get(data.end + 2..).unwrap_or_default();
    }
    (head.to_vec(), body)
}

/// The head for a body of `length` bytes without transfer encoding.
pub(super) fn with_length(head: &[u8], length: usize) -> Vec<u8> {
    let text = String::from_utf8_lossy(head);
    let kept = text.lines().filter(|line| {
        let line = line.to_ascii_lowercase();
        !line.is_empty()
            && !line.starts_with("transfer-encoding:")
            && !line.starts_with("content-length:")
    });
    let mut head: String = kept.map(|line| format!("{line}\r\n")).collect();
    head += &format!("Content-Length: {length}\r\n\r\n");
    head.into_bytes()
}

/// Replaces `from` by `to` everywhere in `bytes`; they are of the same length.
pub(super) fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let mut start = 0;
    while let Some(place) = find(&bytes[start..], from).filter(|_| from.len() == to.len()) {
        bytes[start + place..start + place + to.len()].copy_from_slice(to);
        start += place + to.len();
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    if what.is_empty() {
        return None;
    }
    bytes.windows(what.len()).position(|window| window == what)
}
