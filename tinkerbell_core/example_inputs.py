"""Generates the inputs of a small batch for a loss, and records which keys the loss reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData

LENGTHS = (8, 5, 7, 3)
"""Lengths of the sequences of a generated batch."""

_K = 4  # width of a `[B, T, K]` input


class ExampleInputs(Mapping[str, Tensor]):
    """loss_fn_inputs that contain every key: a value is generated when the loss reads it.

    `inputs[key]` records the key as required; `.get(key)` and `in` record it as optional if it is not required yet.
    given: values that are used instead of generated ones. per_sequence: keys to generate as `[B]` instead of `[B, T]`.
    absent: keys that are reported as missing.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        vocab_size: int,
        given: Mapping[str, Tensor],
        per_sequence: frozenset[str] = frozenset(),
        absent: frozenset[str] = frozenset(),
    ) -> None:
        self._mask = attention_mask
        self._vocab_size = vocab_size
        self._given = {key: value.to(attention_mask.device) for key, value in given.items()}
        self._per_sequence = per_sequence
        self._absent = absent
        self._generated: dict[str, Tensor] = {}
        self.required: list[str] = []
        self.optional: list[str] = []

    def __getitem__(self, key: str) -> Tensor:
        if key in self._absent:
            raise KeyError(key)
        if key not in self.required and key not in self.optional:
            self.required.append(key)
        return self._value(key)

    def get(self, key: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        return self._value(key) if key in self else default

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        if key not in self.required and key not in self.optional:
            self.optional.append(key)
        return key not in self._absent

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in {**self._given, **self._generated} if key not in self._absent])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def guessed(self) -> dict[str, str]:
        """The generated inputs: key → dtype and shape as text."""
        return {key: f"{str(v.dtype).removeprefix('torch.')} {_shape(v)}" for key, v in self._generated.items()}

    def _value(self, key: str) -> Tensor:
        if key in self._given:
            return self._given[key]
        if key not in self._generated:
            self._generated[key] = guess(key, self._mask, self._vocab_size, per_sequence=key in self._per_sequence)
        return self._generated[key]


def guess(key: str, attention_mask: Tensor, vocab_size: int, *, per_sequence: bool = False) -> Tensor:
    """A plausible input for a name, `[B, T]`, or `[B]` if per_sequence.

    Names that end in `tokens` or `ids` give token ids, weights and masks give ones, and all others give floats. Names
    that end in `logits` have a third dimension V; names that contain `topk` have a third dimension K.
    """
    width = vocab_size if key.endswith("logits") else min(_K, vocab_size) if "topk" in key else None
    shape: tuple[int, ...] = attention_mask.shape[:1] if per_sequence else attention_mask.shape
    real = torch.ones_like(attention_mask[:, 0]) if per_sequence else attention_mask
    if width is not None and not per_sequence:
        shape, real = (*shape, width), real[..., None]
    device = attention_mask.device
    if key.endswith(("tokens", "ids")):
        return torch.randint(vocab_size, shape, device=device) * real.long()
    if key.endswith(("weights", "weight", "mask")):
        return real.float()
    floats = torch.rand(shape, device=device)
    return (-floats if "logprob" in key else floats) * real


def ragged_mask(group_size: int, given: Mapping[str, Tensor], device: str | torch.device) -> Tensor:
    """attention_mask `[B, T]` of 4 ragged sequences (more if the groups are larger), or of the batch in `given`.

    Raises BadData if the given inputs have different numbers of rows or positions, or do not fill whole groups.
    """
    if not given:
        rows = -(-len(LENGTHS) // group_size) * group_size
        lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)], device=device)
        return (torch.arange(max(LENGTHS), device=device) < lengths[:, None]).float()
    for key, value in given.items():
        if value.dim() == 0:
            raise BadData(f"example_inputs[{key!r}] is a scalar, but its first dimension must be the batch")
    sizes = {key: value.shape[0] for key, value in given.items()}
    rows = next(iter(sizes.values()))
    if len(set(sizes.values())) > 1 or rows % group_size:
        raise BadData(
            f"example_inputs have {sizes} rows, but must all have the same number, a multiple of {group_size}"
        )
    positions = {key: value.shape[1] for key, value in given.items() if value.dim() > 1}
    if len(set(positions.values())) > 1:
        raise BadData(f"example_inputs have {positions} positions, but must all have the same number")
    return torch.ones(rows, next(iter(positions.values()), max(LENGTHS)), device=device)


def _shape(value: Tensor) -> str:
    return ["[B]", "[B, T]", "[B, T, K]"][value.dim() - 1]
