"""Which loss a call means: one of those there are, or a weighted sum of several. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tinkerbell_core.registry import resolve
from tinkerbell_core.spec import Provenance
from tinkerbell_core.types import LossDescription
from tinkerbell_core.weighted_sum import sum_of


def find_loss(loss_fn: str | Mapping[str, float], losses: Sequence[LossDescription]) -> LossDescription:
    """The description of a name, or of the sum of names and weights.

    Raises UnknownLoss, AmbiguousLoss; BadLoss for parts, weights or groups that do not go together.
    """
    if isinstance(loss_fn, str):
        return resolve(loss_fn, losses)
    made = sum_of([(resolve(name, losses), weight) for name, weight in loss_fn.items()])
    return LossDescription(
        id="sum:" + "+".join(f"{part.weight:.12g}*{part.id}" for part in made.parts),
        name=made.name,
        summary=made.summary,
        inputs=made.inputs or (),
        optional_inputs=made.optional_inputs,
        hyperparameters=made.hyperparameters,
        coupling=made.coupling,
        group_size=made.group_size,
        finite=made.finite,
        provenance=Provenance(),
        digest=made.digest,
        source=made.source,
        parts=made.parts,
    )


def weights_of_sum(loss_fn: str | Mapping[str, float], loss: LossDescription) -> dict[str, float]:
    """The ids and weights of a sum made for one call; empty for a loss that has a name of its own."""
    return {} if isinstance(loss_fn, str) else {part.id: part.weight for part in loss.parts}


def uploads_in(loss: LossDescription) -> list[str]:
    """Ids of what somebody uploaded, among a loss and its parts."""
    return [id for id in (loss.id, *(part.id for part in loss.parts)) if id.startswith("upload:")]


DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def is_dotted(name: str) -> bool:
    """Whether a name has the form `my.module:function`."""
    return DOTTED.fullmatch(name) is not None
