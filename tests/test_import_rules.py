"""import-linter finds a violation of each contract in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tinkerbell_core", "tinkerbell_server", "tinker_client")
LAYERS = "a package of the server imports only packages below it"
NO_TORCH = "the API process imports no torch"


class Violation(NamedTuple):
    """Lines that break a contract if they are added to a file."""

    contract: str
    file: str
    lines: str


VIOLATIONS = [
    Violation(
        "core imports neither client nor server, and the client imports no server",
        "tinkerbell_core/errors.py",
        "import tinkerbell_server.config",
    ),
    Violation("the server imports no client", "tinkerbell_server/cli/demo.py", "import tinker_client.demo"),
    Violation(LAYERS, "tinkerbell_server/service/queue.py", "import tinkerbell_server.api.native"),
    Violation(LAYERS, "tinkerbell_server/a_new_module.py", '"""A module without a layer."""'),
    Violation(
        "access imports only config and database",
        "tinkerbell_server/access/keys.py",
        "import tinkerbell_server.commands",
    ),
    Violation(
        "http imports only access and config", "tinkerbell_server/http/auth.py", "import tinkerbell_server.calls.rows"
    ),
    Violation(
        "the sandbox imports only tinkerbell_core",
        "tinkerbell_server/sandbox/rpc.py",
        "import tinkerbell_server.config",
    ),
    Violation(
        "the scaffold imports only tinkerbell_core",
        "tinkerbell_server/scaffold/literals.py",
        "import tinkerbell_server.calls.rows",
    ),
    Violation(NO_TORCH, "tinkerbell_server/config.py", "import torch"),
    Violation(NO_TORCH, "tinkerbell_server/service/queue.py", "def late():\n    import transformers"),
    Violation(NO_TORCH, "tinkerbell_server/api/native.py", "if TYPE_CHECKING:\n    from peft import PeftModel"),
    Violation(NO_TORCH, "tinkerbell_core/errors.py", "import torch"),  # the API process imports tinkerbell_core.errors
    Violation(
        "only the API process imports an HTTP server",
        "tinkerbell_server/engines/process.py",
        "import starlette.requests",
    ),
    Violation("importing tinkerbell_core loads no torch", "tinkerbell_core/registry.py", "import torch.nn"),
    Violation(
        "an API imports no other API, but openai serves the checkpoints of tinker",
        "tinkerbell_server/api/tinker/http.py",
        "import tinkerbell_server.api.native",
    ),
    Violation(
        "nothing imports the torch engine: the settings name it",
        "tinkerbell_server/engines/process.py",
        "def late():\n    import tinkerbell_server.engines.torch.engine",
    ),
    Violation(
        "no import cycles",
        "tinkerbell_core/errors.py",
        "if TYPE_CHECKING:\n    from tinkerbell_core.spec import LossSpec",
    ),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages and of the configuration of import-linter."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.tmpl"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint_imports(folder: Path) -> dict[str, bool]:
    """Whether each contract is kept by the packages in this folder."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-logo", "--no-cache"],
        cwd=folder,  # comes first on the path of `python -c`, before an editable installation
        env={"COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    kept = {}
    for line in done.stdout.splitlines():
        name, _, verdict = line.partition(" (")[0].rpartition(" ")
        if verdict in ("KEPT", "BROKEN"):
            kept[name] = verdict == "KEPT"
    assert kept, done.stdout + done.stderr
    assert done.returncode == (0 if all(kept.values()) else 1), done.stdout + done.stderr
    return kept


def test_the_packages_keep_every_contract(checkout: Path) -> None:
    assert [name for name, kept in lint_imports(checkout).items() if not kept] == []


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: f"{violation.file}: {violation.contract}")
def test_a_violation_breaks_its_contract(checkout: Path, violation: Violation) -> None:
    file = checkout / violation.file
    original = file.read_text() if file.exists() else None
    try:
        file.write_text(f"{original or ''}\n{violation.lines}\n")
        assert lint_imports(checkout)[violation.contract] is False
    finally:
        if original is None:
            file.unlink()
        else:
            file.write_text(original)


def test_every_contract_has_a_violation() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert {contract["name"] for contract in configuration["contracts"]} == {one.contract for one in VIOLATIONS}
