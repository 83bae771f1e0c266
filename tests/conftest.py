"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import live_server


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on the embedded model that takes uploads."""
    with live_server(tmp_path_factory.mktemp("torch-server"), "--device", "cpu") as url:
        yield url
