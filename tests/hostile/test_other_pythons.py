"""Losses pickled by other Python versions (tests/data/payloads) are refused, and harmless under a false version."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.hostile.world import World
from tinkerbell_core.types import RegisterLossRequest

MAGIC = importlib.util.MAGIC_NUMBER.hex()
FOLDER = Path(__file__).parent.parent / "data" / "payloads"
OTHERS = [
    path
    for path in sorted(FOLDER.glob("*.pickle"))
    if json.loads(path.with_suffix(".json").read_text())["magic"] != MAGIC
]


def send(world: World, payload: Path, name: str, magic: str, python: str) -> httpx.Response:
    content = payload.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    request = RegisterLossRequest(name=name, payload=content, magic=magic, python=python, digest=digest)
    body, kind = msgspec.json.encode(request), {"content-type": "application/json"}
    return httpx.post(f"{world.url}/register_custom_loss", content=body, headers=kind, timeout=120)


@pytest.mark.parametrize("payload", OTHERS, ids=lambda path: path.stem)
def test_a_payload_of_another_python_is_refused_with_both_versions(sandboxed: World, payload: Path) -> None:
    metadata = json.loads(payload.with_suffix(".json").read_text())
    response = send(sandboxed, payload, "of_another_version", metadata["magic"], metadata["python"])
    assert (response.status_code, response.json()["problem"]["kind"]) == (422, "BadUpload")
    for version in (metadata["python"], platform.python_version()):
        assert version in response.json()["problem"]["message"]


@pytest.mark.parametrize("payload", OTHERS, ids=lambda path: path.stem)
def test_a_payload_under_a_false_python_version_ends_only_its_own_process(sandboxed: World, payload: Path) -> None:
    since = len(sandboxed.results)
    response = send(sandboxed, payload, f"false_{payload.stem.replace('.', '_')}", MAGIC, platform.python_version())
    assert response.status_code == 422
    assert response.json()["problem"]["kind"] in ("BadUpload", "BadLoss", "LossKilled")
    assert sandboxed.harm(response.text) == []
    assert sandboxed.changes_for_the_neighbour(since) == []


def test_there_are_payloads_of_two_other_versions() -> None:
    assert len(OTHERS) >= 2
