"""The OpenAPI document describes every route of the native API and the responses of the server."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import msgspec
import pytest

from tinkerbell_server.api import native
from tinkerbell_server.api.native_openapi import OPERATIONS, Health, LossListing, openapi_document

DOCUMENT = openapi_document("0")
BY_PATH = {operation.path: operation for operation in OPERATIONS}


def test_every_route_is_documented_with_its_method() -> None:
    routes = {(route.path, method) for route in native.routes() for method in (route.methods or ()) if method != "HEAD"}
    assert routes == {(operation.path, operation.method) for operation in OPERATIONS}


@pytest.mark.parametrize("route", native.routes(), ids=lambda route: route.path)
def test_the_documented_scope_is_the_scope_that_the_route_checks(route: Any) -> None:
    assert inspect.getclosurevars(route.endpoint).nonlocals.get("scope") == BY_PATH[route.path].scope


def test_the_documented_bodies_are_the_structs_that_the_routes_decode() -> None:
    queued = {operation.path.strip("/"): operation.body for operation in OPERATIONS if operation.queued}
    assert queued == native.SUBMITTED


def test_the_document_is_valid_openapi() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(msgspec.json.decode(msgspec.json.encode(DOCUMENT)))


def test_the_server_sends_the_document_and_the_documented_responses(torch_server: str) -> None:
    assert httpx.get(f"{torch_server}/openapi.json").json()["paths"] == DOCUMENT["paths"]
    health = httpx.get(f"{torch_server}/healthz").json()
    assert health.keys() == Health.__annotations__.keys() | {"status", "boot_id", "version"}
    msgspec.convert(health, Health)
    msgspec.convert(httpx.get(f"{torch_server}/list_loss_functions").json(), LossListing)
