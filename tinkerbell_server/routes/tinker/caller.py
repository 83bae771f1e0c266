"""Who a Tinker request is of. The one place where a tenant enters."""

from __future__ import annotations

from starlette.requests import Request

from tinkerbell_server.auth import caller_of


def tenant_of(request: Request) -> str:
    """The tenant of the request's key."""
    return caller_of(request).tenant
