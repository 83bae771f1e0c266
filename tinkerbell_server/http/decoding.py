"""Decodes large request bodies in worker processes, so that the event loop does not wait for them.

A thread would not help: the decoders of JSON, MessagePack and protobuf do not let other threads run. The result of a
worker holds its numbers as bytes, which this process decodes at the speed of a copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import msgspec

from tinkerbell_core.errors import BadData, Problem, TinkerbellError
from tinkerbell_core.tensors import from_numbers
from tinkerbell_core.types import TensorData

LARGE = 1 << 20
"""Bytes of a body from which it is decoded in a worker; smaller ones take less than 20 ms."""

MOST_SCANNED = 16 << 20
"""The most bytes of a body that this process reads in order to find out whether it needs a worker."""

_WORKERS = 2

T = TypeVar("T")


class Decoding:
    """The workers of one server. They are started with the first large body."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """The result of a module's function in a worker. Raises its TinkerbellError."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(_WORKERS, context, initializer=_start, initargs=(os.getpid(),))
        pool = self._pool
        try:
            result = await asyncio.get_running_loop().run_in_executor(pool, _caught, function, *arguments)
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = None
            raise TinkerbellError(
                "the process that decodes large bodies has ended, perhaps because the memory was full: send the "
                "request again, in smaller calls"
            ) from None
        if isinstance(result, Problem):
            raise result.error()
        return result

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Inputs(msgspec.Struct, kw_only=True):
    loss_fn_inputs: dict[str, TensorData | list[TensorData]] | None = None


class _Datum(_Inputs, kw_only=True):
    model_input: TensorData


class _Datums(_Inputs, kw_only=True):
    data: list[_Datum]


class _Tokens(_Inputs, kw_only=True):
    data: list[TensorData]


def is_compact(body: bytes) -> bool:
    """Whether a body in MessagePack is what `compact` would make of it: all its numbers are in tensors.

    This ends at the first list of numbers, so it takes little time for a body of at most MOST_SCANNED bytes.
    """
    if len(body) > MOST_SCANNED:
        return False
    for type_ in (_Datums, _Tokens):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            msgspec.msgpack.decode(body, type=type_)
            return True
    return False


def compact(body: bytes, format_: str) -> bytes:
    """The body in MessagePack, with the numbers of its rows and of its prompt as tensors in bytes.

    Lists that are not numbers stay as they are. Raises msgspec.DecodeError, UnicodeDecodeError or RecursionError for a
    body that is not of the format, which is "json" or "msgpack".
    """
    decode = msgspec.json.decode if format_ == "json" else msgspec.msgpack.decode
    value = decode(body)
    if isinstance(value, dict):
        if isinstance(value.get("data"), list):
            value["data"] = [_compact_row(row) for row in value["data"]]
        if isinstance(value.get("loss_fn_inputs"), dict):
            value["loss_fn_inputs"] = {
                name: [_compact_numbers(entry) for entry in entries] if isinstance(entries, list) else entries
                for name, entries in value["loss_fn_inputs"].items()
            }
    return msgspec.msgpack.encode(value)


# Any: decoded, not checked yet
def _compact_row(row: Any) -> Any:
    if not isinstance(row, dict):
        return _compact_numbers(row)
    inputs = row.get("loss_fn_inputs")
    if isinstance(inputs, dict):
        row["loss_fn_inputs"] = {name: _compact_numbers(value) for name, value in inputs.items()}
    if "model_input" in row:
        row["model_input"] = _compact_numbers(row["model_input"])
    return row


def _compact_numbers(value: Any) -> Any:
    if not isinstance(value, list) or not value or isinstance(value[0], str | dict):
        return value
    try:
        return from_numbers(value, "a list")
    except BadData:  # the API process refuses it, with the name of the row
        return value


def _caught(function: Callable[..., T], *arguments: object) -> T | Problem:
    # an exception of this project cannot be pickled with all of its attributes
    try:
        return function(*arguments)
    except TinkerbellError as error:
        return Problem.of(error)


def _start(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal reaches every process; the API ends this one
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
