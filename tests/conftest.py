"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import live_server

PATIENT = ("--dry-run-seconds", "60", "--sandbox-seconds", "60")
"""A machine that runs many tests at once is slow."""


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on the embedded model that takes uploads."""
    with live_server(tmp_path_factory.mktemp("torch-server"), *PATIENT, "--device", "cpu", seconds=280) as url:
        yield url
