"""Authenticates requests by API key, and checks scopes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    has_required_scope,
)
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from tinkerbell_core.errors import Forbidden, Unauthorized
from tinkerbell_server.access.audit import Audit
from tinkerbell_server.access.keys import Key, Keys
from tinkerbell_server.access.rates import Rates
from tinkerbell_server.access.tenants import Caller
from tinkerbell_server.config import Settings
from tinkerbell_server.http.handlers import refusal

Endpoint = Callable[[Request], Awaitable[Response]]

NO_KEY = (
    "this server requires an API key: pass TinkerClient(url, api_key=...), set TINKERBELL_API_KEY, or send "
    "'Authorization: Bearer tml-...' or 'X-API-Key: tml-...' (see docs/operators.md#keys)"
)


_AUDITED_REFUSALS = 60
"""Lines about refused keys that the audit log gets in a minute, for each address."""


class User(BaseUser):
    """A `Caller` as a user of starlette."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    @property
    def is_authenticated(self) -> bool:
        return self.caller.key_id is not None

    @property
    def display_name(self) -> str:
        return self.caller.tenant

    @property
    def identity(self) -> str:
        return self.caller.key_id or self.caller.tenant


class KeyBackend(AuthenticationBackend):
    """Finds the caller by the API key, as the setting `auth` requires.

    "on": every request needs a key. "off": no request does. "auto": every request does, except those from this machine
    before the first key is created.
    """

    def __init__(self, settings: Settings, keys: Keys, audit: Audit) -> None:
        self._auth, self._on_loopback = settings.auth, settings.on_loopback
        self._keys, self._audit = keys, audit
        self._refusals = Rates(_AUDITED_REFUSALS)

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """None if a request that needs a key has none. Raises AuthenticationError for a key that is not valid."""
        if not self.required(conn):
            caller = Caller()
            return AuthCredentials(sorted(caller.scopes)), User(caller)
        text = key_of(conn)
        if text is None:
            return None
        key = self._keys.find(text)
        state = "unknown" if key is None else key.state()
        if key is None or state != "valid":
            self._audit_refusal(conn, key, state)
            raise AuthenticationError(state)
        return AuthCredentials(key.scopes), User(Caller(key.tenant, key.id, frozenset(key.scopes)))

    def required(self, conn: HTTPConnection) -> bool:
        """Whether this request needs a key. A request through a proxy may come from another machine."""
        if self._auth != "auto":
            return self._auth == "on"
        forwarded = any(name in conn.headers for name in ("forwarded", "x-forwarded-for"))
        return not self._on_loopback or forwarded or self._keys.exist()

    def _audit_refusal(self, conn: HTTPConnection, key: Key | None, state: str) -> None:
        address = "?" if conn.client is None else conn.client.host
        if self._refusals.take(address) > 0:
            return  # many requests with wrong keys must not fill the disk
        caller = None if key is None else Caller(key.tenant, key.id)
        self._audit.write(caller, "authenticate", "Unauthorized", reason=f"{state} key", address=address)


def key_of(conn: HTTPConnection) -> str | None:
    """The key that a request contains: `Authorization: Bearer`, else `X-API-Key`."""
    scheme, _, token = conn.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return conn.headers.get("x-api-key", "").strip() or None


def on_refused(conn: HTTPConnection, error: AuthenticationError) -> Response:
    """The response to a key that is not valid. It is the same for an unknown id and for a wrong secret."""
    state = str(error)
    reason = f"is {state}" if state in ("expired", "revoked") else "is unknown"
    return refusal(conn, Unauthorized(f"the API key {reason}; ask the server's operator for another"))


def allowed(scope: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint, for keys with this scope. It raises Unauthorized without a key, and Forbidden without the scope."""

    async def guarded(request: Request) -> Response:
        if not has_required_scope(request, [scope]):
            if not isinstance(request.user, User):
                raise Unauthorized(NO_KEY)
            caller = request.user.caller
            request.app.state.service.audit.write(caller, request.url.path.strip("/")[:80], "Forbidden")
            scopes = ", ".join(sorted(caller.scopes))
            raise Forbidden(
                f"{request.method} {request.url.path} needs a key with the scope {scope!r}, but this key has {scopes}; "
                "ask the server's operator for another (see docs/operators.md#keys)"
            )
        return await endpoint(request)

    return guarded


def caller_of(request: Request) -> Caller:
    """The sender of a request, inside an `allowed` endpoint."""
    user = request.user
    assert isinstance(user, User)
    return user.caller
