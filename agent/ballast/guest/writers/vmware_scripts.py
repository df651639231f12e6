"""The scripts that open-vm-tools runs: ``/etc/vmware-tools/backupScripts.d/*`` with freeze, thaw or freezeFail.

And before them the older pair ``/usr/sbin/pre-freeze-script`` and ``post-thaw-script``, either of which may be missing.
See services/plugins/vmbackup/scriptOps.c in open-vm-tools 12.
"""

from __future__ import annotations

from ballast.guest.writers.hooks import Hook, HookWriter, is_leftover
from ballast.guest.writers.program import run

_BEFORE = "usr/sbin/pre-freeze-script"
_AFTER = "usr/sbin/post-thaw-script"
_FOLDER = "etc/vmware-tools/backupScripts.d"


class VmwareScripts(HookWriter):
    """Each gets freeze, and then thaw, or freezeFail if the freeze failed."""

    def find(self) -> list[Hook]:
        """See ``HookWriter``. By name, after the older pair; one that is not executable fails there as well."""
        scripts = [file for file in sorted(self.root.glob(f"{_FOLDER}/*")) if file.is_file()]
        names = [str(script) for script in scripts if not is_leftover(script.name)]
        return self._older_pair() + [_hook(name, name) for name in names]

    def _older_pair(self) -> list[Hook]:
        before, after = (str(file) if (file := self.root / path).is_file() else "" for path in (_BEFORE, _AFTER))
        return [_hook(before, after)] if before or after else []


def _hook(before: str, after: str) -> Hook:
    return Hook(
        before or after,
        freeze=[before, "freeze"] if before else [],
        thaw=[after, "thaw"] if after else [],
        abort=[after, "freezeFail"] if after else [],
    )


def main() -> int:
    """The program /usr/lib/ballast/writers/vmware-scripts."""
    return run(VmwareScripts())
