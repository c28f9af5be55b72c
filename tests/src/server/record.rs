//! What the access log says: requests, and the git commands in them (gitprotocol-v2(5)).

use std::io::Read;

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;

/// One request as the server saw it.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub uri: String,
    pub status: u16,
    /// Bytes from and to the client, heads included.
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub seconds: f64,
    /// It had a header `Authorization`.
    pub authorized: bool,
    pub command: GitCommand,
}

/// The protocol version 2 command in the body of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GitCommand {
    LsRefs,
    Fetch {
        wants: Vec<String>,
        filter: Option<String>,
    },
    ObjectInfo {
        ids: usize,
    },
    /// A `GET`, a push, protocol version 0.
    Other,
}

impl Request {
    /// Object ids after `want`.
    #[must_use]
    pub fn wants(&self) -> &[String] {
        match &self.command {
            GitCommand::Fetch { wants, .. } => wants,
            _ => &[],
        }
    }
}

/// Sums over requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub requests: usize,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

impl<'a> FromIterator<&'a Request> for Totals {
    fn from_iter<I: IntoIterator<Item = &'a Request>>(requests: I) -> Self {
        requests.into_iter().fold(Self::default(), |sum, request| Self {
            requests: sum.requests + 1,
            received_bytes: sum.received_bytes + request.received_bytes,
            sent_bytes: sum.sent_bytes + request.sent_bytes,
        })
    }
}

/// Reads records of `METHOD URI STATUS RECEIVED SENT SECONDS AUTHORIZED [BODY-LENGTH]\nBODY\n`.
pub(super) fn parse(log: &[u8]) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    let mut rest = log;
    while !rest.is_empty() {
        let end = rest.iter().position(|b| *b == b'\n').context("the access log is cut short")?;
        let line = str::from_utf8(&rest[..end]).context("the access log has odd bytes")?;
        rest = &rest[end + 1..];
        let fields: Vec<&str> = line.split(' ').collect();
        let [method, uri, status, received, sent, seconds, authorized, length] = fields[..] else {
            bail!("the access log has the line {line:?}");
        };
        // Without a body there is no length; a body that was refused was not read.
        let length: usize = length.parse().unwrap_or(0);
        let body = match rest.get(..length) {
            Some(body) if rest.get(length) == Some(&b'\n') => body,
            _ => b"",
        };
        rest = rest.get(body.len() + 1..).unwrap_or_default();
        requests.push(Request {
            method: method.to_owned(),
            uri: uri.to_owned(),
            status: status.parse()?,
            received_bytes: received.parse()?,
            sent_bytes: sent.parse()?,
            seconds: seconds.parse()?,
            authorized: authorized == "yes",
            command: command(body)?,
        });
    }
    Ok(requests)
}

fn command(body: &[u8]) -> Result<GitCommand> {
    let mut plain = Vec::new();
    if body.starts_with(&[0x1f, 0x8b]) {
        GzDecoder::new(body).read_to_end(&mut plain).context("a body is not gzip")?;
    } else {
        plain.extend_from_slice(body);
    }
    let lines = packet_lines(&plain);
    let values = |prefix: &str| {
        let values = lines.iter().filter_map(|line| line.strip_prefix(prefix));
        values.map(str::to_owned).collect::<Vec<_>>()
    };
    Ok(match lines.first().map(String::as_str) {
        Some("command=ls-refs") => GitCommand::LsRefs,
        Some("command=fetch") => {
            GitCommand::Fetch { wants: values("want "), filter: values("filter ").pop() }
        }
        Some("command=object-info") => GitCommand::ObjectInfo { ids: values("oid ").len() },
        _ => GitCommand::Other,
    })
}

/// The text of packet lines, without special packets and line breaks, up to the first odd byte.
fn packet_lines(mut bytes: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    while let Some(length) = bytes
        .get(..4)
        .and_then(|digits| str::from_utf8(digits).ok())
        .and_then(|digits| usize::from_str_radix(digits, 16).ok())
    {
        let end = length.max(4);
        let Some(packet) = bytes.get(4..end) else { break };
        if length >= 4 {
            lines.push(String::from_utf8_lossy(packet).trim_end_matches('\n').to_owned());
        }
        bytes = &bytes[end..];
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_with_bodies() {
        let body =
            "0011command=fetch0001000fno-progress000bwant a\n0011filter blob:x0009done\n0000";
        let log = format!(
            "GET /a/info/refs 200 100 50 0.001 yes \n\nPOST /a/x 200 300 70 0.5 no {}\n{body}\n",
            body.len()
        );
        let requests = parse(log.as_bytes()).unwrap();
        assert_eq!(requests.len(), 2);
        assert!(requests[0].authorized && !requests[1].authorized);
        assert_eq!(requests[0].command, GitCommand::Other);
        let filter = Some("blob:x".to_owned());
        assert_eq!(requests[1].command, GitCommand::Fetch { wants: vec!["a".into()], filter });
        let totals: Totals = requests.iter().collect();
        assert_eq!((totals.received_bytes, totals.sent_bytes), (400, 120));
        assert!(parse(b"GET /a").is_err());
    }
}
