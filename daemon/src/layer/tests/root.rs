//! The image of a layer, mounted on the archive itself, beside what unpacking makes of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use fs_err as fs;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::support::{index_by, python, run, scratch};
use crate::builder::layer::{LayerJob, build};
use crate::layer::indexer::Indexer;
use crate::layer::tar::TarReader;
use crate::layer::tree::{TreeBuilder, TreeError};

/// Makes `dir/segment` and `dir/image` of `dir/NAME`, as a first contact does.
fn take(dir: &Path, name: &str) {
    let layer = fs::read(dir.join(name)).unwrap();
    let (mut indexer, mut reader, mut tree) =
        (Indexer::default(), TarReader::default(), TreeBuilder::default());
    let mut segment = Vec::new();
    let mut sink = |bytes: &[u8]| {
        segment.extend_from_slice(bytes);
        reader.push(bytes, &mut |entry| tree.add(entry))
    };
    for chunk in layer.chunks(10_000) {
        indexer.push(chunk, &mut sink).unwrap();
    }
    let index = indexer.finish::<TreeError>(&mut sink).unwrap();
    reader.finish().unwrap();
    fs::write(dir.join("segment"), &segment).unwrap();
    let manifest = tree.finish().write(Vec::new(), index.uncompressed_len()).unwrap();
    fs::write(dir.join("manifest"), manifest).unwrap();
    let job = LayerJob { manifest: dir.join("manifest"), image: dir.join("image"), segment: None };
    let built = build(&job).unwrap();
    assert_eq!(built.segments, [segment.len() as u64]);
    // a layer that comes again makes the same
    assert_eq!(index_by(Indexer::default(), &layer, 99_999).unwrap().0, index);
}

struct Mounted(PathBuf);

impl Mounted {
    fn new(dir: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        let device = format!("device={}", dir.join("segment").display());
        let image = dir.join("image");
        mount(Some(&image), at, Some("erofs"), MsFlags::MS_RDONLY, Some(&device[..])).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("can't unmount {}: {error}", self.0.display());
        }
    }
}

/// Everything below a directory, a line each: path, mode, owner, links, device, time, target or digest, attributes.
const SHOW: &str = r"
import hashlib, os, stat, sys
os.chdir(sys.argv[1])
inodes = {}
def show(path):
    s = os.lstat(path)
    what = ''
    if stat.S_ISLNK(s.st_mode): what = os.readlink(path).hex()
    if stat.S_ISREG(s.st_mode):
        with open(path, 'rb') as f: what = str(s.st_size) + ' ' + hashlib.sha256(f.read()).hexdigest()
    same = inodes.setdefault(s.st_ino, path) if not stat.S_ISDIR(s.st_mode) else b''
    xattrs = {a: os.getxattr(path, a, follow_symlinks=False).hex() for a in sorted(os.listxattr(path, follow_symlinks=False))}
    links = s.st_nlink if not stat.S_ISDIR(s.st_mode) else 0
    if path != b'.':
        print(path.hex(), path, oct(s.st_mode), s.st_uid, s.st_gid, links, s.st_rdev, s.st_mtime_ns, what, same, xattrs)
    if stat.S_ISDIR(s.st_mode):
        for name in sorted(os.listdir(path)): show(os.path.join(path, name))
show(b'.')
";

fn show(at: &Path) -> Vec<String> {
    let listing = python(at, SHOW, &["."]);
    String::from_utf8(listing).unwrap().lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_same(seen: &[String], expected: &[String]) {
    for (seen, expected) in seen.iter().zip(expected) {
        assert_eq!(seen, expected);
    }
    assert_eq!(seen.len(), expected.len());
}

/// Runs a tool of erofs-utils, where it is there. Older ones know no blocks of 512 bytes.
fn check(dir: &Path, tool: &str, arguments: &[&str]) {
    match Command::new(tool).args(arguments).current_dir(dir).output() {
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            let is_old = said.contains("blksize 512 isn't supported");
            assert!(output.status.success() || is_old, "{tool}: {said}");
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{tool}"),
    }
}

const MAKE: &str = r"
import os
os.chdir('src')
def put(path, data, mode=0o644, owner=None):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'wb') as f: f.write(data)
    if owner: os.chown(path, *owner)
    os.chmod(path, mode)
for d in range(30):
    for f in range(40): put('many/%d/file %d' % (d, f), os.urandom(f * 97), 0o600 + f % 8)
put('bin/su', b'setuid' * 1000, 0o4755)
put('bin/cap', b'cap')
os.setxattr('bin/cap', 'security.capability', bytes.fromhex('0100000200040000000000000000000000000000'))
os.setxattr('bin/cap', 'user.a', b'value')
os.setxattr('many', 'user.dir', b'\0\1\2')
put('var/owned', b'o', 0o640, (100000, 70000))
put('big', os.urandom(5_000_000))
put('n' * 200, b'name')
put('/'.join(['deep' * 10] * 8) + '/f', b'deep')
put(b'odd\xff\n'.decode('utf-8', 'surrogateescape'), b'odd')
os.link('bin/su', 'bin/also su')
os.link('big', 'many/3/big')
os.symlink('su', 'bin/sym')
os.symlink('t' * 1000, 'longsym')
os.mkfifo('pipe')
os.mknod('null', 0o20666, os.makedev(1, 3))
os.mknod('disk', 0o60660, os.makedev(259, 70000))
os.mkdir('tmp'); os.chmod('tmp', 0o1777)
for path, size, parts in [('sparse/a', 1 << 20, [(65536, 4096), (500 * 1024, 8192)]), ('sparse/b', (1 << 22) + 777, [(1 << 22, 777)]),
        ('sparse/c', 1 << 20, []), ('sparse/d', 1 << 20, [(0, 100)]), ('sparse/e', 8 << 20, [(n * 131072, 4096) for n in range(60)])]:
    os.makedirs('sparse', exist_ok=True)
    with open(path, 'wb') as f:
        f.truncate(size)
        for at, n in parts: f.seek(at); f.write(os.urandom(n))
for root, dirs, files in os.walk('.', topdown=False):
    for n, name in enumerate(sorted(files + dirs)):
        if os.path.lexists(os.path.join(root, name)):
            os.utime(os.path.join(root, name), ns=(10**18 + n * 123456789, 1_500_000_000 * 10**9 + n * 7), follow_symlinks=False)
";

#[test]
#[ignore = "needs root"]
fn root_a_layer_is_what_it_was_packed_from() {
    let dir = scratch();
    let path = dir.path();
    python(path, MAKE, &[]);
    let expected = show(&path.join("src"));
    let xattrs = ["--xattrs", "--xattrs-include=*", "--numeric-owner"];
    let ways: [(&str, &[&str]); 5] = [
        ("a.tar", &["--format=posix"]),
        ("b.tar.gz", &["--format=posix", "-z", "--sparse", "--sparse-version=1.0"]),
        ("c.tar.zst", &["--format=posix", "--zstd", "--sparse", "--sparse-version=0.1"]),
        ("d.tar.gz", &["--format=posix", "-z", "--sparse", "--sparse-version=0.0", "-b1"]),
        ("e.tar", &["--format=gnu", "--sparse"]),
    ];
    for (name, options) in ways {
        run(path, "tar", &[&["-cf", name, "-C", "src"], options, &xattrs, &["."]].concat());
        take(path, name);
        check(path, "fsck.erofs", &["--device=segment", "image"]);
        check(path, "dump.erofs", &["--device=segment", "-s", "-S", "image"]);
        let at = path.join("mnt");
        let mounted = Mounted::new(path, &at);
        let mut seen = show(&at);
        let mut expected = expected.clone();
        if name == "e.tar" {
            // GNU's own format has whole seconds and no attributes
            let strip = |lines: &mut Vec<String>| {
                for line in lines {
                    let mut fields: Vec<_> = line.split(' ').collect();
                    let time = fields.iter().position(|f| f.starts_with("15") && f.len() == 19);
                    let time = time.unwrap();
                    fields[time] = &fields[time][..10];
                    *line = fields.join(" ").split('{').next().unwrap().to_owned();
                }
            };
            strip(&mut seen);
            strip(&mut expected);
        }
        assert_same(&seen, &expected);
        drop(mounted);
    }
}

#[test]
#[ignore = "needs root"]
fn root_a_layer_is_what_python_unpacks() {
    const MAKE: &str = r"
import io, tarfile
with tarfile.open('l.tar', 'w', format=tarfile.PAX_FORMAT) as tar:
    def add(path, type=tarfile.REGTYPE, data=b'', **more):
        info = tarfile.TarInfo(path)
        info.type, info.size, info.mtime, info.mode = type, len(data), 1234567890, 0o644
        for key, value in more.items(): setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))
    D = dict(type=tarfile.DIRTYPE, mode=0o755)
    add('d', **D); add('e', **D); add('e/f', **D)
    add('d/twice', data=b'first'); add('d/twice', data=b'second, longer', uid=5, mode=0o400)
    add('d/a', data=b'shared'); add('d/b', tarfile.LNKTYPE, linkname='d/a'); add('e/f/c', tarfile.LNKTYPE, linkname='./d/b')
    add('d/a', data=b'replaced')
    add('sym', tarfile.SYMTYPE, linkname='e/f', mode=0o777); add('sym/through', data=b'through')
    add('d', mode=0o2711, type=tarfile.DIRTYPE, mtime=5)
    add('e', mode=0o700, type=tarfile.DIRTYPE, uid=77); add('e/f', **D)
";
    // what the names were before goes first, as runtimes have it
    const UNPACK: &str = r"
import os, tarfile
with tarfile.open('l.tar') as tar:
    members = tar.getmembers()
    for m in members:
        path = os.path.join('out', m.name)
        if os.path.lexists(path) and not (m.isdir() and os.path.isdir(path)): os.unlink(path)
        tar.extract(m, 'out', numeric_owner=True)
    for m in members:
        if m.issym(): os.utime(os.path.join('out', m.name), (m.mtime, m.mtime), follow_symlinks=False)
        if m.isdir(): os.utime(os.path.join('out', m.name), (m.mtime, m.mtime))
";
    let dir = scratch();
    let path = dir.path();
    python(path, MAKE, &[]);
    python(path, UNPACK, &[]);
    take(path, "l.tar");
    let at = path.join("mnt");
    let mounted = Mounted::new(path, &at);
    assert_same(&show(&at), &show(&path.join("out")));
    drop(mounted);
}

#[test]
#[ignore = "needs root"]
fn root_overlayfs_takes_whiteouts_for_what_they_are() {
    const MAKE: &str = r"
import io, tarfile
def layer(name, entries):
    with tarfile.open(name, 'w', format=tarfile.PAX_FORMAT) as tar:
        for path, data in entries:
            info = tarfile.TarInfo(path)
            info.mtime = 1
            if data is None: info.type, info.mode = tarfile.DIRTYPE, 0o755
            else: info.size = len(data)
            if path == 'evil': info.pax_headers = {'SCHILY.xattr.trusted.overlay.opaque': 'y', 'SCHILY.xattr.trusted.overlay.redirect': '/x'}
            tar.addfile(info, io.BytesIO(data or b''))
layer('lower.tar', [('a/1', b'1'), ('a/2', b'2'), ('gone/x', b'x'), ('opaque/old', b'o'), ('new/old', b'o'), ('evil/kept', b'k'), ('file', b'f'), ('x/y', b'y')])
layer('upper.tar', [('a/.wh.1', b''), ('.wh.gone', b''), ('opaque/.wh..wh..opq', b''), ('opaque/n', b'n'), ('.wh.new', b''), ('new/n', b'n'), ('evil', None), ('.wh.file', b''), ('.wh.never', b'')])
";
    let dir = scratch();
    let path = dir.path();
    python(path, MAKE, &[]);
    let mut layers = Vec::new();
    let point = |name: &str| path.join(name).join("mnt");
    for name in ["lower", "upper"] {
        let own = path.join(name);
        fs::create_dir(&own).unwrap();
        fs::rename(path.join(format!("{name}.tar")), own.join("l.tar")).unwrap();
        take(&own, "l.tar");
        layers.push(Mounted::new(&own, &point(name)));
    }
    let at = path.join("merged");
    fs::create_dir(&at).unwrap();
    let options = format!("lowerdir={}:{}", point("upper").display(), point("lower").display());
    mount(Some("overlay"), &at, Some("overlay"), MsFlags::MS_RDONLY, Some(&options[..])).unwrap();
    let merged = Mounted(at.clone());
    let found = run(&at, "sh", &["-c", "find . ! -type d | LC_ALL=C sort"]);
    let expected = "./a/2\n./evil/kept\n./new/n\n./opaque/n\n./x/y\n";
    assert_eq!(String::from_utf8(found).unwrap(), expected);
    drop(merged);
    drop(layers);
}
