//! Against the running kernel. Inode marks on files of our own only; readers are processes of their
//! own, because a thread that waits for this process would never end.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::uio::{pread, pwrite};
use tempfile::TempDir;

use super::testing::*;
use super::*;

const SIZE: u64 = 1 << 20;

struct Marked {
    // before the directory: what waits is let go before its files are removed
    channel: Channel,
    group: Group,
    path: PathBuf,
    file: std::fs::File,
    directory: TempDir,
}

fn marked() -> Marked {
    let directory = directory();
    let path = sparse(directory.path(), "segment", SIZE);
    let file = std::fs::File::open(&path).unwrap();
    let group = Group::stock().unwrap();
    mark::add(&group, file.as_fd()).unwrap();
    Marked { channel: group.channel(), group, path, file, directory }
}

#[test]
#[ignore = "needs root"]
fn root_a_reader_gets_what_was_filled_in() {
    let marked = marked();
    let reader = Reader::start(&marked.path, range(8192, 4096));
    let event = event(&marked.channel);
    assert_eq!(event.range(), Some(range(8192, 4096)));
    assert_eq!(event.pid(), reader.pid());
    assert_eq!(event.mask(), abi::FAN_PRE_ACCESS);
    assert_eq!(event.file().unwrap(), (FileId::of(&marked.file).unwrap(), SIZE));
    let content: Vec<u8> = (0..4096_u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(pwrite(&event, &content, 8192).unwrap(), 4096);
    let mut back = vec![0; 4096];
    assert_eq!(pread(&event, &mut back, 8192).unwrap(), 4096);
    assert_eq!(back, content);
    assert!(is_quiet(&marked.channel), "the event's own fd raises none");
    assert_eq!(event.answer(Verdict::Allow).unwrap(), Answered::Delivered);
    let outcome = reader.finish();
    assert!(outcome.status.success(), "{}", outcome.message);
    assert_eq!(outcome.bytes, content);
}

#[test]
#[ignore = "needs root"]
fn root_the_range_is_in_whole_pages() {
    let marked = marked();
    let reader = Reader::start(&marked.path, range(5000, 100));
    let event = event(&marked.channel);
    assert_eq!(event.range(), Some(range(4096, 4096)));
    let _ = event.answer(Verdict::Allow).unwrap();
    assert_eq!(reader.finish().bytes, [0; 100]);
}

#[test]
#[ignore = "needs root"]
fn root_every_errno_reaches_the_reader() {
    let marked = marked();
    for errno in DenyErrno::ALL {
        let reader = Reader::start(&marked.path, range(0, 4096));
        let answered = event(&marked.channel).answer(Verdict::Deny(errno)).unwrap();
        assert_eq!(answered, Answered::Delivered);
        let outcome = reader.finish();
        assert!(!outcome.status.success());
        let name = nix::errno::Errno::from_raw(errno.number()).desc();
        // nix's words and the C library's differ for a few
        let text = match errno {
            DenyErrno::Ebusy => "Device or resource busy",
            DenyErrno::Eagain => "Resource temporarily unavailable",
            DenyErrno::Edquot => "Disk quota exceeded",
            DenyErrno::Eio => "Input/output error",
            _ => name,
        };
        assert!(outcome.message.contains(text), "{errno:?}: {}", outcome.message);
    }
}

#[test]
#[ignore = "needs root"]
fn root_an_errno_that_the_kernel_does_not_know_would_leave_the_reader_waiting() {
    let marked = marked();
    let mut reader = Reader::start(&marked.path, range(0, 4096));
    let event = event(&marked.channel);
    let bytes = [
        event.number().to_ne_bytes(),
        (abi::FAN_DENY | libc::ENOENT.cast_unsigned() << abi::FAN_ERRNO_SHIFT).to_ne_bytes(),
    ]
    .concat();
    let result = nix::unistd::write(&marked.channel, &bytes);
    assert_eq!(result, Err(nix::errno::Errno::EINVAL));
    assert!(reader.is_blocked(), "which is why DenyErrno is closed");
    let _ = event.answer(Verdict::Allow).unwrap();
    assert!(reader.finish().status.success());
}

#[test]
#[ignore = "needs root"]
fn root_a_reader_that_was_killed_is_no_error() {
    let marked = marked();
    let mut reader = Reader::start(&marked.path, range(0, 4096));
    let event = event(&marked.channel);
    reader.kill();
    // the first answer after the death still finds the event; it is then destroyed
    let number = event.number();
    let first = answer_number(marked.channel.as_fd(), number, Verdict::Allow).unwrap();
    assert!(matches!(first, Answered::Delivered | Answered::ReaderGone));
    assert_eq!(event.answer(Verdict::Allow).unwrap(), Answered::ReaderGone);
}

#[test]
#[ignore = "needs root"]
fn root_a_dropped_event_is_denied() {
    let marked = marked();
    let reader = Reader::start(&marked.path, range(0, 4096));
    drop(event(&marked.channel));
    let outcome = reader.finish();
    assert!(outcome.message.contains("Input/output error"), "{}", outcome.message);
}

#[test]
#[ignore = "needs root"]
fn root_an_event_that_is_left_is_answered_by_its_number() {
    let marked = marked();
    let mut reader = Reader::start(&marked.path, range(0, 4096));
    let event = event(&marked.channel);
    let number = event.number();
    event.leave();
    assert!(reader.is_blocked());
    let unknown = answer_number(marked.channel.as_fd(), number + 1, Verdict::Allow).unwrap();
    assert_eq!(unknown, Answered::ReaderGone);
    assert!(reader.is_blocked());
    let answered = answer_number(marked.channel.as_fd(), number, Verdict::Allow).unwrap();
    assert_eq!(answered, Answered::Delivered);
    assert!(reader.finish().status.success());
}

#[test]
#[ignore = "needs root"]
fn root_a_number_that_is_owed_an_answer_goes_to_no_new_event() {
    let marked = marked();
    let leave_one = || {
        let reader = Reader::start(&marked.path, range(0, 4096));
        let event = event(&marked.channel);
        let number = event.number();
        event.leave();
        (reader, number, Owed::new(&marked.channel, number).unwrap())
    };
    let (old, number, owed) = loop {
        let left = leave_one();
        if left.2.is_occupied() {
            break left;
        }
        // another test's thread was faster
        let _ = left.2.answer(Verdict::Allow).unwrap();
        assert!(left.0.finish().status.success());
    };
    assert!(!Owed::new(&marked.channel, number).unwrap().is_occupied());
    let mut new = Reader::start(&marked.path, range(4096, 4096));
    let event_of_new = event(&marked.channel);
    assert_ne!(event_of_new.number(), number);
    assert_eq!(owed.answer(Verdict::Deny(DenyErrno::Enospc)).unwrap(), Answered::Delivered);
    assert!(old.finish().message.contains("No space left"));
    assert!(new.is_blocked());
    assert_eq!(event_of_new.answer(Verdict::Allow).unwrap(), Answered::Delivered);
    assert!(new.finish().status.success());
}

#[test]
#[ignore = "needs root"]
fn root_a_group_is_taken_over_with_its_marks() {
    let marked = marked();
    let file = FileId::of(&marked.file).unwrap();
    let copy = marked.group.as_fd().try_clone_to_owned().unwrap();
    let Marked { channel, group, path, directory: _directory, .. } = marked;
    drop((channel, group));
    let taken = Group::from_owned_fd(copy).unwrap();
    assert_eq!(taken.kind(), QueueKind::Stock);
    assert_eq!(taken.info().unwrap().marks, [Mark::Inode { file }]);
    let reader = Reader::start(&path, range(0, 4096));
    let _ = event(&taken.channel()).answer(Verdict::Allow).unwrap();
    assert!(reader.finish().status.success());
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Group::from_owned_fd(null.into()), Err(Error::NotAGroup { .. })));
}

#[test]
#[ignore = "needs root"]
fn root_marks_come_and_go() {
    let marked = marked();
    mark::add(&marked.group, marked.file.as_fd()).unwrap();
    assert_eq!(marked.group.info().unwrap().marks.len(), 1, "the same again");
    let removed = mark::remove(&marked.group, marked.file.as_fd()).unwrap();
    assert_eq!(removed, mark::Removed::Removed);
    let removed = mark::remove(&marked.group, marked.file.as_fd()).unwrap();
    assert_eq!(removed, mark::Removed::Identity);
    let reader = Reader::start(&marked.path, range(0, 4096));
    assert!(reader.finish().status.success());
    assert!(is_quiet(&marked.channel));
    mark::add(&marked.group, marked.file.as_fd()).unwrap();
    let reader = Reader::start(&marked.path, range(0, 4096));
    let _ = event(&marked.channel).answer(Verdict::Allow).unwrap();
    assert!(reader.finish().status.success());
    let error = mark::add(&marked.group, std::fs::File::open("/proc/version").unwrap().as_fd());
    assert!(matches!(error, Err(Error::Mark { .. })), "not every filesystem takes a mark");
}

#[test]
#[ignore = "needs root"]
fn root_an_ignored_mount_raises_no_events() {
    let marked = marked();
    let mount = detached_mount(marked.directory.path());
    mark::ignore_mount(&marked.group, mount.as_fd()).unwrap();
    let file = open_at(&mount, "segment");
    file.write_all_at(&[7; 8192], 4096).unwrap();
    let mut back = [0; 4096];
    file.read_exact_at(&mut back, 8192).unwrap();
    assert_eq!(back, [7; 4096]);
    file.set_len(SIZE + 4096).unwrap();
    file.sync_all().unwrap();
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 4096, 4096).unwrap();
    file.read_exact_at(&mut back, 4096).unwrap();
    assert_eq!(back, [0; 4096]);
    assert!(is_quiet(&marked.channel));
    let marks = marked.group.info().unwrap().marks;
    assert!(marks.iter().any(|mark| matches!(mark, Mark::Mount { ignored: true, .. })));
    // everybody else is still asked about
    let reader = Reader::start(&marked.path, range(8192, 4096));
    let _ = event(&marked.channel).answer(Verdict::Allow).unwrap();
    assert_eq!(reader.finish().bytes, [7; 4096]);
}

#[test]
#[ignore = "needs root"]
fn root_ranges_past_the_end() {
    let marked = marked();
    // A mapping is reported whole when it is made, also past the end of the file. (Python's own
    // mmap would refuse.)
    let script = format!(
        "import ctypes as c, os; m = c.CDLL(None).mmap; m.restype = c.c_ssize_t; \
         m.argtypes = [c.c_void_p, c.c_size_t, c.c_int, c.c_int, c.c_int, c.c_long]; \
         assert m(None, 8192, 1, 2, os.open({:?}, os.O_RDONLY), {}) != -1",
        marked.path,
        SIZE - 4096
    );
    let reader = Reader::spawn(Command::new("python3").args(["-c", &script]));
    let mapping = event(&marked.channel);
    assert_eq!(mapping.range(), Some(range(SIZE - 4096, 8192)));
    let _ = mapping.answer(Verdict::Allow).unwrap();
    let outcome = reader.finish();
    assert!(outcome.status.success(), "{}", outcome.message);
    let reader = Reader::start(&marked.path, range(SIZE + 4096, 4096));
    let past = event(&marked.channel);
    assert_eq!(past.range(), Some(range(SIZE + 4096, 4096)));
    let _ = past.answer(Verdict::Allow).unwrap();
    assert!(reader.finish().bytes.is_empty());
}

/// Runs in a process of its own: the limit is the process's.
#[test]
#[ignore = "needs root"]
fn root_without_a_free_fd_the_kernel_denies() {
    const CHILD: &str = "HYDRANT_TEST_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let name = "fanotify::root_tests::root_without_a_free_fd_the_kernel_denies";
        let mut command = Command::new(std::env::current_exe().unwrap());
        let outcome = Reader::spawn(
            command.args(["--ignored", "--exact", name, "--nocapture"]).env(CHILD, "1"),
        )
        .finish();
        assert!(outcome.status.success(), "{}", outcome.message);
        assert!(String::from_utf8_lossy(&outcome.bytes).contains("1 passed"));
        return;
    }
    let marked = marked();
    let reader = Reader::start(&marked.path, range(0, 4096));
    assert!(readable(&marked.channel, LIMIT));
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
    let read = marked.channel.read();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    let Read::Events(events) = read.unwrap() else { panic!("nothing was read") };
    let [Event::Refused { errno: libc::EMFILE, pid }] = events[..] else { panic!("{events:?}") };
    assert_eq!(pid, reader.pid());
    assert!(reader.finish().message.contains("Operation not permitted"));
    assert!(is_quiet(&marked.channel));
}

#[test]
#[ignore = "needs root"]
fn root_this_kernel_has_one_of_the_queues() {
    let kind = probe().unwrap();
    let made = match kind {
        QueueKind::Kernel => Group::restartable(),
        QueueKind::Stock => Group::stock(),
    };
    assert_eq!(made.unwrap().kind(), kind);
}
