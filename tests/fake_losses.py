"""The losses that the fake engine lists: descriptions without functions."""

from __future__ import annotations

import hashlib

from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.spec import Coupling, Provenance
from tinkerbell_core.types import LossDescription


def built_ins() -> dict[str, LossDescription]:
    """The descriptions by id. Two losses have the name `twice`."""
    clip = (
        Hyperparameter("clip_low_threshold", "float", 0.8),
        Hyperparameter("clip_high_threshold", "float", 1.2),
    )
    losses = [
        _loss("cross_entropy", ("target_tokens",), optional=("weights",)),
        _loss("importance_sampling", ("target_tokens", "logprobs", "advantages")),
        _loss("ppo", ("target_tokens", "logprobs", "advantages"), hyperparameters=clip),
        _loss(
            "dpo",
            ("target_tokens", "ref_logprobs"),
            optional=("weights",),
            hyperparameters=(Hyperparameter("beta", "float", 0.1),),
            group_size=2,
            distribution="tinkerbell-loss-dpo",
        ),
        _loss("twice", ("target_tokens",), distribution="one"),
        _loss("twice", ("target_tokens",), distribution="two"),
    ]
    return {loss.id: loss for loss in losses}


def _loss(
    name: str,
    inputs: tuple[str, ...],
    *,
    optional: tuple[str, ...] = (),
    hyperparameters: tuple[Hyperparameter, ...] = (),
    group_size: int = 1,
    coupling: Coupling = "sequence",
    distribution: str = "tinkerbell-core",
) -> LossDescription:
    return LossDescription(
        id=f"{distribution}:{name}",
        name=name,
        summary=f"A pretended {name}.",
        inputs=inputs,
        optional_inputs=optional,
        hyperparameters=hyperparameters,
        coupling=coupling,
        group_size=group_size,
        finite=("advantages",) if "advantages" in inputs else (),
        provenance=Provenance(kind="entry_point", distribution=distribution, version="0"),
        digest=hashlib.sha256(f"{distribution}:{name}".encode()).hexdigest(),
    )
