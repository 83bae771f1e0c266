"""Keeps the engine of one base running: starts it, detects its death and starts it again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from tinkerbell_core.errors import EngineLost
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.client import EngineClient, EngineRefused

log = logging.getLogger("tinkerbell.server")

ATTEMPTS = 5
"""Failed starts in a row after which the supervisor gives up."""

_STABLE_SECONDS = 10.0

Status = Literal["starting", "ok", "engine_down"]


class Supervisor:
    """One engine process after another, all of the same base.

    on_start: awaited with each new engine before others may use it; on_death: called when an engine that was ready
    has ended.
    """

    def __init__(
        self,
        settings: Settings,
        on_start: Callable[[EngineClient], Awaitable[None]],
        on_death: Callable[[EngineClient], None],
    ) -> None:
        self.status: Status = "starting"
        self.problem: str | None = None
        self.restarts = 0
        self.gave_up = False
        self._settings, self._on_start, self._on_death = settings, on_start, on_death
        self._engine: EngineClient | None = None
        self._last: EngineDescription | None = None
        self._changed = asyncio.Condition()

    @property
    def description(self) -> EngineDescription | None:
        """The description of the running engine, or of the last one; None before the first."""
        return self._last if self._engine is None else self._engine.description

    async def run(self) -> None:
        """Start engines until cancelled, or until too many starts have failed in a row."""
        failures = 0
        while failures < ATTEMPTS:
            began = time.monotonic()
            try:
                await self._run_one()
            except EngineRefused as refusal:
                self.problem = refusal.message
                if self.description is None:
                    break
            except EngineLost as lost:
                self.problem = lost.message
            log.error("%s", self.problem)
            failures = 0 if time.monotonic() - began > _STABLE_SECONDS else failures + 1
            self.restarts += 1
            await self._set_status("engine_down")
            await asyncio.sleep(min(0.1 * 2**failures, 5.0))
        self.gave_up = True
        await self._set_status("engine_down")
        log.error("the engine is not started again: %s", self.problem)

    async def engine(self) -> EngineClient:
        """The running engine, as soon as there is one. Raises EngineLost if no engine will be started."""
        async with self._changed:
            while self._engine is None or self._engine.closed.is_set():
                self._check()
                await self._changed.wait()
            return self._engine

    async def described(self) -> EngineDescription:
        """`description`, as soon as there is one. Raises EngineLost if no engine will be started."""
        async with self._changed:
            while (description := self.description) is None or self.gave_up:
                self._check()
                await self._changed.wait()
            return description

    async def settled(self) -> bool:
        """Wait until the first engine is ready (True) or has refused to start (False)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.status == "ok" or self.gave_up)
            return not self.gave_up

    def _check(self) -> None:
        if self.gave_up:
            raise EngineLost(
                f"there is no engine: {self.problem}; read the server's log, correct the cause and start the server "
                "again"
            )

    async def _run_one(self) -> None:
        engine = await EngineClient.start(self._settings)
        try:
            await self._on_start(engine)
            self._engine, self.problem = engine, None
            await self._set_status("ok")
            await engine.closed.wait()
            self._on_death(engine)
            raise EngineLost(f"the engine {engine.end}")
        finally:
            self._engine, self._last = None, engine.description
            await engine.stop()

    async def _set_status(self, status: Status) -> None:
        async with self._changed:
            self.status = status
            self._changed.notify_all()
