"""Which of a tenant's sessions a search means, newest first. Knows no HTTP."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.tinker import bodies
from tinkerbell_server.tinker.records import Checkpoint, Records, Run, Session

Json = dict[str, Any]  # Any: JSON values of several types

HEARD_SECONDS = 120.0
"""A session is active that was heard so lately; its client sends a heartbeat every 10 seconds."""

_MOST = 200

_OWNERS = ("own", "accessible", "user")

_STATUSES = ("active", "cancelled", "failed", "client_finished")


def search(records: Records, tenant: str, body: bytes) -> Json:
    """What POST /sessions/search answers: a page. Raises BadRequest for a setting that is none."""
    sent = bodies.parse(body, bodies.SearchSessions)
    if not 1 <= sent.limit <= _MOST:
        raise BadRequest(f"limit is {sent.limit}, but must be from 1 to {_MOST}")
    found = [one for one in _of_owner(records, tenant, sent) if _means(sent, one)]
    found.sort(key=_place, reverse=True)
    if sent.cursor is not None:
        after = (sent.cursor.last_created_at, sent.cursor.last_session_id)
        found = [one for one in found if _place(one) < after]
    page = found[: sent.limit]
    more = len(found) > len(page)
    return {
        "sessions": [_summary(records, one) for one in page],
        "next_cursor": _cursor(page[-1]) if more else None,
    }


def status_of(session: Session) -> Json | None:
    """None where it has not said how it ended, and was not heard lately."""
    if session.reason is not None:
        return {"type": "client_finished", "reason": {"type": session.reason}, "detail": session.detail}
    active = not session.ended and session.last_seen > time.time() - HEARD_SECONDS
    return {"type": "active"} if active else None


def _of_owner(records: Records, tenant: str, sent: bodies.SearchSessions) -> list[Session]:
    """Of the tenant's own: nobody else's are there."""
    kind = sent.owner.get("type", "own")
    if kind not in _OWNERS:
        raise BadRequest(f"owner is of type {str(kind)[:40]!r}, but must be one of {', '.join(_OWNERS)}")
    if kind == "user" and tenant not in sent.owner.get("owner_urns", ()):
        return []
    return records.of_tenant(Session, tenant)


def _means(sent: bodies.SearchSessions, session: Session) -> bool:
    named = []
    if sent.session_id is not None:
        named.append(session.id == sent.session_id)
    if sent.display_name is not None:
        name = (session.display_name or "").lower()
        named.append(all(word in name for word in sent.display_name.lower().split()))
    own = session.user_metadata or {}
    return (
        (not named or any(named))
        and (sent.project_ids is None or session.project_id in sent.project_ids)
        and all(own.get(key) == value for key, value in sent.user_metadata.items())
        and (sent.statuses is None or any(_has_status(session, wanted) for wanted in sent.statuses))
    )


def _has_status(session: Session, wanted: Json) -> bool:
    if wanted.get("type") not in _STATUSES:
        raise BadRequest(f"statuses has type {str(wanted.get('type'))[:40]!r}, but there is {', '.join(_STATUSES)}")
    status = status_of(session)
    if status is None or status["type"] != wanted["type"]:
        return False
    reasons = wanted.get("reasons")
    return reasons is None or session.reason in reasons


def _place(session: Session) -> tuple[datetime, str]:
    return datetime.fromtimestamp(session.created, UTC), session.id


def _cursor(session: Session) -> Json:
    created, session_id = _place(session)
    return {"last_created_at": created.isoformat(), "last_session_id": session_id}


def _summary(records: Records, session: Session) -> Json:
    saved = [one for run in records.of_parent(Run, session.id) for one in records.of_parent(Checkpoint, run.id)]
    return {
        "session_id": session.id,
        "created_at": _place(session)[0].isoformat(),
        "owner": session.tenant,
        "project_id": session.project_id or "",
        "status": status_of(session),
        "checkpoints_count": len(saved),
        "checkpoint_storage_bytes": sum(one.size for one in saved),
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
    }
