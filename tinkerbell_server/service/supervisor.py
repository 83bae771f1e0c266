"""Keeps one engine running: starts it, notices its death, starts it again. Knows nothing of models or requests."""

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
"""Failed starts in a row before the supervisor gives up."""

_STABLE_SECONDS = 10.0


class Supervisor:
    """One engine after the other.

    born: called with each new engine before anybody else may use it; died: when one that was ready is gone.
    """

    def __init__(
        self,
        settings: Settings,
        born: Callable[[EngineClient], Awaitable[None]],
        died: Callable[[EngineClient], None],
    ) -> None:
        self.status: Literal["starting", "ok", "engine_down"] = "starting"
        self.problem: str | None = None
        self.restarts = 0
        self.description: EngineDescription | None = None
        self._settings, self._born, self._died = settings, born, died
        self._engine: EngineClient | None = None
        self._changed = asyncio.Condition()
        self.gave_up = False

    async def run(self) -> None:
        """Until cancelled, or until starting has failed too often."""
        failures = 0
        while failures < ATTEMPTS:
            began = time.monotonic()
            try:
                await self._one_life()
            except EngineRefused as refusal:
                self.problem = refusal.message
                if self.description is None:
                    break
            except EngineLost as lost:
                self.problem = lost.message
            log.error("%s", self.problem)
            failures = 0 if time.monotonic() - began > _STABLE_SECONDS else failures + 1
            self.restarts += 1
            await self._become("engine_down")
            await asyncio.sleep(min(0.1 * 2**failures, 5.0))
        self.gave_up = True
        await self._become("engine_down")
        log.error("the engine is not started again: %s", self.problem)

    async def engine(self) -> EngineClient:
        """The running engine, once there is one. Raises EngineLost when there will be none."""
        async with self._changed:
            while self._engine is None or self._engine.closed.is_set():
                self._check()
                await self._changed.wait()
            return self._engine

    async def described(self) -> EngineDescription:
        """What the engine says of itself, or said before it died. Raises EngineLost when there is none."""
        async with self._changed:
            while self.description is None or self.gave_up:
                self._check()
                await self._changed.wait()
            return self.description

    async def settled(self) -> bool:
        """Wait for the first engine to be ready (True) or refused (False)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.status == "ok" or self.gave_up)
            return not self.gave_up

    def refresh(self, engine: EngineClient) -> None:
        """Take over what the engine said last."""
        self.description = engine.description

    def _check(self) -> None:
        if self.gave_up:
            raise EngineLost(
                f"there is no engine: {self.problem}; see the server's log, put it right and start the server again"
            )

    async def _one_life(self) -> None:
        engine = await EngineClient.start(self._settings)
        try:
            await self._born(engine)
            self.refresh(engine)
            self._engine, self.problem = engine, None
            await self._become("ok")
            await engine.closed.wait()
            self._died(engine)
            raise EngineLost(f"the engine {engine.end}")
        finally:
            self._engine = None
            await engine.stop()

    async def _become(self, status: Literal["starting", "ok", "engine_down"]) -> None:
        async with self._changed:
            self.status = status
            self._changed.notify_all()
