"""Tenants: ids are namespaced by tenant, so a request cannot address another tenant's objects.

The ids of models, requests and uploads are qualified with the tenant when a request arrives, and sent without it in the
response. The code in between needs no further checks of ownership.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadRequest, Problem
from tinkerbell_core.types import Future, LossDescription

LOCAL = "local"
"""The only tenant of a server that requires no keys."""

PUBLIC = "public"
"""Owns the uploads that an admin has published. No key belongs to this tenant."""

SCOPES = ("read", "train", "upload", "admin")

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. key_id: None if the request needed no key."""

    tenant: str = LOCAL
    key_id: str | None = None
    scopes: frozenset[str] = frozenset(SCOPES)

    @property
    def admin(self) -> bool:
        return "admin" in self.scopes


def check_tenant(name: str) -> None:
    """Raise BadRequest if a tenant cannot have this name."""
    if not _TENANT.fullmatch(name) or name == PUBLIC:
        raise BadRequest(
            f"a tenant cannot be named {name[:80]!r}: use at most 32 lower-case letters, digits, '_' and '-', "
            f"beginning with a letter or a digit, and not {PUBLIC!r}"
        )


def qualified(tenant: str, name: str) -> str:
    """`tenant/name`, so that names of two tenants differ; a name of the local tenant stays as it is without a slash."""
    return name if tenant == LOCAL and "/" not in name else f"{tenant}/{name}"


def owner_of(name: str) -> str:
    """The tenant of a qualified name."""
    return name.partition("/")[0] if "/" in name else LOCAL


def unqualified(name: str) -> str:
    """A qualified name without its tenant."""
    return name.partition("/")[2] if "/" in name else name


def unqualified_text(tenant: str, text: str) -> str:
    """A sentence with the tenant removed from quoted names: `'acme/m1'` becomes `'m1'`."""
    return text.replace(f"'{tenant}/", "'")


def unqualified_problem(tenant: str, problem: Problem) -> Problem:
    """A problem whose message names objects as the tenant does."""
    return msgspec.structs.replace(problem, message=unqualified_text(tenant, problem.message))


def unqualified_future(tenant: str, future: Future) -> Future:
    """A future of this tenant, with all ids as the tenant wrote them."""
    return msgspec.structs.replace(
        future,
        request_id=unqualified(future.request_id),
        model_id=None if future.model_id is None else unqualified(future.model_id),
        result=future.result if tenant == LOCAL else _unqualified_result(future.result),
        problem=None if future.problem is None else unqualified_problem(tenant, future.problem),
    )


def owner_of_loss(loss: LossDescription) -> str | None:
    """The tenant that uploaded a loss; None if the loss is installed."""
    return (loss.provenance.owner or LOCAL) if loss.provenance.kind == "upload" else None


def provenance_owner(tenant: str) -> str | None:
    """The owner in the provenance, and therefore in the id, of a tenant's upload."""
    return None if tenant == LOCAL else tenant


def visible(tenant: str, losses: Sequence[LossDescription]) -> list[LossDescription]:
    """The losses that a tenant may use: installed, public, own. If several have one name, it means the last of them."""
    groups: dict[str | None, list[LossDescription]] = {None: [], PUBLIC: [], tenant: []}
    for loss in losses:
        owner = (loss.provenance.owner or LOCAL) if loss.provenance.kind == "upload" else None
        if owner in groups:
            groups[owner].append(loss)
    return [loss for group in groups.values() for loss in group]


# object: a Raw that holds a map, or None
def _unqualified_result(result: object) -> object:
    if not isinstance(result, msgspec.Raw):
        return result
    fields = msgspec.msgpack.decode(result, type=dict[str, msgspec.Raw])
    if "model_id" in fields:
        model_id = msgspec.msgpack.decode(fields["model_id"], type=str | None)
        fields["model_id"] = msgspec.Raw(msgspec.msgpack.encode(None if model_id is None else unqualified(model_id)))
    return msgspec.Raw(msgspec.msgpack.encode(fields))
