//! What a test and the programs that it starts say to each other: postcard messages, each with its
//! length before it, on a stream socket.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

use crate::fanotify::testing::{LIMIT, readable};
use crate::queue::wire;
use crate::sys::spawn::{Child, Spawn};

/// Which program this is to be: `ROLE`. Where it is to report: `LINE`.
const ROLE: &str = "HYDRANT_CONFORMANCE_ROLE";
const LINE: &str = "HYDRANT_CONFORMANCE_LINE";

/// One end. An error is the end of a test, or of a program that a test has started.
#[derive(Debug)]
pub(super) struct Line(UnixStream);

impl Line {
    pub(super) fn send(&mut self, message: &impl Serialize) {
        let bytes = wire::encode(message).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        self.0.write_all(&length.to_le_bytes()).unwrap();
        self.0.write_all(&bytes).unwrap();
    }

    /// `None`: the other end is gone.
    pub(super) fn recv<T: DeserializeOwned>(&mut self) -> Option<T> {
        let mut length = [0; 4];
        match self.0.read_exact(&mut length) {
            Err(error) if is_the_end(&error) => return None,
            result => result.expect("no word in time"),
        }
        let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
        self.0.read_exact(&mut bytes).unwrap();
        Some(wire::decode(&bytes).unwrap())
    }

    pub(super) fn try_clone(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }
}

fn is_the_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

/// Where programs report.
#[derive(Debug)]
pub(super) struct Lines {
    path: PathBuf,
    listener: UnixListener,
}

impl Lines {
    pub(super) fn new(directory: &Path, name: &str) -> Self {
        let path = directory.join(name);
        let listener = UnixListener::bind(&path).unwrap();
        Self { path, listener }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn accept(&self) -> Line {
        self.accept_within(LIMIT).expect("a program does not start")
    }

    pub(super) fn accept_within(&self, limit: Duration) -> Option<Line> {
        if !readable(&self.listener, limit) {
            return None;
        }
        let (stream, _) = self.listener.accept().unwrap();
        // what it does may take as long as it likes to wait itself
        stream.set_read_timeout(Some(2 * LIMIT)).unwrap();
        Some(Line(stream))
    }

    /// Starts a program and waits until it reports.
    pub(super) fn start(&self, program: Spawn) -> (Child, Line) {
        (program.start().unwrap(), self.accept())
    }
}

/// What makes this test program run [`program`](super::programs::program) alone.
pub(super) const ARGUMENTS: [&str; 6] = [
    "--exact",
    "queue::conformance::programs::program",
    "--ignored",
    "--nocapture",
    "--test-threads=1",
    "--",
];

/// This test program as another one, which reports to `line`.
pub(super) fn program(role: &str, line: &Path) -> Spawn {
    let spawn =
        Spawn::program(Path::new("/proc/self/exe")).variable(ROLE, role).variable(LINE, line);
    ARGUMENTS.iter().fold(spawn, |spawn, argument| spawn.argument(*argument))
}

/// In such a program: which one it is. `None`: it was not started by a test.
pub(super) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

impl Line {
    /// In such a program: its line to the test. Ends the program if the test is over.
    pub(super) fn connect() -> Self {
        match UnixStream::connect(std::env::var_os(LINE).unwrap()) {
            Ok(stream) => Self(stream),
            Err(_) => std::process::exit(0),
        }
    }
}
