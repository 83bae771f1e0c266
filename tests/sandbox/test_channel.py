"""The channel checks a message before it reads the tensors, and refuses messages that the protocol does not allow."""

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

from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.errors import BadMessage, DeadlineExceeded, printable, reported_error
from tinkerbell_server.sandbox.messages import MAX_TEXT, Done, Failed, FromWorker, LogitsReply, LogitsRequest, ToWorker
from tinkerbell_server.sandbox.shared_memory import Arena, map_tensors, write_tensor

Pair = tuple[Channel[Any], socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, FromWorker), theirs


def frame(message: dict[str, Any], tensors: list[Any]) -> bytes:
    header = msgspec.msgpack.encode([msgspec.Raw(msgspec.msgpack.encode(message)), tensors, False])
    return struct.pack("<I", len(header)) + header


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_received_tensors_equal_those_that_were_sent(pair: Pair, dtype: torch.dtype) -> None:
    channel, theirs = pair
    sent = [torch.arange(6).reshape(2, 3).to(dtype), None, torch.zeros(0, 4)]
    Channel(theirs, ToWorker).send(Done(loss=1.0, diagnostics={}, shared=[]), sent)
    message, received = channel.receive()
    assert message == Done(loss=1.0, diagnostics={}, shared=[])
    assert torch.equal(received[0], sent[0])
    assert received[1] is None
    assert received[2].shape == (0, 4)


def test_the_receiver_cannot_write_or_shrink_shared_memory() -> None:
    ours, theirs = socket.socketpair()
    tensors = [torch.randn(300, 300), None, torch.arange(5)]
    arena = Arena(1 << 20, writable=False)
    Channel(ours, FromWorker).send_shared(LogitsReply(), tensors, arena)
    _, received, fds = Channel(theirs, ToWorker).receive_shared(2)
    assert fds == []
    assert torch.equal(received[0], tensors[0])
    assert torch.equal(received[2], tensors[2])
    received[0].zero_()
    assert torch.equal(arena.view(tensors[0]), tensors[0])
    with pytest.raises(OSError, match="not permitted"):
        write_tensor(arena.fd, torch.zeros(4))
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(arena.fd, 0)
    arena.close()
    ours.close()
    theirs.close()


def test_a_writable_arena_can_be_written_through_its_descriptor() -> None:
    arena = Arena(1 << 12, writable=True)
    write_tensor(arena.fd, torch.arange(4.0))
    assert arena.view(torch.zeros(4)).tolist() == [0, 1, 2, 3]
    assert map_tensors(arena.fd, [(torch.float32, (4,))])[0].tolist() == [0, 1, 2, 3]
    arena.close()


def test_a_descriptor_from_a_worker_is_closed(pair: Pair) -> None:
    channel, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as null:
        Channel(theirs, ToWorker).send(Done(loss=1.0, diagnostics={}, shared=[]), fds=[null.fileno()])
        channel.receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_receiver_does_not_allocate_a_tensor_that_its_check_refuses(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(frame({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": []}, [["float32", [1 << 60]]]))

    def refuse(message: object, infos: object) -> None:
        raise BadMessage("no")

    with pytest.raises(BadMessage, match="no"):
        channel.receive(refuse)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 3) + b"abc",
        frame({"type": "OpenUpload"}, []),
        frame({"type": "Done", "loss": "1", "diagnostics": {}, "shared": []}, []),
        frame({"type": "Done", "loss": 1.0, "diagnostics": {}, "shared": [], "more": 1}, []),
        frame({"type": "UploadOpened"}, [["object", [1]]]),
        frame({"type": "UploadOpened"}, [["float32", [-1]]]),
    ],
)
def test_an_invalid_message_is_refused(pair: Pair, data: bytes) -> None:
    channel, theirs = pair
    theirs.sendall(data)
    with pytest.raises(BadMessage):
        channel.receive(lambda message, infos: None)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", len(data)) + data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((BadMessage, EOFError)):
            Channel[Any](ours, LogitsRequest).receive()


def test_receive_raises_at_the_deadline(pair: Pair) -> None:
    channel, theirs = pair
    channel.deadline = time.monotonic() + 0.1
    theirs.sendall(b"\x10")
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        channel.receive()
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("kind", "raised"), [("EngineLost", "BadLoss"), ("BadHyperparameter", "BadHyperparameter"), ("BadLoss", "BadLoss")]
)
def test_a_worker_can_report_only_errors_of_a_loss(kind: str, raised: str) -> None:
    assert reported_error(Failed(kind=kind, message="x")).kind == raised


def test_text_of_a_worker_is_cut_and_its_control_characters_are_replaced() -> None:
    assert printable("a\x1b[2Jb\n\u202e") == "a\ufffd[2Jb\n\ufffd"
    assert len(printable("x" * 100_000)) == MAX_TEXT
