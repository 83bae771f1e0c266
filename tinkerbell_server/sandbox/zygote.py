"""The process that workers are forked from. It has imported torch, and has no environment and no file but its socket.

It runs only code of this project. It ends when the engine closes the socket.
"""

from __future__ import annotations

import importlib.machinery
import os
import signal
import socket
import tempfile
from collections.abc import Sequence

import msgspec

from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.messages import Forked, Ready, ToZygote
from tinkerbell_server.sandbox.worker import Limits, run_worker


def bootstrap(imports: Sequence[str]) -> str:
    """The program of `python -I -S -c PROGRAM FD LIMITS`. imports: its sys.path in front of the standard library."""
    return f"import sys; sys.path[:0] = {list(imports)!r}; from tinkerbell_server.sandbox.zygote import main; main()"


def main() -> None:
    import sys

    sock = socket.socket(fileno=int(sys.argv[1]))
    limits = msgspec.json.decode(sys.argv[2], type=Limits)
    # it need not exist: some libraries only need the name, and the search for a directory would fail
    tempfile.tempdir = "/tmp"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes ended workers
    _warm_up(limits)
    channel: Channel[ToZygote] = Channel(sock, ToZygote)
    try:
        channel.send(Ready())
        while True:
            _, _, fds = channel.receive_shared(1)
            _fork(sock, channel, fds[0], limits)
    except (EOFError, ConnectionError):  # the engine has ended
        os._exit(0)


def _fork(control: socket.socket, channel: Channel[ToZygote], fd: int, limits: Limits) -> None:
    pid = os.fork()
    if pid == 0:
        control.close()
        run_worker(socket.socket(fileno=fd), limits)
    os.close(fd)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        channel.send(Forked(pid=0))
        return
    channel.send(Forked(pid=pid), fds=[pidfd])
    os.close(pidfd)


def _warm_up(limits: Limits) -> None:
    """Import what losses use, and run torch once, on one thread because threads do not survive a fork."""
    import cloudpickle  # noqa: F401
    import torch
    import torch.distributions

    import tinker_client  # noqa: F401
    from tinkerbell_core.dryrun import dry_run
    from tinkerbell_core.losses.cross_entropy import cross_entropy

    torch.set_num_threads(1)
    if not torch.accelerator.is_available():  # else the backward pass would start threads for the device
        dry_run(cross_entropy, vocab_size=16)
    for directory in limits.unlistable:
        # the import system lists a directory once and keeps the names, so a worker can still import from it
        importlib.machinery.PathFinder.find_spec("tinkerbell_absent_module", [directory])
