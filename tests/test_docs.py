"""The code snippets of the guides run in order in one session."""

from __future__ import annotations

import linecache
import re
import types
from pathlib import Path
from typing import Any

import pytest

from tinkerbell_core.testing import CHECKS, check_loss

GUIDE = Path(__file__).parents[1] / "docs" / "custom-losses.md"
PACKAGES = GUIDE.with_name("loss-plugins.md")


def test_the_snippets_of_the_guide_run(torch_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(snippets) > 5
    # cloudpickle sends objects of `__main__` by value, as in a notebook
    session = types.ModuleType("__main__")
    for number, snippet in enumerate(snippets):
        code = snippet.replace("http://localhost:8000", torch_server)
        cell = f"<snippet {number}>"
        monkeypatch.setitem(linecache.cache, cell, (len(code), None, code.splitlines(keepends=True), cell))
        exec(compile(code, cell, "exec"), vars(session))
    vars(session)["client"].close()


def test_the_package_guide_shows_a_loss_that_passes_and_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    page = PACKAGES.read_text()
    [code, *_] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.setitem(linecache.cache, "<guide>", (len(code), None, code.splitlines(keepends=True), "<guide>"))
    shown: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "<guide>", "exec"), shown)
    check_loss(shown["smooth"])
    table = page.partition("| check | what it wants |")[2].partition("\n\n")[0]
    named = [name.strip() for row in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for name in row.split(",")]
    assert named == ["contract", *CHECKS]
    assert f"{len(CHECKS) + 1} checks" in page
