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
