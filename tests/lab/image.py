"""The images of the lab's guests: a minimal Debian with systemd, built by mmdebstrap and kept by content.

An image is three files in ${XDG_CACHE_HOME:-~/.cache}/ballast/images/<suite>-<hash>/: kernel, initrd and the root
file system (ext4). The hash covers everything that goes in from here; what Debian publishes later does not change
it. Building needs root, and packages come from the mirror that apt itself is configured for.

The guest has neither network nor login: the host speaks to it through shell.py. Under TCG every unit costs, so
whatever the lab does not need is masked.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITES = ("trixie", "bookworm")
ROOT_LABEL = "lab-root"
ROOT_BYTES = 3 << 30  # sparse
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SHELL = Path(__file__).with_name("shell.py")

PACKAGES = (
    "linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd", "systemd-sysv", "udev", "dbus", "kmod",
    "procps", "util-linux", "python3", "python3-psutil", "python3-pyudev", "python3-systemd",
    "python3-dbus-next", "e2fsprogs", "xfsprogs", "btrfs-progs", "qemu-guest-agent", "stress-ng",
)  # fmt: skip

# Real servers for Ballast's writers. Nothing but a test that wants them starts their units.
SERVERS = {"trixie": ("postgresql", "mariadb-server", "valkey-server"), "bookworm": ()}
SERVER_UNITS = ("postgresql@17-main.service", "mariadb.service", "valkey-server.service")

# stress-ng links to OpenGL, whose drivers bring 200 MB that nothing here loads.
EXCLUDED_PATHS = (
    "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*",
    "/usr/lib/systemd/system/multi-user.target.wants/systemd-logind.service",  # the bus starts it when it is asked
    "/usr/share/initramfs-tools/*/udev", "/usr/share/initramfs-tools/scripts/*/udev",
    "/usr/lib/systemd/system-generators/postgresql-generator",  # a script, at each boot and daemon-reload
    "/usr/lib/x86_64-linux-gnu/libLLVM*", "/usr/lib/x86_64-linux-gnu/libgallium*", "/usr/lib/x86_64-linux-gnu/dri/*",
)  # fmt: skip

# The first is there for tests to start by hand, beside ours or instead of it; the others only cost time.
MASKED_UNITS = (
    "qemu-guest-agent.service", "getty.target", "getty@.service", "serial-getty@.service",
    "systemd-ask-password-console.path", "systemd-ask-password-wall.path", "systemd-networkd.service",
    "systemd-networkd.socket", "systemd-timesyncd.service", "systemd-resolved.service", "networking.service",
    "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "dpkg-db-backup.timer", "xfs_scrub_all.timer",
    "apt-daily.timer", "apt-daily-upgrade.timer", "systemd-tmpfiles-clean.timer", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "systemd-pstore.service", "systemd-rfkill.socket",
    "systemd-firstboot.service", "ldconfig.service", "systemd-hwdb-update.service", "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount", "keyboard-setup.service", "console-setup.service",
)  # fmt: skip

# Without one, every boot of an overlay would be a first boot, with all of its presets.
MACHINE_ID = "ba11a57000000000000000000000001a"

# Files in the guest, by path.
FILES = {
    "/etc/hostname": "lab\n",
    "/etc/hosts": "127.0.0.1 localhost lab\n",
    "/etc/fstab": f"LABEL={ROOT_LABEL} / ext4 defaults 0 0\n",
    "/etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\n",
    "/etc/systemd/system/lab-shell.service": """\
[Unit]
Description=Shell of the test on the host
DefaultDependencies=no

[Service]
ExecStart=/usr/bin/python3 -IB /usr/lib/lab/shell.py
Restart=always
# It runs while the root file system and the journal on it are frozen.
Environment=TMPDIR=/run
StandardOutput=null
StandardError=kmsg
# Neither memory pressure nor what it does to the programs that we start may end us.
OOMScoreAdjust=-1000
OOMPolicy=continue
KillMode=process
""",
    "/etc/udev/rules.d/99-lab-shell.rules": (
        'SUBSYSTEM=="virtio-ports", ATTR{name}=="lab.shell.0", TAG+="systemd", ENV{SYSTEMD_WANTS}="lab-shell.service"\n'
    ),
    # A small log, and no look at all tables after each start.
    "/etc/mysql/mariadb.conf.d/99-lab.cnf": "[mariadbd]\ninnodb_log_file_size=16M\ninnodb_buffer_pool_size=64M\n",
    "/etc/systemd/system/mariadb.service.d/lab.conf": "[Service]\nExecStartPost=\n",
    # Only what finds the root file system on a virtio disk, and no udev for it: a small initrd is a fast boot.
    "/etc/initramfs-tools/conf.d/lab": "MODULES=list\nRUNSIZE=10%\nRESUME=none\n",
    "/etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}


@dataclass(frozen=True)
class Image:
    """What a guest boots from; `root` is never written, guests put an overlay on it."""

    suite: str
    kernel: Path
    initrd: Path
    root: Path


def cache_dir() -> Path:
    """Where images and tools are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ballast"


def build(suite: str) -> Image:
    """Return the image of a Debian suite, building it first if there is none: about a minute.

    Raises subprocess.CalledProcessError if a tool fails, PermissionError if it must build and is not root.
    """
    folder = cache_dir() / "images" / f"{suite}-{_content_hash(suite)}"
    with _lock(folder.parent / f".{suite}.lock"):
        if not folder.exists():
            if os.geteuid() != 0:
                raise PermissionError("building a guest image needs root")
            _build_into(folder, suite)
    return Image(suite, folder / "vmlinuz", folder / "initrd.img", folder / "root.ext4")


def _content_hash(suite: str) -> str:
    """Sixteen digits over all that this repository puts into the image."""
    parts = [suite.encode(), Path(__file__).read_bytes(), SHELL.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold off other builders; a builder that dies lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_into(folder: Path, suite: str) -> None:
    """Build beside the destination and rename at the end; then drop the suite's older images."""
    start_s = time.monotonic()
    work = folder.parent / f".{suite}.building"
    shutil.rmtree(work, ignore_errors=True)  # of a builder that was killed
    tree, files, result = work / "tree", work / "files", work / "result"
    result.mkdir(parents=True)
    _write_files(files)
    _say(f"{suite}: installing Debian into a folder, about a minute")
    _run(*_mmdebstrap(suite, tree, files))
    (tree / "etc/machine-id").write_text(f"{MACHINE_ID}\n")  # mmdebstrap takes care to leave none
    _say(f"{suite}: making the root file system")
    shutil.copy(next(tree.glob("boot/vmlinuz-*")), result / "vmlinuz")
    shutil.copy(next(tree.glob("boot/initrd.img-*")), result / "initrd.img")
    _make_root(tree, result / "root.ext4")
    result.rename(folder)
    shutil.rmtree(work)
    for old in folder.parent.glob(f"{suite}-*"):
        if old != folder:
            shutil.rmtree(old)
    _say(f"{suite}: image ready after {time.monotonic() - start_s:.0f} s")


def _write_files(files: Path) -> None:
    """Lay out what goes over Debian: FILES, the masks and the shell."""
    shell = {"/usr/lib/lab/shell.py": SHELL.read_text()}
    for name, text in (FILES | shell).items():
        file = files / name[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755 if text.startswith("#!") else 0o644)
    for unit in MASKED_UNITS:
        (files / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _mmdebstrap(suite: str, tree: Path, files: Path) -> list[str]:
    """The command that installs Debian into `tree`, in a mount namespace so that its mounts go with it."""
    return [
        *("unshare", "--mount", "--", "mmdebstrap", "--quiet", "--mode=root", "--variant=essential"),
        f"--include={','.join(PACKAGES + SERVERS[suite])}",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED_PATHS),
        # Before the packages of --include, since the kernel's makes the initrd.
        f"--essential-hook=sync-in {files} /",
        '--customize-hook=cd "$1/etc/systemd/system/multi-user.target.wants" &&'
        " rm -f postgresql.service mariadb.service valkey-server.service",
        # Equal times tell systemd that nothing under /usr awaits an update of /etc and /var.
        '--customize-hook=touch -r "$1/usr" "$1/etc/.updated" "$1/var/.updated"',
        *(suite, str(tree), f"deb [signed-by={KEYRING}] {_mirror()} {suite} main"),
    ]


def _mirror() -> str:
    """The mirror that apt uses for this machine's Debian."""
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {codename}"]
    uris = subprocess.run(targets, check=True, capture_output=True, text=True).stdout.split()
    if not uris:
        raise FileNotFoundError(f"apt has no index of Debian {codename}: run apt-get update")
    return uris[0]


def _make_root(tree: Path, root: Path) -> None:
    """Make the ext4 root file system from a folder. Initialised whole, so that no guest does it in its background."""
    with root.open("wb") as file:
        file.truncate(ROOT_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-L", ROOT_LABEL, "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", tree, root)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def _say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)
