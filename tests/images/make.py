#!/usr/bin/env python3
"""Makes container images and pushes them to a registry: make.py URL REPOSITORY TAG KIND [--keep DIR]

KIND is `odd` (several layers with all that a tar archive can hold), `plain` (one small layer), `index` (the same for
several platforms), `docker` (with Docker's media types), `big` (BYTES of noise in two layers), `app` (a shell below that), `pause` (that shell's layer, which waits),
`implicit` (a layer with directories that only the layer below says something about), `foreign`, `schema1`,
`wrong-diff` (a configuration that names another archive), `wrong-layer` (a manifest that names another blob).
`odd-estargz`, `odd-chunked`, `odd-soci`, `big-estargz`: with layers that have an index (see `indexed.py`); `first-estargz`: a layer of which a quarter is to be fetched first; `other-toc`: eStargz, but the
manifest pins another table of contents; `wrong-chunk`: the table of contents has a wrong digest of the file d1/f03;
`unproved`: eStargz whose configuration names another archive; `impostor`: that of `victim`, which is streamed; `liar`: the very
layer of `victim`, with a SOCI index that makes a file set-uid; `unprovable`: an impostor with longer headers than its index foresees. `app-estargz`: a shell and BYTES of noise, all eStargz; `app-unproved`: the
same, with a configuration that names another archive for the noise.
`many`: LAYERS layers, each of which changes something of those below.
`archives`: the layers are those in FROM (see `debian.py`), compressed as HOW says (`gzip`, `estargz`, `chunked`, `soci`); what comes
of it stays there. With --keep, the layers' archives go to DIR as 0.tar, 1.tar, ...
"""
import functools, gzip, hashlib, io, json, os, pickle, random, subprocess, sys, tarfile, urllib.request

import indexed

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
SOCI = "com.amazon.soci."
TIME = 1_700_000_000
# eStargz has whole seconds only
FRACTION = 0.5


def entry(tar, name, data=b"", kind=tarfile.REGTYPE, mode=0o644, uid=0, gid=0, link="", xattrs={}, device=(0, 0),
          time=TIME):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, time
    info.linkname, info.size = link, len(data)
    info.devmajor, info.devminor = device
    info.pax_headers = {"SCHILY.xattr." + key: value for key, value in xattrs.items()}
    tar.addfile(info, io.BytesIO(data))


def archive(fill, form=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        fill(tar)
    return out.getvalue()


def directory(tar, name, mode=0o755, **more):
    entry(tar, name, kind=tarfile.DIRTYPE, mode=mode, **more)


def base(tar):
    noise = random.Random(1)
    directory(tar, "./")
    for name in ["bin", "etc", "etc/conf.d", "var", "var/cache", "var/cache/old", "var/cache/old/deep", "dev", "home"]:
        directory(tar, name + "/")
    directory(tar, "tmp/", mode=0o1777)
    busybox = open("/bin/busybox", "rb").read() if os.path.exists("/bin/busybox") else noise.randbytes(700_000)
    entry(tar, "bin/busybox", busybox, mode=0o755)
    entry(tar, "bin/sh", kind=tarfile.LNKTYPE, link="bin/busybox", mode=0o755)
    entry(tar, "bin/su", noise.randbytes(5000), mode=0o4755)
    entry(tar, "bin/wall", noise.randbytes(4096), mode=0o2755, gid=5)
    entry(tar, "bin/cap", noise.randbytes(600), mode=0o755, xattrs={"user.note": "a note"})
    entry(tar, "etc/passwd", b"root:x:0:0::/:/bin/sh\n")
    entry(tar, "etc/empty", b"")
    entry(tar, "etc/link", kind=tarfile.SYMTYPE, link="passwd", mode=0o777)
    entry(tar, "etc/abs", kind=tarfile.SYMTYPE, link="/nowhere/at/all", mode=0o777)
    entry(tar, "etc/conf.d/a", b"a" * 511)
    entry(tar, "etc/conf.d/b", b"b" * 512)
    entry(tar, "etc/conf.d/c", b"c" * 513)
    entry(tar, "var/cache/old/file", b"old\n")
    entry(tar, "var/cache/old/deep/file", b"deep\n")
    entry(tar, "var/cache/keep", noise.randbytes(123_456), uid=33, gid=33)
    entry(tar, "dev/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666)
    entry(tar, "dev/loop", kind=tarfile.BLKTYPE, device=(7, 0), mode=0o660, gid=6)
    entry(tar, "dev/pipe", kind=tarfile.FIFOTYPE, mode=0o600)
    entry(tar, "home/" + "long" * 60, b"a long name\n")
    directory(tar, "home/" + "d" * 100 + "/")
    entry(tar, "home/" + "d" * 100 + "/" + "f" * 120, b"a long path\n")
    entry(tar, "home/sp ace\nline \xe9", b"a strange name\n", uid=1000, gid=100)
    entry(tar, "home/owned", b"x", uid=70_000, gid=3_000_000, time=TIME + FRACTION)
    entry(tar, "home/twice", b"first")
    entry(tar, "home/twice", b"second, which counts")
    entry(tar, "gone", b"will be removed")
    entry(tar, "becomes-directory", b"a file")
    directory(tar, "becomes-file/")
    entry(tar, "becomes-file/x", b"x")


def middle(tar):
    noise = random.Random(2)
    entry(tar, ".wh.gone")
    directory(tar, "var/")
    directory(tar, "var/cache/")
    directory(tar, "var/cache/old/")
    entry(tar, "var/cache/old/.wh..wh..opq")
    entry(tar, "var/cache/old/new", b"only this\n")
    entry(tar, ".wh.becomes-directory")
    directory(tar, "becomes-directory/")
    entry(tar, "becomes-directory/inside", b"inside")
    entry(tar, "becomes-file", b"now a file")
    directory(tar, "etc/", mode=0o750, gid=4)
    entry(tar, "etc/passwd", b"root:x:0:0::/:/bin/sh\nme:x:1:1::/:/bin/sh\n", mode=0o600)
    directory(tar, "lib/")
    for n in range(200):
        entry(tar, f"lib/{n:03}.so", noise.randbytes(noise.randrange(1, 60_000)), mode=0o755)
    entry(tar, "lib/hard", kind=tarfile.LNKTYPE, link="lib/007.so", mode=0o755)


def top(tar):
    directory(tar, "etc/", mode=0o755)
    directory(tar, "etc/conf.d/")
    entry(tar, "etc/conf.d/.wh.b")
    entry(tar, "etc/conf.d/d", b"the last layer\n")
    directory(tar, "lib/")
    entry(tar, "lib/.wh.000.so")
    entry(tar, "gone", b"back again")


def plain(tar):
    directory(tar, "./")
    entry(tar, "hello", b"hello\n")
    entry(tar, "big", random.Random(3).randbytes(300_000))


def implicit(tar):
    entry(tar, "tmp/file", b"in a directory that the layer below has\n")
    entry(tar, "home/new/file", b"and in one that it does not have\n")


def noise(seed, size):
    def fill(tar):
        source = random.Random(seed)
        directory(tar, f"d{seed}/")
        for n in range(16):
            # half of it can be compressed
            half = size // 32
            data = source.randbytes(half) + bytes([65 + n]) * half
            entry(tar, f"d{seed}/f{n:02}", data)
    return fill


def first(size):
    """A layer as optimisers make it: what is read first, a landmark, the rest."""
    def fill(tar):
        noise(1, size // 4)(tar)
        entry(tar, ".prefetch.landmark", bytes([0xf]))
        noise(2, size - size // 4)(tar)
    return fill


def many(count):
    """The lowest has a shell, and files that the others change."""
    def lowest(tar):
        base(tar)
        for n in range(10):
            directory(tar, f"d{n}/")
            for m in range(count):
                entry(tar, f"d{n}/{m:03}", b"%d %d\n" % (n, m))

    def other(number):
        def fill(tar):
            own = f"d{number % 10}"
            directory(tar, own + "/", mode=0o700 + number % 64, uid=number)
            if number % 25 == 24:
                entry(tar, own + "/.wh..wh..opq")
            elif number < 10 or number % 25 > 10:
                entry(tar, f"{own}/.wh.{number:03}")
            directory(tar, f"{own}/new-{number}/")
            entry(tar, f"{own}/new-{number}/file", random.Random(number).randbytes(number * 100))
            entry(tar, f"{own}/new-{number}/hard", kind=tarfile.LNKTYPE, link=f"{own}/new-{number}/file")
            entry(tar, f"{own}/same", b"layer %d\n" % number, mode=0o600 + number % 8, gid=number)
            entry(tar, "counter", b"%d\n" % number)
        return fill

    layers = [(archive(lowest), "gzip")]
    for number in range(1, count):
        form = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT][number % 2]
        layers.append((archive(other(number), form), ["gzip", "gzip", "zstd", "none"][number % 4]))
    return layers


def archives(root, name):
    how = {"gzip": "gzip", "estargz": indexed.estargz, "chunked": indexed.zstd_chunked,
           "soci": functools.partial(indexed.soci, span=4 << 20)}[name]
    count = sum(name.endswith(".tar") for name in os.listdir(root))
    return [(open(f"{root}/{n}.tar", "rb").read(), Kept(f"{root}/{n}.{name}", how)) for n in range(count)]


class Kept:
    """What comes of compressing something, kept beside it."""

    def __init__(self, path, how):
        self.path, self.how = path, how

    def __call__(self, data):
        if not os.path.exists(self.path):
            done = self.how(data) if callable(self.how) else compress(data, self.how)
            if done[1] == data:
                done = (done[0], None, done[2])
            with open(f"{self.path}-{os.getpid()}", "wb") as file:
                pickle.dump(done, file)
            os.rename(file.name, self.path)
        with open(self.path, "rb") as file:
            done = pickle.load(file)
        return (done[0], data, done[2]) if done[1] is None else done


def described(how):
    """The suffix of a media type, and whether it comes with a zTOC."""
    how = getattr(how, "how", how)
    how = getattr(how, "func", how)
    kinds = {"zstd": "+zstd", "none": "", indexed.zstd_chunked: "+zstd"}
    return kinds.get(how, "+gzip"), how is indexed.soci


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Repository:
    def __init__(self, url, name):
        self.base = f"{url}/v2/{name}"
        self.url = url

    def request(self, method, url, data=None, kind=None):
        request = urllib.request.Request(url, data=data, method=method)
        if kind:
            request.add_header("Content-Type", kind)
        return urllib.request.urlopen(request, timeout=60)

    def blob(self, data):
        answer = self.request("POST", self.base + "/blobs/uploads/", b"")
        to = answer.headers["Location"]
        to = to if to.startswith("http") else self.url + to
        to += ("&" if "?" in to else "?") + "digest=" + digest(data)
        self.request("PUT", to, data, "application/octet-stream")
        return {"digest": digest(data), "size": len(data)}

    def manifest(self, tag, document, kind):
        data = json.dumps(document).encode()
        self.request("PUT", f"{self.base}/manifests/{tag}", data, kind)
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}


def compress(data, how):
    """The blob, what is in it, annotations."""
    if callable(how):
        return how(data)
    return plainly(data, how), data, {}


def plainly(data, how):
    if how == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if how == "zstd":
        return subprocess.run(["zstd", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def machine():
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    return names.get(os.uname().machine, os.uname().machine)


def push(to, tag, layers, docker=False, architecture=None, change=lambda manifest, config: None):
    """layers: (archive, how it is compressed)."""
    config = {"architecture": architecture or machine(), "os": "linux", "config": {"Cmd": ["/bin/sh"]},
              "rootfs": {"type": "layers", "diff_ids": []}}
    blobs, ztocs = [], []
    for n, (data, how) in enumerate(layers):
        suffix, has_ztoc = described(how)
        kind = OCI + "layer.v1.tar" + suffix
        if docker:
            kind = DOCKER + "image.rootfs.diff.tar" + suffix.replace("+", ".")
        if has_ztoc:
            blob, ztoc = how(data)
            inside, annotations = data, {}
            ztocs.append({"mediaType": "application/octet-stream", **to.blob(ztoc),
                          "annotations": {SOCI + "image-layer-digest": digest(blob)}})
        else:
            blob, inside, annotations = compress(data, how)
        layers[n] = (inside, how)
        config["rootfs"]["diff_ids"].append(digest(inside))
        blobs.append({"mediaType": kind, **to.blob(blob)})
        if annotations:
            blobs[-1]["annotations"] = annotations
    kind = DOCKER + "distribution.manifest.v2+json" if docker else OCI + "manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "layers": blobs}
    if ztocs:
        index = {"schemaVersion": 2, "mediaType": OCI + "manifest.v1+json", "layers": ztocs,
                 "config": {"mediaType": "application/vnd.amazon.soci.index.v2+json", **to.blob(b"{}")}}
        manifest["annotations"] = {SOCI + "index-digest": to.manifest(tag + "-soci", index, index["mediaType"])["digest"]}
    change(manifest, config)
    data = json.dumps(config).encode()
    config_kind = DOCKER + "container.image.v1+json" if docker else OCI + "config.v1+json"
    manifest["config"] = {"mediaType": config_kind, **to.blob(data)}
    return to.manifest(tag, manifest, kind)


def other(toc):
    """An entry more than what is pinned."""
    toc["entries"].append({"name": "more", "type": "dir", "mode": 0o755})


def lying(toc):
    for entry in toc["entries"]:
        if entry["name"] == "d1/f03" and "chunkDigest" in entry:
            entry["chunkDigest"] = digest(b"something else")


def set_uid(entry):
    if entry["name"] == "d3/f05":
        entry["mode"] = 0o4755


lying_soci = functools.partial(indexed.soci, change=set_uid)


def commented(fill):
    """With more headers than a table of contents tells of."""
    def filled(tar):
        fill(tar)
        info = tarfile.TarInfo("commented")
        info.mtime, info.pax_headers = TIME, {"comment": "c" * 50_000}
        tar.addfile(info)
    return filled


def main():
    global FRACTION
    url, name, tag, kind = sys.argv[1:5]
    to = Repository(url, name)
    layers = [(archive(plain), "gzip")]
    if kind in ("odd", "index"):
        layers = [(archive(base), "gzip"), (archive(middle), "zstd"), (archive(top, tarfile.GNU_FORMAT), "none")]
    if kind == "odd-estargz":
        FRACTION = 0
        layers = [(archive(base), indexed.estargz), (archive(middle), functools.partial(indexed.estargz, chunk=10_000)),
                  (archive(top, tarfile.GNU_FORMAT), "none")]
    if kind == "odd-chunked":
        layers = [(archive(base), indexed.zstd_chunked), (archive(middle), indexed.zstd_chunked), (archive(top), "gzip")]
    if kind == "odd-soci":
        layers = [(archive(base), indexed.soci), (archive(middle), indexed.soci), (archive(top), "gzip")]
    size = int(os.environ.get("BYTES", 16 << 20))
    if kind in ("big", "app"):
        layers = [(archive(noise(1, size)), "gzip"), (archive(noise(2, size)), "gzip")]
    if kind == "app":
        layers.insert(0, (archive(base), "gzip"))
    if kind == "pause":
        layers = [(archive(base), "gzip")]
    if kind == "many":
        layers = many(int(os.environ["LAYERS"]))
    if kind == "archives":
        layers = archives(os.environ["FROM"], os.environ["HOW"])
    if kind == "implicit":
        layers = [(archive(base), "gzip"), (archive(implicit), "gzip")]
    if kind == "big-estargz":
        layers = [(archive(noise(1, size)), indexed.estargz), (archive(noise(2, size)), indexed.estargz)]
    if kind == "first-estargz":
        layers = [(archive(first(size)), indexed.estargz)]
    if kind in ("app-estargz", "app-unproved"):
        FRACTION = 0
        layers = [(archive(base), indexed.estargz), (archive(noise(1, size)), indexed.estargz)]
    if kind in ("other-toc", "wrong-chunk", "unproved"):
        how = {"other-toc": functools.partial(indexed.estargz, change=other),
               "wrong-chunk": functools.partial(indexed.estargz, change=lying), "unproved": indexed.estargz}[kind]
        layers = [(archive(noise(1, size // 8)), how)]

    victim = archive(noise(3, size // 8))
    if kind == "liar":
        layers = [(victim, lying_soci)]
    if kind in ("impostor", "victim"):
        layers = [(archive(noise(4, size // 8)), indexed.estargz) if kind == "impostor" else (victim, "gzip")]

    if kind == "unprovable":
        layers = [(archive(commented(noise(4, size // 8))), indexed.estargz)]

    def wrong_diff(manifest, config):
        config["rootfs"]["diff_ids"][-1] = digest(victim if kind in ("impostor", "unprovable") else b"something else")

    def waiting(manifest, config):
        config["config"]["Cmd"] = ["/bin/busybox", "sleep", "36000"]

    def foreign(manifest, config):
        manifest["layers"][0]["mediaType"] = DOCKER + "image.rootfs.foreign.diff.tar.gzip"
        manifest["layers"][0]["urls"] = ["http://example.org/layer"]

    if kind == "index":
        ours = push(to, tag + "-ours", layers)
        others = push(to, tag + "-other", [(archive(plain), "gzip")], architecture="s390x")
        manifests = [{**others, "platform": {"os": "linux", "architecture": "s390x"}},
                     {**ours, "platform": {"os": "linux", "architecture": machine()}}]
        index = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": manifests}
        pushed = to.manifest(tag, index, OCI + "index.v1+json")
    elif kind == "other-platform":
        pushed = push(to, tag, layers, architecture="s390x")
    elif kind in ("wrong-diff", "unproved", "impostor", "unprovable", "app-unproved"):
        pushed = push(to, tag, layers, change=wrong_diff)
    elif kind == "pause":
        pushed = push(to, tag, layers, change=waiting)
    elif kind == "foreign":
        pushed = push(to, tag, layers, change=foreign)
    else:
        pushed = push(to, tag, layers, docker=kind == "docker")
    if "--keep" in sys.argv:
        keep = sys.argv[sys.argv.index("--keep") + 1]
        os.makedirs(keep, exist_ok=True)
        for n, (data, _) in enumerate(layers):
            with open(f"{keep}/{n}.tar", "wb") as file:
                file.write(data)
    print(pushed["digest"])


main()
