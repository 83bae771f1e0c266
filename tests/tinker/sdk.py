"""Helpers to create clients and datums with any supported version of the SDK."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

LINEAR = types.AdamParams(learning_rate=1e4, beta1=0.9, beta2=0.999, eps=1e4)
"""A first step with these is the scaled gradient, because eps is large compared to the normalisation of AdamW."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def has(version: str) -> bool:
    """Whether this SDK has at least this version."""
    return _numbers(tinker.__version__) >= _numbers(version)


def since(version: str, feature: str) -> pytest.MarkDecorator:
    """Skip a test if the SDK is older than the release that added a feature."""
    return pytest.mark.skipif(
        not has(version), reason=f"SDK {tinker.__version__} has no {feature}; release {version} added it"
    )


def now(value: Any) -> Any:  # Any: a client, or in later SDKs a future of one
    """The value that an SDK returns directly or, in later releases, as a future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return value.result() if callable(getattr(type(value), "result", None)) else value


def new_model(service: tinker.ServiceClient, base: Path, rank: int = 4, seed: int | None = 1, **options: Any) -> Any:
    return now(service.create_lora_training_client(base_model=str(base), rank=rank, seed=seed, **options))


def text(length: int = 12, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def datum(ids: Sequence[int], **inputs: Any) -> types.Datum:
    """A datum in which each token predicts the next one."""
    made = {
        name: value if isinstance(value, types.TensorData) else tensor(value)
        for name, value in {"target_tokens": list(ids[1:]), **inputs}.items()
    }
    return types.Datum(model_input=types.ModelInput.from_ints(list(ids[:-1])), loss_fn_inputs=made)


def tensor(value: Any) -> types.TensorData:
    array = np.asarray(value)
    return types.TensorData.from_numpy(array.astype(np.int64 if array.dtype.kind == "i" else np.float32))


def logprobs_of(output: Any) -> list[torch.Tensor]:
    return [given["logprobs"].to_torch() for given in output.loss_fn_outputs]


def rl_datums(model: Any, count: int = 3, seed: int = 5) -> list[types.Datum]:
    """Rows of different lengths, with advantages of both signs and logprobs that differ a little from the model."""
    rng = np.random.default_rng(seed)
    rows = [text(8 + 3 * index, seed + index) for index in range(count)]
    current = logprobs_of(
        model.forward([datum(row, weights=[1.0] * (len(row) - 1)) for row in rows], "cross_entropy").result()
    )
    return [
        datum(
            row,
            logprobs=logprobs.numpy() + rng.normal(0, 0.3, len(row) - 1),
            advantages=rng.normal(0, 1, len(row) - 1),
        )
        for row, logprobs in zip(rows, current, strict=True)
    ]


def inputs_of(one: types.Datum) -> dict[str, torch.Tensor]:
    return {name: value.to_torch() for name, value in one.loss_fn_inputs.items()}


def close(one: float, other: float, tolerance: float = 1e-4) -> bool:
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
