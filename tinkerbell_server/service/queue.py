"""Whose turn it is: requests of one model in the order they came, tenants one after the other, and each one's models.

Jobs that spend their time in a sandbox do not take the others' turn: some of them run beside the one that does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinkerbell_core.errors import TinkerbellError, TooManyRequests
from tinkerbell_server.access.tenants import LOCAL
from tinkerbell_server.commands import RunLoss
from tinkerbell_server.engines.framing import AnyCommand

APART = 8
"""The most jobs that run in sandboxes at once."""

APART_OF_TENANT = 4
"""The most of them that may be one tenant's."""

Lane = tuple[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One thing to do on the engine. command: made when the turn has come, so that it sees what earlier jobs left.

    started, done, failed: called once each at most; done takes the Result in msgpack.
    """

    id: str
    kind: str
    tenant: str = LOCAL
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

    @property
    def uploaded(self) -> bool:
        """Whether it runs a loss that somebody uploaded."""
        if self.kind == "register_custom_loss":
            return True
        if self.kind not in ("forward", "forward_backward"):
            return False
        command = self.command()
        return isinstance(command, RunLoss) and any(
            loss.startswith("upload:") for loss in (command.loss, *command.weights)
        )

    @property
    def lane(self) -> Lane:
        """Jobs of one lane run one after the other: those of a model, or of an upload's name."""
        return ("upload", self.id) if self.kind == "register_custom_loss" else ("model", self.model_id)


class FairQueue:
    """The queue. One job has the turn, or several samples as one; some run apart. Each is counted until `over`."""

    def __init__(self, *, sandboxed: bool = False) -> None:
        """sandboxed: uploaded losses run elsewhere, so that jobs with one run apart."""
        self._queues: dict[Lane, deque[Job]] = {}
        # by tenant, whose turn is next first; so many models are no larger share than one
        self._rings: dict[str, deque[Lane]] = {}
        # whose ring a lane is in; that of samples of the base model has jobs of several tenants
        self._owners: dict[Lane, str] = {}
        self._changed = asyncio.Event()
        self._sandboxed = sandboxed
        self.running: list[Job] = []

    def apart(self, job: Job) -> bool:
        return self._sandboxed and job.uploaded

    def check_room(self, tenant: str, limit: int) -> None:
        """Raise TooManyRequests where the queue is full, or half full with this tenant's own jobs."""
        waiting = [job.tenant for queue in self._queues.values() for job in queue]
        if len(waiting) >= limit:
            raise TooManyRequests(
                f"the queue is full: {len(waiting)} requests wait for the engine; try again later", retry_after=5.0
            )
        own = waiting.count(tenant)
        if own >= limit // 2:
            raise TooManyRequests(
                f"you have {own} requests waiting for the engine, which is the most here: wait for some to end, "
                "then send more",
                retry_after=5.0,
            )

    def put(self, job: Job) -> None:
        if job.lane not in self._queues:
            self._queues[job.lane] = deque()
            self._owners[job.lane] = job.tenant
            self._rings.setdefault(job.tenant, deque()).append(job.lane)
        self._queues[job.lane].append(job)
        self._changed.set()

    async def next(self) -> Job:
        """The job whose turn it is, once there is one; it is among `running` from here on."""
        while (lane := self._ready()) is None:
            self._changed.clear()
            await self._changed.wait()
        queue = self._queues[lane]
        job = queue.popleft()
        owner = self._owners[lane]
        ring = self._rings.pop(owner)
        ring.remove(lane)
        if queue:
            ring.append(lane)
        else:
            del self._queues[lane], self._owners[lane]
        if ring:
            self._rings[owner] = ring  # at the end of the others
        self.running.append(job)
        return job

    def beside(self, job: Job, most: int) -> list[Job]:
        """The samples right behind a running sample, in its lane: they run with it from here on."""
        beside: list[Job] = []
        queue = self._queues.get(job.lane)
        while job.kind == "sample" and queue and queue[0].kind == "sample" and len(beside) < most:
            beside.append(queue.popleft())
        if queue is not None and not queue:
            self._forget(job.lane)
        self.running += beside
        return beside

    def over(self, job: Job) -> None:
        """A running job has ended."""
        if job in self.running:
            self.running.remove(job)
            self._changed.set()

    def drain(self) -> list[Job]:
        """Take every job out, running ones first."""
        jobs = [*self.running, *self._queued()]
        self._queues.clear()
        self._rings.clear()
        self._owners.clear()
        self.running.clear()
        return jobs

    def take_out(self, job_id: str) -> bool:
        """Drop a job that has not begun; whether there was one."""
        for lane, queue in self._queues.items():
            for job in queue:
                if job.id == job_id:
                    queue.remove(job)
                    if not queue:
                        self._forget(lane)
                    return True
        return False

    def of_model(self, model_id: str) -> list[Job]:
        """The jobs of one model that have not ended."""
        running = [job for job in self.running if job.model_id == model_id]
        return [*running, *self._queues.get(("model", model_id), ())]

    def creating(self) -> set[str]:
        """Models that are not there yet, perhaps, but will be."""
        return {job.model_id for job in (*self.running, *self._queued()) if job.creates and job.model_id is not None}

    def position(self, job_id: str) -> int | None:
        """How many jobs run before this one, as far as is known now."""
        lengths = [[len(self._queues[lane]) for lane in ring] for ring in self._rings.values()]
        for place, ring in enumerate(self._rings.values()):
            for number, lane in enumerate(ring):
                for ahead, job in enumerate(self._queues[lane]):
                    if job.id == job_id:
                        own = _before(lengths[place], number, ahead)
                        return _before(list(map(sum, lengths)), place, own) + len(self.running)
        return None

    def __len__(self) -> int:
        return sum(map(len, self._queues.values())) + len(self.running)

    def _ready(self) -> Lane | None:
        """The first lane, of the first tenant, whose next job may run now."""
        busy = {job.lane for job in self.running}
        apart = [job for job in self.running if self.apart(job)]
        taken = len(apart) < len(self.running)
        for lane in itertools.chain.from_iterable(self._rings.values()):
            job = self._queues[lane][0]
            if lane in busy:
                continue
            if self.apart(job):
                if len(apart) < APART and sum(other.tenant == job.tenant for other in apart) < APART_OF_TENANT:
                    return lane
            elif not taken:
                return lane
        return None

    def _forget(self, lane: Lane) -> None:
        """A lane has run empty before its turn."""
        owner = self._owners.pop(lane)
        del self._queues[lane]
        self._rings[owner].remove(lane)
        if not self._rings[owner]:
            del self._rings[owner]

    def _queued(self) -> list[Job]:
        return [job for queue in self._queues.values() for job in queue]


def _before(lengths: Sequence[int], place: int, ahead: int) -> int:
    """How many go before what has `ahead` before it in queue `place`, where queues take turns from the first on."""
    others = (min(length, ahead + (index < place)) for index, length in enumerate(lengths) if index != place)
    return ahead + sum(others)
