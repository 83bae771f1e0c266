"""Frees ended sessions and expired checkpoints."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from pathlib import Path

import msgspec

from tinkerbell_server.access.tenants import Caller
from tinkerbell_server.api.tinker.custom_losses import CustomLosses
from tinkerbell_server.api.tinker.queries import Queries
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Run, Sampler, Session
from tinkerbell_server.commands import DeleteModel

log = logging.getLogger("tinkerbell.server")

EVERY = 60.0
"""Seconds between two passes."""

SILENT_SECONDS = 3600.0
"""A session without a heartbeat for this long has ended; its client sends one every 10 seconds."""


class Reaper:
    """Frees what ended sessions hold."""

    def __init__(self, requests: TinkerRequests, queries: Queries, losses: CustomLosses) -> None:
        self._requests, self._queries, self._losses = requests, queries, losses

    async def run(self) -> None:
        """Run a pass every minute, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            self.once()

    def once(self) -> None:
        """One pass."""
        self._queries.sweep()
        for session in self._requests.store.all(Session):
            if not session.ended and session.last_seen < time.time() - SILENT_SECONDS:
                self._requests.store.put(msgspec.structs.replace(session, ended=True))
                session = msgspec.structs.replace(session, ended=True)
                self._requests.cancel_session(session)
            if session.ended:
                self._release(session)

    def _release(self, session: Session) -> None:
        """Delete the models, the losses and the unnamed weights of a session; what was saved by name remains."""
        store = self._requests.store
        for run in store.of_parent(Run, session.id):
            if not run.ended:
                log.info("session %s has ended: deleting model %s", session.id, run.id)
                store.put(msgspec.structs.replace(run, ended=True))
                self._delete(run)
        self._losses.release(session)
        for sampler in store.of_parent(Sampler, session.id):
            if sampler.model_path is None and sampler.folder is not None:
                store.drop(sampler)
                shutil.rmtree(Path(sampler.folder), ignore_errors=True)

    def _delete(self, run: Run) -> None:
        command = DeleteModel(model_id=run.model_id)
        id = f"{run.model_id}-over"
        self._requests.service.intake.run_unobserved(Caller(run.tenant), "delete_model", command, id)
