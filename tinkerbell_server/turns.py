"""Whose turn it is: requests of one model in the order they came, models one after the other."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.engines.wire import AnyCommand


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One thing to do on the engine. command: made when the turn has come, so that it sees what earlier jobs left.

    started, done, failed: called once each at most; done takes the Result in msgpack.
    """

    id: str
    kind: str
    model_id: str | None
    command: Callable[[], AnyCommand]
    started: Callable[[], None]
    done: Callable[[bytes], None]
    failed: Callable[[TinkerbellError], None]
    accepted: float = field(default_factory=time.monotonic)

    @property
    def creates(self) -> bool:
        """Whether a model that is not there will be there afterwards."""
        return self.kind in ("create_model", "forward", "forward_backward")


class Turns:
    """The queue. At most one job runs, or several samples as one; it is counted until `over`."""

    def __init__(self) -> None:
        self._queues: dict[str | None, deque[Job]] = {}
        self._ring: deque[str | None] = deque()
        self._filled = asyncio.Event()
        self.running: Job | None = None
        self._beside: list[Job] = []

    def put(self, job: Job) -> None:
        if job.model_id not in self._queues:
            self._queues[job.model_id] = deque()
            self._ring.append(job.model_id)
        self._queues[job.model_id].append(job)
        self._filled.set()

    async def next(self) -> Job:
        """The job whose turn it is, once there is one; it is `running` from here on."""
        while not self._ring:
            self._filled.clear()
            await self._filled.wait()
        model_id = self._ring.popleft()
        queue = self._queues[model_id]
        self.running = queue.popleft()
        if queue:
            self._ring.append(model_id)
        else:
            del self._queues[model_id]
        return self.running

    def beside(self, job: Job, most: int) -> list[Job]:
        """The samples right behind a running sample, of the same model: they run with it from here on."""
        queue = self._queues.get(job.model_id)
        while job.kind == "sample" and queue and queue[0].kind == "sample" and len(self._beside) < most:
            self._beside.append(queue.popleft())
        if queue is not None and not queue:
            del self._queues[job.model_id]
            self._ring.remove(job.model_id)
        return list(self._beside)

    def over(self, job: Job) -> None:
        """The running job has ended, and what runs with it."""
        if self.running is job:
            self.running = None
            self._beside = []

    def drain(self) -> list[Job]:
        """Take every job out, the running one first."""
        jobs = [] if self.running is None else [self.running, *self._beside]
        self._beside = []
        jobs += [job for queue in self._queues.values() for job in queue]
        self._queues.clear()
        self._ring.clear()
        self.running = None
        return jobs

    def of_model(self, model_id: str) -> list[Job]:
        """The jobs of one model that have not ended."""
        running = [self.running, *self._beside] if self.running and self.running.model_id == model_id else []
        return [*running, *self._queues.get(model_id, ())]

    def creating(self) -> set[str]:
        """Models that are not there yet, perhaps, but will be."""
        jobs = [job for queue in self._queues.values() for job in queue]
        jobs += [] if self.running is None else [self.running]
        return {job.model_id for job in jobs if job.creates and job.model_id is not None}

    def position(self, job_id: str) -> int | None:
        """How many jobs run before this one, as far as is known now."""
        for place, model_id in enumerate(self._ring):
            for ahead, job in enumerate(self._queues[model_id]):
                if job.id == job_id:
                    others = sum(
                        min(len(self._queues[other]), ahead + (index < place))
                        for index, other in enumerate(self._ring)
                        if index != place
                    )
                    return ahead + others + (self.running is not None)
        return None

    def __len__(self) -> int:
        return sum(map(len, self._queues.values())) + (self.running is not None) + len(self._beside)
