//! The numbers and layouts of the kernel interface, in one table, each with its source.
//!
//! "uapi" is `include/uapi/linux/fanotify.h` of Linux 6.18. What libc or fanotify-rs have is taken
//! from there and only named here; the rest is not in any released header of a C library yet.

use fanotify::low_level;

// Flags of fanotify_init(2).

pub(super) const FAN_CLOEXEC: u32 = low_level::FAN_CLOEXEC;
pub(super) const FAN_NONBLOCK: u32 = low_level::FAN_NONBLOCK;
/// Events before content is read or written; the class that the kernel asks first.
pub(super) const FAN_CLASS_PRE_CONTENT: u32 = low_level::FAN_CLASS_PRE_CONTENT;
/// A queue that overflows *allows* what it drops.
pub(super) const FAN_UNLIMITED_QUEUE: u32 = low_level::FAN_UNLIMITED_QUEUE;
pub(super) const FAN_UNLIMITED_MARKS: u32 = low_level::FAN_UNLIMITED_MARKS;
/// An event whose file cannot be opened is reported with `-errno` in place of the fd. uapi, Linux 6.13.
pub(super) const FAN_REPORT_FD_ERROR: u32 = 0x0000_2000;
/// The group outlives its reader: [`FAN_IOC_OPEN_QUEUE_FD`] opens a queue fd, and what was read from
/// one and not answered returns to the queue at its last close. Patch series "fanotify:
/// restartable permission events" (linux-fsdevel), in no release. A kernel without it says `EINVAL`.
pub(super) const FAN_RESTARTABLE_EVENTS: u32 = 0x0000_8000;

/// `_IO('F', 0xF0)`: opens the queue fd of a restartable group. No argument, returns the fd. The
/// same series.
pub(super) const FAN_IOC_OPEN_QUEUE_FD: (u8, u8) = (b'F', 0xF0);

// Flags of fanotify_mark(2).

pub(super) const FAN_MARK_ADD: u32 = low_level::FAN_MARK_ADD;
pub(super) const FAN_MARK_REMOVE: u32 = low_level::FAN_MARK_REMOVE;
pub(super) const FAN_MARK_INODE: u32 = low_level::FAN_MARK_INODE;
pub(super) const FAN_MARK_MOUNT: u32 = low_level::FAN_MARK_MOUNT;
/// The mask is ignored, also after the file has changed; the only kind of ignore mark that a mount
/// takes. uapi, Linux 6.0.
pub(super) const FAN_MARK_IGNORE_SURV: u32 = 0x0000_0400 | low_level::FAN_MARK_IGNORED_SURV_MODIFY;

// Bits of an event's mask.

/// Content is about to be read or written. uapi, Linux 6.14.
pub(super) const FAN_PRE_ACCESS: u64 = 0x0010_0000;
pub(super) const FAN_Q_OVERFLOW: u64 = low_level::FAN_Q_OVERFLOW;
/// The events that wait for an answer: `FANOTIFY_PERM_EVENTS` of `include/linux/fanotify.h`.
pub(super) const FAN_PERMISSION_EVENTS: u64 = low_level::FAN_OPEN_PERM
    | low_level::FAN_ACCESS_PERM
    | low_level::FAN_OPEN_EXEC_PERM
    | FAN_PRE_ACCESS;

// struct fanotify_event_metadata (uapi): u32 event_len, u8 vers, u8 reserved, u16 metadata_len,
// u64 mask, s32 fd, s32 pid. `event_len` counts the info records that follow.

pub(super) const METADATA_VERSION: u8 = low_level::FANOTIFY_METADATA_VERSION;
pub(super) const METADATA_LEN: usize = 24;
pub(super) const METADATA_EVENT_LEN: usize = 0;
pub(super) const METADATA_VERS: usize = 4;
pub(super) const METADATA_METADATA_LEN: usize = 6;
pub(super) const METADATA_MASK: usize = 8;
pub(super) const METADATA_FD: usize = 16;
pub(super) const METADATA_PID: usize = 20;

/// No fd belongs to the event.
pub(super) const FAN_NOFD: i32 = low_level::FAN_NOFD;

// struct fanotify_event_info_header (uapi): u8 info_type, u8 pad, u16 len. `len` counts the header.

pub(super) const INFO_HEADER_LEN: usize = 4;

/// struct fanotify_event_info_pidfd: header, s32 pidfd.
pub(super) const INFO_TYPE_PIDFD: u8 = 4;
pub(super) const INFO_PIDFD_LEN: usize = 8;
pub(super) const INFO_PIDFD_FD: usize = 4;

/// struct fanotify_event_info_range (uapi, Linux 6.14): header, u32 pad, u64 offset, u64 count.
pub(super) const INFO_TYPE_RANGE: u8 = 6;
pub(super) const INFO_RANGE_LEN: usize = 24;
pub(super) const INFO_RANGE_OFFSET: usize = 8;
pub(super) const INFO_RANGE_COUNT: usize = 16;

// struct fanotify_response (uapi): s32 fd, u32 response.

pub(super) const RESPONSE_LEN: usize = 8;
pub(super) const FAN_ALLOW: u32 = low_level::FAN_ALLOW;
pub(super) const FAN_DENY: u32 = low_level::FAN_DENY;
/// The errno of a denial is in the top byte: `FAN_DENY_ERRNO` of uapi, Linux 6.14.
pub(super) const FAN_ERRNO_SHIFT: u32 = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_libc() {
        assert_eq!(METADATA_LEN, size_of::<libc::fanotify_event_metadata>());
        assert_eq!(METADATA_VERSION, libc::FANOTIFY_METADATA_VERSION);
        assert_eq!(METADATA_VERS, std::mem::offset_of!(libc::fanotify_event_metadata, vers));
        assert_eq!(
            METADATA_METADATA_LEN,
            std::mem::offset_of!(libc::fanotify_event_metadata, metadata_len)
        );
        assert_eq!(METADATA_MASK, std::mem::offset_of!(libc::fanotify_event_metadata, mask));
        assert_eq!(METADATA_FD, std::mem::offset_of!(libc::fanotify_event_metadata, fd));
        assert_eq!(METADATA_PID, std::mem::offset_of!(libc::fanotify_event_metadata, pid));
        assert_eq!(RESPONSE_LEN, size_of::<libc::fanotify_response>());
        assert_eq!(FAN_MARK_IGNORE_SURV, libc::FAN_MARK_IGNORE_SURV);
        assert_eq!(INFO_TYPE_PIDFD, libc::FAN_EVENT_INFO_TYPE_PIDFD);
        assert_eq!(FAN_DENY, libc::FAN_DENY);
    }
}
