"""The wire to one server: sends, retries what is safe to repeat, and raises the server's errors as their own types."""

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

PAUSES = (0.1, 0.4, 1.0)
"""Seconds before each repetition of a request that got no answer."""

PATIENCE = 120.0
"""Seconds that a request which is over one of the server's limits is repeated for, as often as the server says."""


class Transport:
    """One connection pool. `api_key` travels in `X-API-Key` and nowhere else."""

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
            # a proxy meant for the internet does not know this machine's localhost
            trust_env=parts.hostname not in ("localhost", "127.0.0.1", "::1"),
        )
        weakref.finalize(self, self._http.close)

    def __reduce__(self) -> NoReturn:
        raise BadUpload(
            "a TinkerClient cannot be pickled, for it holds a connection and your API key: "
            "do not use the client inside a loss; pass what the loss needs through loss_fn_inputs"
        )

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, message: object, answer: type[T], *, as_json: bool = False) -> T:
        """Send once, whatever happens on the way: every try carries one Idempotency-Key."""
        content = msgspec.json.encode(message) if as_json else encode(message)
        headers = {
            "Content-Type": "application/json" if as_json else "application/msgpack",
            "Idempotency-Key": uuid.uuid4().hex,
        }
        return self._send("POST", path, answer, content=content, headers=headers)

    def get(self, path: str, answer: type[T], params: dict[str, float] | None = None) -> T:
        return self._send("GET", path, answer, params=params, headers={})

    # Any: what httpx takes
    def _send(self, method: str, path: str, answer: type[T], *, headers: dict[str, str], **options: Any) -> T:
        headers = {**headers, "Accept": "application/msgpack"}
        deadline = time.monotonic() + PATIENCE
        while True:
            response = self._answered(method, path, headers=headers, **options)
            again = _again_after(response)
            if again is None or time.monotonic() + again > deadline:
                break
            time.sleep(again)
        if response.is_success:
            return _decode(response, answer)
        raise self._error(response)

    # Any: as above
    def _answered(self, method: str, path: str, **options: Any) -> httpx.Response:
        for pause in (*PAUSES, None):
            try:
                return self._http.request(method, path, **options)
            except httpx.TransportError as error:
                if pause is None:
                    raise ServerUnreachable(
                        f"no answer from {self.base_url} ({type(error).__name__}: {error}): start a server with "
                        "`tinkerbell serve`, or name another with TinkerClient(url) or TINKERBELL_URL"
                    ) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _error(self, response: httpx.Response) -> TinkerbellError:
        try:
            return _decode(response, Refusal).problem.error()
        except msgspec.DecodeError:
            return ServerUnreachable(
                f"{self.base_url} answered {response.status_code} to {response.request.url.path}, "
                "and not as a Tinkerbell server does: check the address"
            )


class Refusal(msgspec.Struct, frozen=True):
    """The body of an error."""

    problem: Problem


def _again_after(response: httpx.Response) -> float | None:
    """The seconds after which a refused request may come again; None where it need not."""
    if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
        return None
    try:
        return max(0.1, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0


def _decode(response: httpx.Response, answer: type[T]) -> T:
    if response.headers.get("Content-Type", "").startswith("application/msgpack"):
        return msgspec.msgpack.decode(response.content, type=answer)
    return msgspec.json.decode(response.content, type=answer)
