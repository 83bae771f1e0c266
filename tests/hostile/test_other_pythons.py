"""Losses pickled by other Pythons (real ones, tests/data/payloads): refused, and harmless if the sender lies."""

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


def sent(world: World, payload: Path, name: str, magic: str, python: str) -> httpx.Response:
    content = payload.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    request = RegisterLossRequest(name=name, payload=content, magic=magic, python=python, digest=digest)
    body, kind = msgspec.json.encode(request), {"content-type": "application/json"}
    return httpx.post(f"{world.url}/register_custom_loss", content=body, headers=kind, timeout=120)


@pytest.mark.parametrize("payload", OTHERS, ids=lambda path: path.stem)
def test_a_payload_of_another_python_is_refused_with_its_version(sandboxed: World, payload: Path) -> None:
    made = json.loads(payload.with_suffix(".json").read_text())
    answer = sent(sandboxed, payload, "of_another_python", made["magic"], made["python"])
    assert (answer.status_code, answer.json()["problem"]["kind"]) == (422, "BadUpload")
    for version in (made["python"], platform.python_version()):
        assert version in answer.json()["problem"]["message"]


@pytest.mark.parametrize("payload", OTHERS, ids=lambda path: path.stem)
def test_a_payload_that_lies_about_its_python_breaks_its_own_process_only(sandboxed: World, payload: Path) -> None:
    since = len(sandboxed.results)
    answer = sent(sandboxed, payload, f"lies_{payload.stem.replace('.', '_')}", MAGIC, platform.python_version())
    assert answer.status_code == 422
    assert answer.json()["problem"]["kind"] in ("BadUpload", "BadLoss", "LossKilled")
    assert sandboxed.harm(answer.text) == []
    assert sandboxed.neighbour_saw(since) == []


def test_there_are_payloads_of_others() -> None:
    assert len(OTHERS) >= 2
