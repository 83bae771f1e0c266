"""find_readable_paths grants code that a loss may import, and never a directory that contains a hidden one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tinkerbell_server.sandbox.isolation.readable_paths import LIBRARIES, find_readable_paths


def test_a_source_tree_is_readable_except_dot_files_and_the_hidden_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("package", "data", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / ".env").write_text("secret")
    (tmp_path / "module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    paths = find_readable_paths([str(tmp_path / "data")])
    assert str(tmp_path) in paths.imports
    assert str(tmp_path) in paths.partial
    readable = {Path(path).name for path in paths.files if path.startswith(str(tmp_path))}
    assert readable == {"package", "module.py"}


def test_the_current_folder_is_not_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    paths = find_readable_paths()
    assert not any(path.startswith(str(tmp_path)) for path in (*paths.imports, *paths.files))


def test_an_installed_library_is_readable_completely_unless_it_contains_the_hidden_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "site-packages"
    for name in ("package", "data"):
        (library / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(library)
    assert str(library) in find_readable_paths().files
    assert str(library) not in find_readable_paths([str(library / "data")]).files


def test_the_other_entries_of_a_package_that_contains_the_hidden_folder_are_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package" / "data").mkdir(parents=True)
    (tmp_path / "package" / "module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    paths = find_readable_paths([str(tmp_path / "package" / "data")])
    assert str(tmp_path / "package" / "module.py") in paths.files
    assert not {str(tmp_path), str(tmp_path / "package")} & {*paths.files}
    assert {str(tmp_path), str(tmp_path / "package")} <= {*paths.unlistable}


def test_the_hidden_folder_is_found_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, link = tmp_path / "tree", tmp_path / "link"
    (tree / "data").mkdir(parents=True)
    (tree / "loop").symlink_to(tree)
    (tree / "other").symlink_to(tree / "data")
    link.symlink_to(tree)
    monkeypatch.syspath_prepend(link)
    paths = find_readable_paths([str(link / "data")])
    assert [path for path in paths.files if path.startswith(str(tmp_path))] == []
    assert paths.unlistable == (str(link),)


def test_a_warning_names_the_folder_on_the_import_path_the_hidden_folder_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (contains,) = find_readable_paths([str(tmp_path / "data")]).warnings
    (inside,) = find_readable_paths([str(tmp_path.parent)]).warnings
    for warning in (contains, inside):
        assert warning.startswith(f"{tmp_path} is on the import path")
        assert "--data-dir" in warning
    assert str(tmp_path / "data") in contains


def test_a_hidden_folder_among_the_system_libraries_is_reported() -> None:
    library = next(path for path in LIBRARIES if os.path.isdir(path))
    problem = find_readable_paths([f"{library}/tinkerbell-data"]).exposed
    assert f"{os.path.realpath(library)}/tinkerbell-data must be hidden" in problem
    assert "--data-dir" in problem
    assert find_readable_paths().exposed == ""
