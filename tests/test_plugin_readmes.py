"""The code snippets in the README of each plugin run in order, with a server that has the plugin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinker_client import TinkerClient

SNIPPETS = {
    path.parent.name: re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    for path in sorted((Path(__file__).parents[1] / "plugins").glob("*/README.md"))
}


@pytest.mark.parametrize("plugin", [plugin for plugin, snippets in SNIPPETS.items() if snippets])
def test_the_snippets_of_the_readme_run(plugin: str, torch_server: str) -> None:
    with TinkerClient(torch_server) as client:
        session = {"client": client}
        for number, snippet in enumerate(SNIPPETS[plugin]):
            exec(compile(snippet, f"<snippet {number} of {plugin}>", "exec"), session)
