//! One direction of a connection, with its delay and bandwidth.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::Quality;

enum Item {
    Bytes(Instant, Vec<u8>),
    /// Tell when everything before has been sent.
    Drained(Sender<()>),
    Finish {
        abrupt: bool,
    },
}

/// Sends bytes in the background, late.
#[derive(Debug, Clone)]
pub(super) struct Link {
    queue: Sender<Item>,
}

impl Link {
    pub(super) fn new(mut stream: TcpStream, quality: Quality) -> Self {
        let (queue, items) = mpsc::channel();
        thread::spawn(move || {
            let mut free_at = Instant::now();
            for item in items {
                match item {
                    Item::Bytes(taken, bytes) => {
                        let mut due = taken + quality.delay;
                        if let Some(rate) = quality.bytes_per_second {
                            let time = bytes.len() as f64 / rate.max(1) as f64;
                            free_at = free_at.max(taken) + Duration::from_secs_f64(time);
                            due = free_at + quality.delay;
                        }
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        if stream.write_all(&bytes).is_err() {
                            return;
                        }
                    }
                    Item::Drained(answer) => {
                        let _ = answer.send(());
                    }
                    Item::Finish { abrupt } => {
                        if !abrupt {
                            let _ = stream.shutdown(Shutdown::Write);
                        }
                        return;
                    }
                }
            }
        });
        Self { queue }
    }

    /// Bytes that are on their way from now. Lost if the connection is gone.
    pub(super) fn send(&self, bytes: Vec<u8>) {
        let _ = self.queue.send(Item::Bytes(Instant::now(), bytes));
    }

    /// Waits until everything is sent.
    pub(super) fn drain(&self) {
        let (send, receive) = mpsc::channel();
        let _ = self.queue.send(Item::Drained(send));
        let _ = receive.recv();
    }

    /// Closes the direction after what is on its way, unless the connection is `abrupt`ly gone.
    pub(super) fn finish(&self, abrupt: bool) {
        let _ = self.queue.send(Item::Finish { abrupt });
    }
}
