"""Two tenants of one server: a tenant cannot see or use the models, requests and saves of the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import FAKE_ENGINE
from tests.server.conftest import Caller
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

ROWS = [[1, 2, 3], [4, 5]]


class Tenants:
    """A server that accepts uploads, and one caller per tenant."""

    def __init__(self, server: Any, keys: Keys) -> None:
        def caller(tenant: str, *scopes: str) -> Caller:
            return Caller(server, keys.create(tenant, tenant=tenant, scopes=scopes or ("train", "upload"))[1])

        self.ann, self.bob, self.local = caller("ann"), caller("bob"), caller("local")
        self.admin = caller("root", "admin")


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("data")
    keys = Keys(folder)
    with running_server(
        Settings(engine=FAKE_ENGINE, data_dir=str(folder), port=0, uploads="trusted"), timeout=30
    ) as server:
        tenants = Tenants(server, keys)
        yield tenants
        for caller in (tenants.ann, tenants.bob, tenants.local, tenants.admin):
            caller.close()
    keys.close()


def assert_same_problem(foreign: dict[str, Any], unknown: dict[str, Any], *names: tuple[str, str]) -> None:
    """Assert that two problems differ only in the names that were requested."""
    text = foreign["message"]
    for name, other in names:
        text = text.replace(name, other)
    assert {**foreign, "message": text} == unknown


def test_tenants_can_have_models_with_the_same_id(tenants: Tenants) -> None:
    tenants.ann.done("/create_model", model_id="both", rank=4)
    tenants.bob.done("/create_model", model_id="both", rank=8)
    tenants.local.done("/create_model", model_id="both", rank=16)
    tenants.ann.train("both", steps=2)
    for caller, rank, steps in ((tenants.ann, 4, 2), (tenants.bob, 8, 0), (tenants.local, 16, 0)):
        assert (caller.models()["both"]["rank"], caller.models()["both"].get("steps", 0)) == (rank, steps)
    tenants.bob.done("/delete_model", model_id="both")
    tenants.local.done("/delete_model", model_id="both")
    assert tenants.ann.done("/save", model_id="both")["model_id"] == "both"
    assert "both" not in tenants.bob.models()


@pytest.mark.parametrize("verb", ["optim_step", "sample", "save", "load", "delete_model"])
def test_the_error_for_a_model_of_another_tenant_is_that_for_an_unknown_model(tenants: Tenants, verb: str) -> None:
    tenants.ann.done("/create_model", model_id="anns")
    more: dict[str, Any] = {"sample": {"prompt": "x"}, "load": {"path": "x"}}.get(verb, {})
    foreign = tenants.bob.problem(f"/{verb}", model_id="anns", **more)
    unknown = tenants.bob.problem(f"/{verb}", model_id="absent", **more)
    assert (foreign["status"], foreign["kind"]) == (404, "UnknownModel")
    assert_same_problem(foreign, unknown, ("anns", "absent"))


@pytest.mark.parametrize("name", ["ann/anns", "local/anns", "/anns"])
def test_a_model_id_with_the_name_of_a_tenant_is_refused(tenants: Tenants, name: str) -> None:
    tenants.ann.done("/create_model", model_id="anns")
    for caller in (tenants.bob, tenants.local, tenants.ann):
        assert caller.problem("/optim_step", model_id=name)["status"] == 422


def test_a_suggestion_never_names_a_model_of_another_tenant(tenants: Tenants) -> None:
    tenants.ann.done("/create_model", model_id="secret-project")
    problem = tenants.bob.problem("/optim_step", model_id="secret-projekt")
    assert "secret-project'" not in problem["message"]
    mine = tenants.ann.problem("/optim_step", model_id="secret-projekt")
    assert "did you mean 'secret-project'?" in mine["message"]
    assert "ann/" not in mine["message"]


def test_the_error_for_a_model_deleted_meanwhile_names_no_models_of_others(tenants: Tenants) -> None:
    tenants.ann.done("/create_model", model_id="quiet")
    tenants.bob.done("/create_model", model_id="slow-deleted")
    deleted = tenants.bob.accepted("/delete_model", model_id="slow-deleted")
    late = tenants.bob.accepted("/optim_step", model_id="slow-deleted")
    tenants.bob.future(deleted)
    problem = tenants.bob.future(late)["problem"]
    assert problem["kind"] == "UnknownModel"
    assert "quiet" not in problem["message"]
    assert "bob/" not in problem["message"]


def test_the_error_for_a_future_of_another_tenant_is_that_for_an_unknown_one(tenants: Tenants) -> None:
    request_id = tenants.ann.accepted("/forward", model_id="futures", data=ROWS)
    assert tenants.ann.future(request_id)["result"]["model_id"] == "futures"
    for id in (request_id, f"ann%2F{request_id}"):
        for caller in (tenants.bob, tenants.local, tenants.admin):
            answer = caller.http.get(f"/futures/{id}")
            assert answer.status_code == 404
    problem = tenants.bob.http.get(f"/futures/{request_id}").json()["problem"]
    assert_same_problem(problem, tenants.bob.http.get("/futures/req-none").json()["problem"], (request_id, "req-none"))


def test_a_sample_of_the_base_has_no_model_id(tenants: Tenants) -> None:
    assert tenants.ann.done("/sample", prompt="x")["model_id"] is None


def test_tenants_can_use_the_same_idempotency_key(tenants: Tenants) -> None:
    body = {"model_id": "keyed", "data": ROWS}
    answers = [
        caller.post("/forward", body, **{"Idempotency-Key": key})
        for caller, key in ((tenants.ann, "k"), (tenants.bob, "k"), (tenants.local, "ann/k"), (tenants.local, "k"))
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["request_id"] for answer in answers}) == 4
    again = tenants.ann.post("/forward", body, **{"Idempotency-Key": "k"}).json()
    assert again["request_id"] == answers[0].json()["request_id"]
    conflict = tenants.ann.post("/forward", {**body, "data": [[1, 2]]}, **{"Idempotency-Key": "k"})
    assert conflict.status_code == 409
    assert "'k'" in conflict.json()["problem"]["message"]


def test_the_error_for_a_save_of_another_tenant_is_that_for_an_unknown_one(tenants: Tenants) -> None:
    tenants.ann.train("saver")
    path = tenants.ann.done("/save", model_id="saver", name="one")["path"]
    tenants.bob.done("/create_model", model_id="reader")
    foreign = tenants.bob.problem("/load", model_id="reader", path=path)
    unknown = tenants.bob.problem("/load", model_id="reader", path=path + "x")
    assert foreign["kind"] == "UnknownCheckpoint"
    assert_same_problem(foreign, unknown, (path, path + "x"))
    foreign = tenants.bob.problem("/create_model", model_id="other", reference=path)
    assert (foreign["status"], foreign["kind"]) == (404, "UnknownCheckpoint")
    assert tenants.ann.done("/load", model_id="saver", path=path)["step"] == 1
    assert tenants.ann.done("/create_model", model_id="heir", reference=path)["model_id"] == "heir"


def test_only_an_admin_can_load_from_a_folder_outside_the_data_dir(tenants: Tenants, tmp_path: Path) -> None:
    (tmp_path / "fake.json").write_text('{"step": 5, "value": 1.0}')
    inside = Path(tenants.ann.done("/save", model_id="saver", name="two")["path"])
    dotted = str(inside / ".." / ".." / ".." / ".." / ".." / "tenants" / "ann" / "models" / "saver" / "two")
    tenants.bob.done("/create_model", model_id="out")
    tenants.admin.done("/create_model", model_id="out")
    for path in (
        str(tmp_path),
        "/",
        "/etc",
        dotted,
        "~",
        "~nobody-here/x",
        "a" * 5000,
        "\0",
        "../../ann/models/saver/two",
    ):
        assert tenants.bob.problem("/load", model_id="out", path=path)["kind"] == "UnknownCheckpoint", path
    assert tenants.admin.done("/load", model_id="out", path=str(tmp_path))["step"] == 5
    assert tenants.ann.done("/load", model_id="saver", path=dotted)["step"] == 1


def test_a_tenant_cannot_load_through_a_link_to_another_folder(tenants: Tenants, tmp_path: Path) -> None:
    (tmp_path / "fake.json").write_text('{"step": 5, "value": 1.0}')
    tenants.bob.done("/create_model", model_id="linked")
    saved = Path(tenants.bob.done("/save", model_id="linked", name="here")["path"])
    os.symlink(tmp_path, saved.parent / "there")
    for path in ("there", str(saved.parent / "there")):
        assert tenants.bob.problem("/load", model_id="linked", path=path)["kind"] == "UnknownCheckpoint"


def test_a_local_model_named_like_a_tenant_cannot_load_its_saves(tenants: Tenants) -> None:
    tenants.ann.train("mm")
    tenants.ann.done("/save", model_id="mm", name="s")
    tenants.local.done("/create_model", model_id="ann")
    assert tenants.local.problem("/load", model_id="ann", path="mm")["kind"] == "UnknownCheckpoint"


def test_after_a_kill_each_tenant_gets_an_error_about_its_own_models(serve: Any, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "data")
    texts = [keys.create(tenant, tenant=tenant)[1] for tenant in ("ann", "bob")]
    root = keys.create("root", tenant="root", scopes=["admin"])[1]
    keys.close()
    with serve() as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        ann.train("m", steps=2)
        bob.train("m")
        ann.done("/save", model_id="m")
        ann.train("m")
        caller.with_key(root).kill_engine()
        messages = [each.problem("/forward", model_id="m", data=ROWS)["message"] for each in (ann, bob)]
        assert "model 'm' is back at step 2" in messages[0]
        assert "model 'm' was never saved" in messages[1]
        assert (ann.models()["m"]["steps"], bob.models()["m"].get("steps", 0)) == (2, 0)
        ann.train("m")
