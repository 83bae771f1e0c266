"""Results, waited for as long as a client's own timeout allows."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tinkerbell_server.routes.tinker.caller import tenant_of
from tinkerbell_server.routes.tinker.edge import PROTOBUF, body_of, front_of, said
from tinkerbell_server.tinker import bodies, results

WAIT = 30.0
"""Seconds; the client gives up a poll after 45, and polls again without a pause."""


async def retrieve_future(request: Request) -> Response:
    sent = bodies.parse(await body_of(request), bodies.RetrieveFuture)
    desk = front_of(request).desk
    answer = await desk.retrieve(tenant_of(request), sent.request_id, WAIT)
    if answer is None:
        # a client logs a pending 200 each time, and a 408 not
        return said(results.pending(sent.request_id, {}), 408)
    if isinstance(answer, bytes):
        return Response(answer, media_type=PROTOBUF)
    return said(answer)


async def retrieve_futures(request: Request) -> Response:
    sampling = front_of(request).sampling
    return said(await sampling.retrieve_futures(tenant_of(request), await body_of(request), WAIT))


async def cancel_future(request: Request) -> Response:
    sent = bodies.parse(await body_of(request), bodies.CancelFuture)
    front_of(request).desk.cancel(tenant_of(request), sent.request_id)
    return Response(status_code=204)
