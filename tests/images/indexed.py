"""Layers with an index: eStargz, zstd:chunked and SOCI, as their tools write them.

`estargz` and `zstd_chunked` give the blob, what is in it uncompressed, and the annotations that pin the index; `soci` gives
blob and zTOC.
"""
import base64, datetime, gzip, hashlib, io, json, struct, subprocess, tarfile, zlib

STARGZ = "containerd.io/snapshot/stargz/toc.digest"
CHUNKED = "io.github.containers.zstd-chunked."


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def entries(archive):
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8", errors="surrogateescape") as tar:
        return list(tar)


def described(info, fraction):
    kinds = {tarfile.REGTYPE: "reg", tarfile.AREGTYPE: "reg", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink",
             tarfile.LNKTYPE: "hardlink", tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block", tarfile.FIFOTYPE: "fifo"}
    time = datetime.datetime.fromtimestamp(info.mtime, datetime.timezone.utc)
    form = "%Y-%m-%dT%H:%M:%S.%fZ" if fraction else "%Y-%m-%dT%H:%M:%SZ"
    entry = {"name": info.name + ("/" if info.isdir() else ""), "type": kinds[info.type], "mode": info.mode,
             "uid": info.uid, "gid": info.gid, "modtime": time.strftime(form), "NumLink": 0}
    if info.linkname:
        entry["linkName"] = info.linkname
    if info.isdev():
        entry.update(devMajor=info.devmajor, devMinor=info.devminor)
    prefix = "SCHILY.xattr."
    xattrs = {key.removeprefix(prefix): base64.b64encode(value.encode()).decode()
              for key, value in info.pax_headers.items() if key.startswith(prefix)}
    if xattrs:
        entry["xattrs"] = xattrs
    return entry


def content(info, archive):
    return archive[info.offset_data:info.offset_data + info.size] if info.isreg() else b""


def estargz(archive, chunk=256 << 10, change=lambda toc: None):
    # the end of the archive comes behind the table of contents
    body = archive.rstrip(b"\0")
    body = archive[:-(-len(body) // 512) * 512]
    blob, toc, start = bytearray(), [], 0

    def member(data):
        blob.extend(gzip.compress(data, 6, mtime=0))

    for info in entries(archive):
        entry = described(info, False)
        toc.append(entry)
        data = content(info, archive)
        if not data:
            continue
        if info.offset_data > start:
            member(archive[start:info.offset_data])
        entry.update(size=len(data), digest=digest(data))
        for at in range(0, len(data), chunk):
            piece = data[at:at + chunk]
            if at:
                entry = {"name": info.name, "type": "chunk", "NumLink": 0}
                toc.append(entry)
                member(data[at - chunk:at])
            entry.update(offset=len(blob), chunkOffset=at, chunkDigest=digest(piece))
            if len(piece) == chunk:
                entry["chunkSize"] = chunk
            # with the headers that follow
            start = info.offset_data + at
    if start < len(body):
        member(body[start:])
    document = {"version": 1, "entries": toc}
    pinned = digest(json.dumps(document).encode())
    change(document)
    document = json.dumps(document).encode()
    tail = io.BytesIO()
    with tarfile.open(fileobj=tail, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("stargz.index.json")
        info.size = len(document)
        tar.addfile(info, io.BytesIO(document))
    tail = tail.getvalue()
    at = len(blob)
    member(tail)
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % at
    blob += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra
    blob += b"\x01\0\0\xff\xff" + bytes(8)
    # a change that is called `other` is one that the image does not pin
    return bytes(blob), body + tail, {STARGZ: pinned if change.__name__ == "other" else digest(document)}


def zstd(data):
    if 2000 < len(data) < 20_000:
        return subprocess.run(["zstd", "-q", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout
    # a frame of blocks that are not compressed (RFC 8878): many calls of a program take their time
    frame = struct.pack("<IBQ", 0xFD2FB528, 0xE0, len(data))
    size = 1 << 17
    pieces = [data[at:at + size] for at in range(0, len(data), size)] or [b""]
    for n, piece in enumerate(pieces, 1):
        frame += struct.pack("<I", len(piece) << 3 | (n == len(pieces)))[:3] + piece
    return frame


def zstd_chunked(archive, chunk=100_000):
    blob, toc, split, start = bytearray(), [], [], 0

    def raw(data):
        split.append({"type": 2, "payload": base64.b64encode(data).decode(), "position": len(split)})

    for info in entries(archive):
        entry = described(info, True)
        toc.append(entry)
        data = content(info, archive)
        raw(archive[start:info.offset_data])
        split.append({"type": 1, "name": info.name, "size": len(data), "payload": "AAAAAAAAAAA=", "position": len(split)})
        if not data:
            blob += zstd(archive[start:info.offset_data])
            start = info.offset_data
            continue
        blob += zstd(archive[start:info.offset_data])
        first = entry
        first.update(size=len(data), digest=digest(data))
        for at in range(0, len(data), chunk):
            piece = data[at:at + chunk]
            if at:
                entry = {"name": info.name, "type": "chunk"}
                toc.append(entry)
            if len(data) > chunk:
                entry.update(chunkSize=len(piece), chunkOffset=at, chunkDigest=digest(piece))
            entry["offset"] = len(blob)
            blob += zstd(piece)
        first["endOffset"] = len(blob)
        start = info.offset_data + len(data)
    raw(archive[start:])
    blob += zstd(archive[start:])
    annotations = {}

    def skipped(frame):
        at = len(blob) + 8
        blob.extend(struct.pack("<II", 0x184D2A50, len(frame)) + frame)
        return at

    split = b"".join(json.dumps(line).encode() + b"\n" for line in split)
    split_frame = zstd(split)
    toc = json.dumps({"version": 1, "entries": toc, "tarSplitDigest": digest(split_frame)}).encode()
    toc_frame = zstd(toc)
    at = skipped(toc_frame)
    annotations[CHUNKED + "manifest-checksum"] = digest(toc_frame)
    annotations[CHUNKED + "manifest-position"] = f"{at}:{len(toc_frame)}:{len(toc)}:1"
    split_at = skipped(split_frame)
    annotations[CHUNKED + "tarsplit-position"] = f"{split_at}:{len(split_frame)}:{len(split)}"
    skipped(struct.pack("<7Q", at, len(toc_frame), len(toc), 1, split_at, len(split_frame), len(split)) + b"GNUlInUx")
    return bytes(blob), archive, annotations


class Flat:
    """A table of a FlatBuffer: bytes, numbers (as packed bytes with `Raw`), tables, lists of these."""

    def __init__(self, *fields):
        self.fields = fields


class Raw(bytes):
    pass


def flat(out, at, value):
    """Writes what a reference at `at` leads to."""
    to = len(out)
    if isinstance(value, (bytes, list)):
        out += struct.pack("<I", len(value))
    if isinstance(value, bytes):
        out += value
    if isinstance(value, list):
        out += bytes(4 * len(value))
        for n, element in enumerate(value):
            flat(out, to + 4 + 4 * n, element)
    if isinstance(value, Flat):
        inline = [field if isinstance(field, Raw) else bytes(4) for field in value.fields]
        places = [4]
        for field in inline:
            places.append(places[-1] + len(field))
        vtable = struct.pack("<HH", 4 + 2 * len(inline), places[-1])
        vtable += b"".join(struct.pack("<H", place) for place in places[:-1])
        out += vtable
        to = len(out)
        out += struct.pack("<i", len(vtable)) + b"".join(inline)
        for field, place in zip(value.fields, places):
            if not isinstance(field, Raw):
                flat(out, to + place, field)
    struct.pack_into("<I", out, at, to - at)


def soci(archive, span=200_000, change=lambda entry: None):
    packer, blob, points = zlib.compressobj(6, wbits=31), bytearray(), []
    for at in range(0, len(archive), span):
        # a checkpoint where a block ends with a byte; the next one still refers to what is before
        window = archive[max(0, at - 32768):at].rjust(32768, b"\0")
        if at:
            blob += packer.flush(zlib.Z_SYNC_FLUSH)
        points.append((len(blob) if at else 10, at, window))
        blob += packer.compress(archive[at:at + span])
    blob = bytes(blob + packer.flush())
    ends = [point[0] for point in points[1:]] + [len(blob)]
    digests = [digest(blob[point[0]:end]).encode() for point, end in zip(points, ends)]
    checkpoints = struct.pack("<iq", len(points), span)
    checkpoints += b"".join(struct.pack("<qqB", *point[:2], 0) + point[2] for point in points)
    long = lambda n: Raw(struct.pack("<q", n))
    int32 = lambda n: Raw(struct.pack("<I", n))
    files = []
    for info in entries(archive):
        entry = described(info, True)
        change(entry)
        name = info.name.encode("utf-8", "surrogateescape") + (b"/" if info.isdir() else b"")
        records = [Flat(key.encode(), value.encode()) for key, value in info.pax_headers.items()]
        files.append(Flat(name, entry["type"].encode(), long(info.offset_data), long(info.size if info.isreg() else 0),
                          info.linkname.encode(), long(entry["mode"]), int32(info.uid), int32(info.gid), b"", b"",
                          entry["modtime"].encode(), long(info.devmajor), long(info.devminor), records))
    ztoc = Flat(b"1.0", b"test", long(len(blob)), long(len(archive)), Flat(files),
                Flat(Raw(b"\1"), int32(len(points) - 1), digests, checkpoints))
    out = bytearray(4)
    flat(out, 0, ztoc)
    return blob, bytes(out)
