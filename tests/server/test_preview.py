"""The preview of data: what each row trains on, as text. No engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chat_families import CHATML
from tests.fake_engine import FAKE_ENGINE
from tests.live import live_server
from tests.server.conftest import Caller
from tinker_client import TinkerClient
from tinkerbell_core.errors import BadData, UnknownLoss
from tinkerbell_core.tensors import as_tensor
from tinkerbell_core.types import PreviewRow
from tinkerbell_server.calls.preview import preview_rows, texts_of
from tinkerbell_server.commands import Row

RECORD = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def row(tokens: list[int], **inputs: Any) -> Row:
    return Row(as_tensor(tokens, "tokens"), {name: as_tensor(value, name) for name, value in inputs.items()})


def preview(*rows: Row) -> list[PreviewRow]:
    return preview_rows(rows, [f"data[{index}]" for index in range(len(rows))], CHATML.tokenizer())


def test_the_texts_of_the_tokens_are_together_the_text_of_the_row() -> None:
    tokenizer = CHATML.tokenizer()
    text = "<|im_start|>ünï 😀 \n日本<|im_end|>"
    texts = texts_of(tokenizer(text)["input_ids"], tokenizer)
    assert "".join(texts) == text
    assert [one for one in texts if one][:4] == ["<|im_start|>", "ü", "n", "ï"]


def test_ids_that_are_not_text_have_one_text_each() -> None:
    tokenizer = CHATML.tokenizer()
    byte = tokenizer("é")["input_ids"][0]
    texts = texts_of([byte] * 40, tokenizer)
    assert len(texts) == 40
    assert set("".join(texts)) == {"\ufffd"}


def test_a_row_has_a_target_and_a_weight_for_each_position() -> None:
    ids = CHATML.tokenizer()("abc")["input_ids"]
    (shown,) = preview(row(ids[:2], target_tokens=ids[1:], weights=[0.0, 0.5]))
    assert (shown.texts, shown.target_texts, shown.weights) == (["a", "b"], ["b", "c"], [0.0, 0.5])
    assert (shown.token_ids, shown.target_ids) == (ids[:2], ids[1:])


@pytest.mark.parametrize(
    ("inputs", "targets", "weights"),
    [
        ({}, [], [1.0, 1.0]),
        ({"target_tokens": [1, 2], "weights": 0.5}, [1, 2], [0.5, 0.5]),
        ({"target_tokens": [[1, 2], [3, 4]], "weights": [[0.0, 0.25], [0.0, 0.0]]}, [], [0.25, 0.0]),
    ],
)
def test_rows_with_other_inputs_are_shown_too(inputs: dict[str, Any], targets: list[int], weights: list[float]) -> None:
    (shown,) = preview(row([5, 6], **inputs))
    assert (shown.target_ids, shown.weights) == (targets, weights)


@pytest.mark.server
def test_a_request_is_answered_at_once_and_an_error_has_its_status(caller: Caller) -> None:
    answer = caller.post("/preview", {"data": [RECORD]})
    assert answer.status_code == 200
    rows = answer.json()["rows"]
    assert [one["name"] for one in rows] == ["data[0] (chosen)", "data[0] (rejected)"]
    assert [one["weights"] for one in rows] == [[0, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert rows[0]["target_texts"] == ["+", "2", "=", "4"]
    assert caller.post("/preview", {"data": [[1, 999]]}).status_code == 422
    assert caller.post("/preview", {"data": [[1, 2]], "loss_fn": "crossentropy"}).status_code == 404


@pytest.mark.server
def test_the_client_shows_what_counts(torch_server: str) -> None:
    with TinkerClient(torch_server) as client:
        shown = client.preview([CHAT, [*CHAT, {**CHAT[0]}, {**CHAT[1], "content": "é", "weight": 0}]])
        assert repr(shown) == (
            "data[0]: 24 positions, 3 of them count\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n\n\n"
            "data[1]: 49 positions, 3 of them count\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\né<|im_end|>\n\n"
        )
        strings = client.preview(["ab"], loss_fn_inputs={"weights": [[1, 0.5]]})
        assert repr(strings) == "data[0]: 2 positions, 2 of them count (weights from 0.5 to 0.5)\na⟦b<|eos|>⟧\n"
        datum = {"model_input": [97, 98], "loss_fn_inputs": {"target_tokens": [99, 100], "weights": [0, 1]}}
        assert repr(client.preview([datum])) == "data[0]: 2 positions, 1 of them count\ntargets: c⟦d⟧\n"
        assert [one.name for one in client.preview([[97, 98]])] == ["data[0]"]
        with pytest.raises(BadData, match="holds token id 999, but the model has ids 0 to 260"):
            client.preview([[97, 999]])
        with pytest.raises(UnknownLoss, match="did you mean 'cross_entropy'"):
            client.preview(["ab"], loss_fn="crossentropy")
        with pytest.raises(BadData, match="data is a str, but must be a list of rows"):
            client.preview("ab")
        assert all(model.model_id != "preview" for model in client.hf_backend.list_models())


@pytest.mark.server
def test_a_preview_runs_while_the_device_is_busy_and_needs_no_model(tmp_path: Path) -> None:
    with live_server(tmp_path, engine=FAKE_ENGINE) as url, TinkerClient(url) as client:
        futures = [client.hf_backend.submit("forward", model_id="slow-1", data=[[1, 2]]) for _ in range(10)]
        assert len(client.preview([RECORD])) == 2
        assert client.healthz()["queue"] > 0
        assert futures[-1].result().tokens == 1
