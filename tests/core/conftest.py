"""A fixture that installs small plugins: real entry points of real modules in a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path

import pytest


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[EntryPoint]]]:
    """Install a distribution with one module, with the files of a wheel, and return its entry points."""
    monkeypatch.syspath_prepend(tmp_path)
    installed = []

    def install(distribution: str, source: str) -> list[EntryPoint]:
        module = "plugin_" + distribution.replace("-", "_")
        installed.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[tinkerbell]\nmain = {module}\n")
        return list(PathDistribution(info).entry_points)

    yield install
    for module in installed:
        sys.modules.pop(module, None)
