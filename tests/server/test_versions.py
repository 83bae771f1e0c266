"""Uploaded losses have names per tenant and versions by digest; they can be deleted and published."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Caller
from tests.server.test_tenants import ROWS, Tenants
from tests.server.test_tenants import tenants as tenants


@pytest.fixture
def clean(tenants: Tenants) -> Iterator[Tenants]:
    """The tenants, without uploads before and after."""
    yield tenants
    for caller, tenant in ((tenants.ann, None), (tenants.bob, None), (tenants.local, None), (tenants.admin, "public")):
        names = {loss["name"] for loss in caller.losses() if loss["provenance"]["kind"] == "upload"}
        for name in names:
            body = {"name": name} if tenant is None else {"name": name, "tenant": tenant}
            caller.post("/delete_custom_loss", body)


def uploads(caller: Caller) -> list[str]:
    return [loss["id"] for loss in caller.losses() if loss["provenance"]["kind"] == "upload"]


def digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:12]


def test_tenants_can_have_uploads_with_the_same_name(clean: Tenants, make_upload: Any) -> None:
    clean.ann.register(make_upload("mine", b"anns"))
    clean.bob.register(make_upload("mine", b"bobs"))
    assert uploads(clean.ann) == [f"upload:ann/mine@{digest(b'anns')}"]
    assert uploads(clean.bob) == [f"upload:bob/mine@{digest(b'bobs')}"]
    call = {"model_id": "m", "data": ROWS, "loss_fn": "mine"}
    assert clean.ann.done("/forward", **call)["loss"] != clean.bob.done("/forward", **call)["loss"]


@pytest.mark.parametrize("name", ["theirs", "theirs@{0}", "upload:ann/theirs@{0}", "upload:ann/theirs"])
def test_the_error_for_an_upload_of_another_tenant_is_that_for_an_unknown_loss(
    clean: Tenants, make_upload: Any, name: str
) -> None:
    clean.ann.register(make_upload("theirs", b"anns"))
    id, missing = name.format(digest(b"anns")), name.format(digest(b"anns")).replace("theirs", "absent")
    for path, field in (("/forward", "loss_fn"), ("/delete_custom_loss", "name")):
        more = {"model_id": "m", "data": ROWS} if path == "/forward" else {}
        foreign = clean.bob.problem(path, **{field: id}, **more)
        assert (foreign["status"], foreign["kind"]) == (404, "UnknownLoss")
        unknown = clean.bob.problem(path, **{field: missing}, **more)
        assert foreign["message"].replace("theirs", "absent") == unknown["message"]
    assert uploads(clean.ann)


def test_a_name_means_the_latest_version_and_a_digest_selects_one(clean: Tenants, make_upload: Any) -> None:
    for payload in (b"one", b"two"):
        clean.ann.register(make_upload("mine", payload))

    def loss(name: str) -> float:
        return float(clean.ann.done("/forward", model_id="m", data=ROWS, loss_fn=name)["loss"])

    assert loss("mine") == loss(f"mine@{digest(b'two')}") != loss(f"mine@{digest(b'one')}")


def test_a_waiting_call_uses_the_version_with_which_it_was_accepted(clean: Tenants, make_upload: Any) -> None:
    clean.ann.register(make_upload("mine", b"one"))
    before = clean.ann.done("/forward", model_id="slow-m", data=ROWS, loss_fn="mine")["loss"]
    waiting = [clean.ann.accepted("/forward", model_id="slow-m", data=ROWS, loss_fn="mine") for _ in range(3)]
    clean.ann.register(make_upload("mine", b"two"))
    assert [clean.ann.future(request_id)["result"]["loss"] for request_id in waiting] == [before] * 3
    assert clean.ann.done("/forward", model_id="slow-m", data=ROWS, loss_fn="mine")["loss"] != before


def test_a_digest_means_the_first_upload_with_it(clean: Tenants, make_upload: Any) -> None:
    first = make_upload("mine", b"one")
    clean.ann.register(first)
    clean.ann.register(make_upload("mine", b"two"))
    again = clean.ann.register(make_upload("mine", b"broken", digest=first.digest, source="def other(): ..."))
    assert again["source"] == first.source
    assert uploads(clean.ann)[-1] == again["id"]


def test_deleting_a_version_keeps_the_others_and_deleting_a_name_removes_all(clean: Tenants, make_upload: Any) -> None:
    for payload in (b"one", b"two", b"three"):
        clean.ann.register(make_upload("mine", payload))
    deleted = clean.ann.post("/delete_custom_loss", {"name": f"mine@{digest(b'three')}"}).json()["deleted"]
    assert deleted == [f"upload:ann/mine@{digest(b'three')}"]
    assert uploads(clean.ann) == [f"upload:ann/mine@{digest(b'one')}", f"upload:ann/mine@{digest(b'two')}"]
    assert len(clean.ann.post("/delete_custom_loss", {"name": "mine"}).json()["deleted"]) == 2
    assert uploads(clean.ann) == []
    assert clean.ann.problem("/delete_custom_loss", name="mine")["kind"] == "UnknownLoss"
    assert clean.ann.problem("/delete_custom_loss", name="dpo")["kind"] == "UnknownLoss"


def test_the_error_of_a_waiting_call_says_that_its_loss_was_deleted(clean: Tenants, make_upload: Any) -> None:
    clean.ann.register(make_upload("mine", b"one"))
    clean.bob.register(make_upload("bobs", b"one"))
    ids = [clean.ann.accepted("/forward", model_id="slow-m", data=ROWS, loss_fn="mine") for _ in range(3)]
    clean.ann.post("/delete_custom_loss", {"name": "mine"})
    problem = clean.ann.future(ids[-1])["problem"]
    assert problem["kind"] == "UnknownLoss"
    assert "deleted while this request waited" in problem["message"]


def test_only_an_admin_can_publish_and_unpublish_a_loss(clean: Tenants, make_upload: Any) -> None:
    clean.ann.register(make_upload("shared", b"anns"))
    assert clean.ann.problem("/publish_custom_loss", name="shared")["kind"] == "Forbidden"
    assert clean.admin.problem("/publish_custom_loss", name="shared")["kind"] == "UnknownLoss"
    published = clean.admin.post("/publish_custom_loss", {"name": "shared", "tenant": "ann"}).json()
    assert published["id"] == f"upload:public/shared@{digest(b'anns')}"
    clean.ann.post("/delete_custom_loss", {"name": "shared"})
    assert uploads(clean.bob) == uploads(clean.ann) == [published["id"]]
    assert clean.bob.done("/forward", model_id="m", data=ROWS, loss_fn="shared")["loss_fn"] == "shared"
    refused = clean.bob.problem("/delete_custom_loss", name="shared", tenant="public")
    assert (refused["status"], refused["kind"]) == (403, "Forbidden")
    assert clean.bob.problem("/delete_custom_loss", name="shared")["kind"] == "UnknownLoss"
    clean.admin.post("/delete_custom_loss", {"name": "shared", "tenant": "public"})
    assert uploads(clean.bob) == []


def test_a_name_means_ones_own_upload_rather_than_the_public_one(clean: Tenants, make_upload: Any) -> None:
    clean.bob.register(make_upload("shared", b"bobs"))
    clean.ann.register(make_upload("shared", b"anns"))
    clean.admin.post("/publish_custom_loss", {"name": "shared", "tenant": "ann"})

    def loss(caller: Caller, name: str) -> float:
        return float(caller.done("/forward", model_id="m", data=ROWS, loss_fn=name)["loss"])

    assert loss(clean.bob, "shared") == loss(clean.bob, f"upload:bob/shared@{digest(b'bobs')}")
    assert loss(clean.bob, f"upload:public/shared@{digest(b'anns')}") == loss(clean.ann, "shared")


def test_uploads_and_deletions_are_kept_after_a_restart(serve: Any, make_upload: Any) -> None:
    with serve(uploads="trusted") as caller:
        caller.register(make_upload("kept", b"one"))
        caller.register(make_upload("deleted", b"one"))
        caller.post("/delete_custom_loss", {"name": "deleted"})
        caller.kill_engine()
        assert uploads(caller) == [f"upload:kept@{digest(b'one')}"]
    with serve(uploads="trusted") as caller:
        assert uploads(caller) == [f"upload:kept@{digest(b'one')}"]
