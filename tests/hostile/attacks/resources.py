"""Attacks that use up time, memory, threads or text, or that end the process."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

Targets = dict[str, Any]


def loops(targets: Targets, logits: Any) -> None:
    while True:
        pass


def sleeps(targets: Targets, logits: Any) -> None:
    time.sleep(3600)


def ignores_signals_and_exceptions(targets: Targets, logits: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1)
        except BaseException:
            continue


def multiplies_forever(targets: Targets, logits: Any) -> None:
    import torch

    x = torch.ones(2000, 2000)
    while True:
        x = x @ x


def takes_all_memory_at_once(targets: Targets, logits: Any) -> str:
    import torch

    return str(torch.ones(1 << 40, dtype=torch.uint8).sum())


def takes_memory_bit_by_bit(targets: Targets, logits: Any) -> None:
    held = []
    while True:
        held.append(bytearray(1 << 28))


def takes_memory_by_mapping(targets: Targets, logits: Any) -> None:
    import mmap

    held = []
    while True:
        held.append(mmap.mmap(-1, 1 << 30))


def recurses(targets: Targets, logits: Any) -> None:
    sys.setrecursionlimit(1 << 30)

    def deeper(n: int) -> int:
        return deeper(n + 1) + 1

    deeper(0)


def starts_threads(targets: Targets, logits: Any) -> None:
    import threading

    while True:
        threading.Thread(target=time.sleep, args=(3600,)).start()


def starts_a_thread_that_does_not_end(targets: Targets, logits: Any) -> None:
    import threading

    def spin() -> None:
        while True:
            pass

    for _ in range(4):
        threading.Thread(target=spin, daemon=True).start()


def opens_files(targets: Targets, logits: Any) -> None:
    held = []
    while True:
        held.append(open(os.__file__))  # noqa: SIM115


def prints(targets: Targets, logits: Any) -> None:
    line = "x" * (1 << 20)
    for _ in range(64):
        print(line)
        sys.stderr.write(line)


def raises_a_long_message(targets: Targets, logits: Any) -> None:
    raise ValueError("x" * (1 << 26))


def raises_with_control_characters(targets: Targets, logits: Any) -> None:
    raise ValueError("\x1b[2J\x1b]0;title\x07\x00\u202e")


def exits(targets: Targets, logits: Any) -> None:
    sys.exit(0)


def exits_at_once(targets: Targets, logits: Any) -> None:
    os._exit(0)


def crashes(targets: Targets, logits: Any) -> None:
    ctypes.string_at(0)


def aborts(targets: Targets, logits: Any) -> None:
    os.abort()


def interrupts(targets: Targets, logits: Any) -> None:
    raise KeyboardInterrupt


def raises_an_error_without_a_text(targets: Targets, logits: Any) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise Odd
