"""Whose is what: the names a tenant says, and the names the engine and the store know. Knows no HTTP.

Models, requests and uploads are qualified with their tenant where a request comes in, and told without it where an
answer goes out. In between nobody need ask whose something is: another tenant's name cannot even be said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadRequest, Problem
from tinkerbell_core.types import Future, LossDescription

LOCAL = "local"
"""The one tenant of a server that asks for no key."""

PUBLIC = "public"
"""Owns the uploads that an admin has published; nobody's key is of this tenant."""

SCOPES = ("read", "train", "upload", "admin")

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. key_id None: nobody had to say."""

    tenant: str = LOCAL
    key_id: str | None = None
    scopes: frozenset[str] = frozenset(SCOPES)

    @property
    def admin(self) -> bool:
        return "admin" in self.scopes


def check_tenant(name: str) -> None:
    """Raise BadRequest where `name` cannot be a tenant's."""
    if not _TENANT.fullmatch(name) or name == PUBLIC:
        raise BadRequest(
            f"a tenant cannot be named {name[:80]!r}: use at most 32 lower-case letters, digits, '_' and '-', "
            f"beginning with a letter or a digit, and not {PUBLIC!r}"
        )


def qualified(tenant: str, name: str) -> str:
    """`tenant/name`; the local tenant's plain names stay plain. No two tenants' names are ever equal."""
    return name if tenant == LOCAL and "/" not in name else f"{tenant}/{name}"


def owner_of(name: str) -> str:
    """The tenant of a qualified name."""
    return name.partition("/")[0] if "/" in name else LOCAL


def unqualified(name: str) -> str:
    """A qualified name as its tenant says it."""
    return name.partition("/")[2] if "/" in name else name


def unqualified_text(tenant: str, text: str) -> str:
    """A sentence with the tenant's names as it says them: `'acme/m1'` reads `'m1'`."""
    return text.replace(f"'{tenant}/", "'")


def unqualified_problem(tenant: str, problem: Problem) -> Problem:
    return msgspec.structs.replace(problem, message=unqualified_text(tenant, problem.message))


def unqualified_future(tenant: str, future: Future) -> Future:
    """A future of this tenant as the tenant reads it."""
    return msgspec.structs.replace(
        future,
        request_id=unqualified(future.request_id),
        model_id=None if future.model_id is None else unqualified(future.model_id),
        result=future.result if tenant == LOCAL else _own_result(future.result),
        problem=None if future.problem is None else unqualified_problem(tenant, future.problem),
    )


def owner_of_loss(loss: LossDescription) -> str | None:
    """The tenant that uploaded it; None for one that is installed."""
    return (loss.provenance.owner or LOCAL) if loss.provenance.kind == "upload" else None


def provenance_owner(tenant: str) -> str | None:
    """The owner in a loss's provenance, and so in its id."""
    return None if tenant == LOCAL else tenant


def visible(tenant: str, losses: Sequence[LossDescription]) -> list[LossDescription]:
    """What a tenant may see: what is installed, what is public, what is its own, which is meant first by a name."""
    return [loss for owner in (None, PUBLIC, tenant) for loss in losses if owner_of_loss(loss) == owner]


# object: a Raw that holds one of the answers, each a map, or None
def _own_result(result: object) -> object:
    if not isinstance(result, msgspec.Raw):
        return result
    fields = msgspec.msgpack.decode(result, type=dict[str, msgspec.Raw])
    if "model_id" in fields:
        told = msgspec.msgpack.decode(fields["model_id"], type=str | None)
        fields["model_id"] = msgspec.Raw(msgspec.msgpack.encode(None if told is None else unqualified(told)))
    return msgspec.Raw(msgspec.msgpack.encode(fields))
