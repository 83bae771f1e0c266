"""A new folder with a complete loss package in it. Imports no torch and runs no loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from tinkerbell_core.errors import Conflict
from tinkerbell_server.scaffold.from_upload import Written, written
from tinkerbell_server.scaffold.names import Names, names_for

__all__ = ["Names", "Written", "names_for", "new_package", "written"]

SUFFIX = ".tmpl"
"""Of every file of the template, so that no tool takes it for code."""

_SUMMARY = "cross-entropy that minds surprising tokens more, to write over."


def new_package(names: Names, folder: Path, upload: Written | None = None) -> list[Path]:
    """Write the package into `folder`, which must not be there yet; the files, as they were written.

    upload: the loss to put there instead of the worked example, with no tests but the kit's. Raises Conflict.
    """
    if folder.exists() or folder.is_symlink():
        raise Conflict(f"{folder} is there already: nothing was written; take another --dir, or remove it")
    words = {
        "distribution": names.distribution,
        "package": names.package,
        "loss": names.loss,
        "summary": upload.summary if upload else _SUMMARY,
        "examples": upload.examples if upload else "{}",
    }
    made = []
    for path, text in _template():
        if upload and path == "tests/test_losses.py":
            continue
        own = upload.text if upload and path.endswith("/losses.py") else _filled(text, words)
        target = folder / path.replace("__package__", names.package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(own)
        made.append(target)
    return made


def _filled(text: str, words: Mapping[str, str]) -> str:
    for name, word in words.items():
        text = text.replace(f"{{{{{name}}}}}", word)
    return text


def _template() -> Iterator[tuple[str, str]]:
    """Path in the package and text of each file, in order."""
    yield from sorted(_below(files(__name__) / "template", ""))


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        name = path + ("." + entry.name.removeprefix("dot-") if entry.name.startswith("dot-") else entry.name)
        if entry.is_dir():
            yield from _below(entry, f"{name}/")
        elif entry.name.endswith(SUFFIX):
            yield name.removesuffix(SUFFIX), entry.read_text()
