"""Starts and kills the zygote and the workers that it forks, and exchanges messages with them under a deadline."""

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
import psutil
import torch
from torch import Tensor

from tinkerbell_core.errors import LossKilled, TinkerbellError
from tinkerbell_server.sandbox.channel import MIN_SHARED, Channel, CheckTensors
from tinkerbell_server.sandbox.errors import BadMessage, DeadlineExceeded, SandboxUnavailable
from tinkerbell_server.sandbox.isolation import bubblewrap, mechanisms
from tinkerbell_server.sandbox.isolation.readable_paths import PROCESSORS, find_readable_paths
from tinkerbell_server.sandbox.messages import (
    CheckConfinement,
    ConfinementChecked,
    Failed,
    Fork,
    Forked,
    FromWorker,
    Ready,
)
from tinkerbell_server.sandbox.shared_memory import Arena, arena_size
from tinkerbell_server.sandbox.worker import Limits
from tinkerbell_server.sandbox.zygote import bootstrap

log = logging.getLogger("tinkerbell.sandbox")

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "USER": "sandbox",
    # huge pages for large buffers: a loss that stores all logits spends half of its time in page faults without them
    "THP_MEM_ALLOC_ENABLE": "1",
    # no device: with one, autograd starts threads, and its backward pass works in no forked process
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}
"""All environment variables of a sandbox."""

_START_SECONDS = 60.0
_FORK_SECONDS = 5.0


class Sandbox:
    """One zygote, which is started again if it ends. mechanisms: the names of those that confine its workers."""

    def __init__(
        self,
        *,
        hidden: Sequence[str] = (),
        memory: int = 4 << 30,
        threads: int | None = None,
        use_bubblewrap: bool = True,
    ) -> None:
        """Start the zygote, without waiting until it is ready.

        hidden: directories that no loss may read. memory: bytes that a worker may allocate. use_bubblewrap: if False,
        only Landlock and seccomp confine the workers. Raises SandboxUnavailable.
        """
        self._paths = find_readable_paths(hidden)
        if self._paths.exposed:
            raise SandboxUnavailable(self._paths.exposed)
        detected = mechanisms.detect(self._paths)
        if not mechanisms.sufficient(detected):
            missing = "; ".join(f"{each.name}: {each.found}" for each in detected if not each.works)
            raise SandboxUnavailable(f"this machine cannot confine uploaded losses ({missing})")
        for warning in self._paths.warnings:
            log.warning("%s", warning)
        works = [each.name for each in detected if each.works and (use_bubblewrap or each.name != "bubblewrap")]
        self.mechanisms = tuple(works)
        self._use_bubblewrap = "bubblewrap" in works
        # in a mount namespace the hidden directories do not exist, so the directories that contain them may be listed
        unlistable = () if self._use_bubblewrap else self._paths.unlistable
        self._limits = Limits(
            readable=[*self._paths.files, PROCESSORS, "/dev/null", "/dev/urandom"],
            listable=[path for path in self._paths.partial if path not in unlistable],
            unlistable=list(unlistable),
            memory=memory,
            threads=threads or torch.get_num_threads(),
        )
        self._hidden = [*hidden, "/etc/passwd", "/etc/hostname", "/proc/1/environ"]
        self._lock = threading.Lock()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._channel: Channel[Ready | Forked] | None = None
        self._start()

    def check_confinement(self) -> None:
        """Let a worker try to escape. Raises SandboxUnavailable if an attempt succeeds."""
        with self.worker() as worker:
            message, _ = worker.request(CheckConfinement(hidden=self._hidden), seconds=_START_SECONDS)
            if isinstance(message, Failed):
                raise SandboxUnavailable(f"a process could not be confined: {message.message}")
            if not isinstance(message, ConfinementChecked):
                raise SandboxUnavailable("a process sent an invalid reply to the check of its confinement")
            if message.escapes:
                raise SandboxUnavailable(f"a confined process can still {', '.join(message.escapes)}"[:500])

    @contextlib.contextmanager
    def worker(self) -> Iterator[WorkerProcess]:
        """A new worker, which is killed at the end of the context."""
        worker = self.fork()
        try:
            yield worker
        finally:
            worker.kill()

    def fork(self) -> WorkerProcess:
        """A new worker. Raises TinkerbellError if even a new zygote does not fork one."""
        with self._lock:
            for attempt in range(2):
                try:
                    return self._fork()
                except (EOFError, OSError, DeadlineExceeded, BadMessage) as error:
                    if attempt:
                        text = f"the sandbox could not start a process ({type(error).__name__})"
                        raise TinkerbellError("; ".join([text, *self._paths.warnings])) from error
                    log.warning("the zygote of the sandbox has ended (%s); starting a new one", type(error).__name__)
                    self._stop()
                    self._start()
        raise AssertionError

    def close(self) -> None:
        """Kill the zygote and every worker."""
        with self._lock:
            self._stop()

    def _fork(self) -> WorkerProcess:
        assert self._channel is not None
        self._await_ready()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._channel.deadline = time.monotonic() + _FORK_SECONDS
                self._channel.send(Fork(), fds=[theirs.fileno()])
            message, _, fds = self._channel.receive_shared(1)
            if not isinstance(message, Forked) or not fds:
                raise BadMessage("the zygote did not fork a worker")
            return WorkerProcess(ours, fds[0])
        except BaseException:
            ours.close()
            raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        limits = msgspec.json.encode(self._limits).decode()
        python = mechanisms.interpreter()
        with theirs:
            program = [*python, "-c", bootstrap(self._paths.imports), str(theirs.fileno()), limits]
            if self._use_bubblewrap:
                program = bubblewrap.command([*self._paths.files, python[0]], program, ENVIRONMENT)
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
            # under bubblewrap, the process itself has another process group, and does not end by itself if it is frozen
            for process in _descendants(self._zygote.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._zygote.pid, signal.SIGKILL)
            self._zygote.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return found
    return []


class WorkerProcess:
    """The engine's side of one worker: a channel, and a pidfd to signal it. Every message from it is checked.

    After an exception of `request`, `send` or `receive`, the worker must be killed.
    """

    def __init__(self, sock: socket.socket, pidfd: int) -> None:
        self._channel: Channel[Any] = Channel(sock, FromWorker)  # Any: mypy does not accept a union as a type
        self._pidfd = pidfd
        self._killed = False
        self._arenas: dict[str, Arena] = {}

    def request(
        self,
        message: msgspec.Struct,
        tensors: Sequence[Tensor | None] = (),
        *,
        seconds: float,
        check: CheckTensors | None = None,
    ) -> tuple[FromWorker, list[Tensor | None]]:
        """Send a message and receive the reply within `seconds`. Raises DeadlineExceeded, LossKilled, BadMessage.

        check: as in `receive`.
        """
        self.set_deadline(time.monotonic() + seconds)
        self.send(message, tensors)
        return self.receive(check)

    def set_deadline(self, deadline: float) -> None:
        """Set the time, on the monotonic clock, at which `send` and `receive` raise DeadlineExceeded."""
        self._channel.deadline = deadline

    def send(self, message: msgspec.Struct, tensors: Sequence[Tensor | None] = (), fds: Sequence[int] = ()) -> None:
        """Send a message; large tensors, and those sent together with descriptors, in shared memory."""
        present = [tensor for tensor in tensors if tensor is not None]
        size = arena_size(present)
        try:
            if fds or size >= MIN_SHARED:
                arena = self.arena(type(message).__name__ + (f" {fds[0]}" if fds else ""), size, writable=False)
                self._channel.send_shared(message, tensors, arena, fds)
            else:
                self._channel.send(message, tensors)
        except OSError:
            raise LossKilled(_ENDED) from None

    def receive(self, check: CheckTensors | None = None) -> tuple[FromWorker, list[Tensor | None]]:
        """The next message and its tensors. Without `check`, a message with tensors raises BadMessage."""
        try:
            message, tensors = self._channel.receive(check or _refuse_tensors)
        except (EOFError, OSError):
            raise LossKilled(_ENDED) from None
        return message, tensors

    def arena(self, use: str, size: int, *, writable: bool) -> Arena:
        """Memory that is shared with this worker only; the same arena for each `use` while it is large enough."""
        arena = self._arenas.get(use)
        if arena is None or arena.size < size:
            if arena is not None:
                arena.close()
            arena = self._arenas[use] = Arena(size, writable=writable)
        return arena

    def close_arenas(self, keep: int = 0) -> None:
        """Close the arenas, except the first few that were made."""
        while len(self._arenas) > keep:
            self._arenas.popitem()[1].close()

    def pause(self) -> None:
        """Stop the process until `resume`, so that threads that a loss has started use no CPU time between calls."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._killed:
            return
        self._killed = True
        self._signal(signal.SIGKILL)
        self._channel.close()
        os.close(self._pidfd)
        self.close_arenas()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)


_ENDED = "its process ended without a reply: it crashed, exited, or ran out of memory"


def _refuse_tensors(message: object, tensors: Sequence[object]) -> None:
    if tensors:
        raise BadMessage("its message may not have tensors")
