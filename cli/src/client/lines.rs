//! A response, line by line.

use std::io;
use std::pin::Pin;

use futures_util::{Stream, StreamExt, TryStreamExt};
use reqwest::Response;

/// The longest line in bytes.
const MAX_LINE: usize = 1 << 20;

/// The lines of a response's body.
pub struct Lines {
    body: Pin<Box<dyn Stream<Item = reqwest::Result<Vec<u8>>>>>,
    /// What came after the last line that was given.
    rest: Vec<u8>,
}

impl Lines {
    pub fn new(response: Response) -> Self {
        let body = response.bytes_stream().map_ok(|chunk| chunk.to_vec());
        Self { body: Box::pin(body), rest: Vec::new() }
    }

    /// The next line without its end, `None` after the last. What is not ended by a newline is no
    /// line. May be dropped and called again.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.rest.iter().position(|&b| b == b'\n') {
                let after = self.rest.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.rest, after);
                line.pop();
                return Ok(Some(line));
            }
            if self.rest.len() > MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without end"));
            }
            match self.body.next().await {
                Some(chunk) => self.rest.extend(chunk.map_err(io::Error::other)?),
                None => return Ok(None),
            }
        }
    }
}
