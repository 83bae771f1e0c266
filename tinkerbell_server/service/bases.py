"""The base models of a server: each with its engine process, its tokenizer process and its queue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.tokenizer.client import TokenizerClient
from tinkerbell_server.service.queue import FairQueue
from tinkerbell_server.service.save_paths import SavePaths
from tinkerbell_server.service.scheduler import Scheduler
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.supervisor import Supervisor


@dataclass(slots=True)
class Base:
    """One base model. name: as it was typed; its digest is in the engine's description."""

    name: str
    supervisor: Supervisor
    queue: FairQueue
    scheduler: Scheduler
    tokenizer: TokenizerClient
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Start the engine and run the queue."""
        self.tasks = [
            asyncio.create_task(self.supervisor.run()),
            asyncio.create_task(self.scheduler.run(self.supervisor)),
            asyncio.create_task(self._start_tokenizer()),
        ]

    async def stop(self) -> None:
        """End both processes."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.tokenizer.stop()

    async def _start_tokenizer(self) -> None:
        # after the engine: it creates the folder of the embedded model, and a base that it refuses needs no tokenizer
        if await self.supervisor.settled():
            await self.tokenizer.start(await self.supervisor.described())


class Bases:
    """Every base of one server, by name. There is one today."""

    def __init__(self, settings: Settings, store: Store, saves: SavePaths) -> None:
        name = settings.model or "embedded"
        queue = FairQueue(sandboxed=settings.uploads == "sandboxed")
        scheduler = Scheduler(store, queue, saves, uploads=settings.uploads != "off")
        supervisor = Supervisor(settings, scheduler.restore, scheduler.engine_died)
        self._bases = {name: Base(name, supervisor, queue, scheduler, TokenizerClient(settings))}
        self.default = self._bases[name]

    def __iter__(self) -> Iterator[Base]:
        return iter(self._bases.values())

    def named(self, name: str | None) -> Base:
        """The base of this name; None: the default one. Raises BadRequest for a base that is not served."""
        if name is None:
            return self.default
        if name not in self._bases:
            raise BadRequest(f"this server has no base {name[:160]!r} (it has: {', '.join(self._bases)})")
        return self._bases[name]

    def start(self) -> None:
        """Start every base."""
        for base in self._bases.values():
            base.start()

    async def stop(self) -> None:
        """Stop every base."""
        await asyncio.gather(*(base.stop() for base in self._bases.values()))
