"""Who a Tinker request is of. The one place where a tenant enters."""

from __future__ import annotations

from starlette.requests import Request

LOCAL = "local"
"""The one tenant of a server that asks for no key."""


def tenant_of(request: Request) -> str:
    """The tenant of the request's key."""
    return LOCAL
