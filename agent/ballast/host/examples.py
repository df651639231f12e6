"""What ``ballastctl COMMAND --help`` says at its end."""

from __future__ import annotations

ABOUT = """\
TARGET is a connect string or the name of a VM in host.toml:
  vsock:42                        guest CID 42 on port 640
  unix:/run/ballast/agent.sock    the local socket, or QEMU's socket of a virtio-serial port
  unix:/run/vm1.vsock?connect=640 a user-space vsock daemon
  web1                            [vm.web1] in host.toml

Exit status: 0 done, 1 failed, 2 usage, 3 unreachable, 4 refused, 5 partial, 6 the freeze did not hold."""

STATUS = """\
examples:
  ballastctl status vsock:42 --token-file /etc/ballast/tokens/web1
  ballastctl status web1 --json | jq .memory.level

Without a token, a guest tells of its agent only; the exit status is then 5."""

WATCH = """\
examples:
  ballastctl watch web1
  ballastctl watch web1 --psi some:150000:1000000 --psi full:100000:1000000 --demand 1000
  ballastctl watch web1 --json | jq -r .event"""

FORECAST = """\
examples:
  ballastctl forecast web1
  ballastctl forecast web1 --lease 5m --exclude '/mnt/*'
  ballastctl forecast web1 --json | jq -r '.risks[] | .kind + ": " + .detail'

Changes nothing, and refuses nothing: a freeze may go well in spite of a risk. File systems on disks that are files
on other file systems come first. Exit status 5 means that the guest could not look at something ("cannot tell")."""

FREEZE = """\
examples:
  ballastctl freeze web1 --lease 60s
  ballastctl freeze web1 -- virsh snapshot-create-as web1 --disk-only --no-metadata
  ballastctl freeze web1 --mountpoint / --mountpoint /var -- ./snapshot.sh
  ballastctl freeze web1 --exclude '/mnt/*' --on-failure degrade --json -- ./snapshot.sh

Without COMMAND the file systems stay frozen until `ballastctl thaw`, or until the lease ends.
With COMMAND they are frozen while it runs: the lease is renewed at each third of it, for at most --max-hold.
The command finds BALLAST_ID, BALLAST_TARGET and BALLAST_CONSISTENCY in its environment. With --json its output
goes to stderr. Its failure is exit status 1; a freeze that did not hold until the thaw is 6."""

THAW = """\
examples:
  ballastctl thaw web1
  ballastctl thaw web1 --id 6f1c1c1e-5f0e-4d6b-9b39-3f0a3f1d8f11

Exit status 6 means that the freeze had ended before, by itself: a snapshot taken since is not consistent."""

ONLINE = """\
examples:
  ballastctl online web1               every offline memory block
  ballastctl online web1 512M
  ballastctl online web1 --block 40 --block 41 --zone movable"""

OFFLINE = """\
examples:
  ballastctl offline web1 1G                  whole DIMMs of no more than that
  ballastctl offline web1 --dimm 0x100000000
  ballastctl offline web1 --block 40 --block 41

What was taken offline stays so for a minute, for you to unplug it; then the guest takes it into use again.
`ballastctl memory remove` does both."""

BALLOON_SET = """\
examples:
  ballastctl balloon set 256M web1
  ballastctl balloon set 0 web1
  ballastctl balloon set 1G vsock:42 --qmp /run/web1/qmp --safe-vhost-user fs0

The guest's memory must be a shared file (memory-backend-memfd,share=on). Only what the host has just read as zero is
freed. Ctrl-C ends it after the chunk in hand. Exit status 5 means that the guest gave less, or took it back."""

BALLOON_SHOW = """\
examples:
  ballastctl balloon show web1
  ballastctl balloon show web1 --json | jq .balloon.ranges"""

MEMORY_ADD = """\
examples:
  ballastctl memory add 1G web1
  ballastctl memory add 512M vsock:42 --qmp /run/web1/qmp

One DIMM, ballast-N. If the guest cannot take it into use, it is taken out again."""

MEMORY_REMOVE = """\
examples:
  ballastctl memory remove 1G web1
  ballastctl memory remove 512M vsock:42 --qmp /run/web1/qmp --offline-timeout 2m

Whole DIMMs of exactly that size in all, ballast-N before others. One that does not come off is in use as before."""

MEMORY_EXPLAIN = """\
examples:
  ballastctl memory explain web1
  ballastctl memory explain web1 --json | jq '.[] | select(.change == "gave-way") | .numbers'

The last 64 since the agent started. The guest's journal has all: journalctl -u ballast-agent BALLAST_CHANGE=gave-way"""

BACKUP_CREATE = """\
examples:
  ballastctl backup create web1
  ballastctl backup create web1 --incremental --target /srv/backups --rate 100
  ballastctl backup create web1 --level filesystem --exclude '/var/lib/docker/*'

The guest is frozen for a moment; it runs while its disks are copied. What it overwrites meanwhile is kept on this host
(fleece = in host.toml): if that cannot be done in time the backup fails, and the guest goes on. Exit status 6 means
that the freeze did not hold and the backup was kept (--if-not-held keep), 5 that a part of it was not frozen."""

BACKUP_LIST = """\
examples:
  ballastctl backup list
  ballastctl backup list web1
  ballastctl backup list web1 --json | jq '.backups[] | select(.held)'"""

BACKUP_SHOW = """\
examples:
  ballastctl backup show web1
  ballastctl backup show web1 --id 20261123T181500Z-1a2b3c"""

BACKUP_VERIFY = """\
examples:
  ballastctl backup verify web1
  ballastctl backup verify web1 --filesystems --boot

All of the chain is read: checksums and the images' own structure. With --filesystems a throw-away machine mounts each
file system as the guest would find it, and checks it (package python3-guestfs; for XFS, libguestfs-xfs too). With
--boot one runs from it without a network, changing nothing, until the guest's agent answers."""

BACKUP_RESTORE = """\
examples:
  ballastctl backup restore web1 --to /var/lib/libvirt/images/web1-restored
  ballastctl backup restore web1 --id 20261123T181500Z-1a2b3c --disk vda --format raw --to .

The disks are whole by themselves. In place of a machine's own disks only while it is off, with --overwrite; the next
backup is a full one then."""

BACKUP_PRUNE = """\
examples:
  ballastctl backup prune web1 --keep-last 3 --keep-daily 14 --keep-weekly 8 --dry-run

The newest backup that held stays in any case. What others need is merged into them before it goes."""

BACKUP_REPAIR = """\
examples:
  ballastctl backup repair web1

A backup that is killed is repaired by a process that waits for it, and by the next backup."""
