"""Finds the loss that a request names: one of the losses of the server, or a weighted sum of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tinkerbell_core.registry import resolve
from tinkerbell_core.spec import Provenance
from tinkerbell_core.types import LossDescription
from tinkerbell_core.weighted_sum import sum_of

DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""The form `my.module:function`; the groups are the module and the function."""


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
    )


def weights_of_sum(loss_fn: str | Mapping[str, float], loss: LossDescription) -> dict[str, float]:
    """The ids and weights of the parts, if a request asks for a weighted sum; empty if it names one loss."""
    return {} if isinstance(loss_fn, str) else {part.id: part.weight for part in loss.parts}


def uploads_in(loss: LossDescription) -> list[str]:
    """The ids of the uploaded losses among a loss and its parts."""
    return [id for id in (loss.id, *(part.id for part in loss.parts)) if id.startswith("upload:")]


def is_dotted(name: str) -> bool:
    """Whether a name has the form `my.module:function`."""
    return DOTTED.fullmatch(name) is not None
