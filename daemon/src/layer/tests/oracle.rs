//! Archives by GNU tar and Python, read by us and by Python's `tarfile`.

use std::collections::BTreeMap;

use fs_err as fs;
use serde::Deserialize;

use super::support::{content, python, read_by, run, scratch};
use crate::layer::digest::Digest;
use crate::layer::tar::{EntryKind, TarReader};

/// What `tarfile` makes of an entry.
#[derive(Debug, Deserialize)]
struct Member {
    name: String,
    kind: String,
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: String,
    size: u64,
    link: String,
    device: (u32, u32),
    digest: Option<String>,
    xattrs: BTreeMap<String, String>,
}

const SCRIPT: &str = r"
import hashlib, json, os, sys, tarfile
hexed = lambda s: os.fsencode(s).hex()
out = []
with tarfile.open(sys.argv[1], encoding='utf-8', errors='surrogateescape') as tar:
    for m in tar:
        file = m.isreg()
        out.append(dict(
            name=hexed('/'.join(p for p in m.name.split('/') if p not in ('', '.'))),
            kind='reg' if file else {b'1': 'link', b'2': 'sym', b'3': 'chr', b'4': 'blk', b'5': 'dir', b'6': 'fifo'}[m.type],
            mode=m.mode & 0o7777, uid=m.uid, gid=m.gid,
            mtime=m.pax_headers.get('mtime', '') or '%d' % m.mtime,
            size=m.size if file else 0, link=hexed(m.linkname),
            device=[m.devmajor, m.devminor] if m.isdev() and not m.isfifo() else [0, 0],
            digest='sha256:' + hashlib.sha256(tar.extractfile(m).read()).hexdigest() if file else None,
            xattrs={hexed(k[13:]): hexed(v) for k, v in m.pax_headers.items() if k.startswith('SCHILY.xattr.')},
        ))
print(json.dumps(out))
";

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).unwrap()).collect()
}

/// Seconds and nanoseconds of a decimal number.
fn time(text: &str) -> (i64, u32) {
    let (secs, rest) = text.split_once('.').unwrap_or((text, ""));
    let nanos: u32 = format!("{rest:0<9}")[..9].parse().unwrap();
    match (secs.starts_with('-'), nanos) {
        (true, 1..) => (secs.parse::<i64>().unwrap() - 1, 1_000_000_000 - nanos),
        _ => (secs.parse().unwrap(), nanos),
    }
}

/// Compares what is read of an archive, in pieces of several lengths; gives how many entries and how many sparse
/// files there are.
pub fn compare(dir: &std::path::Path, archive: &str) -> (usize, usize) {
    let members: Vec<Member> = serde_json::from_slice(&python(dir, SCRIPT, &[archive])).unwrap();
    let bytes = fs::read(dir.join(archive)).unwrap();
    let read = |chunk| {
        let read = read_by(TarReader::with_global_headers(), &bytes, chunk);
        read.unwrap_or_else(|error| panic!("{archive}: {error}"))
    };
    let (entries, summary) = read(bytes.len());
    for chunk in [1, 100, 511, 512, 513, 10_000] {
        assert!(read(chunk) == (entries.clone(), summary), "{archive} in pieces of {chunk}");
    }
    assert_eq!(summary.len, bytes.len() as u64);
    let mut sparse = 0;
    for (entry, member) in entries.iter().zip(&members) {
        let name = String::from_utf8_lossy(&entry.path).into_owned();
        assert_eq!(entry.path, unhex(&member.name), "{archive}");
        let link = unhex(&member.link);
        let (kind, target, device) = match &entry.kind {
            EntryKind::File(data) => {
                let digest = Digest::of(&content(&bytes, data)).to_string();
                assert_eq!(Some(digest), member.digest, "{archive}: {name}");
                assert_eq!(data.size, member.size);
                sparse += usize::from(data.pieces.iter().map(|p| p.len).sum::<u64>() < data.size);
                ("reg", None, (0, 0))
            }
            EntryKind::Directory => ("dir", None, (0, 0)),
            EntryKind::Symlink(target) => ("sym", Some(target), (0, 0)),
            EntryKind::HardLink(target) => ("link", Some(target), (0, 0)),
            EntryKind::CharDevice { major, minor } => ("chr", None, (*major, *minor)),
            EntryKind::BlockDevice { major, minor } => ("blk", None, (*major, *minor)),
            EntryKind::Fifo => ("fifo", None, (0, 0)),
        };
        assert_eq!((kind, device), (&member.kind[..], member.device), "{archive}: {name}");
        if let Some(target) = target {
            let link =
                if kind == "link" { crate::layer::tar::normalise(&link).unwrap() } else { link };
            assert_eq!(*target, link, "{archive}: {name}");
        }
        let seen = (entry.mode, entry.uid, entry.gid, (entry.mtime.secs, entry.mtime.nanos));
        let expected = (member.mode, member.uid, member.gid, time(&member.mtime));
        assert_eq!(seen, expected, "{archive}: {name}");
        let xattrs = member.xattrs.iter().map(|(name, value)| (unhex(name), unhex(value)));
        let mut xattrs: Vec<_> = xattrs.collect();
        xattrs.sort();
        assert_eq!(entry.xattrs, xattrs, "{archive}: {name}");
    }
    assert_eq!(entries.len(), members.len(), "{archive}");
    (entries.len(), sparse)
}

/// Files of every kind that a user can make, with long and odd names, and with holes.
const MAKE: &str = r"
import os
os.chdir('src')
os.makedirs('dir/sub dir')
long = '/'.join(['n' * 90] * 3)
os.makedirs(long)
def put(path, data, mode=0o644):
    with open(path, 'wb') as f: f.write(data)
    os.chmod(path, mode)
put('empty', b'')
put('one', b'1', 0o4755)
put('dir/512', b'x' * 512, 0o2700)
put('dir/513', b'y' * 513, 0o1777)
put('dir/sub dir/big', bytes(range(256)) * 3000)
put(b'odd\xff\n\\ name', b'odd')
put(long + '/' + 'f' * 99, b'long')
put('x' * 100, b'exactly a hundred')
put('y' * 101, b'one more')
os.symlink('one', 'sym')
os.symlink('../' * 60 + 'z' * 100, 'dir/longsym')
os.link('one', 'dir/hard')
os.link(long + '/' + 'f' * 99, 'longhard')
os.mkfifo('fifo')
os.utime('one', ns=(10**18 + 123456789,) * 2)
os.utime('sym', ns=(10**17 + 5,) * 2, follow_symlinks=False)
def holes(path, size, parts):
    with open(path, 'wb') as f:
        f.truncate(size)
        for at, n in parts:
            f.seek(at); f.write(b'd' * n)
holes('sparse-all', 1 << 20, [])
holes('sparse-mid', 1 << 20, [(65536, 4096), (500 * 1024, 8192)])
holes('sparse-end', (1 << 20) + 777, [(1 << 20, 777)])
holes('sparse-start', 1 << 20, [(0, 100)])
holes('sparse-many', 8 << 20, [(n * 131072, 4096) for n in range(60)])
";

#[test]
fn gnu_tar_in_every_format() {
    let dir = scratch();
    python(dir.path(), MAKE, &[]);
    let formats: [(&str, &[&str]); 9] = [
        ("v7", &["--format=v7"]),
        ("oldgnu", &["--format=oldgnu"]),
        ("oldgnu-sparse", &["--format=oldgnu", "--sparse"]),
        ("gnu", &["--format=gnu", "--sparse"]),
        ("ustar", &["--format=ustar"]),
        ("posix", &["--format=posix"]),
        ("posix-0.0", &["--format=posix", "--sparse", "--sparse-version=0.0"]),
        ("posix-0.1", &["--format=posix", "--sparse", "--sparse-version=0.1"]),
        ("posix-1.0", &["--format=posix", "--sparse", "--sparse-version=1.0"]),
    ];
    for (name, options) in formats {
        let archive = format!("{name}.tar");
        let mut arguments = vec!["-cf", &archive, "-C", "src"];
        arguments.extend(options);
        // formats that can't hold it leave a file out, and tar fails
        let few = matches!(name, "v7" | "ustar");
        let kept = ["dir/512", "dir/513", "empty", "one", "sym", "dir/hard", "sparse-mid"];
        arguments.extend(if few { &kept[..] } else { &["."] });
        run(dir.path(), "tar", &arguments);
        let (entries, sparse) = compare(dir.path(), &archive);
        assert_eq!(entries, if few { 7 } else { 25 }, "{name}");
        let expected = if options.contains(&"--sparse") { 5 } else { 0 };
        assert_eq!(sparse, expected, "{name}");
    }
    // with a global header of its own, which changes what all entries show
    let global = ["-cf", "g.tar", "--format=posix", "--pax-option=globexthdr.name=g,mtime=123.5"];
    run(dir.path(), "tar", &[&global[..], &["-C", "src", "one", "dir"]].concat());
    compare(dir.path(), "g.tar");
}

#[test]
fn python_in_every_format() {
    const SCRIPT: &str = r"
import io, tarfile
for name, format in [('ustar', tarfile.USTAR_FORMAT), ('gnu', tarfile.GNU_FORMAT), ('pax', tarfile.PAX_FORMAT)]:
    with tarfile.open(name + '.tar', 'w', format=format, errors='surrogateescape') as tar:
        def add(path, type=tarfile.REGTYPE, data=b'', **more):
            info = tarfile.TarInfo(path)
            info.type, info.size = type, len(data)
            for key, value in more.items(): setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
        add('d', tarfile.DIRTYPE, mode=0o1755)
        add('./d//f', data=b'data', mtime=1234567890, uid=65534, gid=100)
        add('/abs', data=b'z' * 1025, mode=0o7777)
        add('c', tarfile.CHRTYPE, devmajor=1, devminor=3)
        add('b', tarfile.BLKTYPE, devmajor=259, devminor=70000)
        add('p', tarfile.FIFOTYPE)
        add('s', tarfile.SYMTYPE, linkname='../x//y')
        add('h', tarfile.LNKTYPE, linkname='./d/f')
        add('contiguous', tarfile.CONTTYPE, data=b'c' * 700)
        add('p' * 60 + '/' + 'q' * 90, data=b'prefix')
        if format != tarfile.USTAR_FORMAT:
            add('ids', uid=3_000_000_000, gid=2097152, mtime=2**34)
            add('before', mtime=-1)
            add('l' * 250 + '/' + 'm' * 250, data=b'long')
            add('s2', tarfile.SYMTYPE, linkname='t' * 2000)
        if format == tarfile.PAX_FORMAT:
            add('x', data=b'x', pax_headers={'SCHILY.xattr.user.a': 'v', 'SCHILY.xattr.security.b': 'w\n=x'})
            add('fine', mtime=1.25, pax_headers={'mtime': '1600000000.123456789123'})
            add('umlaut-\u00e4\u20ac', data=b'u')
";
    let dir = scratch();
    python(dir.path(), SCRIPT, &[]);
    for (archive, entries) in [("ustar.tar", 10), ("gnu.tar", 14), ("pax.tar", 17)] {
        assert_eq!(compare(dir.path(), archive), (entries, 0), "{archive}");
    }
}
