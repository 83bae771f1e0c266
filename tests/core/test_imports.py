"""Importing tinkerbell_core does not import torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("module", ["tinkerbell_core", "tinkerbell_core.types", "tinkerbell_core.registry"])
def test_importing_the_contract_does_not_import_torch(module: str) -> None:
    assert "torch" not in _loaded(f"import {module}")


def test_creating_a_spec_does_not_import_torch() -> None:
    code = "from tinkerbell_core import loss\nloss(eval('lambda x, inputs, mask, *, beta=0.1: x'))"
    assert "torch" not in _loaded(code)


def test_the_check_detects_torch_if_it_is_imported() -> None:
    assert "torch" in _loaded("import tinkerbell_core.functional")
