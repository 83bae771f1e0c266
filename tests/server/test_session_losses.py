"""Losses of Tinker sessions, with plain HTTP requests: their owner, their lifetime and their lines in the audit log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Caller, Serve
from tests.server.test_wire_tenants import DATUM, Tenant
from tinkerbell_server.access.keys import Keys

NODES = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
    {"op": "call_function", "name": "x", "target": "torch.sum", "args": [{"ref": "logprobs"}]},
    {"op": "output", "name": "o", "target": "output", "args": [{"tuple": [{"ref": "x"}, {"dict": {}}]}]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def keys(data: Path) -> Iterator[Keys]:
    data.mkdir()
    made = Keys(data)
    yield made
    made.close()


def create(tenant: Tenant, seq: int = 0, session: str | None = None) -> httpx.Response:
    return tenant.post(
        "create_custom_loss",
        session_id=session or tenant.session,
        custom_loss_seq_id=seq,
        name="mine",
        inputs=[{"name": "logprobs", "rank": 1}],
        graph={"format": 1, "nodes": NODES},
    )


def run(tenant: Tenant, loss_id: str) -> dict[str, Any]:
    call = {"data": [DATUM], "loss_fn": "custom", "loss_fn_config": {"loss_id": loss_id}}
    return tenant.done(tenant.numbered("forward_backward", forward_backward_input=call))


def after_loss(tenant: Tenant, loss_id: str) -> dict[str, Any]:
    """The result of `run`, repeated if the first response reports gradients lost with the engine."""
    result = run(tenant, loss_id)
    return run(tenant, loss_id) if "lost" in result.get("error", "") else result


def tenant_of(caller: Caller, keys: Keys, name: str, *scopes: str) -> Tenant:
    return Tenant(caller.with_key(keys.create(name, tenant=name, scopes=scopes or ("train", "upload"))[1]))


def test_only_its_own_session_can_call_a_loss(serve: Serve, keys: Keys) -> None:
    with serve(uploads="trusted") as caller:
        ann, bob = (tenant_of(caller, keys, name) for name in ("ann", "bob"))
        loss_id = ann.done(create(ann))["loss_id"]
        assert run(ann, loss_id) == {}
        refused = run(bob, loss_id)
        assert refused["category"] == "user"
        assert refused["error"] == run(bob, "none")["error"].replace("'none'", repr(loss_id))
        again = Tenant(ann.caller)
        assert "no custom loss" in run(again, loss_id)["error"]
        foreign = create(bob, session=ann.session)
        assert foreign.status_code == 404
        assert loss_id not in bob.caller.http.get("/list_loss_functions").text


def test_a_loss_is_kept_after_a_restart_of_the_engine_and_the_server(serve: Serve, data: Path) -> None:
    with serve(uploads="trusted") as caller:
        one = Tenant(caller)
        loss_id = one.done(create(one))["loss_id"]
        caller.kill_engine()
        assert after_loss(one, loss_id) == {}
    with serve(uploads="trusted") as caller:
        one.caller = caller
        assert after_loss(one, loss_id) == {}
    with serve(uploads="off") as caller:
        one.caller = caller
        assert "no longer on this server" in after_loss(one, loss_id)["error"]


def test_a_client_without_the_scope_upload_is_configured_to_run_losses_itself(serve: Serve, keys: Keys) -> None:
    with serve(uploads="trusted") as caller:
        trainer, uploader = tenant_of(caller, keys, "ann", "train"), tenant_of(caller, keys, "bob")
        server_side = [one.post("client/config").json()["custom_loss_server_side"] for one in (trainer, uploader)]
        assert server_side == [False, True]
        refused = create(trainer)
        assert refused.status_code == 403
        assert "'upload'" in refused.json()["detail"]
    with serve(uploads="off") as caller:
        uploader.caller = caller.with_key(keys.create("bob", tenant="bob", scopes=("upload",))[1])
        assert uploader.post("client/config").json()["custom_loss_server_side"] is False
        assert create(uploader).status_code == 403


def test_the_number_of_losses_of_a_tenant_is_limited(serve: Serve) -> None:
    with serve(uploads="trusted", upload_limit=1) as caller:
        one = Tenant(caller)
        one.done(create(one))
        refused = create(one, seq=1)
        assert refused.status_code == 400
        assert "--upload-limit" in refused.json()["detail"]


@pytest.mark.slow
def test_the_losses_of_a_finished_session_are_removed(serve: Serve) -> None:
    with serve(uploads="trusted") as caller:
        one, other = Tenant(caller), Tenant(caller)
        loss_id, kept = (tenant.done(create(tenant))["loss_id"] for tenant in (one, other))
        one.post(f"sessions/{one.session}/finish", reason={"type": "success"})
        deadline = time.monotonic() + 120
        while any(loss["name"] == loss_id for loss in caller.losses()):
            assert time.monotonic() < deadline
            time.sleep(1)
        assert run(other, kept) == {}


def test_the_audit_log_has_each_change_by_a_tinker_client_once(serve: Serve, keys: Keys, data: Path) -> None:
    with serve(uploads="trusted") as caller:
        ann = tenant_of(caller, keys, "ann")
        loss_id = ann.done(create(ann))["loss_id"]
        assert run(ann, loss_id) == {}
        assert "no custom loss" in run(ann, "none")["error"]
        create(ann)  # sent twice, logged once
        path = ann.saved("here")
        ann.done(ann.numbered("load_weights", path=path))
        ann.done(ann.numbered("load_weights", path=f"{path}x"))
        checkpoint = f"/api/v1/training_runs/{ann.run}/checkpoints/weights/here"
        ann.caller.http.post(f"{checkpoint}/publish")
        ann.caller.http.delete(checkpoint)
        ann.caller.http.delete(checkpoint)
        create(ann, session="0" * 32)
        ann.trained()
        caller.with_key("tml-0-wrong").http.get("/v1/models")
    lines = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    changes = [(line["action"], line["verdict"], line.get("name")) for line in lines]
    assert changes == [
        ("create_model", "done", ann.run),
        ("create_custom_loss", "done", loss_id),
        ("forward_backward", "UnknownLoss", "none"),
        ("save_weights", "done", path),
        ("load_weights", "done", path),
        ("load_weights", "NotHere", f"{path}x"),
        ("publish_checkpoint", "done", f"{ann.run}/weights/here"),
        ("delete_checkpoint", "done", f"{ann.run}/weights/here"),
        ("delete_checkpoint", "NotHere", f"{ann.run}/weights/here"),
        ("create_custom_loss", "NotHere", None),
        ("authenticate", "Unauthorized", None),
    ]
    assert {line.get("tenant") for line in lines[:-1]} == {"ann"}
    assert all("key_id" in line for line in lines[:-1])
    assert len(lines[1]["sha256"]) == 64
