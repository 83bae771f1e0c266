"""Fixtures that tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import live_server

PATIENT = {"dry_run_seconds": 60.0, "sandbox_seconds": 60.0}
"""Settings for a machine that runs many tests at once and is therefore slow."""


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the embedded model that accepts uploads."""
    with live_server(tmp_path_factory.mktemp("torch-server"), **PATIENT, device="cpu", seconds=280) as url:
        yield url
