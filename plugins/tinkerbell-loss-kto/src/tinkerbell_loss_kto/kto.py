"""Kahneman-Tversky optimisation: completions liked or disliked, one by one, judged against the model's own drift."""

from __future__ import annotations

from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.errors import BadData
from tinkerbell_core.functional import per_sequence
from tinkerbell_loss_kto.pieces import Inputs, Judged, mean_over, read


@loss(
    coupling="batch",
    inputs=("target_tokens", "ref_logprobs", "desirable"),
    optional_inputs=("weights", "kl_log_ratio"),
    finite=("ref_logprobs", "desirable", "kl_log_ratio", "weights"),
)
def kto(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """w * (1 - sigmoid(+-beta * (log-ratio - z0))), + where liked, - where not: KTO (arXiv:2402.01306).

    z0 is the KL to the reference, at least 0, detached: the mean log-ratio of completions to other rows' prompts. They
    come as rows of `desirable` -1 in the same batch, or as `kl_log_ratio` `[B]`, measured before; without a graph
    either way. desirable `[B]` is 1 for a liked completion, 0 for another. Raises BadData where nothing measures it.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    z0 = _drift(found, loss_fn_inputs.get("kl_log_ratio"))
    ahead = beta * (found.log_ratio - z0)  # [B]
    return found.output(
        desirable_weight * (-ahead).sigmoid(), undesirable_weight * ahead.sigmoid(), beta, aggregation, kl=z0
    )


def _drift(found: Judged, kl_log_ratio: Tensor | None) -> Tensor:
    if kl_log_ratio is not None:
        per_sequence("kl_log_ratio", kl_log_ratio, found.logprobs)
        return mean_over(kl_log_ratio, found.liked | found.disliked | found.mismatched).clamp(min=0)
    judged = found.liked | found.disliked
    if bool(judged.any()) and not bool(found.mismatched.any()):
        raise BadData(
            "kto measures the KL by completions to other rows' prompts: add such rows, desirable -1, or kl_log_ratio"
        )
    return mean_over(found.log_ratio, found.mismatched).clamp(min=0)
