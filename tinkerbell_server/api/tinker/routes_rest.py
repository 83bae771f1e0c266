"""Routes of the RestClient: lists, descriptions, and changes to checkpoints. Each is answered at once."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import IO

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker.http import audit_immediate, control_body_of, json_response, tenant_of, tinker_server
from tinkerbell_server.api.tinker.queries import search
from tinkerbell_server.api.tinker.store import Checkpoint
from tinkerbell_server.api.tinker.transfer import SECONDS, write_archive

_PIECE = 1 << 20


async def training_runs(request: Request) -> Response:
    offset, limit = _page(request)
    project = request.query_params.get("project_id")
    return json_response(tinker_server(request).queries.runs(tenant_of(request), offset, limit, project))


async def training_run(request: Request) -> Response:
    return json_response(tinker_server(request).queries.run(tenant_of(request), request.path_params["run_id"]))


async def run_checkpoints(request: Request) -> Response:
    return json_response(
        tinker_server(request).queries.checkpoints_of(tenant_of(request), request.path_params["run_id"])
    )


async def checkpoints(request: Request) -> Response:
    return json_response(tinker_server(request).queries.checkpoints(tenant_of(request), *_page(request)))


async def delete_checkpoint(request: Request) -> Response:
    with audit_immediate(request, "delete_checkpoint", _path(request)):
        tinker_server(request).queries.delete(_own(request))
    return Response(status_code=204)


async def without_kind(request: Request) -> Response:
    """Refuse a checkpoint that is named without its kind."""
    name = request.path_params["name"]
    ids = " or ".join(f"{kind}/{name[:60]}" for kind in ("weights", "sampler_weights"))
    raise BadRequest(f"the checkpoint {name[:60]!r} has no kind: send {ids}")


async def publish(request: Request) -> Response:
    with audit_immediate(request, "publish_checkpoint", _path(request)):
        tinker_server(request).queries.publish(_own(request), public=True)
    return Response(status_code=204)


async def unpublish(request: Request) -> Response:
    with audit_immediate(request, "unpublish_checkpoint", _path(request)):
        tinker_server(request).queries.publish(_own(request), public=False)
    return Response(status_code=204)


async def ttl(request: Request) -> Response:
    sent = protocol.parse(await control_body_of(request), protocol.Ttl)
    with audit_immediate(request, "expire_checkpoint", _path(request)):
        tinker_server(request).queries.expire(_own(request), sent.ttl_seconds)
    return Response(status_code=204)


async def external_urls(request: Request) -> Response:
    urls = tinker_server(request).downloads.urls(_base(request), _own(request))
    return json_response({"urls": urls, "expires": (datetime.now(UTC) + timedelta(seconds=SECONDS)).isoformat()})


async def archive(request: Request) -> Response:
    """Redirect to the archive of a checkpoint, where SDKs before 0.25 expect it."""
    url = tinker_server(request).downloads.archive_url(_base(request), _own(request))
    expires = format_datetime(datetime.now(UTC) + timedelta(seconds=SECONDS), usegmt=True)
    return RedirectResponse(url, 302, headers={"Expires": expires})


async def download(request: Request) -> Response:
    path = tinker_server(request).downloads.path(request.path_params["token"])
    if path.is_file():
        return FileResponse(path)
    file = tempfile.TemporaryFile()  # noqa: SIM115  # closed after it has been sent
    await asyncio.to_thread(write_archive, path, file)
    return StreamingResponse(_pieces(file), media_type="application/x-tar")


async def weights_info(request: Request) -> Response:
    sent = protocol.parse(await control_body_of(request), protocol.WeightsInfo)
    return json_response(tinker_server(request).queries.weights_info(tenant_of(request), sent.tinker_path))


async def copy_weights(request: Request) -> Response:
    key, token = (request.headers.get(f"x-{name}") for name in ("idempotency-key", "tinker-weights-access-token"))
    body = await control_body_of(request)
    with audit_immediate(request, "copy_weights") as watched:
        path = watched.name = tinker_server(request).copies.copy(tenant_of(request), body, key, token)
    return json_response({"tinker_path": path})


async def sessions(request: Request) -> Response:
    return json_response(tinker_server(request).queries.sessions(tenant_of(request), *_page(request)))


async def search_sessions(request: Request) -> Response:
    return json_response(
        search(tinker_server(request).requests.store, tenant_of(request), await control_body_of(request))
    )


async def session(request: Request) -> Response:
    return json_response(tinker_server(request).queries.session(tenant_of(request), request.path_params["session_id"]))


async def move_session(request: Request) -> Response:
    sent = protocol.parse(await control_body_of(request), protocol.Move)
    tinker_server(request).queries.move(tenant_of(request), request.path_params["session_id"], sent.project_id)
    return Response(status_code=204)


def _own(request: Request) -> Checkpoint:
    parts = request.path_params
    return tinker_server(request).queries.own(tenant_of(request), parts["run_id"], parts["kind"], parts["name"])


def _path(request: Request) -> str:
    parts = request.path_params
    return f"{parts['run_id']}/{parts['kind']}/{parts['name']}"


def _base(request: Request) -> str:
    return f"{str(request.base_url).rstrip('/')}/api/v1/downloads/"


def _page(request: Request) -> tuple[int, int]:
    found = []
    for name, default in (("offset", "0"), ("limit", "20")):
        text = request.query_params.get(name, default)
        if not text.isdecimal() or len(text) > 9:
            raise BadRequest(f"{name} is {text[:40]!r}, but must be a number of at least 0")
        found.append(int(text))
    return found[0], found[1]


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE):
            yield piece
