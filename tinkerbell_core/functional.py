"""Functions to write losses with. They compute in float32 or better, handle masks, and keep values on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.errors import BadData, BadHyperparameter, did_you_mean

__all__ = [
    "Aggregation",
    "aggregate",
    "aggregate_sequences",
    "counted",
    "counted_rows",
    "effective_mask",
    "entropy",
    "hidden_states",
    "logsumexp",
    "masked_mean",
    "masked_sum",
    "pairs",
    "per_sequence",
    "preferred",
    "reward_diagnostics",
    "sequence_log_ratio",
    "sequence_mean",
    "sequence_nll",
    "sequence_sum",
    "spread_rows",
    "target_logprobs",
]

Aggregation = Literal["sum", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]

_IGNORED = -100


def target_logprobs(model_outputs: Tensor, target_tokens: Tensor, where: Tensor | None = None) -> Tensor:
    """Log-probabilities of the targets under the logits: `[B, T]`, or `[B, T, K]` for K targets per position.

    where: `[B, T]`, or `[B, T, K]` like the targets. A position where it is 0 gives 0 and no gradient, costs nothing on
    lazy logits, and may have any target.
    """
    targets = target_tokens.long()
    if targets.dim() == model_outputs.dim():
        return _several_logprobs(model_outputs, targets, where)
    if where is not None:
        targets = targets.masked_fill(where == 0, _IGNORED)
    losses = F.cross_entropy(
        _float32(model_outputs).flatten(0, -2), targets.flatten(), reduction="none", ignore_index=_IGNORED
    )
    return -losses.view(targets.shape)


def entropy(model_outputs: Tensor, where: Tensor | None = None) -> Tensor:
    """Entropy of the next-token distribution at each position, `[B, T]`; 0 at positions where `where` is 0."""
    if where is not None:
        return _scattered(entropy(model_outputs[where != 0]), where != 0)
    logprobs = _float32(model_outputs).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def logsumexp(model_outputs: Tensor, where: Tensor | None = None) -> Tensor:
    """Log of the sum of the exponentials of the logits, `[B, T]`; 0 at positions where `where` is 0."""
    if where is not None:
        return _scattered(logsumexp(model_outputs[where != 0]), where != 0)
    return _float32(model_outputs).logsumexp(-1)


def hidden_states(model_outputs: Tensor) -> Tensor:
    """Hidden states after the final norm, `[B, T, H]`, attached to the graph.

    Raises TypeError for a tensor without hidden states. The `model_outputs` argument of a loss has them; a tensor that
    is computed from it does not.
    """
    hidden = getattr(model_outputs, "hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            "this tensor has no hidden states: call hidden_states() on the model_outputs argument of the loss, "
            "before any operation on it (in a test, create it with tinkerbell_core.logits.plain_logits(hidden, head))"
        )
    return hidden


def effective_mask(loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> Tensor:
    """`weights` (default 1) times the attention mask: float `[B, T]`, or `[B, T, K]` if the weights are.

    A position counts if its value is not 0, and the value multiplies its loss. Weights may be negative. They may be
    `[B]`, with one value per sequence.
    """
    weights = loss_fn_inputs.get("weights")
    if weights is None:
        return attention_mask.float()
    if weights.dim() == 1:
        weights = weights[:, None]
    real = attention_mask != 0
    return torch.where(real[..., None] if weights.dim() == 3 else real, _float32(weights), 0.0)


def counted(x: Tensor, mask: Tensor) -> Tensor:
    """`x` at positions where the mask is not 0, else 0; x is `[B, T]` or `[B]`. Use it BEFORE an exp."""
    return torch.where(mask != 0, x[:, None] if x.dim() == 1 else x, 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x times the mask, a scalar. NaN and inf are ignored at positions where the mask is 0."""
    return (counted(x, mask) * mask).sum()


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x times the mask over the positions of each sequence, `[B]`."""
    return (counted(x, mask) * mask).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Unweighted mean of x over the positions that count, 0 if none does: a detached scalar, for diagnostics."""
    keep = mask != 0
    return counted(x.detach(), keep).sum() / keep.sum().clamp(min=1)


def aggregate(per_token: Tensor, mask: Tensor, aggregation: str = "sum") -> Tensor:
    """Reduce a loss per token, `[B, T]` or `[B, T, K]`, times the mask to a scalar that is attached to the graph.

    sum: the sum over all positions. token-mean: the sum divided by the number of positions that count.
    seq-mean-token-mean: the mean of each sequence, then the mean over all B. seq-mean-token-sum: the sum of each
    sequence, then the mean over all B. Every aggregation except sum depends on the whole batch. Raises
    BadHyperparameter for any other name.
    """
    if aggregation not in get_args(Aggregation):
        known = get_args(Aggregation)
        raise BadHyperparameter(
            f"no aggregation {aggregation!r}{did_you_mean(aggregation, known)} (available: {', '.join(known)})"
        )
    if per_token.dim() > mask.dim():
        mask = mask[..., None].expand(per_token.shape)
    weighted = counted(per_token, mask) * mask
    if aggregation == "sum":
        return weighted.sum()
    keep = (mask != 0).any(-1) if mask.dim() == 3 else mask != 0  # [B, T]
    sums = weighted.flatten(1).sum(-1)  # [B]
    if aggregation == "token-mean":
        return sums.sum() / keep.sum().clamp(min=1)
    if aggregation == "seq-mean-token-mean":
        sums = sums / keep.sum(-1).clamp(min=1)
    return sums.mean()


def _several_logprobs(model_outputs: Tensor, targets: Tensor, where: Tensor | None) -> Tensor:
    """Log-probabilities `[B, T, K]` of targets `[B, T, K]`."""
    if where is None:
        return _float32(model_outputs).log_softmax(-1).gather(-1, targets)
    keep = (where if where.dim() == targets.dim() else where[..., None]).expand(targets.shape) != 0
    rows = keep.any(-1)  # [B, T]
    wanted = keep[rows]  # [n, K]
    found = _several_logprobs(model_outputs[rows], torch.where(wanted, targets[rows], 0), None)
    return _scattered(torch.where(wanted, found, 0.0), rows[..., None].expand(targets.shape))


def _scattered(values: Tensor, keep: Tensor) -> Tensor:
    """A tensor with the values, in order, at positions where keep is true, and 0 elsewhere."""
    return values.new_zeros(keep.shape).masked_scatter(keep, values)


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x times the mask in each sequence, divided by its number of counted positions, `[B]`; 0 if none."""
    return sequence_sum(x, mask) / (mask != 0).sum(-1).clamp(min=1)  # [B]


def sequence_log_ratio(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Log-ratio of the policy to the reference, summed over each sequence, `[B]`; 0 if no position counts.

    reference: log-probabilities `[B, T]`, or their sums `[B]`.
    """
    if reference.dim() == 2:
        return sequence_sum(logprobs - reference, mask)
    return sequence_sum(logprobs, mask) - torch.where((mask != 0).any(-1), reference, 0.0)


def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into the chosen (rows 2i) and the rejected (rows 2i + 1). Raises BadData for an odd number of rows."""
    if len(rows) % 2:
        raise BadData(f"{len(rows)} rows, but a batch of pairs has an even number: chosen, rejected, chosen, ...")
    return rows[0::2], rows[1::2]


def preferred(margin: Tensor, flipped: float = 0.0) -> Tensor:
    """The preference loss -log sigmoid(margin); flipped is the fraction of labels that are assumed to be swapped."""
    right = -F.logsigmoid(margin)
    return (1 - flipped) * right - flipped * F.logsigmoid(-margin) if flipped else right


def reward_diagnostics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Diagnostics of the rewards of P pairs, each `[P]`."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "reward_accuracy": (chosen > rejected).float().mean(),
        "reward_margin": (chosen - rejected).mean(),
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
    }


def aggregate_sequences(per_sequence: Tensor, counts: Tensor, aggregation: str = "sum") -> Tensor:
    """Reduce a loss per sequence (or per group), `[B]`, to a scalar: `aggregate` with one token per sequence.

    counts: `[B]`; a sequence where it is 0 adds nothing. sum: the sum. token-mean: divided by the number of sequences
    that count. The other aggregations: divided by B.
    """
    return aggregate(per_sequence[:, None], counts[:, None], aggregation)


def sequence_nll(logprobs: Tensor, mask: Tensor, aggregation: str = "sum") -> Tensor:
    """Negative log-likelihood to add to a loss per sequence, a scalar.

    "sum" is the sum of the mean of each sequence, because a sum over tokens would be much larger than a preference loss
    of one number per sequence. The other aggregations are those of `aggregate`.
    """
    if aggregation == "sum":
        return aggregate(-logprobs, mask, "seq-mean-token-mean") * len(mask)
    return aggregate(-logprobs, mask, aggregation)


def per_sequence(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Return the input x if it has one number per row. Raises ValueError if it is not `[B]`.

    name: of the input, for the error. Without this check, `[B, T]` would broadcast over rows if B equals T.
    """
    if x.shape != mask.shape[:1]:
        raise ValueError(f"{name} is {list(x.shape)}, but must have one number per row, [{len(mask)}]")
    return x


def counted_rows(x: Tensor, where: Tensor) -> Tensor:
    """The positions of x `[B, T, ...]` at which `where` `[B, T]` is not 0: `[n, ...]`, floats in float32 or better.

    A computation on the result does not depend on the other positions, and does not spend time on them.
    """
    rows = x[where != 0]
    return _float32(rows) if rows.is_floating_point() else rows


def spread_rows(rows: Tensor, where: Tensor) -> Tensor:
    """The inverse of `counted_rows`: `[n]` numbers at their positions `[B, T]`; 0 elsewhere."""
    return _scattered(rows, where != 0)
