"""What a RestClient asks: lists, descriptions, and changes to checkpoints by name. All answered at once."""

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
from tinkerbell_server.routes.tinker.audited import at_once
from tinkerbell_server.routes.tinker.caller import tenant_of
from tinkerbell_server.routes.tinker.edge import body_of, front_of, said
from tinkerbell_server.tinker import bodies
from tinkerbell_server.tinker.downloads import SECONDS, write_archive
from tinkerbell_server.tinker.records import Checkpoint
from tinkerbell_server.tinker.searching import search

_PIECE = 1 << 20


async def training_runs(request: Request) -> Response:
    offset, limit = _page(request)
    project = request.query_params.get("project_id")
    return said(front_of(request).listing.runs(tenant_of(request), offset, limit, project))


async def training_run(request: Request) -> Response:
    return said(front_of(request).listing.run(tenant_of(request), request.path_params["run_id"]))


async def run_checkpoints(request: Request) -> Response:
    return said(front_of(request).listing.checkpoints_of(tenant_of(request), request.path_params["run_id"]))


async def checkpoints(request: Request) -> Response:
    return said(front_of(request).listing.checkpoints(tenant_of(request), *_page(request)))


async def delete_checkpoint(request: Request) -> Response:
    with at_once(request, "delete_checkpoint", _path(request)):
        front_of(request).listing.delete(_own(request))
    return Response(status_code=204)


async def publish(request: Request) -> Response:
    with at_once(request, "publish_checkpoint", _path(request)):
        front_of(request).listing.publish(_own(request), public=True)
    return Response(status_code=204)


async def unpublish(request: Request) -> Response:
    with at_once(request, "unpublish_checkpoint", _path(request)):
        front_of(request).listing.publish(_own(request), public=False)
    return Response(status_code=204)


async def ttl(request: Request) -> Response:
    sent = bodies.parse(await body_of(request), bodies.Ttl)
    with at_once(request, "expire_checkpoint", _path(request)):
        front_of(request).listing.expire(_own(request), sent.ttl_seconds)
    return Response(status_code=204)


async def external_urls(request: Request) -> Response:
    urls = front_of(request).downloads.urls(_base(request), _own(request))
    return said({"urls": urls, "expires": (datetime.now(UTC) + timedelta(seconds=SECONDS)).isoformat()})


async def archive(request: Request) -> Response:
    """Where SDKs before 0.25 look for a checkpoint's tar."""
    url = front_of(request).downloads.archive_url(_base(request), _own(request))
    expires = format_datetime(datetime.now(UTC) + timedelta(seconds=SECONDS), usegmt=True)
    return RedirectResponse(url, 302, headers={"Expires": expires})


async def download(request: Request) -> Response:
    path = front_of(request).downloads.path(request.path_params["token"])
    if path.is_file():
        return FileResponse(path)
    file = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it has been sent
    await asyncio.to_thread(write_archive, path, file)
    return StreamingResponse(_pieces(file), media_type="application/x-tar")


async def weights_info(request: Request) -> Response:
    sent = bodies.parse(await body_of(request), bodies.WeightsInfo)
    return said(front_of(request).listing.weights_info(tenant_of(request), sent.tinker_path))


async def copy_weights(request: Request) -> Response:
    key, token = (request.headers.get(f"x-{name}") for name in ("idempotency-key", "tinker-weights-access-token"))
    body = await body_of(request)
    with at_once(request, "copy_weights") as watched:
        path = watched.name = front_of(request).copies.copy(tenant_of(request), body, key, token)
    return said({"tinker_path": path})


async def sessions(request: Request) -> Response:
    return said(front_of(request).listing.sessions(tenant_of(request), *_page(request)))


async def search_sessions(request: Request) -> Response:
    return said(search(front_of(request).desk.records, tenant_of(request), await body_of(request)))


async def session(request: Request) -> Response:
    return said(front_of(request).listing.session(tenant_of(request), request.path_params["session_id"]))


async def move_session(request: Request) -> Response:
    sent = bodies.parse(await body_of(request), bodies.Move)
    front_of(request).listing.move(tenant_of(request), request.path_params["session_id"], sent.project_id)
    return Response(status_code=204)


def _own(request: Request) -> Checkpoint:
    parts = request.path_params
    return front_of(request).listing.own(tenant_of(request), parts["run_id"], parts["kind"], parts["name"])


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
