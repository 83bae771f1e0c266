"""Requests of one run in the order of their seq_id, whatever order they arrive in. Knows only numbers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_core.types import ForwardOutput
from tinkerbell_server.api.tinker import encode
from tinkerbell_server.api.tinker.chunks import MISSING, SEVERAL, TORN, Chunk, calls_of, forward_request
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Run
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.engines.framing import AnyCommand
from tinkerbell_server.service.intake import Request

log = logging.getLogger("tinkerbell.server")

GAP_SECONDS = 30.0
"""How long requests wait for one that is missing before them, from the last arrival on."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Released(Generic[T]):
    """Consecutive requests whose turn has come in one go. after_gap: the one before them never came.

    held: those that still wait for another.
    """

    ready: list[T]
    after_gap: bool
    held: list[T]


@dataclass(slots=True)
class SequenceBuffer(Generic[T]):
    """The requests of one run. release: takes those whose turn has come.

    A client sends the first chunk of a call last, so that its arrival releases them together.
    """

    name: str
    next: int
    release: Callable[[Released[T]], None]
    _held: dict[int, T] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def late(self, seq: int) -> bool:
        """Whether its turn is over: it was given up after a gap, or it was never sent to this server."""
        return seq < self.next or seq in self._held

    def arrive(self, seq: int, item: T) -> None:
        self._held[seq] = item
        self._flush()

    def close(self) -> None:
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
        log.warning("%s: seq_id %d did not arrive in %g s; going on with %d", self.name, self.next, GAP_SECONDS, first)
        self.next = first
        self._flush(after_gap=True)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in its line. start: queues it, or fails its future. call: of a loss that couples its rows."""

    request_id: str
    start: Callable[[], None]
    call: Chunk | None = None


class Sequencer:
    """Every run's line."""

    def __init__(self, requests: TinkerRequests) -> None:
        self._requests = requests
        self._sequencer: dict[str, SequenceBuffer[Waiting]] = {}

    def close(self) -> None:
        for line in self._sequencer.values():
            line.close()

    def take(
        self,
        run: Run,
        seq: int | None,
        kind: str,
        body: bytes,
        start: Callable[[str], None],
        chunk: Chunk | None = None,
        **details: object,
    ) -> str:
        """Take a request in, or know it again; its id. start: given the id when its turn has come, which may raise.

        Raises BadRequest where its number is none or was used, TooManyRequests where the queue is full.
        """
        key = f"{run.id}/{seq}"
        if seq is None:
            key = f"{run.id}/at/{time.time_ns()}"
        elif seq < 1:
            raise BadRequest(f"seq_id is {seq}, but requests of a model are numbered from 1")
        repeated = self._requests.repeated(run.tenant, key, kind, body)
        if repeated is not None:
            return repeated
        self._check_turn(run, seq)
        request_id = self._requests.accept(run.tenant, kind, key, body, parent=run.id, **details)
        self._wait(run, seq, Waiting(request_id, lambda: self._guarded(request_id, start), chunk))
        return request_id

    def pass_over(self, tenant: str, model_id: str, seq: int | None) -> None:
        """A request was refused before it was accepted: those behind it need not wait for it."""
        run = self._requests.store.get(Run, model_id, tenant)
        if run is None or run.ended or seq is None or seq < 1:
            return
        if not self._line(run).late(seq):
            self._wait(run, seq, Waiting("", lambda: None))

    def command(self, tenant: str, request: Request, kind: str, engine: EngineDescription) -> Callable[[], AnyCommand]:
        """What the engine is to do for a request. Raises what is wrong with it, and once what its model has lost."""
        command = self._requests.command(tenant, request, kind, engine)
        self._requests.service.admission.tell_notice(request, engine)
        return command

    def _guarded(self, request_id: str, start: Callable[[str], None]) -> None:
        try:
            start(request_id)
        except TinkerbellError as error:
            self._requests.fail(request_id, error)

    def _line(self, run: Run) -> SequenceBuffer[Waiting]:
        if run.id not in self._sequencer:
            self._sequencer[run.id] = SequenceBuffer(run.id, run.next_seq, self._release)
        return self._sequencer[run.id]

    def _check_turn(self, run: Run, seq: int | None) -> None:
        line = self._line(run)
        if seq is not None and line.late(seq):
            raise BadRequest(
                f"seq_id {seq} of model {run.id!r} comes too late: the model is at {line.next} already "
                "(a request that does not arrive is given up after a while)"
            )

    def _wait(self, run: Run, seq: int | None, waiting: Waiting) -> None:
        if seq is None:
            waiting.start()
            return
        line = self._line(run)
        before = line.next
        line.arrive(seq, waiting)
        if line.next != before:
            self._requests.touch(run.id, next_seq=line.next)

    def _release(self, released: Released[Waiting]) -> None:
        ready = released.ready
        while ready:
            first = ready[0].call
            if first is None:
                ready[0].start()
                ready = ready[1:]
                continue
            count = 1
            while count < len(ready) and first.continues(ready[count].call):
                count += 1
            behind = released.ready[0] is not ready[0]
            doubt = SEVERAL if behind and count > 1 else MISSING if released.after_gap and not behind else None
            if count == len(ready) and any(first.continues(held.call) for held in released.held):
                doubt = doubt or TORN
            self._run_calls(ready[:count], doubt)
            ready = ready[count:]

    def _run_calls(self, chunks: list[Waiting], doubt: str | None) -> None:
        """Consecutive chunks of one loss that couples its rows, as the calls they are."""
        try:
            counts = calls_of([chunk.call for chunk in chunks if chunk.call is not None], doubt)
        except BadRequest as error:
            for chunk in chunks:
                self._requests.fail(chunk.request_id, error)
            return
        for count in counts:
            if count == 1:
                chunks[0].start()
            else:
                self._run_joined(chunks[:count])
            chunks = chunks[count:]

    def _run_joined(self, chunks: list[Waiting]) -> None:
        """Chunks of one call of a loss that couples its rows, run as the one call they are."""
        joined = [chunk.call for chunk in chunks if chunk.call is not None]
        calls = [chunk.call for chunk in joined]
        first = chunks[0].request_id

        def finish(result: bytes) -> None:
            output = msgspec.msgpack.decode(result, type=ForwardOutput)
            parts = encode.split(output, [len(call.data) for call in calls])
            for chunk, part in zip(chunks, parts, strict=True):
                self._requests.finish(chunk.request_id, msgspec.msgpack.encode(part))

        def fail(error: TinkerbellError) -> None:
            for chunk in chunks:
                self._requests.fail(chunk.request_id, error)

        try:
            kind = "forward_backward" if calls[0].backward else "forward"
            run = joined[0].run
            request = forward_request(run, calls, joined[0].loss)
            command = self.command(run.tenant, request, kind, joined[0].engine)
        except TinkerbellError as error:
            fail(error)
            return
        self._requests.queue_many(run.tenant, first, kind, request.model_id, command, finish, fail)
