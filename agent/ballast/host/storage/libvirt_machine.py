"""What a machine of libvirt's needs to live again, apart from its disks.

Its XML without passwords (of a display, say): who defines it again gives them anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

from ballast.host.storage.libvirt_domain import LibvirtDomain
from ballast.host.storage.shape import shape_of_libvirt, write_shape
from ballast.host.storage.source import BackupFailed
from ballast.host.storage.threads import to_its_end

# Where libvirt keeps what its emulated TPMs hold, in a folder named by the machine's UUID.
_TPM_STATES = Path("/var/lib/libvirt/swtpm")


async def describe_machine(domain: LibvirtDomain, folder: Path, tpm_state: Path | None) -> None:
    """Write ``domain.xml``, how it runs: its machine type with a version, its CPU with all features.

    Also ``domain-inactive.xml``, how it would be started, ``nvram`` and ``tpm``, where there are such.
    ``tpm_state`` is where that is kept, if not at libvirt's own place. OSError, BackupFailed.
    """
    running = await domain.xml()
    await to_its_end((folder / "domain.xml").write_text, running)
    if await domain.is_persistent():
        await to_its_end((folder / "domain-inactive.xml").write_text, await domain.xml(inactive=True))
    xml = ElementTree.fromstring(running)
    await to_its_end(write_shape, folder, shape_of_libvirt(xml, [disk.name for disk in await domain.disks()]))
    await to_its_end(copy_state, xml, folder, tpm_state)


def copy_state(xml: ElementTree.Element, folder: Path, tpm_state: Path | None) -> None:
    """Copy the files that the machine's XML names; blocks. OSError, BackupFailed."""
    nvram = xml.find("./os/nvram")
    if nvram is not None:
        source = nvram.find("source")
        path = (nvram.text or "").strip() or (source.get("file", "") if source is not None else "")
        if not path:
            raise BackupFailed("the firmware's variables (nvram) are in no file of this host")
        shutil.copyfile(path, folder / "nvram")
    backend = xml.find("./devices/tpm/backend")
    if backend is not None and (tpm_state or backend.get("type") == "emulator"):
        source = backend.find("source")
        kept = source.get("path") if source is not None else None
        state = tpm_state or Path(kept or _TPM_STATES / xml.findtext("uuid", ""))
        if not state.exists():
            raise BackupFailed(f"{state}: the TPM's state is not there; set tpm-state for this machine")
        if state.is_dir():
            shutil.copytree(state, folder / "tpm", ignore=_without_sockets)
        else:
            shutil.copyfile(state, folder / "tpm")


def _without_sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder, name).is_file() or Path(folder, name).is_dir())]
