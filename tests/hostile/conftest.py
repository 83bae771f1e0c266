"""A server that runs uploads in the sandbox, one for each test module because its neighbour trains all the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.world import World, world


@pytest.fixture(scope="module")
def sandboxed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("sandboxed"), "sandboxed") as running:
        health = running.client.healthz()
        assert health["uploads"] == "sandboxed"
        assert "seccomp" in health["mechanisms"]
        assert {"bubblewrap", "landlock"} & set(health["mechanisms"])
        yield running
