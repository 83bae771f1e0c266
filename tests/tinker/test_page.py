"""The snippet of "Coming from Tinker" runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tinker.sdk import since

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-tinker.md"


@since("0.38", "RestClient.get_server_capabilities")
def test_the_snippet_of_the_page_runs(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(snippet.replace("http://localhost:8000", server), str(PAGE), "exec"), {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert losses[-1] < losses[0]
