//! A git server in front of the git server: it makes blobs by itself, from their numbers, and passes
//! everything else on. Starting `git http-backend` for each fetch would take longer than all that
//! the chaos is about.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use hydrant_daemon::object::HashKind;

use super::content::Content;
use crate::proxy::{HttpReader, plain};
use crate::repository::{MAIN, Repository};

/// The longest data of a packet with a sideband (gitprotocol-common(5)), less than allowed.
const PACKET: usize = 60_000;

/// A blob's type in a pack (gitformat-pack(5)).
const BLOB: u8 = 3;

#[derive(Debug)]
struct Shared {
    server: u16,
    blobs: HashMap<String, (Content, u64)>,
    /// Answers to `GET`, by the request.
    kept: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    lie: AtomicBool,
    made: AtomicU64,
}

/// The server; it serves for as long as the program runs.
#[derive(Debug)]
pub struct Origin {
    port: u16,
    shared: Arc<Shared>,
}

impl Origin {
    /// In front of port `server` of 127.0.0.1, where the repositories are.
    pub fn start(server: u16, repositories: &[(Content, Repository)]) -> Result<Self> {
        let mut blobs = HashMap::new();
        for (content, repository) in repositories {
            let numbers: HashMap<Vec<u8>, u64> =
                (0..content.files).map(|file| (content.path(file).into_bytes(), file)).collect();
            for (id, path) in repository.blobs(MAIN)? {
                let file = *numbers.get(&path).context("a file that nobody made")?;
                blobs.insert(id, (*content, file));
            }
        }
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no port for the origin")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            server,
            blobs,
            kept: Mutex::default(),
            lie: AtomicBool::new(false),
            made: AtomicU64::new(0),
        });
        let origin = Self { port, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                // who is served no more sees the connection closed
                thread::spawn(move || serve(&stream, &shared));
            }
        });
        Ok(origin)
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether another file's content is given for each.
    pub fn lie(&self, lie: bool) {
        self.shared.lie.store(lie, Ordering::SeqCst);
    }

    /// Blobs made so far.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.shared.made.load(Ordering::Relaxed)
    }
}

fn serve(mut client: &TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut requests = HttpReader::new(client.try_clone()?);
    let mut behind: Option<(TcpStream, HttpReader)> = None;
    while let Some(request) = requests.request()? {
        if let Some(files) = wanted(&request, shared) {
            client.write_all(&answer(&files, shared)?)?;
            continue;
        }
        let is_get = request.starts_with(b"GET ");
        let kept = is_get.then(|| lock(&shared.kept).get(&request).cloned()).flatten();
        if let Some(kept) = kept {
            client.write_all(&kept)?;
            continue;
        }
        let (stream, responses) = match &mut behind {
            Some(behind) => behind,
            None => {
                let stream = TcpStream::connect(("127.0.0.1", shared.server))?;
                let responses = HttpReader::new(stream.try_clone()?);
                behind.insert((stream, responses))
            }
        };
        stream.write_all(&request)?;
        let mut whole = Vec::new();
        responses.response(&mut |bytes| {
            whole.extend_from_slice(bytes);
            true
        })?;
        client.write_all(&whole)?;
        if is_get && whole.starts_with(b"HTTP/1.1 200 ") {
            lock(&shared.kept).insert(request, whole);
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The files that a request wants, if it is a fetch of nothing but files of ours.
fn wanted(request: &[u8], shared: &Shared) -> Option<Vec<(Content, u64)>> {
    if !request.starts_with(b"POST ") {
        return None;
    }
    let (_, body) = plain(request);
    let mut rest = &body[..];
    let mut is_fetch = false;
    let mut files = Vec::new();
    while let Some((length, tail)) = rest.split_at_checked(4) {
        let length = usize::from_str_radix(str::from_utf8(length).ok()?, 16).ok()?;
        let (line, next) = tail.split_at_checked(length.saturating_sub(4))?;
        rest = next;
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        is_fetch |= line == b"command=fetch";
        if let Some(id) = line.strip_prefix(b"want ") {
            files.push(*shared.blobs.get(str::from_utf8(id).ok()?)?);
        }
    }
    (is_fetch && !files.is_empty()).then_some(files)
}

fn answer(files: &[(Content, u64)], shared: &Shared) -> io::Result<Vec<u8>> {
    let lie = shared.lie.load(Ordering::SeqCst);
    let mut pack = b"PACK\0\0\0\x02".to_vec();
    pack.extend_from_slice(&(files.len() as u32).to_be_bytes());
    for (content, file) in files {
        let file = if lie { (file + 1) % content.files } else { *file };
        let bytes = content.bytes(file, 0, u64::MAX);
        head(&mut pack, bytes.len());
        // bytes that don't compress: as they are
        let mut encoder = ZlibEncoder::new(&mut pack, Compression::none());
        encoder.write_all(&bytes)?;
        encoder.finish()?;
    }
    shared.made.fetch_add(files.len() as u64, Ordering::Relaxed);
    let mut hasher = HashKind::Sha1.hasher();
    hasher.update(&pack);
    pack.extend_from_slice(hasher.finish().as_bytes());
    let mut body = b"000dpackfile\n".to_vec();
    for part in pack.chunks(PACKET) {
        body.extend_from_slice(format!("{:04x}\x01", part.len() + 5).as_bytes());
        body.extend_from_slice(part);
    }
    body.extend_from_slice(b"0000");
    let mut message = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-result\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    message.append(&mut body);
    Ok(message)
}

/// Type and size of an entry (gitformat-pack(5)).
fn head(pack: &mut Vec<u8>, size: usize) {
    let mut byte = BLOB << 4 | (size & 15) as u8;
    let mut rest = size >> 4;
    while rest > 0 {
        pack.push(byte | 0x80);
        byte = (rest & 0x7f) as u8;
        rest >>= 7;
    }
    pack.push(byte);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::process::Run;
    use crate::scratch::Scratch;
    use crate::server::{GitServer, Offers, url_at};

    /// Stock git takes what it makes.
    #[test]
    fn git_can_fetch_from_it() {
        let scratch = Scratch::new("origin").unwrap();
        let server = GitServer::start(&scratch.make("server").unwrap()).unwrap();
        let content = Content { seed: 11, files: 300 };
        let repository = content.repository().unwrap();
        server.add(&repository, "some", Offers::default()).unwrap();
        let origin = Origin::start(server.port(), &[(content, repository)]).unwrap();
        let url = url_at(origin.port(), "some");
        let git = |arguments: &[&str]| {
            let mut command = Command::new("git");
            command.arg("-C").arg(scratch.path()).args(arguments);
            Run::new(command).check().unwrap().stdout
        };
        git(&["clone", "-q", "--filter=blob:none", "--no-checkout", &url, "tree"]);
        assert_eq!(origin.made(), 0);
        for file in 0..8 {
            // one at a time: a longer request would be compressed, and passed on
            let name = format!("{MAIN}:{}", content.path(file));
            let got = git(&["-C", "tree", "cat-file", "blob", &name]);
            assert!(got == content.bytes(file, 0, u64::MAX), "file {file}");
        }
        assert_eq!(origin.made(), 8);
        origin.lie(true);
        let mut command = Command::new("git");
        command.arg("-C").arg(scratch.path().join("tree"));
        command.args(["cat-file", "blob", &format!("{MAIN}:{}", content.path(9))]);
        assert!(!Run::new(command).output().unwrap().status.success());
    }
}
