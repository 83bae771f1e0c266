"""One question to a running server, as the command line puts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

KEYS = ("TINKERBELL_API_KEY", "TINKER_API_KEY")


def with_url(command: Callable[..., None]) -> Callable[..., None]:
    """The option that says which server is asked."""
    option = click.option(
        "--url", envvar="TINKERBELL_URL", default="http://127.0.0.1:8000", show_default=True, help="Server to ask."
    )
    return option(command)


# Any, here and below: the server's JSON
def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """GET `path` of the server at `url`, or POST a body there. Raises what the server raised, or ServerUnreachable."""
    import httpx
    import msgspec

    from tinkerbell_core.errors import Problem, ServerUnreachable

    key = next(filter(None, map(os.environ.get, KEYS)), None)
    try:
        answer = httpx.request(
            "GET" if body is None else "POST",
            url.rstrip("/") + path,
            json=body,
            timeout=60,
            headers={"X-API-Key": key} if key else None,
        )
        content = answer.json()
        if answer.is_success:
            return content
        problem = msgspec.convert(content["problem"], Problem)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ServerUnreachable(
            f"no Tinkerbell server answers at {url} ({error}): start one with `tinkerbell serve`, "
            "name it with --url, or list what is installed here with --local"
        ) from error
    raise problem.error()
