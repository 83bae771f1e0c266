"""API keys are created offline, required as soon as one exists, and limited to their scopes and lifetime."""

from __future__ import annotations

import json
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.api import native

ROWS = [[1, 2, 3], [4, 5]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def keys(data: Path) -> Any:
    keys = Keys(data)
    yield keys
    keys.close()


def test_only_the_whole_text_of_a_key_is_accepted(keys: Keys) -> None:
    key, text = keys.create("ann", tenant="ann")
    assert text.startswith(f"tml-{key.id}-")
    assert keys.find(text) == key
    for wrong in (text[:-1], text + "x", f"tml-{key.id}-", f"tml-{key.id}", "tml-", "", text[4:], "ключ", "\udcff"):
        assert keys.find(wrong) is None


def test_the_secret_is_not_stored(keys: Keys, data: Path) -> None:
    _, text = keys.create("ann", tenant="ann")
    secret = text.split("-", 2)[2].encode()
    assert all(secret not in path.read_bytes() for path in data.rglob("*") if path.is_file())
    assert stat.S_IMODE((data / "keys.db").stat().st_mode) == 0o600
    assert stat.S_IMODE(data.stat().st_mode) == 0o700


def test_each_scope_includes_read_and_admin_includes_all(keys: Keys) -> None:
    assert keys.create("a", tenant="a")[0].scopes == ("read", "train", "upload")
    assert keys.create("a", tenant="a", scopes=["upload"])[0].scopes == ("read", "upload")
    assert keys.create("a", tenant="a", scopes=["admin"])[0].scopes == ("read", "train", "upload", "admin")
    with pytest.raises(BadRequest, match="did you mean 'train'"):
        keys.create("a", tenant="a", scopes=["trian"])


@pytest.mark.parametrize("tenant", ["public", "", "../up", "A", "a/b", "x" * 33, "_a"])
def test_a_tenant_name_with_other_characters_is_refused(keys: Keys, tenant: str) -> None:
    with pytest.raises(BadRequest, match="a tenant cannot be named"):
        keys.create("a", tenant=tenant)


def test_a_key_ends_when_it_expires_and_when_it_is_revoked(keys: Keys, data: Path) -> None:
    short, text = keys.create("short", tenant="a", days=1)
    with sqlite3.connect(data / "keys.db") as db:
        db.execute("UPDATE keys SET expires = created WHERE id = ?", (short.id,))
    found = keys.find(text)
    assert found is not None
    assert found.state() == "expired"
    long, _ = keys.create("long", tenant="a", days=1)
    assert (long.state(), keys.revoke(long.id).state()) == ("valid", "revoked")
    with pytest.raises(BadRequest, match="no key has the id 'unknown'"):
        keys.revoke("unknown")


def test_a_server_without_keys_accepts_any_key_for_the_local_tenant(serve: Any) -> None:
    with serve() as caller:
        caller.done("/create_model", model_id="m")
        assert list(caller.with_key("tml-dummy").models()) == ["m"]


def test_a_running_server_requires_a_key_as_soon_as_the_first_is_created(serve: Any, keys: Keys) -> None:
    with serve() as caller:
        caller.done("/create_model", model_id="m")
        _, text = keys.create("ann", tenant="local")
        answer = caller.http.get("/list_models")
        assert (answer.status_code, answer.json()["problem"]["kind"]) == (401, "Unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "TINKERBELL_API_KEY" in answer.json()["problem"]["message"]
        assert caller.with_key("tml-dummy").http.get("/list_models").status_code == 401
        assert list(caller.with_key(text).models()) == ["m"]


def test_both_headers_are_read(serve: Any, keys: Keys) -> None:
    _, text = keys.create("ann", tenant="ann")
    with serve() as caller:
        for headers in ({"Authorization": f"Bearer {text}"}, {"authorization": f"bearer  {text}"}, {"X-API-Key": text}):
            assert caller.http.get("/list_models", headers=headers).status_code == 200
        assert caller.http.get("/list_models", headers={"Authorization": f"Basic {text}"}).status_code == 401


def test_a_revoked_key_is_refused_at_once_and_the_server_still_requires_a_key(serve: Any, keys: Keys) -> None:
    key, text = keys.create("ann", tenant="ann")
    with serve() as caller:
        ann = caller.with_key(text)
        assert ann.http.get("/list_models").status_code == 200
        keys.revoke(key.id)
        answer = ann.http.get("/list_models")
        assert answer.status_code == 401
        assert "is revoked" in answer.json()["problem"]["message"]
        assert caller.http.get("/list_models").status_code == 401


def test_the_response_is_the_same_for_an_unknown_id_and_a_wrong_secret(serve: Any, keys: Keys) -> None:
    key, _ = keys.create("ann", tenant="ann")
    with serve() as caller:
        answers = [
            caller.with_key(text).http.get("/list_models") for text in (f"tml-{key.id}-wrong", "tml-00000000-x", "junk")
        ]
        assert {answer.status_code for answer in answers} == {401}
        assert len({answer.text for answer in answers}) == 1


SCOPES = {
    "/sample": "read",
    "/preview": "train",
    "/forward": "train",
    "/forward_backward": "train",
    "/optim_step": "train",
    "/create_model": "train",
    "/save": "train",
    "/load": "train",
    "/delete_model": "train",
    "/register_custom_loss": "upload",
    "/get_custom_loss": "upload",
    "/delete_custom_loss": "upload",
    "/publish_custom_loss": "admin",
}
"""The scope that each POST of the native API requires."""


def test_each_post_has_a_scope_in_these_tests() -> None:
    assert {route.path for route in native.routes() if "POST" in (route.methods or ())} == set(SCOPES)


def test_each_route_requires_its_scope(serve: Any, keys: Keys, make_upload: Any) -> None:
    texts = {scope: keys.create(scope, tenant="a", scopes=[scope])[1] for scope in ("read", "train", "upload", "admin")}
    with serve(uploads="trusted") as caller:
        for path, scope in SCOPES.items():
            for has, text in texts.items():
                answer = caller.with_key(text).post(path, {})
                allowed = scope in {has, "read"} or has == "admin"
                assert (answer.status_code == 403) != allowed, (path, has, answer.text)
            assert caller.post(path, {}).status_code == 401
        refused = caller.with_key(texts["read"]).post("/forward", {}).json()["problem"]
        assert refused["kind"] == "Forbidden"
        assert "needs a key with the scope 'train', but this key has read" in refused["message"]


def test_health_without_a_key_shows_no_details(serve: Any, keys: Keys) -> None:
    _, text = keys.create("ann", tenant="ann")
    with serve() as caller:
        assert set(caller.health()) == {"status", "boot_id", "version"}
        assert caller.with_key(text).health()["base_model"] == "fake"


def test_auth_on_requires_a_key_before_one_exists_and_auth_off_never(serve: Any, keys: Keys) -> None:
    with serve(auth="on") as caller:
        assert caller.http.get("/list_models").status_code == 401
    keys.create("ann", tenant="ann")
    with serve(auth="off") as caller:
        assert caller.http.get("/list_models").status_code == 200


def test_off_loopback_a_key_is_required_before_one_exists(serve: Any) -> None:
    with serve(host="0.0.0.0") as caller:
        assert caller.http.get("/list_models").status_code == 401


def test_a_request_through_a_proxy_requires_a_key(serve: Any) -> None:
    with serve() as caller:
        assert caller.http.get("/list_models", headers={"x-forwarded-for": "203.0.113.7"}).status_code == 401


def test_the_audit_log_has_each_action_and_no_secret(serve: Any, keys: Keys, data: Path, make_upload: Any) -> None:
    key, text = keys.create("ann", tenant="ann")
    _, reader = keys.create("bob", tenant="bob", scopes=["read"])
    with serve(uploads="trusted") as caller:
        ann = caller.with_key(text)
        ann.done("/create_model", model_id="m")
        ann.register(make_upload())
        ann.train("m")
        ann.problem("/forward", model_id="bug-m", data=ROWS, loss_fn="mine")
        caller.with_key(reader).post("/forward", {})
        caller.with_key("tml-0-wrong").http.get("/list_models")
    lines = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    entries = [(line["action"], line["verdict"], line.get("tenant")) for line in lines]
    assert entries == [
        ("create_model", "done", "ann"),
        ("register_custom_loss", "done", "ann"),
        ("forward", "TinkerbellError", "ann"),
        ("forward", "Forbidden", "bob"),
        ("authenticate", "Unauthorized", None),
    ]
    assert {line["key_id"] for line in lines[:3]} == {key.id}
    assert len(lines[1]["sha256"]) == 64
    assert lines[1]["name"] == lines[2]["name"]
    assert lines[2]["name"].startswith("upload:ann/mine@")
    assert lines[4]["reason"] == "unknown key"
    assert lines[4]["address"] == "127.0.0.1"
    whole = (data / "audit.jsonl").read_text()
    assert text not in whole
    assert "wrong" not in whole
    assert stat.S_IMODE((data / "audit.jsonl").stat().st_mode) == 0o600
