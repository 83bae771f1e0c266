"""The socket that a server listens on."""

from __future__ import annotations

import asyncio
import socket

from tinkerbell_server.config import Settings
from tinkerbell_server.launch import listen


def test_an_answer_in_two_pieces_does_not_wait_for_the_client_to_say_it_has_the_first() -> None:
    async def accepted() -> int:
        options: asyncio.Queue[int] = asyncio.Queue()

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            options.put_nowait(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=listen(Settings(host="127.0.0.1", port=0))) as server:
            _reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            value = await options.get()
            writer.close()
            return value

    assert asyncio.run(accepted())
