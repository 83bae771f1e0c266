"""What nobody needs any more is given back: models and losses of sessions that are over, and what has expired."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from pathlib import Path

import msgspec

from tinkerbell_server.engines.base import DeleteModel
from tinkerbell_server.tinker.desk import Desk
from tinkerbell_server.tinker.listing import Listing
from tinkerbell_server.tinker.losses import CustomLosses
from tinkerbell_server.tinker.records import Run, Sampler, Session

log = logging.getLogger("tinkerbell.server")

EVERY = 60.0

SILENT_SECONDS = 3600.0
"""A session that was not heard for so long is over; its client sends a heartbeat every 10 seconds."""


class Upkeep:
    def __init__(self, desk: Desk, listing: Listing, losses: CustomLosses) -> None:
        self._desk, self._listing, self._losses = desk, listing, losses

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            self.once()

    def once(self) -> None:
        self._listing.sweep()
        for session in self._desk.records.all(Session):
            if not session.ended and session.last_seen < time.time() - SILENT_SECONDS:
                self._desk.records.put(msgspec.structs.replace(session, ended=True))
                session = msgspec.structs.replace(session, ended=True)
            if session.ended:
                self._release(session)

    def _release(self, session: Session) -> None:
        """Its models and losses leave the device, its unnamed weights the disk; what was saved by name stays."""
        records = self._desk.records
        for run in records.of_parent(Run, session.id):
            if not run.ended:
                log.info("session %s is over: model %s leaves the device", session.id, run.id)
                records.put(msgspec.structs.replace(run, ended=True))
                self._delete(run)
        self._losses.release(session)
        for sampler in records.of_parent(Sampler, session.id):
            if sampler.model_path is None and sampler.folder is not None:
                records.drop(sampler)
                shutil.rmtree(Path(sampler.folder), ignore_errors=True)

    def _delete(self, run: Run) -> None:
        def ended(_: object) -> None:
            """Nobody asked for it."""

        drop = DeleteModel(model_id=run.model_id)
        name = f"{run.model_id}-over"
        self._desk.queue_many(run.tenant, name, "delete_model", run.model_id, lambda: drop, ended, ended)
