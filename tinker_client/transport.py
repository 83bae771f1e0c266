"""HTTP to one server: sends requests, retries them safely, and raises the errors of the server as their types."""

from __future__ import annotations

import time
import uuid
import weakref
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from tinker_client.encoding import encode
from tinkerbell_core.errors import BadUpload, Problem, ServerUnreachable, TinkerbellError

T = TypeVar("T")

RETRY_DELAYS = (0.1, 0.4, 1.0)
"""Seconds before each retry of a request without a response."""

RATE_LIMIT_SECONDS = 120.0
"""Time for which a request over a limit of the server is retried, in seconds. The server sets the delays."""


class Transport:
    """A connection pool. `api_key` is sent in the header `X-API-Key` only."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url is {base_url!r}, but must look like http://localhost:8000")
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"X-API-Key": api_key} if api_key else {},
            timeout=httpx.Timeout(300, connect=10),
            # a proxy for the internet does not reach the localhost of this machine
            trust_env=parts.hostname not in ("localhost", "127.0.0.1", "::1"),
        )
        weakref.finalize(self, self._http.close)

    def __reduce__(self) -> NoReturn:
        raise BadUpload(
            "a TinkerClient cannot be pickled, because it has a connection and your API key: "
            "do not use the client inside a loss; pass the data that the loss needs through loss_fn_inputs "
            "(see docs/custom-losses.md#troubleshooting)"
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def post(self, path: str, message: object, result: type[T], *, as_json: bool = False) -> T:
        """Send a message. All retries have the same Idempotency-Key, so the server executes the request once."""
        content = msgspec.json.encode(message) if as_json else encode(message)
        headers = {
            "Content-Type": "application/json" if as_json else "application/msgpack",
            "Idempotency-Key": uuid.uuid4().hex,
        }
        return self._send("POST", path, result, content=content, headers=headers)

    def get(self, path: str, result: type[T], params: dict[str, float] | None = None) -> T:
        """Send a GET request."""
        return self._send("GET", path, result, params=params, headers={})

    # Any: arguments of httpx
    def _send(self, method: str, path: str, result: type[T], *, headers: dict[str, str], **options: Any) -> T:
        headers = {**headers, "Accept": "application/msgpack"}
        deadline = time.monotonic() + RATE_LIMIT_SECONDS
        while True:
            response = self._response(method, path, headers=headers, **options)
            delay = _retry_after(response)
            if delay is None or time.monotonic() + delay > deadline:
                break
            time.sleep(delay)
        if response.is_success:
            return _decode(response, result)
        raise self._error(response)

    # Any: as above
    def _response(self, method: str, path: str, **options: Any) -> httpx.Response:
        for delay in (*RETRY_DELAYS, None):
            try:
                return self._http.request(method, path, **options)
            except httpx.TransportError as error:
                if delay is None:
                    raise ServerUnreachable(
                        f"no answer from {self.base_url} ({type(error).__name__}: {error}): start a server with "
                        "`tinkerbell serve`, or pass another address with TinkerClient(url) or TINKERBELL_URL"
                    ) from None
                time.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def _error(self, response: httpx.Response) -> TinkerbellError:
        try:
            return _decode(response, ErrorBody).problem.error()
        except msgspec.DecodeError:
            return ServerUnreachable(
                f"{self.base_url} answered {response.status_code} to {response.request.url.path}, "
                "which is not a response of a Tinkerbell server: check the address"
            )


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error response."""

    problem: Problem


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds after which a request may be retried; None if it should not be."""
    if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
        return None
    try:
        return max(0.1, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0


def _decode(response: httpx.Response, result: type[T]) -> T:
    if response.headers.get("Content-Type", "").startswith("application/msgpack"):
        return msgspec.msgpack.decode(response.content, type=result)
    return msgspec.json.decode(response.content, type=result)
