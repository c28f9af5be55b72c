//! One million files: how long, and how much memory. Run with `--release --ignored --nocapture`.

use std::io::{self, Write};
use std::process::Command;
use std::time::Instant;

use fs_err as fs;

use super::zoo::BUILD_TIME;
use crate::erofs::{FileContent, ImageBuilder, ImageSpec, Meta, Node};

/// Counts bytes and keeps none.
struct Sink(u64);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The most memory this process has had, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Set in the process that measures, which runs nothing else.
const ALONE: &str = "HYDRANT_TEST_ALONE";

#[test]
#[ignore = "a measurement"]
fn million_files() {
    if std::env::var_os(ALONE).is_some() {
        return measure();
    }
    let name = concat!(module_path!(), "::million_files");
    let name = name.split_once("::").unwrap().1;
    let mut alone = Command::new(std::env::current_exe().unwrap());
    let alone = alone.args([name, "--exact", "--ignored", "--nocapture"]).env(ALONE, "1").output();
    let alone = alone.unwrap();
    let output = String::from_utf8(alone.stdout).unwrap();
    println!("{}", output.lines().find(|line| line.contains(" inodes: ")).unwrap_or(&output));
    assert!(alone.status.success());
    assert!(output.contains("1 passed"), "{output}");
}

fn measure() {
    let before = peak();
    let spec =
        ImageSpec { block_bits: 12, uuid: [1; 16], build_time: BUILD_TIME, devices: vec![1 << 31] };
    let mut b = ImageBuilder::new(spec).unwrap();
    let start = Instant::now();
    let meta = Meta { mode: 0o644, mtime: BUILD_TIME, ..Meta::default() };
    let mut names = 0;
    for d in 0..20_000u64 {
        let name = format!("directory-{d:05}");
        let dir = b.add(b.root(), name.as_bytes(), &meta, Node::Directory).unwrap();
        for f in 0..50u64 {
            let name = format!("some-file-name-{f}.c");
            names += name.len();
            let run =
                FileContent::Contiguous { device: 1, block: (d * 50 + f) * 4, size: 9000 + f };
            b.add(dir, name.as_bytes(), &meta, Node::File(run)).unwrap();
        }
    }
    let added = start.elapsed();
    let layout = b.layout().unwrap();
    let laid_out = start.elapsed();
    let mut sink = Sink(0);
    layout.write(&mut sink).unwrap();
    let written = start.elapsed();
    assert_eq!(sink.0, layout.image_len());
    let memory = peak() - before;
    println!(
        "1,020,000 inodes: added {added:.2?}, laid out {laid_out:.2?}, written {written:.2?}; image {} bytes; \
         memory {memory} bytes, {} of these names, {} a file without the name",
        sink.0,
        names,
        (memory - names as u64) / 1_020_000
    );
    assert!(memory < 1_020_000 * 150 + names as u64);
}
