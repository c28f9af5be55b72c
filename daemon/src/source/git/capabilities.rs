//! What a server can do: the capability advertisement of protocol version 2 (gitprotocol-v2(5)).

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::pktline::{Packet, text};
use crate::object::HashKind;

/// More lines than this are no advertisement.
const MAX_LINES: usize = 1000;

/// How a server offers `object-info`, which tells the sizes of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectInfo {
    No,
    /// `object-info` alone: git 2.32 to 2.55.
    Bare,
    /// `object-info=size`, the attributes by name: git 2.56 and later.
    Attributes {
        size: bool,
    },
}

/// What a server can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The server's program, such as `git/2.47.3`.
    pub agent: Option<String>,
    pub object_info: ObjectInfo,
    /// `None`: not named, which means SHA-1, and that a request must not name it either.
    pub object_format: Option<HashKind>,
    /// The features of `fetch`, such as `filter`; `None` when there is no `fetch`.
    pub fetch: Option<Vec<String>>,
    pub ls_refs: bool,
}

impl Capabilities {
    /// Whether `object-info` can be asked for sizes.
    #[must_use]
    pub fn tells_sizes(&self) -> bool {
        matches!(self.object_info, ObjectInfo::Bare | ObjectInfo::Attributes { size: true })
    }

    /// Whether `fetch` has this feature.
    #[must_use]
    pub fn fetch_has(&self, feature: &str) -> bool {
        self.fetch.as_ref().is_some_and(|features| features.iter().any(|f| f == feature))
    }
}

/// Why an answer is no advertisement.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NotVersion2 {
    #[error(
        "it answers in version {0} of git's protocol, but version 2 is needed (git 2.18 or later \
         on the server; over ssh also `AcceptEnv GIT_PROTOCOL` in its sshd_config, over HTTP \
         nothing on the way that drops the header Git-Protocol)"
    )]
    Version(u8),
    #[error("it is served as plain files (\"dumb HTTP\"), but a git server is needed")]
    Dumb,
    #[error("{0}")]
    Error(String),
    #[error("it uses the unknown object format {0:?}")]
    ObjectFormat(String),
    #[error("it can't fetch")]
    NoFetch,
    #[error("it does not answer as a git server does ({0})")]
    Other(String),
}

/// Reads an advertisement, packet by packet.
#[derive(Debug, Default)]
pub struct Reader {
    lines: usize,
    state: State,
    capabilities: Option<Capabilities>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    /// After `# service=git-upload-pack`, which some servers put before it.
    Service,
    /// After that line's flush.
    Version,
    Lines,
}

impl Reader {
    /// The next packet; gives the capabilities after the last.
    pub fn packet(&mut self, packet: &Packet) -> Result<Option<Capabilities>, NotVersion2> {
        let line = match packet {
            Packet::Data(line) => text(line),
            Packet::Flush if self.state == State::Service => {
                self.state = State::Version;
                return Ok(None);
            }
            Packet::Flush if self.state == State::Lines => return self.end().map(Some),
            other => return Err(NotVersion2::Other(format!("unexpected {other:?}"))),
        };
        self.lines += 1;
        if self.lines > MAX_LINES {
            return Err(NotVersion2::Other(format!("more than {MAX_LINES} lines")));
        }
        if let Some(message) = line.strip_prefix("ERR ") {
            return Err(NotVersion2::Error(message.to_owned()));
        }
        match self.state {
            State::Start if line == "# service=git-upload-pack" => self.state = State::Service,
            State::Start | State::Version => {
                self.version(&line)?;
                self.state = State::Lines;
            }
            State::Service => return Err(NotVersion2::Other(shown(&line))),
            State::Lines => self.line(&line)?,
        }
        Ok(None)
    }

    fn version(&mut self, line: &str) -> Result<(), NotVersion2> {
        match line {
            "version 2" => {}
            "version 1" => return Err(NotVersion2::Version(1)),
            // `<id> <ref>\0<capabilities>`, the first line of version 0
            _ if line.contains('\0') => return Err(NotVersion2::Version(0)),
            _ => return Err(NotVersion2::Other(shown(line))),
        }
        self.capabilities = Some(Capabilities {
            agent: None,
            object_info: ObjectInfo::No,
            object_format: None,
            fetch: None,
            ls_refs: false,
        });
        Ok(())
    }

    fn line(&mut self, line: &str) -> Result<(), NotVersion2> {
        let Some(capabilities) = &mut self.capabilities else { return Ok(()) };
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (line, None),
        };
        let words = || value.unwrap_or_default().split_ascii_whitespace();
        match name {
            "agent" => capabilities.agent = value.map(str::to_owned),
            "ls-refs" => capabilities.ls_refs = true,
            "fetch" => capabilities.fetch = Some(words().map(str::to_owned).collect()),
            "object-info" if value.is_none() => capabilities.object_info = ObjectInfo::Bare,
            "object-info" => {
                let size = words().any(|attribute| attribute == "size");
                capabilities.object_info = ObjectInfo::Attributes { size };
            }
            "object-format" => {
                let kind = match value {
                    Some("sha1") => HashKind::Sha1,
                    Some("sha256") => HashKind::Sha256,
                    _ => return Err(NotVersion2::ObjectFormat(shown(line))),
                };
                capabilities.object_format = Some(kind);
            }
            _ => {}
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Capabilities, NotVersion2> {
        match self.capabilities.take() {
            Some(capabilities) if capabilities.fetch.is_some() => Ok(capabilities),
            _ => Err(NotVersion2::NoFetch),
        }
    }
}

/// A line of a stranger's, short enough for a message.
fn shown(line: &str) -> String {
    line.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::super::pktline::Decoder;
    use super::*;

    fn read(bytes: &[u8]) -> Result<Capabilities, NotVersion2> {
        let mut decoder = Decoder::default();
        let mut reader = Reader::default();
        decoder.push(bytes);
        while let Some(packet) = decoder.packet().unwrap() {
            if let Some(capabilities) = reader.packet(&packet)? {
                return Ok(capabilities);
            }
        }
        panic!("no end");
    }

    fn lines(lines: &[&str]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in lines {
            match *line {
                "" => bytes.extend_from_slice(b"0000"),
                line => bytes.extend(format!("{:04x}{line}\n", line.len() + 5).bytes()),
            }
        }
        bytes
    }

    #[test]
    fn both_forms_of_object_info() {
        let git_2_47 =
            ["version 2", "agent=git/2.47.3-Linux", "ls-refs=unborn", "fetch=shallow filter"];
        let with = |more: &str| {
            let mut all = git_2_47.to_vec();
            all.extend(["server-option", "object-format=sha256", more, "x-unknown=1 2", ""]);
            read(&lines(&all)).unwrap()
        };
        let bare = with("object-info");
        assert_eq!(bare.object_info, ObjectInfo::Bare);
        assert_eq!(bare.object_format, Some(HashKind::Sha256));
        assert_eq!(bare.agent.as_deref(), Some("git/2.47.3-Linux"));
        assert!(bare.tells_sizes() && bare.ls_refs && bare.fetch_has("filter"));
        assert!(with("object-info=type size").tells_sizes());
        assert!(!with("object-info=type").tells_sizes());
        assert!(!with("object-infos").tells_sizes());
    }

    #[test]
    fn service_line_before_it() {
        let all = ["# service=git-upload-pack", "", "version 2", "fetch", ""];
        assert_eq!(read(&lines(&all)).unwrap().fetch, Some(vec![]));
    }

    #[test]
    fn other_answers_are_named() {
        let id = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";
        let v0 = format!("{id} HEAD\0multi_ack agent=git/2.10");
        assert_eq!(
            read(&lines(&["# service=git-upload-pack", "", &v0, ""])),
            Err(NotVersion2::Version(0))
        );
        assert_eq!(read(&lines(&["version 1", &v0, ""])), Err(NotVersion2::Version(1)));
        assert_eq!(read(&lines(&["ERR no"])), Err(NotVersion2::Error("no".into())));
        assert_eq!(read(&lines(&["version 2", "ls-refs", ""])), Err(NotVersion2::NoFetch));
        assert!(matches!(read(&lines(&["hello"])), Err(NotVersion2::Other(_))));
        assert!(matches!(read(b"0000"), Err(NotVersion2::Other(_))));
        let many = vec!["x"; 2000];
        let many: Vec<_> = [&["version 2"][..], &many].concat();
        assert!(matches!(read(&lines(&many)), Err(NotVersion2::Other(_))));
    }
}
