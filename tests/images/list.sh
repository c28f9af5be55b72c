#!/bin/sh
# Everything that can be seen of the tree at $1, for comparison. The times of directories are left out: unpacking
# a layer changes those of the layers before.
set -eu
export LC_ALL=C
cd "$1"
find . -printf '%p %y %m %U %G %l\n' | sort
find . ! -type d -printf '%p %n %T@\n' | sort
find . -type f -printf '%p %s\n' | sort
find . \( -type c -o -type b \) -exec stat -c '%n %t %T' {} + | sort
getfattr -R -h -d -m - . | grep -v '^# file: \.$' || true
find . -type f -print0 | sort -z | xargs -0 sha256sum
