"""The engine's hold on a zygote and the workers it forks: starts them, times them, kills them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from tinkerbell_core.errors import LossKilled, TinkerbellError
from tinkerbell_server.sandbox.channel import SHARED_FROM, BadMessage, Channel, Check, Late
from tinkerbell_server.sandbox.isolation import bubblewrap, mechanisms
from tinkerbell_server.sandbox.isolation.readable_paths import PROCESSORS, readable
from tinkerbell_server.sandbox.messages import Failed, Fork, Forked, FromWorker, Prove, Proved, Ready
from tinkerbell_server.sandbox.shared_memory import Arena, room
from tinkerbell_server.sandbox.worker import Limits
from tinkerbell_server.sandbox.zygote import bootstrap

log = logging.getLogger("tinkerbell.sandbox")

# large buffers in huge pages: half the time of a loss that takes whole logits goes into page faults
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "sandbox", "THP_MEM_ALLOC_ENABLE": "1"}
"""All that a sandbox is told of the world."""

_START_SECONDS = 60.0
_FORK_SECONDS = 5.0


class NoSandbox(TinkerbellError):
    """This machine cannot confine a loss; the message says what is missing."""

    status = 403


class Sandbox:
    """One zygote, started again when it dies. `mechanisms`: what confines its workers, each tried."""

    def __init__(
        self,
        *,
        hidden: Sequence[str] = (),
        memory: int = 4 << 30,
        threads: int | None = None,
        bubblewrapped: bool = True,
    ) -> None:
        """hidden: directories no loss may read. memory: bytes a worker may have. Raises NoSandbox, without a wait."""
        self._readable = readable(hidden)
        found = mechanisms.examine(self._readable)
        if not mechanisms.enough(found):
            missing = "; ".join(f"{each.name}: {each.found}" for each in found if not each.works)
            raise NoSandbox(f"no uploaded loss can be confined here ({missing})")
        works = [each.name for each in found if each.works and (bubblewrapped or each.name != "bubblewrap")]
        self.mechanisms = tuple(works)
        self._bubblewrapped = "bubblewrap" in works
        self._limits = Limits(
            [*self._readable.files, PROCESSORS, "/dev/null", "/dev/urandom"],
            list(self._readable.names),
            memory,
            threads or torch.get_num_threads(),
        )
        self._outside = [*hidden, "/etc/passwd", "/etc/hostname", "/proc/1/environ"]
        self._lock = threading.Lock()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._channel: Channel[Ready | Forked] | None = None
        self._start()

    def prove(self) -> None:
        """Have a worker try to get out. Raises NoSandbox where it can."""
        with self.worker() as worker:
            message, _ = worker.ask(Prove(outside=self._outside), seconds=_START_SECONDS)
            if isinstance(message, Failed):
                raise NoSandbox(f"a process could not be confined: {message.message}")
            if not isinstance(message, Proved):
                raise NoSandbox("the sandbox could not be tried")
            if message.escapes:
                raise NoSandbox(f"a confined process can still {', '.join(message.escapes)}"[:500])

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """A fresh worker, killed at the end."""
        worker = self.fork()
        try:
            yield worker
        finally:
            worker.kill()

    def fork(self) -> Worker:
        """A fresh worker. Raises TinkerbellError where even a new zygote makes none."""
        with self._lock:
            for attempt in range(2):
                try:
                    return self._fork()
                except (EOFError, OSError, Late, BadMessage) as error:
                    if attempt:
                        raise TinkerbellError(f"no sandbox could be made ({type(error).__name__})") from error
                    log.warning("the sandbox is started again: its first process is gone")
                    self._stop()
                    self._start()
        raise AssertionError

    def close(self) -> None:
        """End every worker and the zygote."""
        with self._lock:
            self._stop()

    def _fork(self) -> Worker:
        assert self._channel is not None
        self._await_ready()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._channel.deadline = time.monotonic() + _FORK_SECONDS
                self._channel.send(Fork(), fds=[theirs.fileno()])
            message, _, fds = self._channel.receive_shared(1)
            if not isinstance(message, Forked) or not fds:
                raise BadMessage("the zygote made no worker")
            return Worker(ours, fds[0])
        except BaseException:
            ours.close()
            raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        limits = msgspec.json.encode(self._limits).decode()
        python = mechanisms.interpreter()
        with theirs:
            program = [*python, "-c", bootstrap(self._readable.imports), str(theirs.fileno()), limits]
            if self._bubblewrapped:
                program = bubblewrap.command([*self._readable.files, python[0]], program, ENVIRONMENT)
            self._zygote = subprocess.Popen(
                program,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        self._channel = Channel(ours, Ready | Forked)
        self._ready = False

    def _await_ready(self) -> None:
        if self._ready:
            return
        assert self._channel is not None
        self._channel.deadline = time.monotonic() + _START_SECONDS
        message, _ = self._channel.receive()
        self._ready = isinstance(message, Ready)

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._zygote is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._zygote.pid, signal.SIGKILL)
            self._zygote.wait()


class Worker:
    """One worker, as the engine sees it: a channel, and a handle to kill it by. Nothing it says is believed."""

    def __init__(self, sock: socket.socket, handle: int) -> None:
        self._channel: Channel[Any] = Channel(sock, FromWorker)  # Any: a union is no type to mypy
        self._handle = handle
        self._dead = False
        self._arenas: dict[str, Arena] = {}

    def ask(
        self,
        message: msgspec.Struct,
        tensors: Sequence[Tensor | None] = (),
        *,
        seconds: float,
        check: Check | None = None,
    ) -> tuple[FromWorker, list[Tensor | None]]:
        """Its answer, with tensors where `check` allows them. Raises Late, LossKilled, BadMessage: then it must die."""
        self.until(time.monotonic() + seconds)
        self.tell(message, tensors)
        return self.hear(check)

    def until(self, deadline: float) -> None:
        """When patience ends, on the monotonic clock, for whatever is sent or awaited next."""
        self._channel.deadline = deadline

    def tell(self, message: msgspec.Struct, tensors: Sequence[Tensor | None] = (), fds: Sequence[int] = ()) -> None:
        """Large tensors, and all that come with fds, go by way of an arena."""
        present = [tensor for tensor in tensors if tensor is not None]
        size = room(present)
        try:
            if fds or size >= SHARED_FROM:
                arena = self.arena(type(message).__name__ + (f" {fds[0]}" if fds else ""), size, writable=False)
                self._channel.send_shared(message, tensors, arena, fds)
            else:
                self._channel.send(message, tensors)
        except OSError:
            raise LossKilled(_LOST) from None

    def arena(self, use: str, size: int, *, writable: bool) -> Arena:
        """Memory shared with this worker alone, the same for each use while it is large enough."""
        arena = self._arenas.get(use)
        if arena is None or arena.size < size:
            if arena is not None:
                arena.close()
            arena = self._arenas[use] = Arena(size, writable=writable)
        return arena

    def give_back(self) -> None:
        """Let go of what is shared with it."""
        while self._arenas:
            self._arenas.popitem()[1].close()

    def hear(self, check: Check | None = None) -> tuple[FromWorker, list[Tensor | None]]:
        try:
            message, tensors = self._channel.receive(check or _no_tensors)
        except (EOFError, OSError):
            raise LossKilled(_LOST) from None
        return message, tensors

    def freeze(self) -> None:
        """Stop it from computing until it is thawed: threads that a loss has left behind take nobody's time."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._dead:
            return
        self._dead = True
        self._signal(signal.SIGKILL)
        self._channel.close()
        os.close(self._handle)
        self.give_back()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)


_LOST = "its process ended without an answer: it crashed, was ended by its own code, or ran out of memory"


def _no_tensors(message: object, tensors: Sequence[object]) -> None:
    if tensors:
        raise BadMessage("tensors that were not asked for")
