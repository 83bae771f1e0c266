"""What is told of sessions, runs and checkpoints, and what is done to them by name. Knows no HTTP."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.tinker.checkpoints import Checkpoints
from tinkerbell_server.tinker.desk import Desk, NotHere
from tinkerbell_server.tinker.names import KINDS, TinkerPath, expiry
from tinkerbell_server.tinker.records import Checkpoint, Kind, Run, Sampler, Session

Json = dict[str, Any]  # Any: JSON values of several types

_TYPES: dict[Kind, str] = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}

_MOST = 1000


class Listing:
    def __init__(self, desk: Desk, checkpoints: Checkpoints) -> None:
        self._desk, self._records, self._checkpoints = desk, desk.records, checkpoints

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
        """A checkpoint of one's own, by the parts of its path. Raises NotHere."""
        self._known_run(tenant, run_id)
        if kind not in KINDS:
            raise NotHere(f"no kind of checkpoint {kind[:60]!r}: there is {', '.join(KINDS)}")
        path = TinkerPath(run_id, kind, name)
        checkpoint = self._records.get(Checkpoint, str(path), tenant)
        if checkpoint is None or _expired(checkpoint):
            there = ", ".join(f"{one.kind}/{one.name}" for one in self._living(run_id)) or "none"
            raise NotHere(f"no checkpoint {str(path)[:200]!r} (of this run there is: {there})")
        return checkpoint

    def delete(self, checkpoint: Checkpoint) -> None:
        """Its record and its folder. What is loaded already stays loaded."""
        self._records.drop(checkpoint)
        shutil.rmtree(checkpoint.folder, ignore_errors=True)

    def publish(self, checkpoint: Checkpoint, *, public: bool) -> None:
        self._records.put(msgspec.structs.replace(checkpoint, public=public))

    def expire(self, checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
        self._records.put(msgspec.structs.replace(checkpoint, expires=expiry(ttl_seconds)))

    def sweep(self) -> None:
        """Delete what has expired."""
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
