"""Parts of the project do not import heavy modules, and no module is in an import cycle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tinkerbell_core", "tinkerbell_server", "tinker_client")


def loaded_by(statement: str) -> set[str]:
    """The modules that a new Python process has after this statement."""
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of the project that each module imports, also in functions and under TYPE_CHECKING."""
    sources = {_module_name(root, file): file for package in PACKAGES for file in (root / package).rglob("*.py")}
    return {
        module: {imported for name in _names(ast.parse(file.read_text())) if (imported := _module(name, sources))}
        for module, file in sources.items()
    }


def _module_name(root: Path, file: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _names(tree: ast.AST) -> Iterator[str]:
    """The dotted names that import statements name; relative imports are forbidden by ruff."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(name: str, modules: dict[str, Path]) -> str | None:
    """The module that this name is, or is defined in; None if it is not one of the project's."""
    return name if name in modules else parent if (parent := name.rpartition(".")[0]) in modules else None


def test_no_module_is_in_an_import_cycle() -> None:
    graph = imports(ROOT)
    assert len(graph) > 200
    TopologicalSorter(graph).prepare()


def test_a_cycle_through_type_checking_and_a_function_is_found(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "tinkerbell_core" / "a.py").write_text("if TYPE_CHECKING:\n    from tinkerbell_core.b import B\n")
    (tmp_path / "tinkerbell_core" / "b.py").write_text("def f():\n    from tinkerbell_core import a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(tmp_path)).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_the_api_process_loads_no_torch() -> None:
    loaded = loaded_by("import tinkerbell_server.launch, tinkerbell_server.app")
    assert not loaded & {"torch", "transformers", "peft"}
    assert "starlette" in loaded


@pytest.mark.parametrize("module", ["tinkerbell_server.engines.process", "tinkerbell_server.service.service"])
def test_an_engine_and_the_service_load_no_http_server(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"starlette", "uvicorn"}
