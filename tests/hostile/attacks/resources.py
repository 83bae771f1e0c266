"""Taking all the time, memory, threads or room for text there is, and dying in the middle."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

Where = dict[str, Any]


def loops(where: Where, logits: Any) -> None:
    while True:
        pass


def sleeps(where: Where, logits: Any) -> None:
    time.sleep(3600)


def loops_whatever_is_raised(where: Where, logits: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1)
        except BaseException:
            continue


def multiplies_for_ever(where: Where, logits: Any) -> None:
    import torch

    x = torch.ones(2000, 2000)
    while True:
        x = x @ x


def takes_all_memory_at_once(where: Where, logits: Any) -> str:
    import torch

    return str(torch.ones(1 << 40, dtype=torch.uint8).sum())


def takes_memory_bit_by_bit(where: Where, logits: Any) -> None:
    held = []
    while True:
        held.append(bytearray(1 << 28))


def takes_memory_by_mapping(where: Where, logits: Any) -> None:
    import mmap

    held = []
    while True:
        held.append(mmap.mmap(-1, 1 << 30))


def recurses(where: Where, logits: Any) -> None:
    sys.setrecursionlimit(1 << 30)

    def deeper(n: int) -> int:
        return deeper(n + 1) + 1

    deeper(0)


def starts_threads(where: Where, logits: Any) -> None:
    import threading

    while True:
        threading.Thread(target=time.sleep, args=(3600,)).start()


def leaves_a_thread_behind(where: Where, logits: Any) -> None:
    import threading

    def spin() -> None:
        while True:
            pass

    for _ in range(4):
        threading.Thread(target=spin, daemon=True).start()


def opens_files(where: Where, logits: Any) -> None:
    held = []
    while True:
        held.append(open(os.__file__))  # noqa: SIM115


def prints(where: Where, logits: Any) -> None:
    line = "x" * (1 << 20)
    for _ in range(64):
        print(line)
        sys.stderr.write(line)


def raises_at_length(where: Where, logits: Any) -> None:
    raise ValueError("x" * (1 << 26))


def raises_with_control_characters(where: Where, logits: Any) -> None:
    raise ValueError("\x1b[2J\x1b]0;title\x07\x00\u202e")


def exits(where: Where, logits: Any) -> None:
    sys.exit(0)


def exits_at_once(where: Where, logits: Any) -> None:
    os._exit(0)


def crashes(where: Where, logits: Any) -> None:
    ctypes.string_at(0)


def aborts(where: Where, logits: Any) -> None:
    os.abort()


def interrupts(where: Where, logits: Any) -> None:
    raise KeyboardInterrupt


def raises_what_cannot_be_shown(where: Where, logits: Any) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    raise Odd
