use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::time::timeout;

use super::*;

/// A pipe's ends: when all copies of the writing one are closed, reading gives the end.
fn pipe() -> (io::PipeReader, io::PipeWriter) {
    io::pipe().unwrap()
}

fn connected() -> (Seqpacket, Seqpacket) {
    let (a, b) = pair().unwrap();
    (Seqpacket::new(a).unwrap(), Seqpacket::new(b).unwrap())
}

/// All copies of the writing end are closed. Other tests start programs meanwhile, which have copies
/// of everything between fork and exec: hence the patience.
fn assert_closed(mut reader: io::PipeReader) {
    let mut end = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut end, 10_000u16).unwrap(), 1, "somebody still has the other end");
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn messages_keep_their_borders_order_and_fds() {
    let (a, b) = connected();
    let (mut reader, mut writer) = pipe();
    a.send(b"one", &[]).await.unwrap();
    a.send(b"second", &[writer.as_fd(), reader.as_fd()]).await.unwrap();
    let mut buffer = [0; 64];
    let first = b.recv(&mut buffer).await.unwrap().unwrap();
    assert_eq!((&buffer[..first.length], first.fds.len()), (&b"one"[..], 0));
    let second = b.recv(&mut buffer).await.unwrap().unwrap();
    assert_eq!((&buffer[..second.length], second.fds.len()), (&b"second"[..], 2));
    for fd in &second.fds {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
    std::fs::File::from(second.fds.into_iter().next().unwrap()).write_all(b"x").unwrap();
    writer.write_all(b"y").unwrap();
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "xy");
}

#[tokio::test]
async fn the_end_is_none_and_sending_to_nobody_is_an_error() {
    let (a, b) = connected();
    a.send(b"last", &[]).await.unwrap();
    drop(a);
    let mut buffer = [0; 16];
    assert_eq!(b.recv(&mut buffer).await.unwrap().unwrap().length, 4);
    assert!(b.recv(&mut buffer).await.unwrap().is_none());
    assert_eq!(b.send(b"x", &[]).await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert_eq!(b.try_send(b"", &[]).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn last_words_are_heard_though_the_peer_has_left_something_unread() {
    let (a, b) = connected();
    a.send(b"not read", &[]).await.unwrap();
    b.send(b"last words", &[]).await.unwrap();
    drop(b);
    let mut buffer = [0; 100];
    assert_eq!(a.recv(&mut buffer).await.unwrap().unwrap().length, b"last words".len());
    assert!(a.recv(&mut buffer).await.unwrap().is_none());
}

#[tokio::test]
async fn a_message_that_is_too_long_is_an_error_and_leaks_nothing() {
    let (a, b) = connected();
    let (reader, writer) = pipe();
    a.send(&[7; 100], &[writer.as_fd()]).await.unwrap();
    a.send(b"next", &[]).await.unwrap();
    drop(writer);
    let mut buffer = [0; 99];
    assert_eq!(b.recv(&mut buffer).await.unwrap_err().kind(), ErrorKind::InvalidData);
    assert_closed(reader);
    assert_eq!(b.recv(&mut buffer).await.unwrap().unwrap().length, 4);
}

#[tokio::test]
async fn too_many_fds_are_an_error_and_are_closed() {
    let (a, b) = connected();
    let (reader, writer) = pipe();
    for count in [MAX_FDS + 1, KERNEL_MAX_FDS] {
        let fds = vec![writer.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&fds)];
        let part = [io::IoSlice::new(b"x")];
        sendmsg::<()>(a.as_fd().as_raw_fd(), &part, &rights, MsgFlags::empty(), None).unwrap();
        assert_eq!(b.recv(&mut [0; 8]).await.unwrap_err().kind(), ErrorKind::InvalidData);
    }
    drop(writer);
    assert_closed(reader);
}

#[tokio::test]
async fn credentials_are_refused() {
    let (a, b) = connected();
    setsockopt(&b, sockopt::PassCred, &true).unwrap();
    a.send(b"x", &[]).await.unwrap();
    assert_eq!(b.recv(&mut [0; 8]).await.unwrap_err().kind(), ErrorKind::InvalidData);
}

#[tokio::test]
async fn a_full_socket_makes_senders_wait_and_loses_nothing_when_they_are_cancelled() {
    let (a, b) = connected();
    let mut sent = 0u32;
    loop {
        let mut message = vec![0; 4096];
        message[..4].copy_from_slice(&sent.to_le_bytes());
        match a.try_send(&message, &[]) {
            Ok(()) => sent += 1,
            Err(error) => break assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    assert!(sent > 10);
    for _ in 0..3 {
        let waiting = timeout(Duration::from_millis(20), a.send(&[0xff; 4096], &[])).await;
        assert!(waiting.is_err(), "there was room");
    }
    let mut buffer = [0; 4096];
    for number in 0..sent {
        let received = b.recv(&mut buffer).await.unwrap().unwrap();
        assert_eq!(received.length, 4096);
        assert_eq!(buffer[..4], number.to_le_bytes());
    }
    // What was cancelled was never sent, and a cancelled receive takes nothing.
    let waiting = timeout(Duration::from_millis(20), b.recv(&mut buffer)).await;
    assert!(waiting.is_err(), "a cancelled message came");
    a.send(b"after", &[]).await.unwrap();
    assert_eq!(b.recv(&mut buffer).await.unwrap().unwrap().length, 5);
    assert_eq!(b.try_recv(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[tokio::test]
async fn many_senders_and_receivers_share_a_socket() {
    let (a, b) = connected();
    let (a, b) = (std::sync::Arc::new(a), std::sync::Arc::new(b));
    let receivers: Vec<_> = (0..4)
        .map(|_| {
            let b = b.clone();
            tokio::spawn(async move {
                let mut numbers = Vec::new();
                let mut buffer = [0; 8];
                while let Some(received) = b.recv(&mut buffer).await.unwrap() {
                    assert_eq!(received.length, 8);
                    numbers.push(u64::from_le_bytes(buffer));
                }
                numbers
            })
        })
        .collect();
    let senders: Vec<_> = (0..4u64)
        .map(|sender| {
            let a = a.clone();
            tokio::spawn(async move {
                for number in 0..500 {
                    a.send(&(sender * 1000 + number).to_le_bytes(), &[]).await.unwrap();
                }
            })
        })
        .collect();
    for sender in senders {
        sender.await.unwrap();
    }
    drop(a);
    let mut numbers = Vec::new();
    for receiver in receivers {
        numbers.extend(receiver.await.unwrap());
    }
    numbers.sort_unstable();
    let expected: Vec<u64> = (0..4).flat_map(|s| (0..500).map(move |n| s * 1000 + n)).collect();
    assert_eq!(numbers, expected);
}

#[test]
fn something_else_than_a_seqpacket_socket_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(Seqpacket::new(a.into()).unwrap_err().kind(), ErrorKind::InvalidInput);
    });
}
