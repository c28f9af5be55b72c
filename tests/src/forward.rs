//! A forward proxy, as `http.proxy` names one: the only way to a server whose name nobody else knows.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

#[derive(Debug)]
struct Shared {
    plain: u16,
    tls: u16,
    asked: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// The proxy.
#[derive(Debug)]
pub struct Forward {
    port: u16,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Forward {
    /// Whatever host it is asked for is on this machine: at the port `plain`, and at `tls` for who asks for
    /// a tunnel.
    pub fn start(plain: u16, tls: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no port for a proxy")?;
        let port = listener.local_addr()?.port();
        let shared = Shared { plain, tls, asked: Mutex::default(), stop: AtomicBool::new(false) };
        let shared = Arc::new(shared);
        let context = Arc::clone(&shared);
        let listener = thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if context.stop.load(Ordering::SeqCst) {
                    return;
                }
                let context = Arc::clone(&context);
                // A connection that can't be served is one that the client sees closed.
                thread::spawn(move || serve(client, &context));
            }
        });
        Ok(Self { port, shared, listener: Some(listener) })
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The first line of each connection since the last call.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // it wakes up for a connection
        let woken = TcpStream::connect(("127.0.0.1", self.port)).is_ok();
        if let Some(listener) = self.listener.take().filter(|_| woken) {
            let _ = listener.join();
        }
    }
}

fn serve(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    let tunnel = line.starts_with("CONNECT ");
    shared.asked.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    let port = if tunnel { shared.tls } else { shared.plain };
    let mut server = TcpStream::connect(("127.0.0.1", port))?;
    if tunnel {
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    } else {
        // the server takes whole URLs as well, also in what comes after it
        server.write_all(&head)?;
    }
    let (up, down) = ((client.try_clone()?, server.try_clone()?), (server, client));
    let up = thread::spawn(move || pass(up.0, up.1));
    pass(down.0, down.1);
    let _ = up.join();
    Ok(())
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
