"""What a loss may read of the disk is code, and nothing that lies beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tinkerbell_server.sandbox.isolation.readable_paths import readable


def test_a_source_tree_is_readable_but_for_dot_files_and_the_servers_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("package", "data", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / ".env").write_text("secret")
    (tmp_path / "module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = readable([str(tmp_path / "data")])
    assert str(tmp_path) in found.imports
    assert str(tmp_path) in found.names
    mine = {Path(path).name for path in found.files if path.startswith(str(tmp_path))}
    assert mine == {"package", "module.py"}


def test_the_current_directory_is_not_readable_for_being_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    assert not any(path.startswith(str(tmp_path)) for path in (*readable().imports, *readable().files))


def test_an_installed_library_is_readable_whole_unless_the_servers_data_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "site-packages"
    for name in ("package", "data"):
        (library / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(library)
    assert str(library) in readable().files
    assert str(library) not in readable([str(library / "data")]).files
