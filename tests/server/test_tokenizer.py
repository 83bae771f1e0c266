"""The tokenizer process, with the tokenizer of the tiny model and with a fake one that crashes on purpose."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from tests.fake_engine import FAKE_ENGINE
from tinkerbell_core.errors import BadCheckpoint, BadData, BadRequest, EngineLost, TinkerbellError
from tinkerbell_core.spec import Provenance
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.calls.prompts import prompt_ids
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.calls.text import rows_from_text
from tinkerbell_server.calls.vocabulary import Piece
from tinkerbell_server.commands import EngineDescription, TextData
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.tokenizer.client import TokenizerClient
from tinkerbell_server.engines.torch.tiny_model import write_tokenizer

pytestmark = pytest.mark.anyio

VOCAB, LENGTH = 261, 2048

LOSS = LossDescription(
    id="tinkerbell-core:cross_entropy",
    name="cross_entropy",
    summary="",
    inputs=("target_tokens",),
    optional_inputs=("weights",),
    hyperparameters=(),
    coupling="sequence",
    group_size=1,
    finite=(),
    provenance=Provenance(),
    digest="",
)

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALLS: list[list[Any]] = [
    ["abc", "ünï"],
    [CHAT, [*CHAT, {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]],
    [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}],
]
PROMPTS: list[str | list[dict[str, str]]] = ["abc", CHAT[:1]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that contains only a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@asynccontextmanager
async def running(vocab_size: int = VOCAB, max_length: int = LENGTH, **settings: Any) -> AsyncIterator[TokenizerClient]:
    client = TokenizerClient(Settings(**settings))
    await client.start(
        EngineDescription(
            engine="test",
            base_model="test",
            vocab_size=vocab_size,
            max_length=max_length,
            device="cpu",
            dtype="float32",
            losses=[],
            plugins=[],
            has_chat_template=True,
        )
    )
    try:
        yield client
    finally:
        await client.stop()


def parsed(data: list[Any], max_length: int = LENGTH) -> TextData:
    text = parse_call(data, None, LOSS, vocab_size=VOCAB, max_length=max_length)
    assert isinstance(text, TextData)
    return text


async def kill_process(client: TokenizerClient) -> None:
    """Wait until the process has started, and kill it."""
    while client.pid is None:
        await asyncio.sleep(0.01)
    os.kill(client.pid, signal.SIGKILL)


async def test_rows_and_prompts_equal_those_of_this_process(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    async with running(model=str(folder)) as client:
        for data in CALLS:
            text = parsed(data)
            expected = rows_from_text(text, tokenizer, LOSS, vocab_size=VOCAB, max_length=LENGTH)
            assert await client.rows(text, LOSS) == expected
        for prompt in map(TextPrompt, PROMPTS):
            assert await client.prompt(prompt) == prompt_ids(prompt, tokenizer, vocab_size=VOCAB, max_length=LENGTH)


async def test_the_setting_chat_tokens_determines_which_tokens_count() -> None:
    for chat_tokens in ("assistant", "all"):
        async with running(engine=FAKE_ENGINE, chat_tokens=chat_tokens) as client:
            (row,) = await client.rows(parsed([CHAT]), LOSS)
            assert to_numpy(row.inputs["weights"]).all() == (chat_tokens == "all")


async def test_an_error_names_the_row() -> None:
    async with running(engine=FAKE_ENGINE, max_length=8) as client:
        with pytest.raises(BadData, match=r"data\[1\] has 9 tokens, but the model takes 8 at most"):
            await client.rows(parsed(["a" * 8, "a" * 10]), LOSS)
        with pytest.raises(BadData, match="the prompt has 9 tokens, but the model takes 8 tokens"):
            await client.prompt(TextPrompt("a" * 9))


async def test_an_error_names_the_turn(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else m['content'][:1]) + '|' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    async with running(model=str(tmp_path)) as client:
        with pytest.raises(
            BadData, match=r"data\[0\], turn 1 \(assistant\): the chat template writes this turn differently"
        ):
            await client.rows(parsed([[*CHAT, *CHAT]]), LOSS)


async def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    async with running(engine=FAKE_ENGINE, vocab_size=100) as client:
        with pytest.raises(BadData, match="token id 122, but the model has ids 0 to 99"):
            await client.prompt(TextPrompt("z"))
        with pytest.raises(BadData, match=r"data\[0\].* holds token id 122, but the model has ids 0 to 99"):
            await client.rows(parsed(["az"]), LOSS)


async def test_an_integer_of_more_than_64_bits_is_an_error() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        with pytest.raises(BadData, match="more than 64 bits"):
            await client.rows(parsed([[{**CHAT[0], "id": 10**30}, CHAT[1]]]), LOSS)
        assert await client.prompt(TextPrompt("a")) == [97]


async def test_a_text_that_cannot_be_sent_fails_and_the_next_request_is_answered() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        with pytest.raises(TinkerbellError, match="internal error"):
            await client.rows(TextData("strings", [object()], [{}]), LOSS)
        assert await client.prompt(TextPrompt("a")) == [97]


async def test_an_unexpected_error_fails_only_its_request() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        with pytest.raises(TinkerbellError, match="ZeroDivisionError: on purpose"):
            await client.prompt(TextPrompt("!bug!"))
        assert await client.prompt(TextPrompt("a")) == [97]


async def test_each_of_200_concurrent_requests_gets_its_own_answer() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        answers = await asyncio.gather(*(client.prompt(TextPrompt(str(number))) for number in range(200)))
        assert [bytes(ids).decode() for ids in answers] == [str(number) for number in range(200)]


async def test_a_request_in_progress_is_answered_after_the_process_is_killed() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        await client.prompt(TextPrompt("a"))
        answers = asyncio.gather(client.prompt(TextPrompt("!sleep!")), client.prompt(TextPrompt("b")))
        await asyncio.sleep(0.1)
        await kill_process(client)
        assert [bytes(ids) for ids in await answers] == [b"!sleep!", b"b"]


async def test_a_killed_idle_process_is_started_again() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        await client.prompt(TextPrompt("a"))
        await kill_process(client)
        while client.pid is not None:
            await asyncio.sleep(0.01)
        assert await client.prompt(TextPrompt("b")) == [98]


async def test_without_text_the_process_starts_after_a_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinkerbell_server.engines.tokenizer.client._START_SECONDS", 0.5)
    async with running(engine=FAKE_ENGINE) as client:
        await asyncio.sleep(0.1)
        assert client.pid is None
        while client.pid is None:
            await asyncio.sleep(0.01)


async def test_a_request_that_ends_the_process_twice_fails_and_others_do_not() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        crash, other = await asyncio.gather(
            client.prompt(TextPrompt("!crash!")), client.prompt(TextPrompt("a")), return_exceptions=True
        )
        assert isinstance(crash, EngineLost)
        assert "the tokenizer process exited with status 9 while reading this request" in crash.message
        assert other == [97]


async def test_a_process_that_ends_during_its_start_is_started_again_for_a_later_request() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        waiting = asyncio.gather(*(client.prompt(TextPrompt("a")) for _ in range(3)), return_exceptions=True)
        await kill_process(client)
        await waiting
        assert await client.prompt(TextPrompt("b")) == [98]


async def test_requests_fail_with_the_reason_if_the_tokenizer_cannot_be_loaded(tmp_path: Path) -> None:
    async with running(model=str(tmp_path)) as client:
        for _ in range(2):
            with pytest.raises(BadRequest, match="cannot load the tokenizer of "):
                await client.prompt(TextPrompt("a"))
    async with running(engine=FAKE_ENGINE, model="no-tokenizer") as client:
        for result in await asyncio.gather(
            *(client.prompt(TextPrompt("a")) for _ in range(20)), return_exceptions=True
        ):
            assert isinstance(result, BadCheckpoint)
        assert client.pid is None


async def test_requests_fail_with_the_reason_if_the_engine_cannot_be_imported() -> None:
    async with running(engine="tests.no_such_engine") as client:
        with pytest.raises(BadRequest, match=r"the engine 'tests.no_such_engine' cannot be imported: "):
            await client.prompt(TextPrompt("a"))


async def test_a_cancelled_request_does_not_delay_the_next_one() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        await client.prompt(TextPrompt("a"))
        tasks = [asyncio.create_task(client.prompt(TextPrompt("!sleep!"))) for _ in range(20)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        start = time.monotonic()
        assert await client.prompt(TextPrompt("b")) == [98]
        assert time.monotonic() - start < 2  # the client does not send cancelled requests


async def test_waiting_requests_fail_when_the_client_stops() -> None:
    async with running(engine=FAKE_ENGINE) as client:
        waiting = asyncio.gather(*(client.prompt(TextPrompt("!sleep!")) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0.1)
        await client.stop()
        assert all(isinstance(result, EngineLost) for result in await waiting)
        with pytest.raises(EngineLost):
            await client.prompt(TextPrompt("a"))


_PARENT = """
import asyncio, os, signal
from tests.server.test_tokenizer import FAKE_ENGINE, TextPrompt, running

async def main():
    async with running(engine=FAKE_ENGINE) as client:
        await client.prompt(TextPrompt("a"))
        print(client.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_the_process_ends_when_its_parent_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    output, _ = await parent.communicate()
    async with asyncio.timeout(10):
        while _runs(int(output)):
            await asyncio.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_the_event_loop_runs_while_a_long_text_is_tokenised(folder: Path) -> None:
    text = parsed(["x" * 2000] * 1000)
    async with running(model=str(folder)) as client:
        await client.prompt(TextPrompt("a"))
        rows = asyncio.create_task(client.rows(text, LOSS))
        lags = []
        while not rows.done():
            start = time.monotonic()
            await asyncio.sleep(0.001)
            lags.append(time.monotonic() - start)
        assert len(await rows) == 1000
    # on an idle machine the longest lag is about 30 ms of 3 s; a loop that waited would have one lag of the whole time
    assert max(lags) < sum(lags) / 2


async def test_the_bytes_of_tokens_are_asked_for_once(folder: Path) -> None:
    async with running(model=str(folder)) as client:
        expected = {200: Piece(b"\xc8"), 257: Piece(b"<|eos|>", special=True)}
        assert await client.pieces([200, 257, 200]) == expected
        await client.stop()
        assert await client.pieces([257, 200]) == expected
