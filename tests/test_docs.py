"""The code blocks of the documentation run, its commands exist, and the pages that errors name exist."""

from __future__ import annotations

import ast
import json
import linecache
import re
import shlex
import tomllib
import types
from pathlib import Path
from typing import Any

import click
import pytest

from tinkerbell_core.testing import CHECKS, check_loss
from tinkerbell_server.cli import tinkerbell
from tools.site import NAV, PAGES, PYTHON_API, broken_links, public_names, python_api_page, site_links

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = DOCS / "loss-plugins.md"
TEXTS = {page.name: page.read_text() for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
ALL_TEXTS = TEXTS | {name: (ROOT / name).read_text() for name in PAGES.values()}

NOT_RUN = r"<!-- not run: [^>]+ -->\n+"
"""The mark, with a reason, before a block that cannot run."""


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without those that are marked as not run."""
    text = re.sub(rf"{NOT_RUN}```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# tests/tinker/test_page.py runs the blocks of coming-from-tinker.md with each version of the SDK
RUN_HERE = [page for page, text in TEXTS.items() if blocks(text, "python") and page != "coming-from-tinker.md"]


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_python_blocks_of_a_page_run_in_order(
    page: str, torch_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snippets = blocks(TEXTS[page], "python")
    monkeypatch.chdir(tmp_path)
    # cloudpickle sends objects of `__main__` by value, as in a notebook
    session = types.ModuleType("__main__")
    for number, snippet in enumerate(snippets):
        code = snippet.replace("http://localhost:8000", torch_server)
        cell = f"<block {number} of {page}>"
        monkeypatch.setitem(linecache.cache, cell, (len(code), None, code.splitlines(keepends=True), cell))
        exec(compile(code, cell, "exec"), vars(session))
    if "client" in vars(session):
        vars(session)["client"].close()


@pytest.mark.parametrize("page", ALL_TEXTS)
def test_the_toml_and_json_blocks_of_a_page_can_be_parsed(page: str) -> None:
    for block in blocks(ALL_TEXTS[page], "toml"):
        tomllib.loads(block)
    for block in blocks(ALL_TEXTS[page], "json"):
        json.loads(block)


def commands(text: str) -> list[str]:
    """The `tinkerbell` commands of a page: lines of indented or fenced blocks, and inline code."""
    lines = re.findall(r"^(?:    |\$ )?(tinkerbell [^\n]*)$", text, re.MULTILINE)
    return [*lines, *(code for code in re.findall(r"`(tinkerbell [^`\n]+)`", text))]


def check_command(line: str) -> None:
    """Raise AssertionError if a command has an unknown subcommand or option."""
    command: click.Command = tinkerbell
    context = click.Context(command)
    words = shlex.split(re.sub(r"\$\([^)]*\)|[|;].*", "", line), comments=True)[1:]
    for word in words:
        if isinstance(command, click.Group) and not word.startswith("-"):
            found = command.get_command(context, word)
            assert found is not None, f"{line!r}: there is no command {word!r}"
            command, context = found, click.Context(found)
        elif word.startswith("--"):
            option = word.partition("=")[0]
            known = {name for param in command.get_params(context) for name in (*param.opts, *param.secondary_opts)}
            assert option in known, f"{line!r}: there is no option {option!r}"


@pytest.mark.parametrize("page", ALL_TEXTS)
def test_the_commands_of_a_page_exist(page: str) -> None:
    if page == "CHANGELOG.md":
        pytest.skip("it names commands of earlier versions")
    for line in commands(ALL_TEXTS[page]):
        check_command(line)


@pytest.mark.parametrize("line", ["tinkerbell serv", "tinkerbell loss make", "tinkerbell serve --prot 1"])
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises(AssertionError, match="there is no"):
        check_command(line)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def references() -> list[tuple[str, str, str]]:
    """Each page that a text in the code names: (file, page, anchor)."""
    found = []
    for package in ("tinkerbell_core", "tinkerbell_server", "tinker_client", "plugins"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names = re.findall(r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?", node.value)
                    found += [(str(file.relative_to(ROOT)), page, anchor) for page, anchor in names]
    return found


def test_the_pages_and_anchors_that_errors_name_exist() -> None:
    assert len(references()) > 10
    for file, page, anchor in references():
        assert (ROOT / page).exists(), f"{file} names {page}"
        assert not anchor or anchor in anchors(ROOT / page), f"{file} names {page}#{anchor}"


def test_the_navigation_names_every_page_of_docs() -> None:
    def pages(entries: list[tuple[str, Any]]) -> list[str]:
        return [page for _, target in entries for page in ([target] if isinstance(target, str) else pages(target))]

    named = set(pages(NAV))
    assert {page.name for page in DOCS.glob("*.md")} <= named
    assert named - {"http-api.md", "python-api.md", *PAGES} <= {page.name for page in DOCS.glob("*.md")}


def test_the_python_api_page_names_every_public_name() -> None:
    page = python_api_page().split()
    for module in PYTHON_API:
        assert public_names(module)
        assert {f"{module}.{name}" for name in public_names(module)} <= set(page)


def test_a_link_to_a_file_without_a_page_becomes_text() -> None:
    text = "[a](../SECURITY.md#keys) [b](settings.md) [c](../tinkerbell_core/functional.py) [d](https://example.org)"
    assert site_links(text, "docs") == "[a](security.md#keys) [b](settings.md) c [d](https://example.org)"
    with pytest.raises(ValueError, match="no file of the repository"):
        site_links("[a](../missing.py)", "docs")


def test_a_broken_link_anchor_or_external_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html">b</a><a href="#x">x</a><a href="#y">y</a>')
    (tmp_path / "c.html").write_text('<a href="a.html#z">z</a><script src="https://cdn.example/x.js"></script>')
    assert list(broken_links(tmp_path)) == [
        "a.html: b.html does not exist",
        "a.html: #y has no such anchor",
        "c.html: a.html#z has no such anchor",
        "c.html: loads https://cdn.example/x.js from another site",
    ]


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
