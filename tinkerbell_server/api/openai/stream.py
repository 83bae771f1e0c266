"""The events of a stream: one for each piece of a sample, as soon as it is drawn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.commands import SamplePiece

log = logging.getLogger("tinkerbell.server")

Json = dict[str, Any]  # Any: JSON values of several types

OnPiece = Callable[[int, SamplePiece], None]
"""Takes the number of a prompt and a piece of one of its samples."""


class Pieces:
    """The pieces of the samples that `draw` draws, in the order in which they are drawn.

    Iterate with `async for`; afterwards `output` is the result of `draw`. If the iteration is ended early, so are the
    samples. draw: gets the function that takes the pieces.
    """

    def __init__(self, draw: Callable[[OnPiece], Awaitable[Any]]) -> None:  # Any: the result of draw
        self._arrived: asyncio.Queue[tuple[int, SamplePiece] | None] = asyncio.Queue()
        self._drawing = asyncio.ensure_future(draw(lambda prompt, piece: self._arrived.put_nowait((prompt, piece))))
        self._drawing.add_done_callback(lambda _: self._arrived.put_nowait(None))
        self.output: Any = None

    async def __aiter__(self) -> AsyncIterator[tuple[int, SamplePiece]]:
        try:
            while (arrived := await self._arrived.get()) is not None:
                yield arrived
            self.output = await self._drawing
        finally:
            self._drawing.cancel()


async def started(chunks: AsyncIterator[Json]) -> AsyncIterator[Json]:
    """The same chunks, once there is a first one; an error before it is raised here, so that it has its status."""
    first = await anext(chunks, None)

    async def all_chunks() -> AsyncIterator[Json]:
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk

    return all_chunks()


async def events(chunks: AsyncIterator[Json], describe: Callable[[TinkerbellError], Json]) -> AsyncIterator[bytes]:
    """The lines of a stream of server-sent events. describe: the event of an error after the first chunk."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except TinkerbellError as error:
        yield _event(describe(error))
    except Exception:  # the status was sent already, so that the handlers of exceptions cannot answer
        log.exception("a stream failed")
        yield _event(describe(TinkerbellError("internal error, see the server's log")))
    yield b"data: [DONE]\n\n"


def _event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def chunks_of(answer: Json) -> list[Json]:
    """A complete answer as chunks: the text of each choice, then its finish reason; the usage last."""
    chat = answer["object"] == "chat.completion"
    head = head_of(answer["id"], answer["created"], answer["model"], chat=chat)
    found = []
    for choice in answer["choices"]:
        text = choice["message"]["content"] if chat else choice["text"]
        found += [
            {**head, "choices": [piece_of(choice["index"], text, choice["logprobs"], chat=chat, first=True)]},
            {**head, "choices": [end_of(choice["index"], choice["finish_reason"], chat=chat)]},
        ]
    return [*found, {**head, "choices": [], "usage": answer["usage"]}]


def head_of(id: str, created: int, model: str, *, chat: bool) -> Json:
    """The fields that every chunk of a stream has."""
    return {
        "id": id,
        "created": created,
        "model": model,
        "object": "chat.completion.chunk" if chat else "text_completion",
    }


# Any: JSON values of several types
def piece_of(index: int, text: str, logprobs: Any, *, chat: bool, first: bool) -> Json:
    """The choice of a chunk with a piece of text. first: it is the first of its sample."""
    common = {"index": index, "logprobs": logprobs, "finish_reason": None}
    if chat:
        return {**common, "delta": {"role": "assistant", "content": text} if first else {"content": text}}
    return {**common, "text": text}


def end_of(index: int, finish_reason: str, *, chat: bool) -> Json:
    """The choice of the chunk that ends a sample."""
    ended: Json = {"index": index, "logprobs": None, "finish_reason": finish_reason}
    return {**ended, "delta": {}} if chat else {**ended, "text": ""}
