//! A slow and broken network: a proxy in front of a test's server, with a delay, a bandwidth, byte
//! counters, and faults that are switched on and off while it runs.
//!
//! The kernels at hand have no netem. Faults are HTTP/1.1-aware: they hit the next so many `POST`
//! requests, or all from now on, also on connections that are open already.

mod http;
mod link;

use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, poll};

pub(crate) use http::{Reader as HttpReader, plain};
use link::{Bottleneck, Link};

use crate::server::record;

/// Something that goes wrong with a request or its response. Numbers of bytes count from the start
/// of the response's body as the server meant it, without transfer encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The request is not passed on; this is the answer. `headers` are whole lines.
    Status { code: u16, headers: Vec<String> },
    /// The connection is reset once so many bytes of the response, head included, have passed.
    ResetAfter(u64),
    /// Nothing more comes after so many bytes of the response, head included; the connection stays.
    StallAfter(u64),
    /// The body ends after so many bytes, and everything in HTTP says that it is whole.
    CutAfter(usize),
    /// One bit of the byte at this place is wrong; everything else is right.
    FlipAt(usize),
    /// Every occurrence of `from` in the request is passed on as `to`, of the same length: the
    /// server answers another question.
    Rewrite { from: Vec<u8>, to: Vec<u8> },
    /// The request goes out only after this time.
    Late(Duration),
    /// A request for objects by their ids, of which one is in the set, is answered as by a server whose settings are
    /// against that; any other passes.
    Withhold(Arc<HashSet<String>>),
}

impl Fault {
    /// An answer with this status and nothing else.
    #[must_use]
    pub fn status(code: u16) -> Self {
        Self::Status { code, headers: Vec::new() }
    }
}

/// How the way to the server is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quality {
    /// One way; a round trip takes twice that.
    pub delay: Duration,
    /// Each way, of each connection; unlimited if `None`.
    pub bytes_per_second: Option<u64>,
    /// Each way, of all connections together; unlimited if `None`.
    pub shared_bytes_per_second: Option<u64>,
}

impl Quality {
    /// Half of `round_trip` each way.
    #[must_use]
    pub fn round_trip(round_trip: Duration) -> Self {
        Self { delay: round_trip / 2, ..Self::default() }
    }
}

/// What has passed, towards the server (`up`) and back (`down`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    pub up_bytes: u64,
    pub down_bytes: u64,
    pub connections: u64,
    pub requests: u64,
    /// Requests that met a fault.
    pub faults: u64,
}

#[derive(Debug, Default)]
struct Plan {
    next: Option<(Fault, u64)>,
    always: Option<Fault>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    quality: Quality,
    plan: Mutex<Plan>,
    refuse: AtomicBool,
    hold: AtomicBool,
    stop: AtomicBool,
    up: Arc<Bottleneck>,
    down: Arc<Bottleneck>,
    up_bytes: AtomicU64,
    connections: AtomicU64,
    requests: AtomicU64,
    faults: AtomicU64,
    /// Requests that were answered by [`Fault::Withhold`].
    withheld: AtomicU64,
    /// Both sides of open connections, to cut them.
    open: Mutex<Vec<TcpStream>>,
}

/// The proxy. Its connections are cut when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// In front of port `server` of 127.0.0.1.
    pub fn start(server: u16, quality: Quality) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no port for a proxy")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            server: SocketAddr::from(([127, 0, 0, 1], server)),
            quality,
            plan: Mutex::default(),
            refuse: AtomicBool::new(false),
            hold: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            up: Arc::default(),
            down: Arc::default(),
            up_bytes: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            withheld: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let context = Arc::clone(&shared);
        let listener = thread::spawn(move || accept(listener, port, &context));
        Ok(Self { port, shared, listener: Some(listener) })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let shared = &self.shared;
        Traffic {
            up_bytes: shared.up_bytes.load(Ordering::Relaxed),
            down_bytes: shared.down.passed.load(Ordering::Relaxed),
            connections: shared.connections.load(Ordering::Relaxed),
            requests: shared.requests.load(Ordering::Relaxed),
            faults: shared.faults.load(Ordering::Relaxed),
        }
    }

    /// How many requests were answered by [`Fault::Withhold`].
    #[must_use]
    pub fn withheld(&self) -> u64 {
        self.shared.withheld.load(Ordering::Relaxed)
    }

    /// The next `count` `POST` requests meet `fault`.
    pub fn fail_next(&self, count: u64, fault: Fault) {
        locked(&self.shared.plan).next = Some((fault, count));
    }

    /// Every `POST` request meets `fault` until [`heal`](Self::heal).
    pub fn fail_always(&self, fault: Fault) {
        locked(&self.shared.plan).always = Some(fault);
    }

    /// Open connections are reset and new ones refused by the kernel until [`heal`](Self::heal).
    pub fn refuse(&self) {
        self.shared.refuse.store(true, Ordering::SeqCst);
        self.cut();
        // The thread that accepts looks every 20 ms; what it took until then is cut as well.
        thread::sleep(Duration::from_millis(80));
        self.cut();
    }

    /// Requests wait in the proxy until [`heal`](Self::heal).
    pub fn hold(&self) {
        self.shared.hold.store(true, Ordering::SeqCst);
    }

    /// Open connections are reset.
    pub fn cut(&self) {
        for stream in locked(&self.shared.open).drain(..) {
            reset(&stream);
        }
    }

    /// Everything works from here on. What stalls already stays so.
    pub fn heal(&self) {
        *locked(&self.shared.plan) = Plan::default();
        self.shared.hold.store(false, Ordering::SeqCst);
        if self.shared.refuse.swap(false, Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(80));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.cut();
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

/// Sends RST, whoever else has the socket open: a connection to "no address" is what breaks one off
/// (connect(2), `AF_UNSPEC`).
fn reset(stream: &TcpStream) {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let size = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: the address is valid during the call and of the size that is given.
    unsafe { libc::connect(stream.as_raw_fd(), &raw const nowhere, size) };
}

fn accept(listener: TcpListener, port: u16, shared: &Arc<Shared>) {
    let mut listener = Some(listener);
    while !shared.stop.load(Ordering::SeqCst) {
        let refuse = shared.refuse.load(Ordering::SeqCst);
        if refuse {
            listener = None;
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        let Some(open) = &listener else {
            listener = TcpListener::bind(("127.0.0.1", port)).ok();
            continue;
        };
        let mut ready = [PollFd::new(open.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ready, 20_u16), Ok(1)) {
            continue;
        }
        if let Ok((client, _)) = open.accept() {
            shared.connections.fetch_add(1, Ordering::Relaxed);
            let shared = Arc::clone(shared);
            // A connection that can't be served is one that the client sees closed.
            thread::spawn(move || serve(client, &shared));
        }
    }
}

/// What the two directions of a connection tell each other.
#[derive(Debug, Default)]
struct Connection {
    /// The fault of the response that comes next.
    response: Mutex<Option<Fault>>,
    /// It is to a `HEAD` request.
    is_head: AtomicBool,
    /// The client sends nothing any more.
    closed: AtomicBool,
}

fn serve(client: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    let server = TcpStream::connect(shared.server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        locked(&shared.open).push(stream.try_clone()?);
    }
    let ports = [client.peer_addr()?, server.local_addr()?];
    // The round trip of the TCP handshake, which the kernel did without us.
    thread::sleep(shared.quality.delay * 2);
    let connection = Arc::new(Connection::default());
    let up = Link::new(server.try_clone()?, shared.quality, Arc::clone(&shared.up));
    let down = Link::new(client.try_clone()?, shared.quality, Arc::clone(&shared.down));
    let back = {
        let (shared, connection) = (Arc::clone(shared), Arc::clone(&connection));
        let (down, client) = (down.clone(), client.try_clone()?);
        let server = server.try_clone()?;
        thread::spawn(move || {
            let end = responses(server, &client, &down, &shared, &connection);
            down.finish(matches!(end, Ok(End::Reset)));
        })
    };
    let _ = requests(&client, &up, &down, shared, &connection);
    connection.closed.store(true, Ordering::SeqCst);
    up.finish(false);
    let _ = back.join();
    // it is over: a proxy that serves for long must not gather them
    let is_over = |stream: &TcpStream| {
        let is_ours = |end: SocketAddr| ports.contains(&end);
        stream.peer_addr().map_or(true, is_ours) || stream.local_addr().is_ok_and(is_ours)
    };
    locked(&shared.open).retain(|stream| !is_over(stream));
    Ok(())
}

/// Client to server.
fn requests(
    client: &TcpStream,
    up: &Link,
    down: &Link,
    shared: &Shared,
    connection: &Connection,
) -> io::Result<()> {
    let mut reader = http::Reader::new(client.try_clone()?);
    while let Some(mut request) = reader.request()? {
        shared.requests.fetch_add(1, Ordering::Relaxed);
        shared.up_bytes.fetch_add(request.len() as u64, Ordering::Relaxed);
        while shared.hold.load(Ordering::SeqCst) && !shared.stop.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        let fault = request.starts_with(b"POST ").then(|| take_fault(shared)).flatten();
        match fault {
            Some(Fault::Status { code, headers }) => {
                let mut head = format!("HTTP/1.1 {code} Fault\r\nContent-Length: 0\r\n");
                headers.iter().for_each(|line| head += &format!("{line}\r\n"));
                head += "\r\n";
                down.send(head.into_bytes());
                continue;
            }
            Some(Fault::Rewrite { from, to }) => http::replace(&mut request, &from, &to),
            Some(Fault::Withhold(ids)) => {
                let wants = record::wants(&plain(&request).1);
                if let Some(id) = wants.iter().find(|id| ids.contains(*id)) {
                    shared.withheld.fetch_add(1, Ordering::Relaxed);
                    let line = format!("ERR upload-pack: not our ref {id}");
                    let body = format!("{:04x}{line}", line.len() + 4);
                    let head = b"HTTP/1.1 200 OK\r\n\
                        Content-Type: application/x-git-upload-pack-result\r\n\r\n";
                    let answer = [http::with_length(head, body.len()), body.into_bytes()].concat();
                    down.send(answer);
                    continue;
                }
            }
            Some(Fault::Late(time)) => thread::sleep(time),
            fault => *locked(&connection.response) = fault,
        }
        connection.is_head.store(request.starts_with(b"HEAD "), Ordering::SeqCst);
        up.send(request);
    }
    Ok(())
}

fn take_fault(shared: &Shared) -> Option<Fault> {
    let mut plan = locked(&shared.plan);
    let fault = match plan.next.take() {
        Some((fault, count)) => {
            if count > 1 {
                plan.next = Some((fault.clone(), count - 1));
            }
            Some(fault)
        }
        None => plan.always.clone(),
    };
    if fault.is_some() {
        shared.faults.fetch_add(1, Ordering::Relaxed);
    }
    fault
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    Closed,
    Reset,
}

/// Server to client.
fn responses(
    server: TcpStream,
    client: &TcpStream,
    down: &Link,
    shared: &Shared,
    connection: &Connection,
) -> io::Result<End> {
    let pass = |bytes: &[u8]| down.send(bytes.to_vec());
    let mut reader = http::Reader::new(server);
    loop {
        let Some(first) = reader.peek()? else { return Ok(End::Closed) };
        debug_assert!(!first.is_empty());
        // A byte of the response is there, so the request has been seen, and its fault is known.
        let fault = locked(&connection.response).take();
        match fault {
            None
            | Some(
                Fault::Status { .. } | Fault::Rewrite { .. } | Fault::Late(_) | Fault::Withhold(_),
            ) => {
                let mut there = true;
                let mut take = |bytes: &[u8]| {
                    there = pass(bytes);
                    there
                };
                if connection.is_head.load(Ordering::SeqCst) {
                    reader.response_without_body(&mut take)?;
                } else {
                    reader.response(&mut take)?;
                }
                if !there {
                    return Ok(End::Closed);
                }
            }
            Some(fault @ (Fault::ResetAfter(count) | Fault::StallAfter(count))) => {
                if !pass_some(&mut reader, count, &pass)? {
                    continue;
                }
                down.drain();
                if matches!(fault, Fault::ResetAfter(_)) {
                    reset(client);
                    return Ok(End::Reset);
                }
                wait_until_closed(connection, shared);
                return Ok(End::Closed);
            }
            Some(fault @ (Fault::CutAfter(_) | Fault::FlipAt(_))) => {
                let mut whole = Vec::new();
                reader.response(&mut |bytes| {
                    whole.extend_from_slice(bytes);
                    true
                })?;
                let (head, mut body) = plain(&whole);
                match fault {
                    Fault::CutAfter(count) => body.truncate(count),
                    Fault::FlipAt(place) => {
                        if let Some(byte) = body.get_mut(place) {
                            *byte ^= 0x10;
                        }
                    }
                    _ => {}
                }
                pass(&http::with_length(&head, body.len()));
                pass(&body);
            }
        }
    }
}

/// Passes up to `count` bytes of a response; whether there would have been more.
fn pass_some(
    reader: &mut http::Reader,
    count: u64,
    pass: &dyn Fn(&[u8]) -> bool,
) -> io::Result<bool> {
    let mut left = usize::try_from(count).unwrap_or(usize::MAX);
    let mut more = false;
    reader.response(&mut |bytes| {
        let now = left.min(bytes.len());
        if now > 0 {
            pass(&bytes[..now]);
        }
        left -= now;
        more = now < bytes.len();
        !more
    })?;
    Ok(more)
}

fn wait_until_closed(connection: &Connection, shared: &Shared) {
    while !shared.stop.load(Ordering::SeqCst) && !connection.closed.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::time::Instant;

    use super::*;

    /// Answers every request with `body`, in two chunks.
    fn server(body: &'static str) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap());
                    loop {
                        let mut line = String::new();
                        let mut length = 0;
                        while lines.read_line(&mut line).unwrap_or(0) > 2 {
                            if let Some(value) = line.strip_prefix("Content-Length: ") {
                                length = value.trim().parse().unwrap();
                            }
                            line.clear();
                        }
                        if line.is_empty() {
                            return;
                        }
                        let mut asked = vec![0; length];
                        lines.read_exact(&mut asked).unwrap();
                        let (a, b) = body.split_at(body.len() / 2);
                        let mut answer =
                            String::from("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
                        for part in [a, b, &String::from_utf8(asked).unwrap(), ""] {
                            if !part.is_empty() {
                                answer += &format!("{:x}\r\n{part}\r\n", part.len());
                            }
                        }
                        stream.write_all((answer + "0\r\n\r\n").as_bytes()).unwrap();
                    }
                });
            }
        });
        port
    }

    fn ask(stream: &mut TcpStream, body: &str) -> io::Result<(String, String)> {
        let head = format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all((head + body).as_bytes())?;
        let mut whole = Vec::new();
        http::Reader::new(stream.try_clone()?).response(&mut |bytes| {
            whole.extend_from_slice(bytes);
            true
        })?;
        let (head, body) = plain(&whole);
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ok((text(head).lines().next().unwrap_or_default().to_owned(), text(body)))
    }

    fn connect(proxy: &Proxy) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        stream
    }

    #[test]
    fn passes_counts_and_delays() {
        let proxy =
            Proxy::start(server("hello"), Quality::round_trip(Duration::from_millis(40))).unwrap();
        let mut stream = connect(&proxy);
        ask(&mut stream, "").unwrap();
        let started = Instant::now();
        assert_eq!(ask(&mut stream, "you").unwrap().1, "helloyou");
        let elapsed = started.elapsed().as_millis();
        assert!((40..120).contains(&elapsed), "{elapsed} ms");
        let traffic = proxy.traffic();
        assert_eq!((traffic.connections, traffic.requests, traffic.faults), (1, 2, 0));
        assert!(traffic.up_bytes > 80 && traffic.down_bytes > 100, "{traffic:?}");
    }

    #[test]
    fn an_answer_to_head_has_no_body() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy =
            Proxy::start(listener.local_addr().unwrap().port(), Quality::default()).unwrap();
        let body = "x".repeat(100);
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n";
        let said = [answer.to_owned(), format!("{answer}{body}")];
        let server = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut requests = http::Reader::new(stream.try_clone().unwrap());
            for answer in said {
                requests.request().unwrap().unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut stream = connect(&proxy);
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        for (method, length) in [("HEAD", answer.len()), ("GET", answer.len() + body.len())] {
            stream.write_all(format!("{method} / HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
            let mut read = vec![0; length];
            stream.read_exact(&mut read).unwrap();
            assert!(read.starts_with(answer.as_bytes()));
        }
        server.join().unwrap();
    }

    #[test]
    fn faults_hit_the_next_requests_and_go() {
        let proxy = Proxy::start(server("hello"), Quality::default()).unwrap();
        let mut stream = connect(&proxy);
        let headers = vec!["Retry-After: 1".to_owned()];
        proxy.fail_next(2, Fault::Status { code: 429, headers });
        for _ in 0..2 {
            assert_eq!(ask(&mut stream, "a").unwrap().0, "HTTP/1.1 429 Fault");
        }
        assert_eq!(ask(&mut stream, "a").unwrap().1, "helloa");
        proxy.fail_next(1, Fault::CutAfter(3));
        assert_eq!(ask(&mut stream, "a").unwrap().1, "hel");
        proxy.fail_next(1, Fault::FlipAt(1));
        assert_eq!(ask(&mut stream, "").unwrap().1, "hullo");
        proxy.fail_next(1, Fault::Rewrite { from: b"ab".to_vec(), to: b"xy".to_vec() });
        assert_eq!(ask(&mut stream, "cabd").unwrap().1, "hellocxyd");
        assert_eq!(proxy.traffic().faults, 5);
    }

    #[test]
    fn connections_share_the_way() {
        let body: &'static str = "x".repeat(100_000).leak();
        let quality = Quality { shared_bytes_per_second: Some(1_000_000), ..Quality::default() };
        let proxy = Proxy::start(server(body), quality).unwrap();
        let started = Instant::now();
        thread::scope(|scope| {
            for _ in 0..3 {
                let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
                scope.spawn(move || assert_eq!(ask(&mut stream, "").unwrap().1.len(), 100_000));
            }
        });
        let elapsed = started.elapsed();
        assert!(elapsed >= Duration::from_millis(300), "{elapsed:?}");
        assert!(proxy.traffic().down_bytes > 300_000);
    }

    #[test]
    fn resets_stalls_and_refuses() {
        let proxy = Proxy::start(server("hello"), Quality::default()).unwrap();
        proxy.fail_next(1, Fault::ResetAfter(30));
        let error = ask(&mut connect(&proxy), "a").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
        proxy.fail_next(1, Fault::StallAfter(30));
        let error = ask(&mut connect(&proxy), "a").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        assert_eq!(ask(&mut connect(&proxy), "a").unwrap().1, "helloa");
        let mut open = connect(&proxy);
        proxy.refuse();
        let error = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
        assert!(ask(&mut open, "a").is_err());
        proxy.heal();
        assert_eq!(ask(&mut connect(&proxy), "a").unwrap().1, "helloa");
    }
}
