"""The HTTP client of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

KEY_VARIABLES = ("TINKERBELL_API_KEY", "TINKER_API_KEY")
"""Environment variables with an API key; the first that is set is used."""


def with_url(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option --url."""
    option = click.option(
        "--url",
        envvar="TINKERBELL_URL",
        default="http://127.0.0.1:8000",
        show_default=True,
        help="Address of a server.",
    )
    return option(command)


# Any, here and below: JSON
def request(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """GET a path of the server, or POST a body to it; the JSON of the response.

    Raises the error that the server sent, or ServerUnreachable.
    """
    import httpx
    import msgspec

    from tinkerbell_core.errors import Problem, ServerUnreachable

    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    try:
        response = httpx.request(
            "GET" if body is None else "POST",
            url.rstrip("/") + path,
            json=body,
            timeout=60,
            headers={"X-API-Key": key} if key else None,
        )
        content = response.json()
        if response.is_success:
            return content
        problem = msgspec.convert(content["problem"], Problem)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ServerUnreachable(
            f"no Tinkerbell server answers at {url} ({error}): start one with `tinkerbell serve`, "
            "pass another address with --url, or list the losses installed here with --local"
        ) from error
    raise problem.error()
