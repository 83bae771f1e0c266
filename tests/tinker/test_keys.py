"""The SDK with a server that requires keys: a valid key is accepted, and any other is refused at once."""

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
class ProtectedServer:
    """A server that requires a key, and its keys."""

    url: str
    keys: Keys

    def key(self, *scopes: str) -> tuple[str, str]:
        made, secret = self.keys.create("test", tenant="ann", scopes=scopes or ("train",))
        return made.id, secret


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProtectedServer]:
    folder: Path = tmp_path_factory.mktemp("protected")
    keys = Keys(folder)
    keys.create("first", tenant="ann", scopes=("train",))
    with running_server(
        Settings(engine=FAKE_ENGINE, data_dir=str(folder), port=0, uploads="off"), timeout=280
    ) as server:
        yield ProtectedServer(server.url, keys)
    keys.close()


def client(protected: ProtectedServer, key: str) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=protected.url, api_key=key)
    base = now(service.get_server_capabilities()).supported_models[0].model_name
    made: tinker.TrainingClient = now(service.create_lora_training_client(base_model=base, rank=4))
    return made


def test_a_client_with_a_valid_key_can_train(protected: ProtectedServer) -> None:
    model = client(protected, protected.key()[1])
    assert model.forward_backward(DATA, "cross_entropy").result().metrics
    assert model.optim_step(types.AdamParams()).result().metrics


@pytest.mark.parametrize("reason", ["unknown", "revoked"])
def test_an_invalid_key_is_refused_at_once(protected: ProtectedServer, reason: str) -> None:
    key_id, secret = protected.key()
    if reason == "revoked":
        protected.keys.revoke(key_id)
    else:
        secret = f"{secret[:-4]}0000"
    began = time.monotonic()
    with pytest.raises(tinker.AuthenticationError, match="revoked" if reason == "revoked" else "key"):
        client(protected, secret)
    assert time.monotonic() - began < 20


def test_without_a_key_the_sdk_raises_an_error(
    protected: ProtectedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # the SDK reads a stored key from there
    began = time.monotonic()
    with pytest.raises(Exception, match=r"TINKER_API_KEY|api_key"):
        client(protected, "")
    assert time.monotonic() - began < 20


def test_a_key_that_is_revoked_during_training_is_refused(protected: ProtectedServer) -> None:
    key_id, secret = protected.key()
    model = client(protected, secret)
    assert model.forward_backward(DATA, "cross_entropy").result().metrics
    protected.keys.revoke(key_id)
    began = time.monotonic()
    with pytest.raises(tinker.AuthenticationError, match="revoked"):
        model.forward_backward(DATA, "cross_entropy").result()
    assert time.monotonic() - began < 20


def test_a_key_with_the_scope_read_cannot_train(protected: ProtectedServer) -> None:
    began = time.monotonic()
    with pytest.raises(tinker.PermissionDeniedError, match="train"):
        client(protected, protected.key("read")[1])
    assert time.monotonic() - began < 20
