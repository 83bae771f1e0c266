"""Keys and tenants in the Tinker and OpenAI APIs: a tenant cannot see or use the objects of another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_engine import FAKE_ENGINE
from tests.server.conftest import Caller, upload
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import RunningServer, running_server

UNKNOWN = "0" * 32

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}

DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}},
}


class Tenant:
    """A Tinker client with one key: a session and a run, with methods to train, save, sample and complete."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.base = self.get("get_server_capabilities").json()["supported_models"][0]["model_name"]
        self.session = self.post("create_session", tags=[], sdk_version="test").json()["session_id"]
        self.models, self.samplers = 0, 0
        self.run = self.model()
        self.seq = 1

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.caller.http.post(f"/api/v1/{path}", json=body)

    def get(self, path: str) -> httpx.Response:
        return self.caller.http.get(f"/api/v1/{path}")

    def done(self, future: httpx.Response) -> dict[str, Any]:
        assert future.status_code == 200, future.text
        answer = self.post("retrieve_future", request_id=future.json()["request_id"])
        assert answer.status_code == 200, answer.text
        return dict(answer.json()) if answer.headers["content-type"] == "application/json" else {}

    def model(self) -> str:
        self.models += 1
        made = self.post("create_model", session_id=self.session, model_seq_id=self.models, base_model=self.base)
        return str(self.done(made)["model_id"])

    def numbered(self, verb: str, **body: Any) -> httpx.Response:
        self.seq += 1
        return self.post(verb, model_id=self.run, seq_id=self.seq - 1, **body)

    def trained(self, loss_fn: str = "cross_entropy") -> dict[str, Any]:
        return self.done(
            self.numbered("forward_backward", forward_backward_input={"data": [DATUM], "loss_fn": loss_fn})
        )

    def saved(self, name: str) -> str:
        answer = self.done(self.numbered("save_weights", path=name))
        return str(answer["path"])

    def sampler(self, **of: str) -> httpx.Response:
        self.samplers += 1
        return self.post(
            "create_sampling_session", session_id=self.session, sampling_session_seq_id=self.samplers, **of
        )

    def complete(self, model: str) -> httpx.Response:
        return self.caller.http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 2})


class World:
    def __init__(self, server: RunningServer, keys: Keys, data: Path) -> None:
        self.data, self.anonymous = data, Caller(server)

        def caller(tenant: str, *scopes: str) -> Caller:
            return Caller(server, keys.create(tenant, tenant=tenant, scopes=scopes or ("train", "upload"))[1])

        self.reader = caller("reader", "read")
        self.ann, self.bob = Tenant(caller("ann")), Tenant(caller("bob"))
        self.local = Tenant(caller("local"))

    def close(self) -> None:
        for caller in (self.anonymous, self.reader, self.ann.caller, self.bob.caller, self.local.caller):
            caller.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("data")
    keys = Keys(folder)
    settings = Settings(engine=FAKE_ENGINE, data_dir=str(folder), port=0, uploads="trusted", concurrency_limit=20)
    with running_server(settings, timeout=120) as server:
        made = World(server, keys, folder)
        yield made
        made.close()
    keys.close()


def assert_same_problem(foreign: httpx.Response, unknown: httpx.Response, name: str, other: str) -> None:
    """Assert that two refusals differ only in the name that was requested."""
    assert foreign.status_code == unknown.status_code
    assert foreign.status_code in (404, 410)
    assert foreign.text.replace(name, other) == unknown.text


def test_the_error_for_a_session_of_another_tenant_is_that_for_an_unknown_one(world: World) -> None:
    session = world.ann.session
    base = world.bob.base
    for path, body in (
        ("create_model", {"model_seq_id": 7, "base_model": base}),
        ("create_sampling_session", {"sampling_session_seq_id": 7, "base_model": base}),
        ("session_heartbeat", {}),
    ):
        foreign = world.bob.post(path, session_id=session, **body)
        assert_same_problem(foreign, world.bob.post(path, session_id=UNKNOWN, **body), session, UNKNOWN)
    assert_same_problem(world.bob.get(f"sessions/{session}"), world.bob.get(f"sessions/{UNKNOWN}"), session, UNKNOWN)


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("get_info", {}),
        ("forward_backward", {"seq_id": 1, "forward_backward_input": {"data": [DATUM], "loss_fn": "cross_entropy"}}),
        ("optim_step", {"seq_id": 1}),
        ("save_weights", {"seq_id": 1, "path": "x"}),
        ("save_weights_for_sampler", {"seq_id": 1, "path": "x"}),
        ("load_weights", {"seq_id": 1, "path": "tinker://a/weights/b"}),
    ],
)
def test_the_error_for_a_run_of_another_tenant_is_that_for_an_unknown_one(
    world: World, verb: str, body: dict[str, Any]
) -> None:
    for run in (world.ann.run, f"ann/{world.ann.run}"):
        for tenant in (world.bob, world.local):
            answer = tenant.post(verb, model_id=run, **body)
            assert answer.status_code == 404
    foreign = world.local.post(verb, model_id=world.ann.run, **body)
    unknown = world.local.post(verb, model_id=UNKNOWN, **body)
    assert_same_problem(foreign, unknown, world.ann.run, UNKNOWN)


def test_the_error_for_a_future_of_another_tenant_is_that_for_an_unknown_one(world: World) -> None:
    future = world.ann.numbered(
        "forward_backward", forward_backward_input={"data": [DATUM], "loss_fn": "cross_entropy"}
    )
    request_id = future.json()["request_id"]
    assert "/" not in request_id
    world.ann.done(future)
    for id in (request_id, f"ann/{request_id}"):
        foreign = world.bob.post("retrieve_future", request_id=id)
        assert_same_problem(foreign, world.bob.post("retrieve_future", request_id="req-none"), id, "req-none")


def test_a_checkpoint_of_another_tenant_can_be_used_only_after_it_is_published(world: World) -> None:
    world.ann.trained()
    path = world.ann.saved("mine")
    run, _, name = path.removeprefix("tinker://").split("/")
    unknown = path.replace(run, UNKNOWN)
    for answer in (world.bob.sampler(model_path=path), world.bob.post("weights_info", tinker_path=path)):
        assert answer.status_code == 404
    assert_same_problem(
        world.bob.post("weights_info", tinker_path=path),
        world.bob.post("weights_info", tinker_path=unknown),
        path,
        unknown,
    )
    for verb in ("", "/publish"):
        answer = world.bob.caller.http.delete(f"/api/v1/training_runs/{run}/checkpoints/weights/{name}{verb}")
        assert answer.status_code == 404
    assert world.bob.complete(path).status_code == 404
    assert world.bob.caller.http.get(f"/v1/models/{path}").status_code == 404
    assert path not in world.bob.get("checkpoints").text
    assert path in world.ann.get("checkpoints").text
    world.ann.caller.http.post(f"/api/v1/training_runs/{run}/checkpoints/weights/{name}/publish")
    assert world.bob.sampler(model_path=path).status_code == 200
    assert world.bob.caller.http.get(f"/v1/models/{path}").json()["id"] == path


def test_saves_are_written_to_the_folder_of_the_tenant(world: World) -> None:
    world.ann.saved("here")
    world.local.saved("here")
    assert (world.data / "tenants" / "ann" / "models" / world.ann.run / "weights.here").is_dir()
    assert (world.data / "models" / world.local.run / "weights.here").is_dir()


def test_the_error_for_a_sampler_of_another_tenant_is_that_for_an_unknown_one(world: World) -> None:
    sampler = world.ann.sampler(base_model=world.ann.base).json()["sampling_session_id"]
    request = {"prompt": PROMPT, "sampling_params": {"max_tokens": 2}, "seq_id": 0}
    sampled = world.ann.post("asample", sampling_session_id=sampler, **request)
    assert not any("/" in name for name in sampled.json()["sample_sequence_ids"])
    world.ann.done(sampled)
    foreign = world.bob.post("asample", sampling_session_id=sampler, **request)
    assert_same_problem(foreign, world.bob.post("asample", sampling_session_id=UNKNOWN, **request), sampler, UNKNOWN)
    assert_same_problem(world.bob.get(f"samplers/{sampler}"), world.bob.get(f"samplers/{UNKNOWN}"), sampler, UNKNOWN)


def test_tenants_can_use_the_same_seq_id_for_samples_of_the_base(world: World) -> None:
    request = {"prompt": PROMPT, "sampling_params": {"max_tokens": 2}, "seq_id": 900}
    answers = [tenant.post("asample", base_model=tenant.base, **request) for tenant in (world.ann, world.bob)]
    assert len({answer.json()["request_id"] for answer in answers}) == 2
    for tenant, answer in zip((world.ann, world.bob), answers, strict=True):
        tenant.done(answer)


def test_a_tenant_lists_only_its_own_runs_sessions_and_models(world: World) -> None:
    for tenant, other in ((world.ann, world.bob), (world.bob, world.ann), (world.local, world.ann)):
        runs = tenant.get("training_runs").text
        assert tenant.run in runs
        assert other.run not in runs
        assert other.session not in tenant.get("sessions").text
        models = [model["id"] for model in tenant.caller.http.get("/v1/models").json()["data"]]
        assert tenant.run in models
        assert not any(other.run in model or "ann/" in model for model in models)


def test_only_the_owner_can_complete_with_a_model_in_training(world: World) -> None:
    assert world.ann.complete(world.ann.run).status_code == 200
    refused = world.bob.complete(world.ann.run)
    assert refused.status_code == 404
    assert world.bob.complete(f"ann/{world.ann.run}").status_code == 404


def test_only_the_owner_can_train_with_an_upload(world: World) -> None:
    mine = world.ann.caller.register(upload("wired"))
    world.ann.trained("wired")
    world.ann.trained(f"wired@{mine['digest'][:12]}")
    refused = world.bob.trained("wired")
    assert refused["category"] == "user"
    assert "wired" in refused["error"]


def test_without_a_key_only_healthz_answers(world: World) -> None:
    for path in ("client/config", "create_session", "retrieve_future", "asample", "create_model"):
        answer = world.anonymous.http.post(f"/api/v1/{path}", json={})
        assert answer.status_code == 401
        assert "API key" in answer.json()["detail"]
    assert world.anonymous.http.get("/v1/models").status_code == 401
    assert world.anonymous.http.get("/api/v1/healthz").json() == {"status": "ok"}


def test_a_key_with_the_scope_read_can_sample_and_cannot_train(world: World) -> None:
    reader = world.reader.http
    assert reader.post("/api/v1/client/config", json={}).status_code == 200
    session = reader.post("/api/v1/create_session", json={"tags": []}).json()["session_id"]
    refused = reader.post(
        "/api/v1/create_model", json={"session_id": session, "model_seq_id": 0, "base_model": world.ann.base}
    )
    assert refused.status_code == 403
    assert "train" in refused.json()["detail"]
    assert reader.post("/v1/completions", json={"model": world.ann.base, "prompt": "x"}).status_code == 200


def test_client_config_has_half_of_the_concurrency_limit(world: World) -> None:
    assert world.ann.post("client/config").json()["sample_max_concurrent_requests"] == 10


def test_an_error_of_the_engine_names_no_models_of_other_tenants(world: World) -> None:
    world.bob.caller.done("/create_model", model_id="others-secret")
    run = world.ann.model()
    assert world.ann.caller.problem("/optim_step", model_id=run)["kind"] == "NothingAccumulated"
    world.ann.caller.done("/delete_model", model_id=run)
    late = world.ann.post("optim_step", model_id=run, seq_id=1)
    result = world.ann.done(late)
    assert result["category"] == "user"
    assert "others-secret" not in result["error"]
    assert "ann/" not in result["error"]
