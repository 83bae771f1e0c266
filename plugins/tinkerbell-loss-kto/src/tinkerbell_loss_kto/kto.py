"""Kahneman-Tversky optimisation (KTO): compares the log-ratio of a completion with the KL to the reference."""

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
    """w * (1 - sigmoid(+-beta * (log-ratio - z0))), + if liked, - if not: KTO (arXiv:2402.01306).

    w is desirable_weight or undesirable_weight. z0 estimates the KL to the reference: the mean log-ratio of mismatched
    rows, which are completions with the prompts of other rows; at least 0, detached. The mismatched rows are rows with
    `desirable` -1 in the same batch, or kl_log_ratio `[B]` contains their log-ratios. desirable: `[B]`, 1 for a liked
    completion, 0 for a disliked one. Raises BadData if there are neither mismatched rows nor kl_log_ratio.
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
            "kto cannot estimate the KL: the batch has no mismatched rows (desirable -1, the prompt of another row); "
            "add such rows, or send kl_log_ratio"
        )
    return mean_over(found.log_ratio, found.mismatched).clamp(min=0)
