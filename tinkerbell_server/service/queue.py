"""Fair queue of one engine: FIFO per lane (a model), round-robin over tenants, then over each tenant's lanes.

A job has the engine alone for a quantum of time; then other jobs are sent to it, and the engine lets them take turns.
A job that runs an uploaded loss spends its time in a sandbox, so a few of these jobs run beside those that compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from tinkerbell_core.errors import BadRequest, TinkerbellError, TooManyRequests
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.access.tenants import LOCAL
from tinkerbell_server.commands import QUANTUM_SECONDS, AnyCommand, Load, RunLoss, SamplePiece
from tinkerbell_server.service.save_paths import LoadByName, SaveByName

SANDBOXED, SANDBOXED_OF_TENANT = 8, 4
"""The most jobs that run in sandboxes at the same time, and the most of them that may belong to one tenant."""

COMPUTING, COMPUTING_OF_TENANT = 8, 2
"""The same for the lanes whose jobs take turns on the device."""

FIRST_OF_TENANT = 16
"""The most jobs of a kind while each additional job is the first one of its tenant."""

Outcome = bytes | TinkerbellError
"""How a job ends: with its Result in msgpack, or with an error."""


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One command for the engine.

    lane: jobs of one lane run one after the other, in the order in which they came.
    ready: False while the text of the command is being tokenised; the job and those behind it wait.
    on_start, on_end: called at most once each; on_end gets the outcome. on_piece: gets the pieces of a sample that is
    streamed. stop: ends the job while it runs. cancelled: whether its client has cancelled it while it ran.
    started: when it was sent to the engine, on the monotonic clock.
    """

    id: str
    kind: str
    tenant: str = LOCAL
    lane: str
    model_id: str | None
    command: AnyCommand | SaveByName | LoadByName
    on_start: Callable[[], None]
    on_end: Callable[[Outcome], None]
    on_piece: Callable[[SamplePiece], None] | None = None
    stop: Callable[[], None] | None = None
    cancelled: bool = False
    ready: bool = True
    started: float = 0.0
    accepted: float = field(default_factory=time.monotonic)

    @property
    def creates_model(self) -> bool:
        """Whether the model exists after this job, if it does not exist before."""
        if isinstance(self.command, Load):
            return self.command.create is not None
        return self.kind in ("create_model", "forward", "forward_backward")

    @property
    def runs_upload(self) -> bool:
        """Whether the job runs a loss that somebody uploaded."""
        if self.kind == "register_custom_loss":
            return True
        command = self.command
        return isinstance(command, RunLoss) and any(
            loss.startswith("upload:") for loss in (command.loss, *command.weights)
        )


class FairQueue:
    """The jobs of one engine that have not ended. A few of them run; several samples of one lane run as one.

    sandboxed: uploaded losses run in another process, so jobs that run one may overlap.
    """

    def __init__(self, *, sandboxed: bool = False) -> None:
        self._lanes: dict[str, deque[Job]] = {}
        # the lanes of each tenant; the tenant and the lane that come next are first
        self._rings: dict[str, deque[str]] = {}
        # the tenant whose ring holds a lane; the lane of the base model's samples has jobs of several tenants
        self._owners: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._sandboxed = sandboxed
        self.running: list[Job] = []

    def overlaps(self, job: Job) -> bool:
        """Whether the job runs in a sandbox, beside the job that computes."""
        return self._sandboxed and job.runs_upload

    def check_room(self, tenant: str, limit: int) -> None:
        """Raise TooManyRequests if the queue is full, or half full with the jobs of this tenant."""
        waiting = [job.tenant for job in self._waiting()]
        if len(waiting) >= limit:
            raise TooManyRequests(
                f"the queue is full: {len(waiting)} requests wait for the engine; try again later "
                "(see docs/operators.md#limits)",
                retry_after=5.0,
            )
        own = waiting.count(tenant)
        if own >= limit // 2:
            raise TooManyRequests(
                f"you have {own} requests waiting for the engine, and {limit // 2} is the limit for one tenant: wait "
                "until some of them end, then send more (see docs/operators.md#limits)",
                retry_after=5.0,
            )

    def put(self, job: Job) -> None:
        """Add a job at the end of its lane."""
        if job.lane not in self._lanes:
            self._lanes[job.lane] = deque()
            self._owners[job.lane] = job.tenant
            self._rings.setdefault(job.tenant, deque()).append(job.lane)
        self._lanes[job.lane].append(job)
        self._changed.set()

    def complete(self, job: Job, command: AnyCommand) -> None:
        """Give a job that was not ready its command."""
        job.command, job.ready = command, True
        self._changed.set()

    async def next(self) -> Job:
        """The next job that may run, as soon as there is one; from then on it is in `running`."""
        while (lane := self._next_lane()) is None:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._seconds_alone())
        queue = self._lanes[lane]
        job = queue.popleft()
        owner = self._owners[lane]
        ring = self._rings.pop(owner)
        ring.remove(lane)
        if queue:
            ring.append(lane)
        else:
            del self._lanes[lane], self._owners[lane]
        if ring:
            self._rings[owner] = ring  # behind the other tenants
        job.started = time.monotonic()
        self.running.append(job)
        return job

    def samples_behind(self, job: Job, limit: int) -> list[Job]:
        """Take the samples that directly follow a running sample in its lane; they run together with it."""
        found: list[Job] = []
        queue = self._lanes.get(job.lane)
        while job.kind == "sample" and queue and queue[0].kind == "sample" and queue[0].ready and len(found) < limit:
            found.append(queue.popleft())
            found[-1].started = job.started
        if queue is not None and not queue:
            self._drop_lane(job.lane)
        self.running += found
        return found

    def remove_running(self, job: Job) -> None:
        """Note that a running job has ended."""
        if job in self.running:
            self.running.remove(job)
            self._changed.set()

    def drain(self) -> list[Job]:
        """Remove every job, the running ones first."""
        jobs = [*self.running, *self._waiting()]
        self._lanes.clear()
        self._rings.clear()
        self._owners.clear()
        self.running.clear()
        return jobs

    def remove_waiting(self, job_id: str) -> Job | None:
        """Remove and return a job that has not started; None if there is none with this id."""
        for lane, queue in self._lanes.items():
            for job in queue:
                if job.id == job_id:
                    queue.remove(job)
                    if not queue:
                        self._drop_lane(lane)
                    self._changed.set()
                    return job
        return None

    def cancel(self, job: Job) -> None:
        """End a job with an error: at once if it waits, else when its next work item is done.

        A job that has ended, or whose command cannot be stopped, stays as it is.
        """
        if job in self.running:
            job.cancelled = True
            if job.stop is not None:
                job.stop()
        elif self.remove_waiting(job.id) is not None:
            job.on_end(BadRequest("this request was cancelled by its client before it was run"))

    def find(self, job_id: str) -> Job | None:
        """The job of this id, if it has not ended."""
        return next((job for job in (*self.running, *self._waiting()) if job.id == job_id), None)

    def samples_from(self, path: str) -> bool:
        """Whether a job that has not ended draws samples from a saved folder."""
        return any(getattr(job.command, "path", None) == path for job in (*self.running, *self._waiting()))

    def of_model(self, model_id: str) -> list[Job]:
        """The jobs of one model that have not ended."""
        return [job for job in (*self.running, *self._waiting()) if job.model_id == model_id]

    def creating(self) -> set[str]:
        """The models that queued and running jobs create."""
        return {model.model_id for model in self.new_models()}

    def new_models(self) -> list[CreateModelRequest]:
        """The models that queued and running jobs create if they do not exist."""
        found: dict[str, CreateModelRequest] = {}
        for job in (*self.running, *self._waiting()):
            if job.creates_model and job.model_id is not None:
                spec = getattr(job.command, "spec", None) or getattr(job.command, "create", None)
                found.setdefault(job.model_id, spec or CreateModelRequest(model_id=job.model_id))
        return list(found.values())

    def position(self, job_id: str) -> int | None:
        """How many jobs run before this one, as far as is known now; None for a job that does not wait."""
        lengths = [[len(self._lanes[lane]) for lane in ring] for ring in self._rings.values()]
        for place, ring in enumerate(self._rings.values()):
            for number, lane in enumerate(ring):
                for ahead, job in enumerate(self._lanes[lane]):
                    if job.id == job_id:
                        own = _served_before(lengths[place], number, ahead)
                        return _served_before(list(map(sum, lengths)), place, own) + len(self.running)
        return None

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values())) + len(self.running)

    def _next_lane(self) -> str | None:
        """The first lane, of the first tenant, whose next job may run now."""
        busy = {job.lane for job in self.running}
        overlapping = [job for job in self.running if self.overlaps(job)]
        computing = {job.lane: job for job in self.running if not self.overlaps(job)}
        has_company = self._seconds_alone() is None
        for lane in itertools.chain.from_iterable(self._rings.values()):
            job = self._lanes[lane][0]
            if lane in busy or not job.ready:
                continue
            if self.overlaps(job):
                if _has_place(job, overlapping, SANDBOXED, SANDBOXED_OF_TENANT):
                    return lane
            elif has_company and _has_place(job, computing.values(), COMPUTING, COMPUTING_OF_TENANT):
                return lane
        return None

    def _seconds_alone(self) -> float | None:
        """How long the job that was sent last to compute has the engine alone; None if others may be sent."""
        newest = max((job.started for job in self.running if not self.overlaps(job)), default=None)
        if newest is None:
            return None
        left = newest + QUANTUM_SECONDS - time.monotonic()
        return left if left > 0 else None

    def _drop_lane(self, lane: str) -> None:
        owner = self._owners.pop(lane)
        del self._lanes[lane]
        self._rings[owner].remove(lane)
        if not self._rings[owner]:
            del self._rings[owner]

    def _waiting(self) -> list[Job]:
        return [job for queue in self._lanes.values() for job in queue]


def _has_place(job: Job, others: Collection[Job], most: int, most_of_tenant: int) -> bool:
    """Whether a job may run beside the others of its kind. A place is kept for a tenant that has none."""
    own = sum(other.tenant == job.tenant for other in others)
    if own == 0:
        return len(others) < max(most, FIRST_OF_TENANT)
    return own < most_of_tenant and len(others) < most


def _served_before(lengths: Sequence[int], place: int, ahead: int) -> int:
    """How many items round-robin serves before the item that has `ahead` items before it in queue `place`."""
    others = (min(length, ahead + (index < place)) for index, length in enumerate(lengths) if index != place)
    return ahead + sum(others)
