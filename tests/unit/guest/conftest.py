"""A fake kernel is a folder: made of a few lines, or recorded from a real guest."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from ballast.guest.linux.tree import Tree
from tests.fixtures import HERE, RECORDED

# Property tests say what holds, not how fast: a busy machine must not fail them.
settings.register_profile("ballast", deadline=None)
settings.load_profile("ballast")

MakeTree = Callable[[Mapping[str, str]], Tree]


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Write {path: content} below a root."""

    def make(files: Mapping[str, str]) -> Tree:
        root = tmp_path / "kernel"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return Tree(root)

    return make


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[str]]:
    """Every file and folder that is opened below ``make_tree``'s root from now on, without the root."""
    root = f"{tmp_path / 'kernel'}/"
    found: list[str] = []
    listening = True

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(root):
            found.append(str(arguments[0]).removeprefix(root))

    sys.addaudithook(hear)  # for as long as Python runs
    yield found
    listening = False


@pytest.fixture(params=RECORDED)
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """What a real guest showed, in a copy that a test may write to."""
    root = tmp_path / "kernel"
    shutil.copytree(HERE / request.param, root)
    return Tree(root)
