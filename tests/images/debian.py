#!/usr/bin/env python3
"""Makes the layers of an image of Debian packages: debian.py KIND DIRECTORY

KIND is `python` (with numpy and pandas) or `node`. DIRECTORY gets 0.tar, 1.tar, ... and is the same each time,
but for updates of the packages. They are downloaded by apt with a list of sources of its own: the machine's sources and packages stay as they
are. No script of a package runs.
"""
import io, os, re, subprocess, sys, tarfile

SUITE = "bookworm"
TIME = 1_700_000_000
# links into `usr`, which no package has
USR = ["bin", "sbin", "lib", "lib64"]
# what each layer has, with all that it depends on
BASE = ["base-files", "bash", "coreutils", "dash", "findutils", "libc-bin", "busybox-static", "perl-base"]
KINDS = {
    "python": [BASE, ["python3"], ["python3-pandas"]],
    "node": [BASE, ["nodejs"]],
}


class Apt:
    def __init__(self, root):
        self.cache = f"{root}/cache/archives"
        for directory in (f"{root}/lists/partial", f"{self.cache}/partial"):
            os.makedirs(directory)
        open(f"{root}/status", "w").close()
        targets = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
                                 stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        mirror = next(uri for uri in targets if "debian" in uri and "security" not in uri)
        with open(f"{root}/sources.list", "w") as sources:
            sources.write(f"deb {mirror} {SUITE} main\n")
        options = {"Dir::Etc::SourceList": f"{root}/sources.list", "Dir::Etc::SourceParts": "/dev/null",
                   "Dir::Etc::Preferences": "/dev/null", "Dir::Etc::PreferencesParts": "/dev/null",
                   "Dir::State::Lists": f"{root}/lists", "Dir::State::status": f"{root}/status",
                   "Dir::Cache": f"{root}/cache", "APT::Sandbox::User": "root", "Acquire::Retries": "3"}
        self.command = ["apt-get", "-qq", "-y"]
        for name, value in options.items():
            self.command += ["-o", f"{name}={value}"]
        subprocess.run(self.command + ["update"], stdout=sys.stderr, check=True)

    def install(self, names, *options):
        """What is needed for these packages, as names of files."""
        command = self.command + ["install", "--no-install-recommends", *options, *names]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return re.findall(r"^'\S+' (\S+) ", said, re.MULTILINE)

    def layers(self, layers):
        """The packages of each layer."""
        needed, known = [], []
        for layer in layers:
            needed += layer
            new = sorted(set(self.install(needed, "--print-uris")) - set(known))
            known += new
            yield [f"{self.cache}/{name}" for name in new]

    def download(self, names):
        self.install(names, "--download-only")


def entry(name, kind, mode, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.linkname = kind, mode, TIME, link
    return info


class Layer:
    def __init__(self, path):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)
        self.names = set()

    def add(self, info, file=None):
        info.uname = info.gname = ""
        info.pax_headers = {}
        if info.name in self.names:
            if not info.isdir():
                raise SystemExit(f"{info.name} is in two packages")
            return
        self.names.add(info.name)
        self.tar.addfile(info, file)

    def parents(self, name):
        parts = name.split("/")[:-1]
        for n in range(1, len(parts) + 1):
            self.add(entry("/".join(parts[:n]), tarfile.DIRTYPE, 0o755))

    def package(self, path):
        archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            for info in packed:
                file = packed.extractfile(info) if info.isreg() else None
                info.name = place(info.name)
                if info.islnk():
                    info.linkname = place(info.linkname)
                if info.name in USR or info.name == "":
                    continue
                self.parents(info.name)
                self.add(info, file)

    def alternatives(self):
        """Shared libraries that are in a directory of their own."""
        for name in sorted(self.names):
            found = re.fullmatch(r"(usr/lib/[^/]+)/(blas|lapack)/(lib(?:blas|lapack)\.so\.\d+)", name)
            if found:
                directory, sub, library = found.groups()
                self.add(entry(f"{directory}/{library}", tarfile.SYMTYPE, 0o777, f"{sub}/{library}"))


def place(name):
    """All of these directories are links into `usr`."""
    name = name.removeprefix("./").rstrip("/")
    first, _, rest = name.partition("/")
    return f"usr/{name}" if first in USR and rest else name


def main():
    kind, directory = sys.argv[1:3]
    apt = Apt(f"{directory}/apt")
    layers = list(apt.layers(KINDS[kind]))
    apt.download(sum(KINDS[kind], []))
    for n, packages in enumerate(layers):
        layer = Layer(f"{directory}/{n}.tar")
        if n == 0:
            layer.add(entry("usr", tarfile.DIRTYPE, 0o755))
            for name in USR:
                layer.add(entry(f"usr/{name}", tarfile.DIRTYPE, 0o755))
                layer.add(entry(name, tarfile.SYMTYPE, 0o777, f"usr/{name}"))
        for package in packages:
            layer.package(package)
        layer.alternatives()
        layer.tar.close()
    subprocess.run(["rm", "-rf", f"{directory}/apt"], check=True)


main()
