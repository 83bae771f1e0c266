"""Lists and describes sessions, runs and checkpoints, and changes checkpoints by name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker.checkpoints import Checkpoints
from tinkerbell_server.api.tinker.paths import KINDS, TinkerPath, expiry
from tinkerbell_server.api.tinker.requests import NotHere, TinkerRequests
from tinkerbell_server.api.tinker.store import Checkpoint, Kind, Run, Sampler, Session, TinkerStore

Json = dict[str, Any]  # Any: JSON values of several types

_TYPES: dict[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}

_MOST = 1000


class Queries:
    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._records, self._checkpoints = requests, requests.store, checkpoints

    def runs(self, tenant: str, offset: int, limit: int, project_id: str | None = None) -> Json:
        runs = self._records.of_tenant(Run, tenant)
        if project_id is not None:
            inside = {s.id for s in self._records.of_tenant(Session, tenant) if s.project_id == project_id}
            runs = [run for run in runs if run.parent in inside]
        page, cursor = _page(runs, offset, limit)
        return {"training_runs": [self._run(run) for run in page], "cursor": cursor}

    def run(self, tenant: str, run_id: str) -> Json:
        return self._run(self._known_run(tenant, run_id))

    def checkpoints_of(self, tenant: str, run_id: str) -> Json:
        self._known_run(tenant, run_id)
        return {"checkpoints": [_checkpoint(one) for one in self._living(run_id)]}

    def checkpoints(self, tenant: str, offset: int, limit: int) -> Json:
        living = [one for one in self._records.of_tenant(Checkpoint, tenant) if not _expired(one)]
        page, cursor = _page(living, offset, limit)
        return {"checkpoints": [_checkpoint(one) for one in page], "cursor": cursor}

    def weights_info(self, tenant: str, path: str) -> Json:
        checkpoint = self._checkpoints.find(tenant, path)
        return {
            "base_model": checkpoint.base_model,
            "optimizer_config": {"type": "adamw"},
            "is_lora": checkpoint.rank is not None,
            "lora_rank": checkpoint.rank,
            "train_unembed": checkpoint.train_unembed,
            "train_mlp": checkpoint.train_mlp,
            "train_attn": checkpoint.train_attn,
        }

    def sessions(self, tenant: str, offset: int, limit: int) -> Json:
        page, cursor = _page(self._records.of_tenant(Session, tenant), offset, limit)
        return {"sessions": [session.id for session in page], "cursor": cursor}

    def session(self, tenant: str, session_id: str) -> Json:
        session = self._known_session(tenant, session_id)
        return {
            "training_run_ids": [run.id for run in self._records.of_parent(Run, session_id)],
            "sampler_ids": [sampler.id for sampler in self._records.of_parent(Sampler, session_id)],
            "user_metadata": session.user_metadata,
            "display_name": session.display_name,
        }

    def move(self, tenant: str, session_id: str, project_id: str) -> None:
        session = self._known_session(tenant, session_id)
        self._records.put(msgspec.structs.replace(session, project_id=project_id))

    def own(self, tenant: str, run_id: str, kind: str, name: str) -> Checkpoint:
        """A checkpoint of the tenant, by the parts of its path. Raises NotHere, BadRequest for an unknown kind."""
        self._known_run(tenant, run_id)
        if kind not in KINDS:
            raise BadRequest(f"no kind of checkpoint {kind[:60]!r}: the id is <kind>/<name>, of {' or '.join(KINDS)}")
        path = TinkerPath(run_id, kind, name)
        checkpoint = self._records.get(Checkpoint, str(path), tenant)
        if checkpoint is None or _expired(checkpoint):
            there = ", ".join(f"{one.kind}/{one.name}" for one in self._living(run_id)) or "none"
            raise NotHere(f"no checkpoint {str(path)[:200]!r} (of this run there is: {there})")
        return checkpoint

    def delete(self, checkpoint: Checkpoint) -> None:
        """Delete the record and the folder of a checkpoint; models that loaded it keep their weights."""
        self._records.drop(checkpoint)
        shutil.rmtree(checkpoint.folder, ignore_errors=True)

    def publish(self, checkpoint: Checkpoint, *, public: bool) -> None:
        self._records.put(msgspec.structs.replace(checkpoint, public=public))

    def expire(self, checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
        self._records.put(msgspec.structs.replace(checkpoint, expires=expiry(ttl_seconds)))

    def sweep(self) -> None:
        """Delete expired checkpoints."""
        for checkpoint in self._records.all(Checkpoint):
            if _expired(checkpoint):
                self.delete(checkpoint)

    def _known_run(self, tenant: str, run_id: str) -> Run:
        run = self._records.get(Run, run_id, tenant)
        if run is None:
            raise NotHere(f"no training run {run_id[:160]!r} on this server")
        return run

    def _known_session(self, tenant: str, session_id: str) -> Session:
        session = self._records.get(Session, session_id, tenant)
        if session is None:
            raise NotHere(f"no session {session_id[:160]!r} on this server")
        return session

    def _living(self, run_id: str) -> list[Checkpoint]:
        return [one for one in self._records.of_parent(Checkpoint, run_id) if not _expired(one)]

    def _run(self, run: Run) -> Json:
        living = self._living(run.id)
        training = next((one for one in living if one.kind == "weights"), None)
        sampler = next((one for one in living if one.kind == "sampler_weights"), None)
        return {
            "training_run_id": run.id,
            "base_model": run.base_model,
            "model_owner": run.tenant,
            "is_lora": True,
            "lora_rank": run.rank,
            "corrupted": False,
            "last_request_time": _time(run.last_request),
            "last_checkpoint": None if training is None else _checkpoint(training),
            "last_sampler_checkpoint": None if sampler is None else _checkpoint(sampler),
            "user_metadata": run.user_metadata,
        }


def _checkpoint(one: Checkpoint) -> Json:
    return {
        "checkpoint_id": f"{one.kind}/{one.name}",
        "checkpoint_type": _TYPES[one.kind],
        "time": _time(one.created),
        "tinker_path": one.id,
        "size_bytes": one.size,
        "public": one.public,
        "user_metadata": one.user_metadata,
        "expires_at": None if one.expires is None else _time(one.expires),
    }


def _page(records: Sequence[Any], offset: int, limit: int) -> tuple[Sequence[Any], Json]:  # Any: records of one kind
    if offset < 0 or not 1 <= limit <= _MOST:
        raise BadRequest(f"offset is {offset} and limit {limit}, but must be at least 0, and from 1 to {_MOST}")
    return records[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(records)}


def _expired(checkpoint: Checkpoint) -> bool:
    return checkpoint.expires is not None and checkpoint.expires < time.time()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


HEARD_SECONDS = 120.0
"""A session is active if its last heartbeat is at most this old; its client sends one every 10 seconds."""

_MOST_FOUND = 200

_OWNERS = ("own", "accessible", "user")

_STATUSES = ("active", "cancelled", "failed", "client_finished")


def search(store: TinkerStore, tenant: str, body: bytes) -> Json:
    """The answer of POST /sessions/search: one page. Raises BadRequest for an invalid filter."""
    sent = protocol.parse(body, protocol.SearchSessions)
    if not 1 <= sent.limit <= _MOST_FOUND:
        raise BadRequest(f"limit is {sent.limit}, but must be from 1 to {_MOST_FOUND}")
    found = [one for one in _of_owner(store, tenant, sent) if _means(sent, one)]
    found.sort(key=_place, reverse=True)
    if sent.cursor is not None:
        after = (sent.cursor.last_created_at, sent.cursor.last_session_id)
        found = [one for one in found if _place(one) < after]
    page = found[: sent.limit]
    more = len(found) > len(page)
    return {
        "sessions": [_summary(store, one) for one in page],
        "next_cursor": _cursor(page[-1]) if more else None,
    }


def status_of(session: Session) -> Json | None:
    """The status of a session; None if its client did not report how it ended and sends no heartbeat."""
    if session.reason is not None:
        return {"type": "client_finished", "reason": {"type": session.reason}, "detail": session.detail}
    active = not session.ended and session.last_seen > time.time() - HEARD_SECONDS
    return {"type": "active"} if active else None


def _of_owner(store: TinkerStore, tenant: str, sent: protocol.SearchSessions) -> list[Session]:
    """Whether the owner filter matches the tenant, who sees no other sessions."""
    kind = sent.owner.get("type", "own")
    if kind not in _OWNERS:
        raise BadRequest(f"owner is of type {str(kind)[:40]!r}, but must be one of {', '.join(_OWNERS)}")
    if kind == "user" and tenant not in sent.owner.get("owner_urns", ()):
        return []
    return store.of_tenant(Session, tenant)


def _means(sent: protocol.SearchSessions, session: Session) -> bool:
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


def _summary(store: TinkerStore, session: Session) -> Json:
    saved = [one for run in store.of_parent(Run, session.id) for one in store.of_parent(Checkpoint, run.id)]
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
