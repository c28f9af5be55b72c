//! One process: it has the group, fills, and answers.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use hydrant_daemon::fanotify::{
    DenyErrno, Event, FileId, Group, PermissionEvent, Read, Verdict, mark,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::pwrite;
use nix::unistd::{Whence, lseek};

use super::super::content::Content;
use super::super::reader::tree_path;
use super::PeerOrders;

/// As many files are fetched at the same time.
const MOST: usize = 256;

type Files = HashMap<FileId, (Content, u64)>;

/// Marks all files and serves them.
pub fn serve(orders: &PeerOrders) -> Result<()> {
    let group = Group::stock()?;
    let mut files = Files::new();
    for (tree, content) in orders.contents.iter().enumerate() {
        for number in 0..content.files {
            let path = tree_path(&orders.trees, tree as u64).join(content.path(number));
            let file = fs_err::File::open(path)?;
            mark::add(&group, file.as_fd())?;
            files.insert(FileId::of(&file)?, (*content, number));
        }
    }
    let (files, running) = (Arc::new(files), Arc::new(AtomicUsize::new(0)));
    let channel = group.channel();
    loop {
        let mut ready = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::NONE)?;
        let events = match channel.read()? {
            Read::Events(events) => events,
            Read::Empty => continue,
            Read::Gone => bail!("the group is gone"),
        };
        for event in events {
            let Event::Permission(event) = event else { continue };
            if is_whole(&event) {
                event.answer(Verdict::Allow)?;
                continue;
            }
            while running.load(Ordering::SeqCst) >= MOST {
                thread::yield_now();
            }
            running.fetch_add(1, Ordering::SeqCst);
            let (files, running) = (Arc::clone(&files), Arc::clone(&running));
            let round_trip = orders.round_trip;
            thread::spawn(move || {
                thread::sleep(round_trip);
                let verdict = match fill(&event, &files) {
                    Ok(()) => Verdict::Allow,
                    Err(error) => {
                        eprintln!("{error:#}");
                        Verdict::Deny(DenyErrno::Eio)
                    }
                };
                if let Err(error) = event.answer(verdict) {
                    eprintln!("{error}");
                }
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }
}

/// The file has no hole. (Through the event's own fd, which raises no event.)
fn is_whole(event: &PermissionEvent) -> bool {
    let size = event.file().map_or(0, |(_, size)| size as i64);
    lseek(event.as_fd(), 0, Whence::SeekHole).is_ok_and(|hole| hole >= size)
}

fn fill(event: &PermissionEvent, files: &Files) -> Result<()> {
    let (content, number) = files.get(&event.file_id()?).context("a file that is not served")?;
    let bytes = content.bytes(*number, 0, u64::MAX);
    let mut done = 0;
    while done < bytes.len() {
        done += pwrite(event.as_fd(), &bytes[done..], done as i64)?;
    }
    Ok(())
}
