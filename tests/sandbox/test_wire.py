"""What comes from a worker is doubted before it is read."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinkerbell_server.sandbox.channel import BadMessage, Channel, Late
from tinkerbell_server.sandbox.messages import Answer, Done, FromWorker, Question, ToWorker
from tinkerbell_server.sandbox.shared_memory import Arena, fill, mapped
from tinkerbell_server.sandbox.trouble import error_of, shown

Pair = tuple[Channel[Any], socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, FromWorker), theirs


def raw(message: dict[str, Any], tensors: list[Any]) -> bytes:
    header = msgspec.msgpack.encode([msgspec.Raw(msgspec.msgpack.encode(message)), tensors, False])
    return struct.pack("<I", len(header)) + header


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_arrive_as_they_were(pair: Pair, dtype: torch.dtype) -> None:
    channel, theirs = pair
    sent = [torch.arange(6).reshape(2, 3).to(dtype), None, torch.zeros(0, 4)]
    Channel(theirs, ToWorker).send(Done(loss=1.0, diagnostics={}, shared=[]), sent)
    message, got = channel.receive()
    assert message == Done(loss=1.0, diagnostics={}, shared=[])
    assert torch.equal(got[0], sent[0])
    assert got[1] is None
    assert got[2].shape == (0, 4)


def test_large_tensors_arrive_through_memory_that_only_the_sender_can_write() -> None:
    ours, theirs = socket.socketpair()
    tensors = [torch.randn(300, 300), None, torch.arange(5)]
    arena = Arena(1 << 20, writable=False)
    Channel(ours, FromWorker).send_shared(Answer(), tensors, arena)
    _, got, fds = Channel(theirs, ToWorker).receive_shared(2)
    assert fds == []
    assert torch.equal(got[0], tensors[0])
    assert torch.equal(got[2], tensors[2])
    got[0].zero_()
    assert torch.equal(arena.view(tensors[0]), tensors[0])
    with pytest.raises(OSError, match="not permitted"):
        fill(arena.fd, torch.zeros(4))
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(arena.fd, 0)
    arena.close()
    ours.close()
    theirs.close()


def test_memory_for_gradients_is_written_by_the_other_side() -> None:
    arena = Arena(1 << 12, writable=True)
    fill(arena.fd, torch.arange(4.0))
    assert arena.view(torch.zeros(4)).tolist() == [0, 1, 2, 3]
    assert mapped(arena.fd, [(torch.float32, (4,))])[0].tolist() == [0, 1, 2, 3]
    arena.close()


def test_a_descriptor_from_a_worker_is_dropped(pair: Pair) -> None:
    channel, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as null:
        Channel(theirs, ToWorker).send(Done(loss=1.0, diagnostics={}, shared=[]), fds=[null.fileno()])
        channel.receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tensor_that_the_receiver_refuses_is_never_read(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(raw({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": []}, [["float32", [1 << 60]]]))

    def refuse(message: object, infos: object) -> None:
        raise BadMessage("no")

    with pytest.raises(BadMessage, match="no"):
        channel.receive(refuse)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 3) + b"abc",
        raw({"type": "Open"}, []),
        raw({"type": "Done", "loss": "1", "diagnostics": {}, "shared": []}, []),
        raw({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": [], "more": 1}, []),
        raw({"type": "Opened"}, [["object", [1]]]),
        raw({"type": "Opened"}, [["float32", [-1]]]),
    ],
)
def test_what_is_no_message_is_refused(pair: Pair, data: bytes) -> None:
    channel, theirs = pair
    theirs.sendall(data)
    with pytest.raises(BadMessage):
        channel.receive(lambda message, infos: None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", len(data)) + data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((BadMessage, EOFError)):
            Channel[Any](ours, Question).receive()


def test_patience_ends(pair: Pair) -> None:
    channel, theirs = pair
    channel.deadline = time.monotonic() + 0.1
    theirs.sendall(b"\x10")
    start = time.monotonic()
    with pytest.raises(Late):
        channel.receive()
    assert time.monotonic() - start < 1


def test_a_worker_may_raise_few_errors_and_only_text_that_can_be_shown() -> None:
    from tinkerbell_server.sandbox.messages import Failed

    assert type(error_of(Failed(kind="EngineLost", message="x"))).__name__ == "BadLoss"
    assert type(error_of(Failed(kind="BadHyperparameter", message="x"))).__name__ == "BadHyperparameter"
    assert shown("a\x1b[2Jb\n\u202e") == "a\ufffd[2Jb\n\ufffd"
    assert len(shown("x" * 100_000)) == 8000
