"""The loss that a request names: one loss, or a weighted sum described by its parts. Imports no torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from tinkerbell_core.errors import BadHyperparameter, BadLoss, did_you_mean
from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.registry import resolve
from tinkerbell_core.spec import Coupling, Part, Provenance
from tinkerbell_core.types import LossDescription

MAX_PARTS = 8
"""Largest number of losses in a sum."""

REJECTED_ROWS = "rejected_rows"
"""The hyperparameter of a row loss in a sum with a preference loss: whether it counts the rejected rows too."""


class Described(Protocol):
    """The fields that a sum reads of each part: those of LossSpec and of LossDescription."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...] | None: ...
    @property
    def optional_inputs(self) -> tuple[str, ...]: ...
    @property
    def hyperparameters(self) -> tuple[Hyperparameter, ...]: ...
    @property
    def coupling(self) -> Literal["sequence", "batch"]: ...
    @property
    def group_size(self) -> int: ...
    @property
    def preferred_rows(self) -> tuple[int, ...]: ...
    @property
    def finite(self) -> tuple[str, ...]: ...
    @property
    def digest(self) -> str: ...


D = TypeVar("D", bound=Described)


@dataclass(frozen=True, slots=True)
class Sum:
    """The fields that LossSpec and LossDescription have in common, for a sum.

    The hyperparameter `name` of a part is `part/name`. row_parts: the names of the parts that take single rows, if
    preferred_rows is not empty: they count the preferred rows only, unless their hyperparameter REJECTED_ROWS is true.
    """

    parts: tuple[Part, ...]
    name: str
    summary: str
    inputs: tuple[str, ...] | None
    optional_inputs: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    coupling: Coupling
    group_size: int
    finite: tuple[str, ...]
    digest: str
    source: str
    preferred_rows: tuple[int, ...]
    row_parts: tuple[str, ...]


def sum_of(weighted: Sequence[tuple[Described, float]], name: str | None = None) -> Sum:
    """The weighted sum of losses. Raises BadLoss for parts, weights or group sizes that cannot be combined."""
    if not 1 <= len(weighted) <= MAX_PARTS:
        raise BadLoss(f"a weighted sum has {len(weighted)} parts, but must have 1 to {MAX_PARTS}")
    parts = tuple(Part(loss.name, _weight(loss.name, weight), loss.id, loss.digest) for loss, weight in weighted)
    losses = [loss for loss, _ in weighted]
    _check_names(parts)
    terms = [f"{part.weight:.12g}*{part.name}" for part in parts]
    unknown = any(loss.inputs is None for loss in losses)
    inputs = _union(loss.inputs or () for loss in losses)
    optional = _union(loss.optional_inputs for loss in losses)
    size = _group_size(losses)
    preferred = _preferred_rows(losses, size)
    row_losses = [loss for loss in losses if loss.group_size == 1 and preferred]
    lines = [f"{part.weight!r} * {part.id} (digest {part.digest[:12]})" for part in parts]
    return Sum(
        parts=parts,
        name=name or "+".join(terms),
        summary=f"The weighted sum {' + '.join(terms)}.",
        inputs=None if unknown else inputs,
        optional_inputs=tuple(key for key in optional if key not in inputs),
        hyperparameters=tuple(
            replace(hyper, name=f"{loss.name}/{hyper.name}") for loss in losses for hyper in loss.hyperparameters
        )
        + tuple(_rejected_rows(loss) for loss in row_losses),
        coupling="batch" if any(loss.coupling == "batch" for loss in losses) else "sequence",
        group_size=size,
        finite=_union(loss.finite for loss in losses),
        digest=_digest(parts),
        source="\n".join(lines) + "\n",
        preferred_rows=preferred,
        row_parts=tuple(loss.name for loss in row_losses),
    )


def find_loss(loss_fn: str | Mapping[str, float], losses: Sequence[LossDescription]) -> LossDescription:
    """The description of a loss by its name, or of a weighted sum by the names and weights of its parts.

    Raises UnknownLoss or AmbiguousLoss for a name, BadLoss if the parts of a sum cannot be combined.
    """
    if isinstance(loss_fn, str):
        return resolve(loss_fn, losses)
    weighted = sum_of([(resolve(name, losses), weight) for name, weight in loss_fn.items()])
    return LossDescription(
        id="sum:" + "+".join(f"{part.weight:.12g}*{part.id}" for part in weighted.parts),
        name=weighted.name,
        summary=weighted.summary,
        inputs=weighted.inputs or (),
        optional_inputs=weighted.optional_inputs,
        hyperparameters=weighted.hyperparameters,
        coupling=weighted.coupling,
        group_size=weighted.group_size,
        finite=weighted.finite,
        provenance=Provenance(),
        digest=weighted.digest,
        source=weighted.source,
        parts=weighted.parts,
        preferred_rows=weighted.preferred_rows,
    )


def weights_of_sum(loss_fn: str | Mapping[str, float], loss: LossDescription) -> dict[str, float]:
    """The ids and weights of the parts, if a request asks for a weighted sum; empty if it names one loss."""
    return {} if isinstance(loss_fn, str) else {part.id: part.weight for part in loss.parts}


def uploads_in(loss: LossDescription) -> list[str]:
    """The ids of the uploaded losses among a loss and its parts."""
    return [id for id in (loss.id, *(part.id for part in loss.parts)) if id.startswith("upload:")]


def flat_config(config: Mapping[str, Any] | None, parts: Sequence[Part]) -> dict[str, Any]:
    """Convert `{"dpo": {"beta": 0.2}}` to `{"dpo/beta": 0.2}`. A key is the name or the id of a part.

    Raises BadHyperparameter for an unknown part, and for a hyperparameter of a sum that is not in the dict of a part.
    """
    names = {part.name: part.name for part in parts} | {part.id: part.name for part in parts}
    flat = {}
    for key, value in (config or {}).items():
        if not isinstance(value, Mapping):
            if parts and "/" not in key:
                example = f'{{"{parts[0].name}": {{"{key}": ...}}}}'
                raise BadHyperparameter(f"{key!r} is not the name of a part of the sum: pass loss_fn_config={example}")
            flat[key] = value
            continue
        if not parts:
            raise BadHyperparameter(
                f"loss_fn_config[{key!r}] is a dict, which only a weighted sum accepts: pass a number or a string"
            )
        if key not in names:
            known = ", ".join(part.name for part in parts)
            raise BadHyperparameter(f"the sum has no part {key!r}{did_you_mean(key, names)} (its parts: {known})")
        flat |= {f"{names[key]}/{name}": setting for name, setting in value.items()}
    return flat


def _weight(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise BadLoss(f"the weight of {name!r} is {weight!r}, but must be a finite number")
    return float(weight)


def _check_names(parts: tuple[Part, ...]) -> None:
    seen: dict[str, Part] = {}
    for part in parts:
        if part.name in seen:
            twice = part.id if part.id == seen[part.name].id else f"{seen[part.name].id} and {part.id}"
            raise BadLoss(
                f"two parts of a weighted sum are named {part.name!r} ({twice}): add their weights or rename one"
            )
        seen[part.name] = part


def _group_size(losses: Sequence[Described]) -> int:
    largest = max(losses, key=lambda loss: loss.group_size)
    for loss in losses:
        if largest.group_size % loss.group_size:
            raise BadLoss(
                f"{loss.name!r} takes rows in groups of {loss.group_size} and {largest.name!r} in groups of "
                f"{largest.group_size}, and no batch has both: call them one after the other before optim_step"
            )
    return largest.group_size


def _preferred_rows(losses: Sequence[Described], size: int) -> tuple[int, ...]:
    """The places in a group of `size` rows that every preference loss among these prefers; empty if there is none."""
    preferences = [loss for loss in losses if loss.preferred_rows]
    return tuple(
        row
        for row in range(size)
        if preferences and all(row % loss.group_size in loss.preferred_rows for loss in preferences)
    )


def _rejected_rows(loss: Described) -> Hyperparameter:
    if any(hyper.name == REJECTED_ROWS for hyper in loss.hyperparameters):
        raise BadLoss(
            f"loss {loss.name!r} has a hyperparameter {REJECTED_ROWS!r}, which a sum with a preference loss adds to "
            "each loss of single rows: rename it"
        )
    return Hyperparameter(f"{loss.name}/{REJECTED_ROWS}", "bool", False)


def _digest(parts: tuple[Part, ...]) -> str:
    hashed = hashlib.sha256(b"sum")
    for part in parts:
        hashed.update(f"{len(part.name)}:{part.name}{part.weight!r}:{part.digest}".encode())
    return hashed.hexdigest()


def _union(several: Any) -> tuple[str, ...]:  # Any: an iterable of iterables of names
    return tuple(dict.fromkeys(name for names in several for name in names))
