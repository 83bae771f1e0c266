"""The guide's snippets run, in order and in one session, as a reader would run them."""

from __future__ import annotations

import linecache
import re
import types
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "custom-losses.md"


def test_the_snippets_of_the_guide_run(torch_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(snippets) > 5
    # what is defined in `__main__` travels by value, as in a notebook
    session = types.ModuleType("__main__")
    for number, snippet in enumerate(snippets):
        code = snippet.replace("http://localhost:8000", torch_server)
        cell = f"<snippet {number}>"
        monkeypatch.setitem(linecache.cache, cell, (len(code), None, code.splitlines(keepends=True), cell))
        exec(compile(code, cell, "exec"), vars(session))
    vars(session)["client"].close()
