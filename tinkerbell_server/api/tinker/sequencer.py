"""Puts the requests of each run in the order of their seq_id, and joins the chunks of calls that the SDK split."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import msgspec

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_core.types import ForwardOutput
from tinkerbell_server.api.tinker import encode
from tinkerbell_server.api.tinker.chunks import MISSING, SEVERAL, TORN, Chunk, calls_of, forward_request
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Run, StoredRequest
from tinkerbell_server.service.intake import Held
from tinkerbell_server.service.submissions import Submission

log = logging.getLogger("tinkerbell.server")

GAP_SECONDS = 30.0
"""How long requests wait for a missing one before them, counted from the last arrival."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Released(Generic[T]):
    """Consecutive requests whose turn has come together. after_gap: the one before them did not arrive in time.

    held: those that still wait for another.
    """

    ready: list[T]
    after_gap: bool
    held: list[T]


@dataclass(slots=True)
class SequenceBuffer(Generic[T]):
    """The requests of one run. release: called with those whose turn has come.

    A client sends the first chunk of a call last, so that its arrival releases all of them together.
    """

    name: str
    next: int
    release: Callable[[Released[T]], None]
    _held: dict[int, T] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def late(self, seq: int) -> bool:
        """Whether this number has had its turn, because its request arrived or because the wait for it ended."""
        return seq < self.next or seq in self._held

    def arrive(self, seq: int, item: T) -> None:
        """Add a request, and release those whose turn has come."""
        self._held[seq] = item
        self._flush()

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self, *, after_gap: bool = False) -> None:
        ready = []
        while self.next in self._held:
            ready.append(self._held.pop(self.next))
            self.next += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            self._timer = asyncio.get_running_loop().call_later(GAP_SECONDS, self._skip)
        if ready:
            held = [self._held[seq] for seq in sorted(self._held)]
            self.release(Released(ready, after_gap, held))

    def _skip(self) -> None:
        first = min(self._held)
        log.warning(
            "%s: seq_id %d did not arrive within %g s; continuing with %d", self.name, self.next, GAP_SECONDS, first
        )
        self.next = first
        self._flush(after_gap=True)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request of a run. held: None for a number whose request was refused. chunk: if its loss couples rows."""

    held: Held | None
    chunk: Chunk | None = None


class Sequencer:
    """The requests of every run."""

    def __init__(self, requests: TinkerRequests) -> None:
        self._requests = requests
        self._buffers: dict[str, SequenceBuffer[Waiting]] = {}

    def close(self) -> None:
        """Cancel all timers."""
        for buffer in self._buffers.values():
            buffer.close()

    async def submit(
        self,
        run: Run,
        seq: int | None,
        submission: Submission,
        body: bytes,
        record: StoredRequest,
        chunk: Chunk | None = None,
    ) -> str:
        """Accept a request, which is queued when its number is next; its qualified id.

        Raises BadRequest for a number below 1 or one that was used, TooManyRequests if the queue is full.
        """
        key = f"{run.id}/{seq}"
        if seq is None:
            key = f"{run.id}/at/{time.time_ns()}"
        elif seq < 1:
            raise BadRequest(f"seq_id is {seq}, but requests of a model are numbered from 1")
        submission = replace(submission, key=key, before_accept=partial(self._check_turn, run, seq))
        return await self._requests.submit(submission, body, record, partial(self._hold, run, seq, chunk))

    def pass_over(self, tenant: str, model_id: str, seq: int | None) -> None:
        """Note that the request of a number was refused, so that those behind it do not wait for it."""
        run = self._requests.store.get(Run, model_id, tenant)
        if run is None or run.ended or seq is None or seq < 1:
            return
        if not self._buffer(run).late(seq):
            self._arrive(run, seq, Waiting(None))

    def _buffer(self, run: Run) -> SequenceBuffer[Waiting]:
        if run.id not in self._buffers:
            self._buffers[run.id] = SequenceBuffer(run.id, run.next_seq, self._release)
        return self._buffers[run.id]

    def _check_turn(self, run: Run, seq: int | None) -> None:
        buffer = self._buffer(run)
        if seq is not None and buffer.late(seq):
            raise BadRequest(
                f"seq_id {seq} of model {run.id!r} arrived too late: the model is at {buffer.next} already "
                f"(the server waits {GAP_SECONDS:g} s for a missing request)"
            )

    def _hold(self, run: Run, seq: int | None, chunk: Chunk | None, held: Held) -> None:
        if seq is None:
            self._requests.service.intake.queue_held([held])
        else:
            self._arrive(run, seq, Waiting(held, chunk))

    def _arrive(self, run: Run, seq: int, waiting: Waiting) -> None:
        buffer = self._buffer(run)
        before = buffer.next
        buffer.arrive(seq, waiting)
        if buffer.next != before:
            self._requests.touch(run.id, next_seq=buffer.next)

    def _release(self, released: Released[Waiting]) -> None:
        ready = released.ready
        while ready:
            first = ready[0].chunk
            if first is None:
                if ready[0].held is not None:
                    self._requests.service.intake.queue_held([ready[0].held])
                ready = ready[1:]
                continue
            count = 1
            while count < len(ready) and first.continues(ready[count].chunk):
                count += 1
            behind = released.ready[0] is not ready[0]
            doubt = SEVERAL if behind and count > 1 else MISSING if released.after_gap and not behind else None
            if count == len(ready) and any(first.continues(held.chunk) for held in released.held):
                doubt = doubt or TORN
            joined = [(one.held, one.chunk) for one in ready[:count] if one.held is not None and one.chunk is not None]
            self._run_calls(joined, doubt)
            ready = ready[count:]

    def _run_calls(self, chunks: list[tuple[Held, Chunk]], doubt: str | None) -> None:
        """Queue consecutive chunks of one loss that couples its rows, grouped into the calls that they are."""
        try:
            for held, _ in chunks:
                if held.submission.problem is not None:
                    raise held.submission.problem
            counts = calls_of([chunk for _, chunk in chunks], doubt)
        except TinkerbellError as error:
            for held, _ in chunks:
                self._requests.service.intake.fail(held, error)
            return
        for count in counts:
            self._run_call(chunks[:count])
            chunks = chunks[count:]

    def _run_call(self, chunks: list[tuple[Held, Chunk]]) -> None:
        """Queue the chunks of one call as one job, whose result is split among them."""
        helds = [held for held, _ in chunks]
        if len(chunks) == 1:
            self._requests.service.intake.queue_held(helds)
            return
        calls = [chunk.call for _, chunk in chunks]
        first = chunks[0][1]

        def split(result: bytes) -> list[bytes]:
            output = msgspec.msgpack.decode(result, type=ForwardOutput)
            return [msgspec.msgpack.encode(part) for part in encode.split(output, [len(call.data) for call in calls])]

        submission = replace(helds[0].submission, content=forward_request(first.run, calls, first.loss))
        self._requests.service.intake.queue_held(helds, submission, split)
