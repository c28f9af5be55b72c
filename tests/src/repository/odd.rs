//! Everything that a git tree can have and that tools stumble over.

use anyhow::Result;

use super::random::Prose;
use super::{Change, Import, MAIN, Random, Repository, TOPIC, cached};

/// What may be left out or scaled.
#[derive(Debug, Clone, Copy)]
pub struct OddOptions {
    /// Size of `large.bin`; none at 0.
    pub large_bytes: usize,
    /// `sha1` or `sha256`.
    pub format: &'static str,
    /// Content of `bin/busybox`, a static program to be executed from the tree.
    pub executable: bool,
}

impl Default for OddOptions {
    fn default() -> Self {
        Self { large_bytes: 0, format: "sha1", executable: false }
    }
}

/// Names with spaces, line breaks, quotes and bytes that are not UTF-8, of 255 bytes, below 40
/// directories; symbolic links of all kinds; executables; empty files; sizes around blocks and
/// pages; one blob at several paths; a directory with 3,000 files; attributes, ignored files, line
/// ends, a gitlink. Some commits, and [`TOPIC`], which differs in 13 files.
pub fn odd(options: OddOptions) -> Result<Repository> {
    let OddOptions { large_bytes, format, executable } = options;
    let name =
        format!("odd-{large_bytes}-{format}{}-1", if executable { "-executable" } else { "" });
    cached(&name, format, |path| {
        let mut import = Import::start(path)?;
        let mut changes = files(&mut import)?;
        if large_bytes > 0 {
            let blob = import.blob(&large(large_bytes))?;
            changes.push(Change::file("large.bin", blob));
        }
        if executable {
            let blob = import.blob(&fs_err::read("/bin/busybox")?)?;
            changes.push(Change::File { path: b"bin/busybox".to_vec(), mode: "100755", blob });
        }
        let gitlink = "1".repeat(if format == "sha1" { 40 } else { 64 });
        changes.push(Change::Gitlink { path: b"vendor/library".to_vec(), commit: gitlink });
        import.commit(MAIN, None, &changes)?;

        let old = import.blob(b"will go\n")?;
        import.commit(MAIN, None, &[Change::file("history/old.txt", old)])?;
        let new = import.blob(b"came later\n")?;
        let second = [
            Change::Delete { path: b"history/old.txt".to_vec() },
            Change::file("history/new.txt", new),
        ];
        let last = import.commit(MAIN, None, &second)?;

        let mut topic = Vec::new();
        for n in 0..10 {
            let blob =
                import.blob(format!("file {n} as it is on the other branch\n").as_bytes())?;
            topic.push(Change::file(format!("many/file-{:04}.txt", n * 250), blob));
        }
        let blob = import.blob(b"only on the other branch\n")?;
        topic.push(Change::file("topic/only here.txt", blob));
        topic.push(Change::file("sizes/4096.txt", blob));
        topic.push(Change::Delete { path: b"sizes/1.txt".to_vec() });
        import.commit(TOPIC, Some(last), &topic)?;
        import.finish()
    })
}

fn files(import: &mut Import) -> Result<Vec<Change>> {
    let mut random = Random::new(1);
    let mut prose = Prose::new(2);
    let mut changes = Vec::new();

    let names: [&[u8]; 14] = [
        b"with space.txt",
        b"names/two\nlines.txt",
        b"names/not utf-8 \xff\xfe\x80.txt",
        b"names/tab\there",
        b"names/quote\"and'back\\slash",
        b"names/-leading-dash",
        b"names/*[star]?",
        b"names/ ends in space ",
        b"names/CaseTwin",
        b"names/casetwin",
        "names/\u{1f6b0} \u{00fc}nicode".as_bytes(),
        b"names/...dots",
        b"names/#hash",
        b"names/$(dollar)",
    ];
    for name in names {
        let blob = import.blob(&[b"name: ", name, b"\n"].concat())?;
        changes.push(Change::file(name, blob));
    }
    let blob = import.blob(b"a long name\n")?;
    changes.push(Change::file([b"names/".as_slice(), &[b'n'; 255]].concat(), blob));
    let blob = import.blob(b"far down\n")?;
    changes.push(Change::file("deep/".repeat(40) + "down.txt", blob));

    for size in
        [1, 511, 512, 513, 4095, 4096, 4097, 8192, 65_535, 65_536, 65_537, 131_073, 1_500_000]
    {
        let blob = import.blob(&prose.text(size))?;
        changes.push(Change::file(format!("sizes/{size}.txt"), blob));
    }
    let blob = import.blob(&random.bytes(700_001))?;
    changes.push(Change::file("sizes/random.bin", blob));
    let zeros = import.blob(&[0; 300_000])?;
    changes.push(Change::file("sizes/zeros.bin", zeros));

    let empty = import.blob(b"")?;
    let same = import.blob(&prose.text(9_000))?;
    for n in 0..4 {
        changes.push(Change::file(format!("empty/{n}/nothing"), empty));
        changes.push(Change::file(format!("same/{n}/twin-{n}.txt"), same));
    }
    for n in 0..3_000 {
        let text = format!("file {n} of many\n").repeat(1 + random.below(20));
        let blob = import.blob(text.as_bytes())?;
        changes.push(Change::file(format!("many/file-{n:04}.txt"), blob));
    }

    let script = import.blob(b"#!/bin/sh\necho \"ran $1\"\n")?;
    changes.push(Change::File { path: b"bin/script".to_vec(), mode: "100755", blob: script });
    for (name, target) in [
        ("links/to-file", "../sizes/4096.txt".to_owned()),
        ("links/to-directory", "../many".to_owned()),
        ("links/dangling", "nowhere/at all".to_owned()),
        ("links/absolute", "/etc/hostname".to_owned()),
        ("links/itself", "itself".to_owned()),
        ("links/long", "x/".repeat(2000) + "end"),
    ] {
        let blob = import.blob(target.as_bytes())?;
        changes.push(Change::File { path: name.into(), mode: "120000", blob });
    }

    let attributes = "*.dat -text\nconverted/crlf.txt text eol=crlf\nconverted/ident.c ident\n";
    for (name, content) in [
        (".gitattributes", attributes),
        (".gitignore", "*.o\n/build/\n"),
        ("many/.gitignore", "ignored-here\n"),
        ("converted/.gitattributes", "utf16.txt working-tree-encoding=UTF-16LE\n"),
        ("converted/crlf.txt", "one\ntwo\nthree\n"),
        ("converted/ident.c", "/* $Id$ */\nint x;\n"),
        ("converted/utf16.txt", "wide\n"),
        ("converted/kept-crlf.dat", "one\r\ntwo\r\n"),
        (
            ".gitmodules",
            "[submodule \"library\"]\n\tpath = vendor/library\n\turl = ../library.git\n",
        ),
        ("README.md", "# An odd repository\n"),
        ("src/main.c", "int main(void) { return 0; }\n"),
        ("Makefile", "all:\n\t@echo made\n"),
    ] {
        let blob = import.blob(content.as_bytes())?;
        changes.push(Change::file(name, blob));
    }
    Ok(changes)
}

/// Half text, half noise, in stretches of a megabyte.
fn large(size: usize) -> Vec<u8> {
    let mut random = Random::new(200);
    let mut prose = Prose::new(200);
    let mut bytes = Vec::with_capacity(size + (1 << 20));
    while bytes.len() < size {
        bytes.extend_from_slice(&random.bytes(1 << 20));
        bytes.extend_from_slice(&prose.text(1 << 20));
    }
    bytes.truncate(size);
    bytes
}
