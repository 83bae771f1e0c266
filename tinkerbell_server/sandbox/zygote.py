"""The process that workers are forked from: torch imported once, no environment, nothing else in its hands.

Runs only our own code. `bootstrap` makes the program that starts it; it speaks on the socket it is given, and ends when
the engine's end of it closes.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Sequence

import msgspec

from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.messages import Forked, Ready, ToZygote
from tinkerbell_server.sandbox.worker import Limits, work


def bootstrap(imports: Sequence[str]) -> str:
    """The program of `python -I -S -c PROGRAM FD LIMITS`."""
    return f"import sys; sys.path[:0] = {list(imports)!r}; from tinkerbell_server.sandbox.zygote import main; main()"


def main() -> None:
    import sys

    sock = socket.socket(fileno=int(sys.argv[1]))
    limits = msgspec.json.decode(sys.argv[2], type=Limits)
    tempfile.tempdir = "/tmp"  # there is none; libraries that only name it work all the same
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are buried by the kernel
    _warm_up()
    channel: Channel[ToZygote] = Channel(sock, ToZygote)
    channel.send(Ready())
    while True:
        try:
            _, _, fds = channel.receive_shared(1)
        except (EOFError, ConnectionError):
            os._exit(0)
        _fork(sock, channel, fds[0], limits)


def _fork(control: socket.socket, channel: Channel[ToZygote], fd: int, limits: Limits) -> None:
    pid = os.fork()
    if pid == 0:
        control.close()
        work(socket.socket(fileno=fd), limits)
    os.close(fd)
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        channel.send(Forked(pid=0))
        return
    channel.send(Forked(pid=pid), fds=[handle])
    os.close(handle)


def _warm_up() -> None:
    """Import what losses use, and run torch once, on one thread: threads do not survive a fork."""
    import cloudpickle  # noqa: F401
    import torch
    import torch.distributions

    import tinker_client  # noqa: F401
    from tinkerbell_core.dryrun import dry_run
    from tinkerbell_core.losses.cross_entropy import cross_entropy

    torch.set_num_threads(1)
    dry_run(cross_entropy, vocab_size=16)
