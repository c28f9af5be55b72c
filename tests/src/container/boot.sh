#!/bin/sh
# Becomes systemd, as the first process of a container. Runs in new process, mount, host name, IPC and
# cgroup namespaces (unshare(1)); the network is the machine's.
#
# $1: a directory with
#   usr/   what is to be seen in /usr besides what this machine has there
#   etc/   /etc                state/  /var/lib/hydrant                home/  /home
#   root/  empty; work/  on the same file system as usr/
# $2: a directory, or nothing; what is in its usr/ comes before what this machine has there
set -eu
root=$1/root

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir usr etc var run proc sys dev tmp root home old
for directory in bin sbin lib lib32 lib64; do
  [ -e "/$directory" ] && ln -s "usr/$directory" "$directory"
done
mount -t overlay -o "lowerdir=${2:+$2/usr:}/usr,upperdir=$1/usr,workdir=$1/work" overlay usr
mount --bind "$1/etc" etc
mount --bind "$1/home" home
mkdir -p var/lib/hydrant var/log var/tmp
mount --bind "$1/state" var/lib/hydrant

# the machine's kernel is not the container's to set up
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup

mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
for device in null zero full random urandom tty; do
  : >"dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp

pivot_root . old
umount -l old
# `container`: it leaves alone what is not the container's (container interface, systemd.io)
exec env -i container=hydrant-test PATH=/usr/sbin:/usr/bin \
  /lib/systemd/systemd --system --unit=hydrant-test.target --log-target=journal </dev/null
