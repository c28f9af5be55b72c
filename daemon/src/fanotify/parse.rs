//! What a `read` of a fanotify fd returned, taken apart. Pure: bytes in, values out.
//!
//! The kernel never writes a malformed event, so a fault here means a kernel that this program
//! does not know. Two things must hold even then: no fd that was installed for us is lost (its
//! reader would wait for ever), and nothing is taken for an fd that is none (closing a stranger's
//! fd is worse than losing one). So every event whose own 24 bytes are sound is returned, whatever
//! follows them.

use std::os::fd::RawFd;

use thiserror::Error;

use super::abi;
use crate::range::ByteRange;

/// The fd of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventFd {
    /// The fd number; never negative.
    Open(RawFd),
    /// None belongs to the event (`FAN_NOFD`): a queue overflow.
    None,
    /// The file could not be opened (`FAN_REPORT_FD_ERROR`). The errno, positive. The kernel has
    /// already denied the access (`fs/notify/fanotify/fanotify_user.c:fanotify_read`).
    Error(i32),
}

/// One event as it stood in the buffer. Owns nothing: its fds are numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawEvent {
    /// What happens, as bits (fanotify(7)).
    pub mask: u64,
    pub fd: EventFd,
    /// The process that caused it, in the reader's pid namespace; 0 if it is not in that.
    pub pid: i32,
    /// What is accessed, rounded out to pages. `None`: there was no such record.
    pub range: Option<ByteRange>,
    /// The pidfds of `FAN_REPORT_PIDFD` records: none or one.
    pub pidfds: Vec<RawFd>,
}

impl RawEvent {
    /// Somebody waits for an answer.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        self.mask & abi::FAN_PERMISSION_EVENTS != 0 && matches!(self.fd, EventFd::Open(_))
    }

    /// Events were lost, and if they were permission events, allowed.
    #[must_use]
    pub fn is_overflow(&self) -> bool {
        self.mask & abi::FAN_Q_OVERFLOW != 0
    }
}

/// Bytes that are not as the kernel's header says. `at`: in bytes from the start of the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Fault {
    #[error("fanotify event at byte {at}: {left} bytes are left, an event has at least 24")]
    Truncated { at: usize, left: usize },
    #[error("fanotify event at byte {at}: layout version {version}, known is version 3")]
    Version { at: usize, version: u8 },
    #[error("fanotify event at byte {at}: its metadata has {len} bytes, expected 24")]
    MetadataLen { at: usize, len: u16 },
    #[error("fanotify event at byte {at}: length {len} with {left} bytes left")]
    EventLen { at: usize, len: u32, left: usize },
    #[error("fanotify info record at byte {at}: length {len} with {left} bytes left in its event")]
    InfoLen { at: usize, len: u16, left: usize },
    #[error(
        "fanotify info record at byte {at}: {left} bytes are left in its event, a record has at least 4"
    )]
    InfoTruncated { at: usize, left: usize },
}

/// The events of one `read`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// In the order of the buffer. An event that a fault was found in is among them if its metadata is
    /// sound: its fd must be answered and closed. What of it was lost shows as `range: None`.
    pub events: Vec<RawEvent>,
    /// So many bytes from the start were without fault.
    pub good: usize,
    /// The first fault. After one in an info record the next event is taken; after one in an
    /// event's own metadata it is not known where that would be, and the rest is given up.
    pub fault: Option<Fault>,
}

/// Takes a buffer of events apart.
#[must_use]
pub fn parse(buffer: &[u8]) -> Batch {
    let mut batch = Batch::default();
    let mut at = 0;
    while at < buffer.len() {
        let step = parse_event(buffer, at);
        batch.events.extend(step.event);
        batch.fault = batch.fault.or(step.fault);
        if batch.fault.is_none() {
            batch.good = at + step.len.unwrap_or(0);
        }
        match step.len {
            Some(len) => at += len,
            None => break,
        }
    }
    batch
}

struct Step {
    event: Option<RawEvent>,
    /// To the next event; `None` when that is not known. At least 24.
    len: Option<usize>,
    fault: Option<Fault>,
}

fn parse_event(buffer: &[u8], at: usize) -> Step {
    let lost = |fault| Step { event: None, len: None, fault: Some(fault) };
    let rest = buffer.get(at..).unwrap_or_default();
    let left = rest.len();
    let Some(metadata) = rest.get(..abi::METADATA_LEN) else {
        return lost(Fault::Truncated { at, left });
    };
    let Metadata { event_len, version, metadata_len, mask, fd, pid } = Metadata::new(metadata);
    if version != abi::METADATA_VERSION {
        return lost(Fault::Version { at, version });
    }
    if usize::from(metadata_len) != abi::METADATA_LEN {
        return lost(Fault::MetadataLen { at, len: metadata_len });
    }
    let mut event = RawEvent { mask, fd, pid, range: None, pidfds: Vec::new() };
    let records = usize::try_from(event_len)
        .ok()
        .filter(|len| *len >= abi::METADATA_LEN)
        .and_then(|len| rest.get(abi::METADATA_LEN..len));
    let Some(records) = records else {
        let fault = Some(Fault::EventLen { at, len: event_len, left });
        return Step { event: Some(event), len: None, fault };
    };
    let fault = parse_records(records, at + abi::METADATA_LEN, &mut event).err();
    Step { event: Some(event), len: Some(abi::METADATA_LEN + records.len()), fault }
}

/// The info records of one event, `at` bytes into the buffer. Those of unknown types are passed over.
fn parse_records(mut records: &[u8], mut at: usize, event: &mut RawEvent) -> Result<(), Fault> {
    while !records.is_empty() {
        let left = records.len();
        let Some(&[kind, _, len_0, len_1]) = records.get(..abi::INFO_HEADER_LEN) else {
            return Err(Fault::InfoTruncated { at, left });
        };
        let len = u16::from_ne_bytes([len_0, len_1]);
        let minimum = match kind {
            abi::INFO_TYPE_PIDFD => abi::INFO_PIDFD_LEN,
            abi::INFO_TYPE_RANGE => abi::INFO_RANGE_LEN,
            _ => abi::INFO_HEADER_LEN,
        };
        let size = usize::from(len);
        let record = records.get(..size).filter(|_| size >= minimum);
        let Some(record) = record else {
            return Err(Fault::InfoLen { at, len, left });
        };
        match kind {
            abi::INFO_TYPE_PIDFD => {
                let fd = i32::from_ne_bytes(field(record, abi::INFO_PIDFD_FD));
                // negative: FAN_NOPIDFD, FAN_EPIDFD or -errno
                event.pidfds.extend((fd >= 0).then_some(fd));
            }
            abi::INFO_TYPE_RANGE => {
                let offset = u64::from_ne_bytes(field(record, abi::INFO_RANGE_OFFSET));
                let count = u64::from_ne_bytes(field(record, abi::INFO_RANGE_COUNT));
                event.range = Some(ByteRange::new(offset, count));
            }
            _ => {}
        }
        records = records.get(size..).unwrap_or_default();
        at += size;
    }
    Ok(())
}

struct Metadata {
    event_len: u32,
    version: u8,
    metadata_len: u16,
    mask: u64,
    fd: EventFd,
    pid: i32,
}

impl Metadata {
    /// From the 24 bytes.
    fn new(bytes: &[u8]) -> Self {
        let [version] = field(bytes, abi::METADATA_VERS);
        let fd = match i32::from_ne_bytes(field(bytes, abi::METADATA_FD)) {
            number if number >= 0 => EventFd::Open(number),
            abi::FAN_NOFD => EventFd::None,
            error => EventFd::Error(error.saturating_neg()),
        };
        Self {
            event_len: u32::from_ne_bytes(field(bytes, abi::METADATA_EVENT_LEN)),
            version,
            metadata_len: u16::from_ne_bytes(field(bytes, abi::METADATA_METADATA_LEN)),
            mask: u64::from_ne_bytes(field(bytes, abi::METADATA_MASK)),
            fd,
            pid: i32::from_ne_bytes(field(bytes, abi::METADATA_PID)),
        }
    }
}

/// `N` bytes from `at`; zeros where a caller has not checked that there are so many.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests;
