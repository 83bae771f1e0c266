"""Direct preference optimisation and its variants: make the chosen completion more likely than the rejected one."""

from __future__ import annotations

from tinkerbell_core import LossSpec, hookimpl
from tinkerbell_loss_dpo.batches import aot, aot_unpaired
from tinkerbell_loss_dpo.divergences import dpo_alpha, dpo_forward_kl, dpo_js
from tinkerbell_loss_dpo.lengths import ld_dpo, wpo
from tinkerbell_loss_dpo.margins import discopop, dpo, dpo_hinge, dpo_norm, dpop, exo, ipo, ipo_norm, robust_dpo
from tinkerbell_loss_dpo.mixes import mpo
from tinkerbell_loss_dpo.rewards import apo_down, apo_zero, bco_pair, cal_dpo, nca, sppo_hard

__all__ = [
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "cal_dpo",
    "discopop",
    "dpo",
    "dpo_alpha",
    "dpo_forward_kl",
    "dpo_hinge",
    "dpo_js",
    "dpo_norm",
    "dpop",
    "exo",
    "ipo",
    "ipo_norm",
    "ld_dpo",
    "mpo",
    "nca",
    "register_losses",
    "robust_dpo",
    "sppo_hard",
    "wpo",
]


@hookimpl
def register_losses() -> list[LossSpec]:
    return [
        *(dpo, dpo_norm, robust_dpo, dpo_hinge, ipo, ipo_norm, exo, discopop, dpop),
        *(nca, bco_pair, sppo_hard, cal_dpo, apo_zero, apo_down),
        *(dpo_forward_kl, dpo_js, dpo_alpha),
        *(ld_dpo, wpo),
        *(aot, aot_unpaired),
        mpo,
    ]
