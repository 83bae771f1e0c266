"""Writes the folder of a new loss package. Imports only `tinkerbell_core`, and runs no loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from tinkerbell_core.errors import Conflict
from tinkerbell_server.scaffold.from_upload import LossModule, module_from_upload
from tinkerbell_server.scaffold.names import Names, names_for

__all__ = ["LossModule", "Names", "module_from_upload", "names_for", "new_package"]

SUFFIX = ".tmpl"
"""The suffix of every file of the template, so that no tool treats it as code."""

_SUMMARY = "cross-entropy with a larger penalty on surprising tokens, a worked example to replace."


def new_package(names: Names, folder: Path, module: LossModule | None = None) -> list[Path]:
    """Write a loss package into a new folder; the paths of its files, in the order in which they are written.

    module: replaces the worked example and its tests. Raises Conflict if the folder exists.
    """
    if folder.exists() or folder.is_symlink():
        raise Conflict(
            f"{folder} already exists, so nothing was written: remove it, or choose another folder with --dir"
        )
    values = {
        "distribution": names.distribution,
        "package": names.package,
        "loss": names.loss,
        "summary": module.summary if module else _SUMMARY,
        "examples": module.examples if module else "{}",
    }
    paths = []
    for name, template in _template_files():
        if module and name == "tests/test_losses.py":
            continue
        text = module.text if module and name.endswith("/losses.py") else _filled_in(template, values)
        path = folder / name.replace("__package__", names.package)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(path)
    return paths


def _filled_in(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def _template_files() -> Iterator[tuple[str, str]]:
    """The path in the package and the text of each file of the template, sorted by path."""
    yield from sorted(_files_in(files(__name__) / "template", ""))


def _files_in(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        name = prefix + ("." + entry.name.removeprefix("dot-") if entry.name.startswith("dot-") else entry.name)
        if entry.is_dir():
            yield from _files_in(entry, f"{name}/")
        elif entry.name.endswith(SUFFIX):
            yield name.removesuffix(SUFFIX), entry.read_text()
