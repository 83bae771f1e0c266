"""Ordinary tensors made after the dtype, device and shape of lazy ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form
from tinkerbell_core.logits.lazy.rule import need


def like(name: str, input: Any, *args: Any, **named: Any) -> Tensor:
    """zeros_like and its kin."""
    need(isinstance(input, Form), "memory_format" not in named)
    made: Tensor = getattr(torch, name)(input.shape, *args, **{"dtype": input.dtype, "device": input.device, **named})
    return made


def new(make: Any, input: Any, *args: Any, **named: Any) -> Tensor:
    """new_zeros and its kin."""
    need(isinstance(input, Form))
    made: Tensor = make(torch.empty(0, dtype=input.dtype, device=input.device), *args, **named)
    return made


RULES = {
    **{f"{name}_like": functools.partial(like, name) for name in ("zeros", "ones", "empty", "full", "rand", "randn")},
    **{
        name: functools.partial(new, getattr(Tensor, name))
        for name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
    },
}
