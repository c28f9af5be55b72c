#!/usr/bin/env python3
"""Unpacks layers one on top of the other, as the OCI image specification says: unpack.py DIR LAYER.tar...

Written for comparison: with GNU tar and `rm`, and nothing of Hydrant's.
"""
import os, shutil, subprocess, sys, tarfile


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def main():
    root, layers = sys.argv[1], sys.argv[2:]
    os.makedirs(root, exist_ok=True)
    for layer in layers:
        with tarfile.open(layer, encoding="utf-8", errors="surrogateescape") as tar:
            names = [(info.name.removeprefix("./"), info.isdir()) for info in tar]
        # whiteouts are about the layers below: they go first
        for name, _ in names:
            parent, base = os.path.split(name)
            if base == ".wh..wh..opq":
                for child in os.listdir(os.path.join(root, parent)):
                    remove(os.path.join(root, parent, child))
            elif base.startswith(".wh."):
                remove(os.path.join(root, parent, base.removeprefix(".wh.")))
        # what becomes something else
        for name, is_directory in names:
            path = os.path.join(root, name)
            if os.path.lexists(path) and os.path.isdir(path) != is_directory:
                remove(path)
        subprocess.run(["tar", "-x", "-p", "--same-owner", "--numeric-owner", "--xattrs", "--xattrs-include=*",
                        "--exclude=.wh.*", "-C", root, "-f", layer], check=True)


main()
