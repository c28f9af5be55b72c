//! What the kernel says of a group in `/proc/self/fdinfo` (`fs/notify/fdinfo.c`).

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::stat::makedev;

use super::{Error, FileId, abi};

/// A group as the kernel shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupInfo {
    /// As given to fanotify_init(2), without `FAN_CLOEXEC` and `FAN_NONBLOCK`.
    pub(super) flags: u32,
    /// Newest first.
    pub marks: Vec<Mark>,
}

/// A mark of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// On a file. On btrfs its `dev` is the filesystem's, which `fstat` doesn't show.
    Inode { file: FileId },
    /// On a mount (the id of `/proc/self/mountinfo`, also of one that is not attached): accesses
    /// through it are ignored, or asked about.
    Mount { id: u32, ignored: bool },
}

impl GroupInfo {
    /// What the kernel says of `group`.
    pub(super) fn of(group: BorrowedFd<'_>) -> Result<Self, Error> {
        let fd = group.as_raw_fd();
        let text = fs_err::read_to_string(format!("/proc/self/fdinfo/{fd}"))
            .map_err(|source| Error::Info { fd, source })?;
        Self::parse(&text).ok_or(Error::NotAGroup { fd })
    }

    /// `None` if that is not a fanotify group's.
    fn parse(text: &str) -> Option<Self> {
        let mut flags = None;
        let mut marks = Vec::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("fanotify ")) {
            let number = |key: &str| {
                let mut words = line.split_whitespace();
                let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix(':'))?;
                u64::from_str_radix(value, 16).ok()
            };
            let small = |key: &str| u32::try_from(number(key)?).ok();
            if let Some(value) = small("flags") {
                flags = Some(value);
            } else if let (Some(ino), Some(sdev)) = (number("ino"), number("sdev")) {
                // the kernel's own dev_t: 12 bits and 20
                let dev = makedev(sdev >> 20, sdev & 0xf_ffff);
                marks.push(Mark::Inode { file: FileId { dev, ino } });
            } else if let Some(id) = small("mnt_id") {
                let ignored = number("ignored_mask").unwrap_or(0) & abi::FAN_PRE_ACCESS != 0;
                marks.push(Mark::Mount { id, ignored });
            }
        }
        Some(Self { flags: flags?, marks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_with_two_marks() {
        let text = "pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t1057\n\
            fanotify flags:2038 event-flags:88802\n\
            fanotify mnt_id:5a mflags:440 mask:0 ignored_mask:100000\n\
            fanotify ino:1f sdev:800001 mflags:0 mask:100000 ignored_mask:0 fhandle-bytes:8 \
            fhandle-type:1 f_handle:1f00000000000000\n";
        let file = FileId { dev: makedev(8, 1), ino: 0x1f };
        let marks = vec![Mark::Mount { id: 0x5a, ignored: true }, Mark::Inode { file }];
        assert_eq!(GroupInfo::parse(text), Some(GroupInfo { flags: 0x2038, marks }));
    }

    #[test]
    fn a_file_is_no_group() {
        assert_eq!(GroupInfo::parse("pos:\t0\nflags:\t0100002\nmnt_id:\t32\n"), None);
    }
}
