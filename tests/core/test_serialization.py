"""A loss that is rebuilt from its source gives the same results, and an unsupported value is named."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinkerbell_core.decorator import loss
from tinkerbell_core.digest import digest_of
from tinkerbell_core.errors import BadUpload
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.serialization import format, pack, unpack

BETA = 0.1
TABLE = {"a": [1, 2.5], ("b",): {3}}
VECTOR = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)


def roundtrip(fn: Callable[..., Any]) -> Callable[..., Any]:
    return unpack(pack(fn))


def helper(x: Any) -> Any:
    return x * BETA + (helper(x - 1) if x > 1 else 0)


def mine(model_outputs: torch.Tensor, loss_fn_inputs: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> Any:
    """Mine."""
    return LossFnOutput(F.log_softmax(model_outputs, -1).sum() * helper(3) * math.pi)


def test_a_serialized_loss_keeps_its_helpers_constants_and_imports() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(roundtrip(mine)(x, {}, None).loss, mine(x, {}, None).loss)
    assert roundtrip(mine).__doc__ == "Mine."


def test_captured_values_are_restored() -> None:
    array = np.arange(6).reshape(2, 3)

    def capturing() -> Any:
        return TABLE, VECTOR, array, torch.float16, torch.logsumexp, len, LossFnOutput

    restored = roundtrip(capturing)()
    assert restored[0] == TABLE
    assert restored[1].dtype == torch.bfloat16
    assert torch.equal(restored[1], VECTOR)
    assert np.array_equal(restored[2], array)
    assert restored[3:] == (torch.float16, torch.logsumexp, len, LossFnOutput)


def test_defaults_are_serialized_as_values() -> None:
    functions = []
    for c in (1, 2):

        def scaled(x: float, y: float = c, *, z: float = c * 10) -> float:
            return x + y + z

        functions.append(scaled)
    assert [roundtrip(fn)(0) for fn in functions] == [11, 22]


def test_a_lambda_is_serialized() -> None:
    double = lambda x: x * 2  # noqa: E731

    def uses(x: int) -> int:
        return double(x) + 1

    assert roundtrip(uses)(3) == 7


def test_a_rebuilt_loss_has_the_hyperparameters_and_the_digest_of_the_loss() -> None:
    def tuned(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any, *, beta: float = BETA) -> LossFnOutput:
        return LossFnOutput(model_outputs.sum() * beta)

    assert loss(roundtrip(tuned)).hyperparameters == loss(tuned).hyperparameters
    digests = [digest_of(fn, coupling="batch", group_size=1) for fn in (tuned, roundtrip(tuned))]
    assert digests[0] == digests[1]


def test_a_traceback_shows_the_source_line_of_the_author() -> None:
    def wrong(x: int) -> float:
        return x / 0  # a line of mine

    try:
        roundtrip(wrong)(1)
    except ZeroDivisionError as error:
        text = traceback.format_exc()
        line = error.__traceback__.tb_next.tb_lineno
    assert "return x / 0  # a line of mine" in text
    assert line == wrong.__code__.co_firstlineno + 1


def test_the_error_for_an_unsupported_value_names_it_and_a_remedy() -> None:
    import threading

    lock = threading.Lock()

    def locked() -> None:
        with lock:
            pass

    with pytest.raises(BadUpload, match=r"'lock' is a lock, .*create it inside the loss"):
        pack(locked)


def test_an_object_that_is_captured_twice_is_refused() -> None:
    shared: list[int] = []
    pair = (shared, shared)

    def both() -> Any:
        return pair

    with pytest.raises(BadUpload, match="captured twice"):
        pack(both)


def test_a_function_without_source_is_refused() -> None:
    scope: dict[str, Any] = {}
    exec("def unsourced(): return 1", scope)
    with pytest.raises(BadUpload, match="is not available"):
        pack(scope["unsourced"])


def test_a_decorated_function_is_refused() -> None:
    @torch.no_grad()
    def frozen(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(BadUpload):
        pack(frozen)


@pytest.mark.parametrize("payload", [b"", b"\x80", b"\x81\xa9functions\x90", b"cposix\nsystem\n"])
def test_an_invalid_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(BadUpload):
        unpack(payload)


def test_the_tags_of_stored_payloads_do_not_change() -> None:
    tags = {kind.__struct_config__.tag for kind in get_args(format.Value)}
    assert tags == {"Plain", "Raw", "Several", "Mapped", "Array", "Named", "Helper"}
