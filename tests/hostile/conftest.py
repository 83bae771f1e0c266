"""A server under attack that runs uploads in the sandbox: one a module, since its neighbour works all the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.world import World, world


@pytest.fixture(scope="module")
def sandboxed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("sandboxed"), "sandboxed") as made:
        health = made.client.healthz()
        assert health["uploads"] == "sandboxed"
        assert "seccomp" in health["mechanisms"]
        assert {"bubblewrap", "landlock"} & set(health["mechanisms"])
        yield made
