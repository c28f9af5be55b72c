//! One direction of a connection, with its delay and bandwidth.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Quality;

/// As much as this can wait where all connections meet; then their senders do.
const BACKLOG: Duration = Duration::from_millis(10);

/// What all connections share, in one direction.
#[derive(Debug, Default)]
pub(super) struct Bottleneck {
    free_at: Mutex<Option<Instant>>,
    /// Bytes that have left it.
    pub(super) passed: AtomicU64,
}

impl Bottleneck {
    /// When so many bytes that come `now` are through. They are behind all that came before.
    fn take(&self, now: Instant, bytes: usize, rate: u64) -> Instant {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let time = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let due = free_at.unwrap_or(now).max(now) + time;
        *free_at = Some(due);
        due
    }
}

enum Item {
    /// Not before that time.
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
    quality: Quality,
    bottleneck: Arc<Bottleneck>,
    broken: Arc<AtomicBool>,
}

impl Link {
    pub(super) fn new(
        mut stream: TcpStream,
        quality: Quality,
        bottleneck: Arc<Bottleneck>,
    ) -> Self {
        let (queue, items) = mpsc::channel();
        let broken = Arc::new(AtomicBool::new(false));
        let link = Self { queue, quality, bottleneck, broken };
        let (bottleneck, broken) = (Arc::clone(&link.bottleneck), Arc::clone(&link.broken));
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
                        // before anybody can have seen them
                        bottleneck.passed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                        if stream.write_all(&bytes).is_err() {
                            broken.store(true, Ordering::SeqCst);
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
        link
    }

    /// Bytes that are on their way from now. Lost if the connection is gone: then, sooner or later, it is false.
    pub(super) fn send(&self, bytes: Vec<u8>) -> bool {
        let now = Instant::now();
        let Some(rate) = self.quality.shared_bytes_per_second else {
            let _ = self.queue.send(Item::Bytes(now, bytes));
            return true;
        };
        let due = self.bottleneck.take(now, bytes.len(), rate);
        let _ = self.queue.send(Item::Bytes(due, bytes));
        thread::sleep((due - now).saturating_sub(BACKLOG));
        !self.broken.load(Ordering::SeqCst)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_wait_for_what_came_before() {
        let bottleneck = Bottleneck::default();
        let start = Instant::now();
        let after = |due: Instant| (due - start).as_millis();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(after(bottleneck.take(start, 1000, 10_000)), 100);
        assert_eq!(after(bottleneck.take(at(50), 2000, 10_000)), 300);
        assert_eq!(after(bottleneck.take(at(900), 500, 10_000)), 950, "idle time is not saved up");
    }
}
