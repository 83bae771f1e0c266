"""The real `openai` client with the base model and with models of the Tinker SDK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.tinker.sdk import datum, new_model

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "unknown"}, "no model 'unknown'"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [5000]}, "5000"),
        ({"logprobs": 99}, "99"),
    ],
)
def test_an_unsupported_completion_request_is_refused(
    client: Any, model_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        client.completions.create(**{"model": str(model_folder), "prompt": "ab", "max_tokens": 2, **options})
    assert raised.value.status_code in (400, 404)
