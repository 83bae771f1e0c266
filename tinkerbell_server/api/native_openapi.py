"""The OpenAPI document of the native API, from its operations and the structs of their bodies and answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypedDict

import msgspec

from tinkerbell_core.errors import Problem
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteLossesOutput,
    DeleteLossesRequest,
    DeleteModelOutput,
    DeleteModelRequest,
    ForwardOutput,
    ForwardRequest,
    Future,
    GetLossRequest,
    LoadOutput,
    LoadRequest,
    LossDescription,
    ModelInfo,
    OptimStepOutput,
    OptimStepRequest,
    PluginDescription,
    PreviewOutput,
    PreviewRequest,
    PublishLossRequest,
    RegisterLossRequest,
    SampleOutput,
    SampleRequest,
    SaveOutput,
    SaveRequest,
)

PATH = "/openapi.json"
FORMATS = ("application/json", "application/msgpack")


class BriefHealth(TypedDict):
    """The state of the server."""

    status: Literal["ok", "starting", "engine_down"]
    boot_id: str
    version: str


class Health(BriefHealth, total=False):
    """The state of the server. Without a key that the server requires: only status, boot_id and version."""

    problem: str | None
    engine: str | None
    base_model: str | None
    device: str | None
    dtype: str | None
    vocab_size: int | None
    max_length: int | None
    uploads: Literal["off", "sandboxed", "trusted"]
    uploads_problem: str | None
    mechanisms: list[str]
    auth: Literal["auto", "on", "off"]
    queue: int
    restarts: int


class LossListing(TypedDict):
    """The losses and plugins that the caller can use. descriptions: name → summary."""

    available_loss_functions: list[str]
    descriptions: dict[str, str]
    losses: list[LossDescription]
    plugins: list[PluginDescription]


class ModelListing(TypedDict):
    """The models of the caller's tenant."""

    models: list[ModelInfo]


class Failure(TypedDict):
    """The body of an answer with an error status."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of a path. scope: of the key; None if no key is needed. queued: the answer is a Future of `answer`."""

    method: str
    path: str
    summary: str
    scope: str | None
    answer: Any  # Any: a struct type, a TypedDict or dict
    body: type[msgspec.Struct] | None = None
    queued: bool = False


def _submitted(path: str, summary: str, body: type[msgspec.Struct], answer: type[msgspec.Struct]) -> Operation:
    return Operation("POST", path, summary, "read" if path == "/sample" else "train", answer, body, queued=True)


OPERATIONS = (
    Operation("GET", "/healthz", "Report the state of the server; the status is always 200.", None, Health),
    Operation("GET", "/health", "The same as `/healthz`.", None, Health),
    Operation("GET", PATH, "Return this document, as JSON.", None, dict),
    Operation("GET", "/list_loss_functions", "List the losses and plugins.", "read", LossListing),
    Operation("GET", "/list_models", "List the models.", "read", ModelListing),
    _submitted("/create_model", "Create a model.", CreateModelRequest, ModelInfo),
    _submitted("/forward", "Compute a loss without a gradient.", ForwardRequest, ForwardOutput),
    _submitted("/forward_backward", "Compute a loss, and accumulate its gradient.", ForwardRequest, ForwardOutput),
    Operation(
        "POST",
        "/preview",
        "Show the rows that a call makes of its data, as text, without a model.",
        "train",
        PreviewOutput,
        PreviewRequest,
    ),
    _submitted("/optim_step", "Take one optimizer step.", OptimStepRequest, OptimStepOutput),
    _submitted("/sample", "Sample from a model.", SampleRequest, SampleOutput),
    _submitted("/save", "Save a model.", SaveRequest, SaveOutput),
    _submitted("/load", "Restore a model from a save.", LoadRequest, LoadOutput),
    _submitted("/delete_model", "Delete a model.", DeleteModelRequest, DeleteModelOutput),
    Operation(
        "GET",
        "/futures/{request_id}",
        "Return a Future; `wait` is the number of seconds to wait for it to finish, at most 30.",
        "read",
        Future,
    ),
    Operation(
        "POST",
        "/register_custom_loss",
        "Upload a loss. The answer comes after its dry run.",
        "upload",
        LossDescription,
        RegisterLossRequest,
    ),
    Operation(
        "POST", "/get_custom_loss", "Return an upload as it was sent.", "upload", RegisterLossRequest, GetLossRequest
    ),
    Operation("POST", "/delete_custom_loss", "Delete uploads.", "upload", DeleteLossesOutput, DeleteLossesRequest),
    Operation(
        "POST",
        "/publish_custom_loss",
        "Let all tenants use an upload.",
        "admin",
        LossDescription,
        PublishLossRequest,
    ),
)

DESCRIPTION = """\
Bodies and answers are JSON or MessagePack; in JSON, bytes are base64. Fields with their default value are omitted.

A request that is queued is answered at once with a Future, whose state is queued, running, done (`result` contains the
result) or failed (`problem` contains the error). The header `Idempotency-Key` makes such a request repeatable: the same
key with the same body returns the Future of the first request, and with another body the status 409.

An error has the status of its kind: 422 unless the kind has another; 413 for a body over the limit; 429 with
`Retry-After` over a limit of the key or of the queue; 500 for a bug.

If the server requires API keys, each operation except `/healthz`, `/health` and `/openapi.json` needs a key with its
scope.
"""


@cache
def openapi_document(version: str) -> dict[str, Any]:  # Any: JSON
    """The OpenAPI 3.1 document. version: of the server."""
    types = [op.answer for op in OPERATIONS if op.answer is not dict] + [op.body for op in OPERATIONS if op.body]
    unique = list(dict.fromkeys([*types, Future, Failure]))
    schemas, components = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    schema = dict(zip(unique, schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schema)
    key = {"type": "http", "scheme": "bearer", "description": "An API key; needed only if the server requires keys."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tinkerbell native API", "version": version, "description": DESCRIPTION},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": key}},
    }


def _operation(operation: Operation, schema: dict[Any, Any]) -> dict[str, Any]:  # Any: as above
    answer = {"type": "object"} if operation.answer is dict else schema[operation.answer]
    if operation.queued:
        result = {"anyOf": [answer, {"type": "null"}]}
        answer = {"allOf": [schema[Future], {"type": "object", "properties": {"result": result}}]}
    name = operation.path.strip("/").partition("/")[0].removesuffix(".json")
    described: dict[str, Any] = {
        "operationId": name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": _content(answer)},
            "default": {"description": "An error.", "content": _content(schema[Failure])},
        },
    }
    if operation.scope:
        described["description"] = f"Needs the scope `{operation.scope}` if the server requires keys."
        described["security"] = [{}, {"key": []}]
    if operation.body:
        described["requestBody"] = {"required": True, "content": _content(schema[operation.body])}
    parameters = []
    if "{request_id}" in operation.path:
        parameters.append({"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}})
        parameters.append({"name": "wait", "in": "query", "schema": {"type": "number", "minimum": 0, "default": 0}})
    if operation.queued:
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 200}})
    if parameters:
        described["parameters"] = parameters
    return described


def _content(schema: dict[str, Any]) -> dict[str, Any]:  # Any: as above
    return {format_: {"schema": schema} for format_ in FORMATS}
