"""The models for exact comparisons compute nothing in float32 when they are loaded in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from tests.engine.conftest import LLAMA
from tests.engine.exact_models import EXACT_MODELS


class NarrowOperations(TorchDispatchMode):
    """Collects the operations whose result is narrower than float64 and not a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in (output if isinstance(output, tuple | list) else [output]) if is_narrow(tensor)]
        if func is torch.ops.aten.rand.default:  # some versions of transformers draw which layers to leave out
            return output
        if any(bool((tensor != tensor.round()).any()) for tensor in tensors):
            self.found.add(str(func))
        return output


def is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def narrow_operations(model: Any) -> set[str]:
    """The narrow operations of a forward and backward pass in float64, with and without padding."""
    model = model.double().train()
    tokens = torch.arange(36).reshape(3, 12)
    padding = torch.ones(3, 12, dtype=torch.int64)
    padding[1, 5:] = 0
    with NarrowOperations() as operations:
        for mask in (None, padding):
            model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.square().sum().backward()
    return operations.found


@pytest.mark.parametrize("make", EXACT_MODELS.values(), ids=EXACT_MODELS)
def test_an_exact_model_computes_nothing_in_float32(make: Callable[[], Any]) -> None:
    assert narrow_operations(make()) == set()


def test_a_llama_computes_its_norms_in_float32() -> None:
    assert "aten.rsqrt.default" in narrow_operations(LlamaForCausalLM(LLAMA))
