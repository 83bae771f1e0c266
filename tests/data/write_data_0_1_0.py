"""Writes data-0.1.0.tar.gz: a data folder of release 0.1.0, and facts.json, which describes it.

Run it with the code of 0.1.0 (commit 4ed83fd) from a checkout at OLD, with its dependencies and Tinker SDK 0.38.0:

    PYTHONPATH=OLD TINKER_API_KEY=tml-test python tests/data/write_data_0_1_0.py

The fake engine of that release keeps the folder small. Its databases contain the paths of a temporary folder, which is
deleted at the end, as if the data folder had been moved. tests/server/test_data_folder.py opens it.
"""

# mypy: ignore-errors
# ruff: noqa: I001
# the modules of 0.1.0 had other names

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import platform
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import httpx
import tinker
from tinker import types
from tinkerbell_server.config import Settings
from tinkerbell_server.keys import Keys
from tinkerbell_server.running import running

ROWS = [[1, 2, 3], [4, 5]]


class Native:
    """A client of the native API."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.http = httpx.Client(base_url=url, timeout=40, headers={"x-api-key": key} if key else None)

    def request(self, path: str, /, **body: Any) -> dict[str, Any]:
        """The future of a request, which is done."""
        answer = self.http.post(path, json=body).raise_for_status()
        future = self.http.get(f"/futures/{answer.json()['request_id']}", params={"wait": 30}).json()
        assert future["state"] == "done", future
        return dict(future)

    def step(self, model_id: str) -> None:
        self.request("/forward_backward", model_id=model_id, data=ROWS)
        self.request("/optim_step", model_id=model_id)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        settings = Settings(engine="fake", data_dir=str(data), port=0, uploads="trusted")
        facts: dict[str, Any] = {"folder": str(data)}
        with running(settings) as server:
            facts |= native_requests(Native(server.url))
            facts |= tinker_requests(server.url)
        facts |= create_keys(data)
        with running(settings) as server:
            facts |= tenant_requests(Native(server.url, facts["key"]))
        Path(folder, "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
        with tarfile.open(Path(__file__).with_name("data-0.1.0.tar.gz"), "w:gz") as tar:
            tar.add(data, "data", filter=lambda entry: None if entry.name == "data/lock" else entry)
            tar.add(Path(folder, "facts.json"), "facts.json")


def native_requests(client: Native) -> dict[str, Any]:
    """A saved model, one that loaded the save, one with the save as its reference and an unsaved step, an upload."""
    client.request("/create_model", model_id="life", rank=4)
    client.step("life")
    client.step("life")
    save = client.request("/save", model_id="life", name="first")
    path = save["result"]["path"]
    client.request("/create_model", model_id="loaded", rank=4)
    client.request("/load", model_id="loaded", path=path)
    client.request("/create_model", model_id="child", rank=4, reference=path)
    client.step("child")
    payload = b"a pickled loss"
    upload = {
        "name": "mine",
        "payload": base64.b64encode(payload).decode(),
        "magic": importlib.util.MAGIC_NUMBER.hex(),
        "python": platform.python_version(),
        "digest": hashlib.sha256(payload).hexdigest(),
        "source": "def mine(): ...",
    }
    client.http.post("/register_custom_loss", json=upload).raise_for_status()
    return {"save_request": save["request_id"]}


def tinker_requests(url: str) -> dict[str, Any]:
    """A run with a state, weights for samplers with and without a name, and a sample."""
    service = tinker.ServiceClient(base_url=url)
    base = httpx.get(f"{url}/api/v1/get_server_capabilities").json()["supported_models"][0]["model_name"]
    training = service.create_lora_training_client(base_model=base, rank=4).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[2, 3, 4], dtype="int64", shape=[3])},
    )
    training.forward_backward([datum], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    facts = {
        "run": training.model_id,
        "base": base,
        "state": training.save_state("state").result().path,
        "named": training.save_weights_for_sampler("named").result().path,
    }
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt, parameters = types.ModelInput.from_ints([1, 2]), types.SamplingParams(max_tokens=3, seed=1)
    sample = sampler.sample(prompt, num_samples=1, sampling_params=parameters).result()
    return {**facts, "sampler": sampler._sampling_session_id, "sampled": list(sample.sequences[0].tokens)}


def create_keys(data: Path) -> dict[str, Any]:
    """A key, and one that was revoked."""
    keys = Keys(data)
    _, key = keys.create("fixture", tenant="ann")
    revoked, text = keys.create("old", tenant="ann")
    keys.revoke(revoked.id)
    keys.close()
    return {"key": key, "revoked": text}


def tenant_requests(client: Native) -> dict[str, Any]:
    """A saved model of a tenant with a key."""
    client.request("/create_model", model_id="life", rank=2)
    client.step("life")
    client.request("/save", model_id="life", name="first")
    return {}


if __name__ == "__main__":
    main()
