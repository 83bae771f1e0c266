"""Rules for functions that create an ordinary tensor with the dtype, device or shape of a lazy one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, require


def like(name: str, input: Any, *args: Any, **named: Any) -> Tensor:
    """zeros_like, ones_like and so on."""
    require(isinstance(input, Form), "memory_format" not in named)
    result: Tensor = getattr(torch, name)(input.shape, *args, **{"dtype": input.dtype, "device": input.device, **named})
    return result


def new(method: Any, input: Any, *args: Any, **named: Any) -> Tensor:
    """new_zeros, new_ones and so on."""
    require(isinstance(input, Form))
    result: Tensor = method(torch.empty(0, dtype=input.dtype, device=input.device), *args, **named)
    return result


RULES = {
    **{f"{name}_like": functools.partial(like, name) for name in ("zeros", "ones", "empty", "full", "rand", "randn")},
    **{
        name: functools.partial(new, getattr(Tensor, name))
        for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
    },
}
