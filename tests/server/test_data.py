"""Token data becomes checked rows, or an error that names the row and the input."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from tinkerbell_core.errors import BadData
from tinkerbell_core.spec import Provenance
from tinkerbell_core.tensors import as_tensor, to_numpy
from tinkerbell_core.types import LossDescription, TensorData
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.commands import Row, TextData


def describe(name: str = "cross_entropy", **fields: Any) -> LossDescription:
    given = {
        "inputs": ("target_tokens",),
        "optional_inputs": ("weights",),
        "coupling": "sequence",
        "group_size": 1,
        "finite": ("weights",),
    }
    return LossDescription(
        id=f"tinkerbell-core:{name}",
        name=name,
        summary="",
        hyperparameters=(),
        provenance=Provenance(),
        digest="0" * 64,
        **{**given, **fields},
    )


CROSS_ENTROPY = describe()
POLICY = describe(
    "importance_sampling", inputs=("target_tokens", "logprobs", "advantages"), finite=("logprobs", "advantages")
)
PAIR = describe("dpo", inputs=("target_tokens", "ref_logprobs"), group_size=2)


def parse(data: Any, inputs: Any = None, loss: LossDescription = CROSS_ENTROPY, **limits: int) -> list[Row]:
    rows = parse_call(data, inputs, loss, **{"vocab_size": 100, "max_length": 16, **limits})
    assert isinstance(rows, list)
    return rows


def numbers(row: Row, name: str) -> list[Any]:
    return to_numpy(row.inputs[name]).tolist()


def wire(array: Any) -> dict[str, Any]:
    return {"data": array.tobytes(), "dtype": array.dtype.name, "shape": list(array.shape)}


def test_token_lists_are_shifted_when_the_loss_reads_target_tokens() -> None:
    (row,) = parse([[5, 6, 7]])
    assert to_numpy(row.tokens).tolist() == [5, 6]
    assert numbers(row, "target_tokens") == [6, 7]
    assert numbers(row, "weights") == [1, 1]


def test_token_lists_stay_as_sent_when_the_caller_sends_target_tokens() -> None:
    rows = parse([[5, 6, 7], [8, 9]], {"target_tokens": [[6, 7, 8], [9, 1]]})
    assert to_numpy(rows[0].tokens).tolist() == [5, 6, 7]
    assert numbers(rows[1], "target_tokens") == [9, 1]
    assert "weights" not in rows[0].inputs


def test_token_lists_stay_as_sent_when_the_loss_reads_no_target_tokens() -> None:
    (row,) = parse([[5, 6, 7]], {"labels": [[1.0, 2.0, 3.0]]}, describe("regression", inputs=("labels",)))
    assert row.tokens.shape == (3,)


def test_datums_stay_as_sent_with_their_inputs() -> None:
    datum = {
        "model_input": wire(np.array([5, 6, 7])),
        "loss_fn_inputs": {"target_tokens": wire(np.array([6, 7, 8])), "weights": [0, 1, 0.5]},
    }
    (row,) = parse([datum])
    assert to_numpy(row.tokens).tolist() == [5, 6, 7]
    assert row.inputs["weights"].dtype == "float32"
    assert numbers(row, "weights") == [0, 1, 0.5]


def test_loss_fn_inputs_of_the_call_are_added_to_those_of_the_datums() -> None:
    datums = [{"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3]}}] * 2
    rows = parse(datums, {"reward": [1.5, -2]})
    assert [numbers(row, "reward") for row in rows] == [1.5, -2]
    assert {row.inputs["reward"].dtype for row in rows} == {"float32"}


def test_a_tensor_in_loss_fn_inputs_is_divided_among_the_rows() -> None:
    rows = parse(
        [[1, 2], [3, 4]],
        {"target_tokens": wire(np.array([[2, 3], [4, 5]], dtype=np.int32)), "teacher": wire(np.ones((2, 2, 3)))},
    )
    assert numbers(rows[1], "target_tokens") == [4, 5]
    assert rows[0].inputs["target_tokens"].dtype == "int64"
    assert (rows[0].inputs["teacher"].shape, rows[0].inputs["teacher"].dtype) == ((2, 3), "float64")


def test_msgpack_and_json_give_the_same_rows() -> None:
    row = {
        "model_input": TensorData(np.array([1, 2]).tobytes(), "int64", (2,)),
        "loss_fn_inputs": {"target_tokens": [2, 3]},
    }
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode([row]))
    assert parse(packed) == parse(json.loads(msgspec.json.encode([row])))


def test_a_bfloat16_input_is_not_converted() -> None:
    half = TensorData(np.array([0x3F80, 0x4000], dtype="<u2").tobytes(), "bfloat16", (2,))
    (row,) = parse([[1, 2]], {"target_tokens": [[2, 3]], "teacher": [half]})
    assert row.inputs["teacher"].dtype == "bfloat16"
    assert numbers(row, "teacher") == [1, 2]


def test_bools_and_infinities_are_kept_if_the_loss_does_not_need_finite_values() -> None:
    (row,) = parse([[1, 2]], {"target_tokens": [[2, 3]], "keep": [[True, False]], "teacher": [[-math.inf, 0.0]]})
    assert row.inputs["keep"].dtype == "bool"
    assert numbers(row, "teacher") == [-math.inf, 0]


def test_nan_is_allowed_at_a_position_of_weight_0() -> None:
    inputs = {"target_tokens": [[2, 3]], "logprobs": [[math.nan, -1.0]], "advantages": [[1.0, 1.0]]}
    with pytest.raises(BadData, match=r"data\[0\]: 'logprobs' holds NaN or infinity .* weight 0"):
        parse([[1, 2]], inputs, POLICY)
    parse([[1, 2]], {**inputs, "weights": [[0, 1]]}, POLICY)


def test_ref_logprobs_need_not_be_sent() -> None:
    assert len(parse([[1, 2], [1, 3]], loss=PAIR)) == 2


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "data is empty"),
        ("text", "data is str, but must be a list"),
        ([[]], r"data\[0\] is empty"),
        ([[1, 2], []], r"data\[1\] is empty"),
        ([wire(np.zeros(0, dtype=np.int64))], r"data\[0\] has no tokens"),
        ([""], r"data\[0\] is an empty string"),
        ([[1, 2], "text"], r"data\[0\] is one of tokens, but data\[1\] is one of strings: send one kind per call"),
        ([[1, 100]], r"data\[0\]: 'target_tokens' holds token id 100, but the model has ids 0 to 99"),
        ([[1, -1, 2]], r"data\[0\] holds token id -1, but the model has ids 0 to 99"),
        ([[1]], r"data\[0\] is 1 token long, but needs 2"),
        ([[1] * 18], r"data\[0\] has 17 tokens, but the model takes 16 at most"),
        ([[1.5, 2]], r"data\[0\] is float32, but token ids are integers"),
        ([[1, None]], r"data\[0\] holds something that is not a number"),
        ([[[1], [2, 3]]], r"data\[0\] is a ragged list"),
        ([[[1, 2]]], r"data\[0\] has shape \[1, 2\], but the token ids of a row are one flat list"),
        ([3], r"data\[0\] is int; data is a list of one kind"),
        ([{"tokens": [1, 2], "weights": [1, 1]}], r"data\[0\] has 'tokens': write a Datum"),
        ([{"model_input": [1, 2], "weights": [1, 1]}], "put it into loss_fn_inputs"),
        ([{"role": "user", "content": "hi"}], "a chat is a list of messages"),
        ([{"messages": []}], r"data\[0\] is an empty chat"),
        ([{"text": "hi"}], r"data\[0\] has the keys \['text'\]"),
        ([[{"role": "user"}]], r"data\[0\], turn 0: content is NoneType, but must be a string"),
        ([[{"content": "hi"}]], r"data\[0\], turn 0: a message is \{role, content\}"),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], r"data\[0\]\['chosen'\] is empty"),
        ([{"prompt": "a", "chosen": [], "rejected": "b"}], r"data\[0\]\['chosen'\] is an empty chat"),
        ([{"prompt": "a", "chosen": 3, "rejected": "b"}], r"\['chosen'\] is int, but must be a string or a chat"),
        (
            [{"prompt": "a", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}],
            "the prompt is a string, so chosen and rejected must be strings too",
        ),
    ],
)
def test_an_error_says_what_is_wrong_with_the_data(data: Any, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        parse(data)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"target_tokens": [[2, 3]]}, r"'target_tokens'\] has 1 entries, but data has 2 rows"),
        ({"target_tokens": [[2, 3, 4], [2, 3]]}, r"data\[0\]: 'target_tokens' has length 3, but the row has 2"),
        (
            {"target_tokens": [[2, -100], [2, 3]]},
            "token id -100.*give positions that do not count weights of 0",
        ),
        ({"target_tokens": [[2.5, 1], [2, 3]]}, "'target_tokens' is float32, but token ids are integers"),
        ({"teacher_ids": [[2, 100], [2, 3]], "target_tokens": [[1, 1]] * 2}, "'teacher_ids' holds token id 100"),
        ({"target_tokens": 3}, "is int, but needs a list or tensor with one entry per row"),
        ({"target_tokens": wire(np.array(3))}, "a setting belongs in loss_fn_config"),
        ({"weights": [[1, None], [1, 1]]}, r"loss_fn_inputs\['weights'\]\[0\] holds something that is not a number"),
        ({"weights": ["one", [1, 1]]}, r"loss_fn_inputs\['weights'\]\[0\] is 'one', but must be numbers"),
        ({"weights": [[math.inf], [1]]}, r"data\[0\]: 'weights' holds NaN or infinity"),
        ({"weights": [[[[1.0]]], [[[1.0]]]]}, r"'weights' has shape \[1, 1, 1\], but the input of a row is"),
        ({"weights": [[1], 1]}, r"data\[1\]: 'weights' has shape \[\], but in data\[0\] it has \[1\]"),
        ({"weights": {"data": b"", "dtype": "float32", "shape": [2]}}, "has 0 bytes, but float32 .2. takes 8 bytes"),
        ({"weights": {"data": b"", "dtype": "complex64", "shape": [2]}}, "has dtype 'complex64', but must have one of"),
        ({"weights": {"data": "?", "dtype": "float32", "shape": [2]}}, "its data is not base64"),
        ({"weights": {"data": b"", "dtype": "float32", "shape": [-1]}}, "a shape is a list of sizes"),
        ({"weights": [{"data": b""}] * 2}, "a tensor has data, dtype and shape"),
    ],
)
def test_an_error_says_what_is_wrong_with_an_input(inputs: Any, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        parse([[5, 6], [7, 8]], inputs)


def test_the_error_for_a_missing_input_lists_the_inputs_that_were_sent() -> None:
    with pytest.raises(BadData, match=r"needs 'advantages', which was not sent \(sent: target_tokens, logprobs\)"):
        parse([[1, 2]], {"target_tokens": [[2, 3]], "logprobs": [[0.0, 0.0]]}, POLICY)


def test_a_missing_input_is_found_before_text_is_tokenised() -> None:
    with pytest.raises(BadData, match=r"data\[0\]: loss 'importance_sampling' needs 'logprobs'"):
        parse(["text"], None, POLICY)


def test_an_odd_number_of_rows_is_refused_for_a_pair_loss() -> None:
    with pytest.raises(BadData, match=r"groups of 2 .* but data makes 3 rows"):
        parse([[1, 2], [1, 2], [1, 2]], loss=PAIR)


def test_an_input_sent_twice_is_refused() -> None:
    datum = {"model_input": [1], "loss_fn_inputs": {"target_tokens": [2]}}
    with pytest.raises(BadData, match="is in the Datum and in the call's loss_fn_inputs: send it once"):
        parse([datum], {"target_tokens": [[2]]})


def test_an_input_that_only_some_rows_have_is_refused() -> None:
    rows = [
        {"model_input": [1], "loss_fn_inputs": {"target_tokens": [2], "margin": [1]}},
        {"model_input": [1], "loss_fn_inputs": {"target_tokens": [2]}},
    ]
    with pytest.raises(BadData, match=r"data\[0\] has the input 'margin', but data\[1\] does not"):
        parse(rows)


def test_text_is_returned_with_the_inputs_of_its_rows() -> None:
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    text = parse_call(records, {"margin": [1.0, 2.0]}, PAIR, vocab_size=100, max_length=16)
    assert isinstance(text, TextData)
    assert (text.kind, text.items) == ("preferences", records)
    assert [to_numpy(inputs["margin"]).item() for inputs in text.inputs] == [1, 2]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0},
            r"data\[0\] has the key 'margin', but a prefer",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tool": []}, "has the key 'tool'.*did you mean 'tools'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{}]}, "the prompt is a string, so no chat template"),
        ({"messages": [{"role": "assistant", "content": "a"}], "tools": {}}, "tools must be a list of JSON objects"),
        ({"messages": [{"role": "assistant", "content": "a"}], "id": 3}, "has the key 'id', but a chat with tools has"),
        ({"messages": "hi"}, "messages is str, but must be a list"),
        ({"model_input": [1], "mask": [1]}, "has 'mask' in addition to model_input"),
    ],
)
def test_a_key_that_a_record_does_not_have_is_refused(data: Any, sentence: str) -> None:
    loss = PAIR if "prompt" in data else CROSS_ENTROPY
    with pytest.raises(BadData, match=sentence):
        parse_call([data], None, loss, vocab_size=100, max_length=16)


def test_inputs_of_preference_records_need_one_entry_per_row() -> None:
    with pytest.raises(BadData, match="has 1 entries, but 1 preference records make 2 rows"):
        parse_call(
            [{"prompt": "a", "chosen": "b", "rejected": "c"}], {"margin": [1.0]}, PAIR, vocab_size=9, max_length=9
        )


def test_bytes_base64_and_lists_give_the_same_tensor() -> None:
    raw = np.array([1.0, 2.0], dtype=np.float32)
    coded = {"data": base64.b64encode(raw.tobytes()).decode(), "dtype": "float32", "shape": [2]}
    assert as_tensor(coded, "x") == as_tensor([1.0, 2.0], "x")
    assert as_tensor({"data": [1, 2], "dtype": "float32", "shape": [2]}, "x") == as_tensor([1.0, 2.0], "x")


@pytest.mark.parametrize(
    ("name", "right"), [("advantage", "advantages"), ("weightss", "weights"), ("target_token", "target_tokens")]
)
def test_a_misspelt_input_is_refused_with_the_right_name(name: str, right: str) -> None:
    loss = describe("importance_sampling", inputs=("target_tokens",), optional_inputs=("advantages", "logprobs"))
    with pytest.raises(BadData, match=f"does not read '{name}'; did you mean '{right}'"):
        parse([[1, 2, 3]], {name: [[1.0, 1.0]]}, loss)


@pytest.mark.parametrize(
    ("sent", "missing"), [([0.5, 0.25], [1.0, 1.0, 1.0]), (0.5, 1.0), ([[0.5, 0.0], [1.0, 1.0]], [[1.0, 1.0]] * 3)]
)
def test_rows_without_weights_beside_rows_with_weights_have_weights_of_1(sent: Any, missing: Any) -> None:
    rows = [
        {"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": sent}},
        {"model_input": [1, 2, 3], "loss_fn_inputs": {"target_tokens": [2, 3, 4]}},
    ]
    first, second = parse(rows)
    assert numbers(first, "weights") == sent
    assert numbers(second, "weights") == missing


def test_another_name_is_left_to_the_call_which_shows_whether_the_loss_reads_it() -> None:
    loss = describe("mine", inputs=("target_tokens", "logprobs"))
    (row,) = parse([[1, 2, 3]], {"ref_logprobs": [[1.0, 1.0]], "logprobs": [[1.0, 1.0]]}, loss)
    assert "ref_logprobs" in row.inputs
