"""Rules for the files of the project: the name on the package index, versions of tools, workflows, distributions."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tinkerbell_server.api import native

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = [ROOT / "pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]

NAME = "tinkerbell"
"""On the package index, this name belongs to another project. The distribution of this project is tinkerbell-core."""

FOREIGN = rf"""['"]?{NAME}(?![\w-]|\.\w)"""
INSTALLS = re.compile(
    rf"""\b(?:pip3?|pipx|uv|uv\ tool)\ (?:install|add)\s+(?:[^\n\\`;&|\#,]*?[\s'"])?{FOREIGN}"""
    rf"""|\b(?:uvx|pipx\ run|uv\ tool\ run)\s+(?:-\S+\s+)*{FOREIGN}"""
    rf"""|--from[ =]{FOREIGN}"""
)


def toml(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text())


def text_files() -> list[Path]:
    """The files that git tracks, and new ones that it does not ignore, without binary files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file() and b"\0" not in file.read_bytes()[:8000]]


def test_no_file_says_to_install_the_distribution_of_another_project() -> None:
    files = text_files()
    assert len(files) > 400
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in files
        for match in INSTALLS.finditer(file.read_text(errors="replace"))
    ]
    assert not found


@pytest.mark.parametrize(
    "command",
    [
        "uvx NAME",
        "uvx NAME demo",
        "uvx --python 3.13 --from NAME NAME serve",
        "uvx --quiet NAME",
        "pipx run NAME demo",
        "pip install NAME",
        "Run `pip install NAME` first.",
        "pip install\nNAME",
        "pip install -U torch NAME",
        "pip install 'NAME[server]'",
        'pip3 install "NAME>=0.2"',
        "uv tool install NAME",
        "uv add NAME",
    ],
)
def test_a_command_that_installs_the_distribution_of_another_project_is_found(command: str) -> None:
    assert INSTALLS.search(command.replace("NAME", NAME))


@pytest.mark.parametrize(
    "command",
    [
        "pip install NAME-core",
        "pip install 'NAME-core[server]'     # the server, `NAME serve`",
        "pip install ./plugins/NAME-loss-dpo && NAME serve",
        "uvx --from NAME-core NAME serve",
        "pip install nox, and write NAME.toml",
        "uv run NAME demo",
    ],
)
def test_a_command_that_installs_this_project_is_permitted(command: str) -> None:
    assert not INSTALLS.search(command.replace("NAME", NAME))


@pytest.mark.parametrize("file", DISTRIBUTIONS, ids=lambda file: file.parent.name)
def test_a_distribution_has_no_upper_bound_on_python(file: Path) -> None:
    assert toml(file)["project"]["requires-python"] == ">=3.11"


def test_mypy_checks_every_plugin() -> None:
    plugins = {file.parent.name.replace("-", "_") for file in DISTRIBUTIONS[1:]}
    assert plugins <= set(toml(ROOT / "pyproject.toml")["tool"]["mypy"]["packages"])


def test_every_tool_has_a_version_in_the_constraints() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()[1:]}
    groups = toml(ROOT / "pyproject.toml")["dependency-groups"]
    assert {*groups["lint"], *groups["test"]} <= pinned


def sessions() -> set[str]:
    """The sessions of nox, without importing nox."""
    decorated = r"^@nox\.session(?:\((.*)\))?\ndef (\w+)"
    found = re.findall(decorated, (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    return {name[1] if (name := re.search(r'name="(.+?)"', options)) else function for options, function in found}


def test_the_workflows_run_sessions_that_exist() -> None:
    workflows = "".join(file.read_text() for file in (ROOT / ".github" / "workflows").glob("*.yml"))
    named = set(re.findall(r"(?:nox -s|session:) \[?([a-z-]+)", workflows))
    assert {"tests", "lowest", "client"} <= named
    assert named <= sessions()


def test_contributing_describes_every_session() -> None:
    described = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sessions() <= set(described)


def test_the_docstring_of_the_native_api_names_every_route() -> None:
    documented = re.findall(r"^    (?:GET |POST) (/[\w.]+)", native.__doc__ or "", re.MULTILINE)
    assert {"/" + route.path.split("/")[1] for route in native.routes()} == set(documented)
