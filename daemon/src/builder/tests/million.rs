//! A million files.

use std::io::{BufWriter, Write};
use std::time::Instant;

use super::State;
use super::testing::Maker;
use crate::builder::{IndexJob, PackJob, build};
use crate::importer::listing::Listing;
use crate::manifest::EntryKind;
use crate::object::HashKind;

/// The process's largest resident size so far, in MiB.
fn peak() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

/// Prints times and memory:
/// `cargo test --lib builder::tests::million -- --ignored --nocapture --test-threads 1`.
#[test]
#[ignore = "a measurement"]
fn measure_a_million_files() {
    let state = State::new();
    let started = Instant::now();
    {
        let out = fs_err::File::create(state.path("manifest")).unwrap();
        let mut writer = Maker::writer(BufWriter::new(out));
        let mut number = 0;
        let mut add = |parent: u32, name: String, kind: EntryKind| {
            number += 1;
            writer
                .entry(&Maker::entry(
                    parent,
                    name.as_bytes(),
                    &number.to_string().into_bytes(),
                    kind,
                ))
                .unwrap();
            number
        };
        for a in 100..200 {
            let top = add(0, format!("directory-{a}"), EntryKind::Directory);
            for b in 100..200 {
                let dir = add(top, format!("part-{b}"), EntryKind::Directory);
                for c in 100..200_u32 {
                    let size = u64::from(c.wrapping_mul(2_654_435_761) >> 19);
                    let kind = EntryKind::File { size, executable: false };
                    add(dir, format!("a-source-file-{c}.c"), kind);
                }
            }
        }
        writer.finish().unwrap().flush().unwrap();
    }
    println!("manifest written: {:.2?}, peak {} MiB", started.elapsed(), peak());
    let mut job = state.job_for(state.path("manifest"));
    job.index = Some(IndexJob { index: state.path("index"), ino_or: 0 });
    job.pack = Some(PackJob { dir: state.path("pack"), in_repository: None });
    let started = Instant::now();
    let builder = build(&job).unwrap();
    let built = &builder.built;
    println!(
        "{} files, {} MiB, {} segments, image of {} MiB: {:.2?}, peak {} MiB",
        built.files,
        built.tree_bytes >> 20,
        built.segments.len(),
        built.image_size >> 20,
        started.elapsed(),
        peak()
    );
    assert_eq!((built.files, built.objects), (1_000_000, 1_000_000));
    let started = Instant::now();
    println!("index: {:.2?}, peak {} MiB", started.elapsed(), peak());
}

#[test]
#[ignore = "a measurement"]
fn measure_a_listing_of_a_million_files() {
    let id = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391";
    let mut text = Vec::new();
    for a in 100..200 {
        write!(text, "040000 tree {id}\tdirectory-{a}\0").unwrap();
        for b in 100..200 {
            write!(text, "040000 tree {id}\tdirectory-{a}/part-{b}\0").unwrap();
            for c in 100..200 {
                write!(text, "100644 blob {id}\tdirectory-{a}/part-{b}/a-source-file-{c}.c\0")
                    .unwrap();
            }
        }
    }
    let before = peak();
    let started = Instant::now();
    let listing = Listing::read(HashKind::Sha1, &text[..]).unwrap();
    println!("{}: {:.2?}, {} MiB", listing.len(), started.elapsed(), peak() - before);
}
