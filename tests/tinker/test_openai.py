"""The real `openai` client with the base model and with models of the Tinker SDK."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.tinker.sdk import datum, new_model
from tinkerbell_server.api.openai.fields import fields_of

openai = pytest.importorskip("openai", reason="the openai client is not installed: nox -s sdk")

TEXT = "abcdefgh"


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="tml-test", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def trained(service: tinker.ServiceClient, model_folder: Path) -> Any:
    """A model that has learned TEXT."""
    model = new_model(service, model_folder, rank=8)
    row = datum(list(TEXT.encode()), weights=[1.0] * (len(TEXT) - 1))
    for _ in range(60):
        model.forward_backward([row], "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    return model


def test_the_list_of_models_has_the_base_and_the_adapters(client: Any, trained: Any, model_folder: Path) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == str(model_folder)
    assert trained.model_id in names
    assert client.models.retrieve(trained.model_id).id == trained.model_id


def test_an_adapter_completes_differently_than_its_base(client: Any, trained: Any, model_folder: Path) -> None:
    path = trained.save_weights_for_sampler("for-openai").result().path
    options = {"prompt": TEXT[0], "max_tokens": len(TEXT) - 1, "temperature": 0}
    texts = {
        name: client.completions.create(model=name, **options).choices[0].text
        for name in (str(model_folder), trained.model_id, path)
    }
    assert texts[trained.model_id] == texts[path] == TEXT[1:]
    assert texts[str(model_folder)] != TEXT[1:]


def test_a_completion_has_finish_reasons_and_usage_and_is_reproducible(client: Any, model_folder: Path) -> None:
    answer = client.completions.create(
        model=str(model_folder), prompt=["ab", "abc"], max_tokens=4, n=2, seed=1, stop=[]
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    assert answer.usage.prompt_tokens == 5
    again = client.completions.create(model=str(model_folder), prompt=["ab", "abc"], max_tokens=4, n=2, seed=1, stop=[])
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


def test_a_chat_completion_has_logprobs_and_can_be_streamed(client: Any, model_folder: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    options = {"model": str(model_folder), "messages": messages, "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.role == "assistant"
    first = answer.choices[0].logprobs.content[0]
    assert first.logprob == pytest.approx(first.top_logprobs[0].logprob)
    streamed = client.chat.completions.create(**options, stream=True)
    pieces = [chunk.choices[0] for chunk in streamed]
    assert "".join(piece.delta.content or "" for piece in pieces) == answer.choices[0].message.content
    assert pieces[-1].finish_reason == answer.choices[0].finish_reason


def test_a_streamed_completion_equals_the_whole_one(client: Any, model_folder: Path) -> None:
    options = {"model": str(model_folder), "prompt": "ab", "max_tokens": 4, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == whole


def test_a_stream_ends_with_the_usage_if_it_is_asked_for(client: Any, model_folder: Path) -> None:
    options = {"model": str(model_folder), "prompt": "ab", "max_tokens": 4, "temperature": 0}
    usage = client.completions.create(**options).usage
    *before, last = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], usage)
    assert [chunk.usage for chunk in before] == [None] * len(before)


def test_token_ids_and_strings_end_a_sample(client: Any, trained: Any) -> None:
    def text(**options: Any) -> tuple[str, str]:
        extra = {"extra_body": options}
        choice = client.completions.create(model=trained.model_id, prompt="a", max_tokens=7, temperature=0, **extra)
        return choice.choices[0].text, choice.choices[0].finish_reason

    assert text() == ("bcdefgh", "length")
    assert text(stop=[ord("d")]) == ("bcd", "stop")
    assert text(stop=["e", ord("g")]) == ("bcd", "stop")
    assert text(stop=ord("d")) == ("bcd", "stop")
    assert text(stop_token_ids=[ord("c")]) == ("bc", "stop")


def test_an_end_of_text_token_is_ignored_if_asked_for(
    client: Any, service: tinker.ServiceClient, model_folder: Path
) -> None:
    model = new_model(service, model_folder, rank=8)
    eos = 257
    for _ in range(40):
        model.forward_backward([datum([97, eos, eos, eos], weights=[1.0] * 3)], "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    options = {"model": model.model_id, "prompt": "a", "max_tokens": 3, "temperature": 0}
    ended = client.completions.create(**options)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 1)
    ignored = client.completions.create(**options, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 3)


def test_top_k_of_1_gives_the_likeliest_tokens(client: Any, trained: Any) -> None:
    options = {"model": trained.model_id, "prompt": "a", "max_tokens": 7, "temperature": 100.0, "seed": 1}
    assert client.completions.create(**options, extra_body={"top_k": 1}).choices[0].text == "bcdefgh"
    assert client.completions.create(**options, extra_body={"top_k": 0}).choices[0].text != "bcdefgh"


def test_a_token_of_a_completion_has_its_text_its_offset_and_always_its_own_logprob(
    client: Any, model_folder: Path
) -> None:
    options = {"model": str(model_folder), "prompt": "ab", "max_tokens": 24, "temperature": 1.5, "seed": 3}
    for count in (0, 2):
        choice = client.completions.create(**options, logprobs=count).choices[0]
        found = choice.logprobs
        sizes = {len(row) for row in found.top_logprobs}
        assert sizes == ({1} if count == 0 else {2, 3})
        for token, logprob, row, offset in zip(
            found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True
        ):
            assert row[token] == logprob
            if len(token) == 1:
                assert choice.text[offset] == token
    byte_tokens = [token for token in found.tokens if token.startswith("bytes:")]
    assert byte_tokens, "the sample has parts of characters"
    assert byte_tokens[0][:8] == "bytes:\\x"


def test_a_token_of_a_chat_has_its_bytes(client: Any, model_folder: Path) -> None:
    answer = client.chat.completions.create(
        model=str(model_folder),
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=24,
        temperature=1.5,
        seed=3,
        logprobs=True,
        top_logprobs=2,
    )
    content = answer.choices[0].logprobs.content
    assert (
        b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
        == answer.choices[0].message.content
    )
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert all(bytes(token.bytes).decode() == token.token for token in content if not token.token.startswith("bytes:"))


def test_tokens_are_named_by_their_ids_if_asked_for(client: Any, model_folder: Path) -> None:
    choice = client.completions.create(
        model=str(model_folder),
        prompt="ab",
        max_tokens=1,
        temperature=0,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True},
    ).choices[0]
    assert re.fullmatch(r"token_id:\d+", choice.logprobs.tokens[0])


def test_echo_returns_the_prompt_with_its_logprobs(client: Any, trained: Any, model_folder: Path) -> None:
    options = {"model": trained.model_id, "temperature": 0, "echo": True, "logprobs": 1}
    for prompt in ("abcd", list(b"abcd")):
        choice = client.completions.create(**options, prompt=prompt, max_tokens=1).choices[0]
        assert choice.text == "abcde"
        found = choice.logprobs
        assert (found.tokens, found.text_offset) == (list("abcde"), [0, 1, 2, 3, 4])
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        # the model has learned the text, so each token is the likeliest
        assert all(
            max(row.values()) == row[token]
            for token, row in list(zip(found.tokens, found.top_logprobs, strict=True))[1:]
        )
    scored = client.completions.create(**options, prompt="abcd", max_tokens=0)
    assert (scored.choices[0].text, scored.usage.completion_tokens) == ("abcd", 0)
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[:4]
    alone = client.completions.create(**options, prompt="a", max_tokens=0).choices[0].logprobs
    assert (alone.tokens, alone.token_logprobs, alone.top_logprobs) == (["a"], [None], [None])
    unlikely = client.completions.create(**options, prompt="adcb", max_tokens=0).choices[0].logprobs
    assert all(len(row) == 2 for row in unlikely.top_logprobs[1:])


def test_tools_calls_and_results_reach_the_model(client: Any, model_folder: Path) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    options: dict[str, Any] = {"model": str(model_folder), "max_tokens": 1, "temperature": 0}

    def tokens(messages: list[dict[str, Any]], **more: Any) -> int:
        return client.chat.completions.create(messages=messages, **options, **more).usage.prompt_tokens

    hi = {"role": "user", "content": "hi"}
    plain = tokens([hi])
    rendered = len('<tools>[{"type": "function", "function": {"name": "add"}}]')
    for choice in ("none", "auto"):
        assert tokens([hi], tools=[tool], tool_choice=choice) == plain + rendered
    with_call = tokens([hi, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert with_call == plain + len('<call>add{"a": 1}') + len(" assistant\n \n")
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert tokens([{"role": "user", "content": parts}]) == plain
    assert tokens([{"role": "developer", "content": "hi"}]) == plain + len("developer") - len("user")
    assert tokens([hi], extra_body={"chat_template_kwargs": {"think": True}}) == plain + len("<think>")
    assert tokens([hi], extra_body={"add_generation_prompt": False}) == plain - len(" assistant\n")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"messages": []}, "messages", "empty"),
        (
            {"messages": [{"role": "usr", "content": "hi"}]},
            "messages",
            r"messages\[0\].role is 'usr'; did you mean 'user'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            r"messages\[0\].content\[0\]",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages", r"messages\[0\].content must be"),
        ({"messages": [{"role": "user", "content": "hi", "contents": "x"}]}, "messages", "did you mean 'content'"),
        ({"tool_choice": "required"}, "tool_choice", "'required'"),
        ({"tools": [{"type": "x"}]}, "tools", r"tools\[0\] must be"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, but must be at least 1"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not support"),
        ({"extra_body": {"chat_template_kwargs": {"thinc": 1}}}, "chat_template_kwargs", "did you mean 'think'"),
        ({"extra_body": {"prompt": "x"}}, "prompt", "is a field of /v1/completions"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "use top_p"),
    ],
)
def test_an_unsupported_chat_is_refused_with_the_name_of_the_field(
    client: Any, model_folder: Path, options: dict[str, Any], param: str, message: str
) -> None:
    basic = {"model": str(model_folder), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client.chat.completions.create(**{**basic, **options})
    assert raised.value.param == param


@pytest.mark.parametrize("prompt", ["a" * 128, [97] * 128, "a" * 120, [97] * 120, "a" * 300_000])
def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(
    client: Any, model_folder: Path, prompt: str | list[int]
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"This model's maximum context length is 128 tokens") as raised:
        client.completions.create(model=str(model_folder), prompt=prompt, max_tokens=16)
    assert (raised.value.code, raised.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert raised.value.param == "prompt"


def test_a_chat_that_is_too_long_has_the_code_that_clients_know(client: Any, model_folder: Path) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(
            model=str(model_folder), messages=[{"role": "user", "content": "a" * 200}], max_tokens=1
        )
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "unknown"}, "no model 'unknown'"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [5000]}, "5000"),
        ({"prompt": [[{"role": "user", "content": "hi"}]]}, "takes messages"),
        ({"logprobs": 99}, "99"),
        ({"n": 0}, "n is 0, but must be at least 1"),
        ({"stop": ["a", 9999]}, r"stop\[1\] is 9999"),
        ({"stream_options": {"include_usage": True}}, "without stream"),
        ({"best_of": 2}, "must equal n"),
        ({"extra_body": {"temperatur": 0.5}}, "did you mean 'temperature'"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty is '1.1'"),
        ({"extra_body": {"prompt_logprobs": 1}}, "use echo with logprobs"),
        ({"extra_body": {"top_k": -2}}, "top_k is -2"),
    ],
)
def test_an_unsupported_completion_request_is_refused(
    client: Any, model_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        client.completions.create(**{"model": str(model_folder), "prompt": "ab", "max_tokens": 2, **options})
    assert raised.value.status_code in (400, 404)


def test_values_that_change_nothing_are_accepted(client: Any, model_folder: Path) -> None:
    neutral = {
        name: (field.neutral or [None])[0]
        for name, field in fields_of("completions").items()
        if field.neutral is not None
    }
    answer = client.completions.create(
        model=str(model_folder), prompt="ab", max_tokens=2, user="ann", extra_body=neutral
    )
    assert answer.usage.completion_tokens == 2


def test_a_stream_has_an_event_for_each_piece(client: Any, model_folder: Path) -> None:
    options = {"model": str(model_folder), "prompt": "ab", "max_tokens": 100, "seed": 5}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**options)
    texts = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(texts) == whole.choices[0].text
    assert len(texts) > 20


def test_a_stream_of_several_samples_has_the_logprobs_and_the_end_of_each(client: Any, model_folder: Path) -> None:
    options = {
        "model": str(model_folder),
        "prompt": ["ab", "abc"],
        "max_tokens": 8,
        "n": 2,
        "seed": 5,
        "logprobs": 2,
        "stop": ["zz"],
    }
    whole = {choice.index: choice for choice in client.completions.create(**options).choices}
    chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert whole.keys() == {0, 1, 2, 3}
    for index, expected in whole.items():
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == expected.text
        assert [chunk.finish_reason for chunk in own][-1] == expected.finish_reason
        assert {chunk.finish_reason for chunk in own[:-1]} == {None}
        found = [chunk.logprobs for chunk in own if chunk.logprobs is not None]
        for field in ("tokens", "top_logprobs", "text_offset"):
            assert [one for each in found for one in getattr(each, field)] == getattr(expected.logprobs, field)


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_cancels_its_sample(server: str, model_folder: Path, stream: bool) -> None:
    body = {
        "model": str(model_folder),
        "prompt": "ab",
        "max_tokens": 120,
        "n": 64,
        "stream": stream,
        "ignore_eos": True,
    }
    url = httpx.URL(f"{server}/v1/completions")
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    sent = []
    for _ in range(12):
        sock = socket.create_connection((url.host, url.port), timeout=20)
        sock.sendall(head.encode() + content)
        sent.append(sock)
    with httpx.Client(base_url=server, timeout=60, trust_env=False) as http:
        deadline = time.monotonic() + 30
        while http.get("/healthz").json()["queue"] < 3:
            assert time.monotonic() < deadline
        for sock in sent:
            sock.close()
        start = time.monotonic()
        while http.get("/healthz").json()["queue"]:
            assert time.monotonic() - start < 10
            time.sleep(0.02)
    assert time.monotonic() - start < 2


def test_an_error_before_the_first_token_of_a_stream_has_its_status(client: Any, model_folder: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=str(model_folder), prompt="x" * 300, max_tokens=5, stream=True)
