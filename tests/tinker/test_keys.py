"""The SDK at a server that asks for keys: with a good one it works, with any other it hears so at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.fake_engine import FAKE_ENGINE
from tests.tinker.sdk import datum, now, text
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

DATA = [datum(text(8), weights=[1.0] * 7)]


@dataclass(frozen=True, slots=True)
class Guarded:
    """A server that asks for a key, its base model, and its keys."""

    url: str
    keys: Keys

    def key(self, *scopes: str) -> tuple[str, str]:
        made, secret = self.keys.create("test", tenant="ann", scopes=scopes or ("train",))
        return made.id, secret


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    keys = Keys(folder)
    keys.create("first", tenant="ann", scopes=("train",))
    with running_server(
        Settings(engine=FAKE_ENGINE, data_dir=str(folder), port=0, uploads="off"), timeout=280
    ) as server:
        yield Guarded(server.url, keys)
    keys.close()


def client(guarded: Guarded, key: str) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=guarded.url, api_key=key)
    base = now(service.get_server_capabilities()).supported_models[0].model_name
    made: tinker.TrainingClient = now(service.create_lora_training_client(base_model=base, rank=4))
    return made


def test_with_a_key_one_trains(guarded: Guarded) -> None:
    model = client(guarded, guarded.key()[1])
    assert model.forward_backward(DATA, "cross_entropy").result().metrics
    assert model.optim_step(types.AdamParams()).result().metrics


@pytest.mark.parametrize("why", ["unknown", "revoked"])
def test_a_key_that_is_not_taken_is_refused_at_once(guarded: Guarded, why: str) -> None:
    key_id, secret = guarded.key()
    if why == "revoked":
        guarded.keys.revoke(key_id)
    else:
        secret = f"{secret[:-4]}0000"
    began = time.monotonic()
    with pytest.raises(tinker.AuthenticationError, match="revoked" if why == "revoked" else "key"):
        client(guarded, secret)
    assert time.monotonic() - began < 20


def test_without_a_key_the_sdk_itself_says_so(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key may be kept
    began = time.monotonic()
    with pytest.raises(Exception, match=r"TINKER_API_KEY|api_key"):
        client(guarded, "")
    assert time.monotonic() - began < 20


def test_a_key_that_is_revoked_meanwhile_ends_what_it_did(guarded: Guarded) -> None:
    key_id, secret = guarded.key()
    model = client(guarded, secret)
    assert model.forward_backward(DATA, "cross_entropy").result().metrics
    guarded.keys.revoke(key_id)
    began = time.monotonic()
    with pytest.raises(tinker.AuthenticationError, match="revoked"):
        model.forward_backward(DATA, "cross_entropy").result()
    assert time.monotonic() - began < 20


def test_a_key_that_may_only_read_does_not_train(guarded: Guarded) -> None:
    began = time.monotonic()
    with pytest.raises(tinker.PermissionDeniedError, match="train"):
        client(guarded, guarded.key("read")[1])
    assert time.monotonic() - began < 20
