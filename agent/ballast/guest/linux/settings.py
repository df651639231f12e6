"""Settings of the kernel that are the whole system's, changed for a moment.

A mark on a tmpfs, from before the change, says how they were: whoever finds it there puts them back, though the one who
made it was killed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

MARKS = Path("/run/ballast")

Values = Mapping[Path, str]


def change(mark: Path, values: Values, before: Values) -> None:
    """Write ``values``, until ``restore`` writes ``before``. OSError, and then ``restore`` puts back what was changed.

    Whatever the mark tells of already is put back first. Both are written in their order.
    """
    restore(mark)
    mark.write_text(json.dumps({str(path): value for path, value in before.items()}))
    for path, value in values.items():
        path.write_text(value)


def restore(mark: Path) -> None:
    """As it was before; may be called by anybody, any number of times."""
    with contextlib.suppress(FileNotFoundError):
        with contextlib.suppress(ValueError):  # killed while the mark was written: nothing was changed yet
            for path, value in json.loads(mark.read_text()).items():
                with contextlib.suppress(OSError):
                    Path(path).write_text(value)
        mark.unlink()
