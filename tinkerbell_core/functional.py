"""The pieces losses are written from; float32 or better, safe under masks, and they stay on the device."""

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
    """Log-probabilities of the targets under the logits: `[B, T]`, or `[B, T, K]` where there are K targets a position.

    where: `[B, T]`, or `[B, T, K]` as the targets are; a position where it is 0 gives 0 and no gradient, costs nothing
    on lazy logits, and its target may be anything.
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
    """Entropy of the next-token distribution at each position, `[B, T]`; 0 where `where` is, as above."""
    if where is not None:
        return _scattered(entropy(model_outputs[where != 0]), where != 0)
    logprobs = _float32(model_outputs).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def logsumexp(model_outputs: Tensor, where: Tensor | None = None) -> Tensor:
    """Log of the sum of the exponentials of the logits at each position, `[B, T]`; 0 where `where` is, as above."""
    if where is not None:
        return _scattered(logsumexp(model_outputs[where != 0]), where != 0)
    return _float32(model_outputs).logsumexp(-1)


def hidden_states(model_outputs: Tensor) -> Tensor:
    """Hidden states after the final norm, `[B, T, H]`, attached to the graph.

    Raises TypeError for a tensor that carries none: the `model_outputs` a loss was given does, what is computed from it
    does not.
    """
    hidden = getattr(model_outputs, "hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            "this tensor carries no hidden states: pass hidden_states() the model_outputs the loss was given, "
            "before any operation on it (in a test: tinkerbell_core.logits.plain_logits(hidden, head))"
        )
    return hidden


def effective_mask(loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> Tensor:
    """`weights` (default 1) times the attention mask, float, `[B, T]`; `[B, T, K]` where the weights are.

    A position counts where it is not 0; there it multiplies. Weights may have any sign, or be `[B]`, one a sequence.
    """
    weights = loss_fn_inputs.get("weights")
    if weights is None:
        return attention_mask.float()
    if weights.dim() == 1:
        weights = weights[:, None]
    real = attention_mask != 0
    return torch.where(real[..., None] if weights.dim() == 3 else real, _float32(weights), 0.0)


def counted(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is not 0, else 0; x may be `[B]`, one number for a sequence. Comes BEFORE an exp."""
    return torch.where(mask != 0, x[:, None] if x.dim() == 1 else x, 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x times the mask over everything, a scalar; NaN and inf where the mask is 0 do no harm."""
    return (counted(x, mask) * mask).sum()


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x times the mask over the positions of each sequence, `[B]`."""
    return (counted(x, mask) * mask).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the positions that count, each once, 0 where none does; a scalar without a graph, to be shown."""
    keep = mask != 0
    return counted(x.detach(), keep).sum() / keep.sum().clamp(min=1)


def aggregate(per_token: Tensor, mask: Tensor, aggregation: str = "sum") -> Tensor:
    """One scalar of a loss per token, `[B, T]` or `[B, T, K]`, times the mask; attached to the graph whatever counts.

    sum: over everything. token-mean: divided by the number of positions that count. seq-mean-token-mean: that mean in
    each sequence, then the mean over all B. seq-mean-token-sum: the sum in each, then the mean over all B.
    Any but sum depends on the whole batch. Raises BadHyperparameter for another name.
    """
    if aggregation not in get_args(Aggregation):
        known = get_args(Aggregation)
        raise BadHyperparameter(
            f"no aggregation {aggregation!r}{did_you_mean(aggregation, known)} (there is: {', '.join(known)})"
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
    """`[B, T, K]` of targets `[B, T, K]`."""
    if where is None:
        return _float32(model_outputs).log_softmax(-1).gather(-1, targets)
    keep = (where if where.dim() == targets.dim() else where[..., None]).expand(targets.shape) != 0
    rows = keep.any(-1)  # [B, T]
    wanted = keep[rows]  # [n, K]
    found = _several_logprobs(model_outputs[rows], torch.where(wanted, targets[rows], 0), None)
    return _scattered(torch.where(wanted, found, 0.0), rows[..., None].expand(targets.shape))


def _scattered(found: Tensor, keep: Tensor) -> Tensor:
    """What was found, in order, where keep is true, and 0 elsewhere."""
    return found.new_zeros(keep.shape).masked_scatter(keep, found)


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The sum of x times the mask in each sequence, divided by the number of its positions that count; 0 for none."""
    return sequence_sum(x, mask) / (mask != 0).sum(-1).clamp(min=1)  # [B]


def sequence_log_ratio(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """How much likelier each sequence is than under the reference, `[B]`: the log-ratio, summed; 0 where none counts.

    reference: `[B, T]`, or `[B]`, summed already.
    """
    if reference.dim() == 2:
        return sequence_sum(logprobs - reference, mask)
    return sequence_sum(logprobs, mask) - torch.where((mask != 0).any(-1), reference, 0.0)


def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows 2i, the chosen, and rows 2i + 1, the rejected. Raises BadData for an odd number of rows."""
    if len(rows) % 2:
        raise BadData(f"{len(rows)} rows, but they come in pairs: chosen, rejected, chosen, ...")
    return rows[0::2], rows[1::2]


def preferred(margin: Tensor, flipped: float = 0.0) -> Tensor:
    """-log sigmoid(margin), what a preference costs; for a share of flipped labels, that of the opposite one."""
    right = -F.logsigmoid(margin)
    return (1 - flipped) * right - flipped * F.logsigmoid(-margin) if flipped else right


def reward_diagnostics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What to watch of the rewards of pairs, `[P]` each."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "reward_accuracy": (chosen > rejected).float().mean(),
        "reward_margin": (chosen - rejected).mean(),
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
    }


def aggregate_sequences(per_sequence: Tensor, counts: Tensor, aggregation: str = "sum") -> Tensor:
    """One scalar of a loss per sequence (or per group), `[B]`: aggregate as if each were one token.

    counts: `[B]`; where it is 0 the sequence adds nothing. sum: the sum. token-mean: divided by how many count. The
    others: divided by all B.
    """
    return aggregate(per_sequence[:, None], counts[:, None], aggregation)


def sequence_nll(logprobs: Tensor, mask: Tensor, aggregation: str = "sum") -> Tensor:
    """Negative log-likelihood to stand beside a loss per sequence, a scalar; for "sum", the sum of each one's mean.

    The other aggregations are aggregate's; a likelihood summed over tokens would drown a preference of one number.
    """
    if aggregation == "sum":
        return aggregate(-logprobs, mask, "seq-mean-token-mean") * len(mask)
    return aggregate(-logprobs, mask, aggregation)


def per_sequence(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The input x called `name`, one number a row. Raises ValueError where it is not `[B]`.

    Where B and T are equal, `[B, T]` would spread over rows without a word.
    """
    if x.shape != mask.shape[:1]:
        raise ValueError(f"{name} is {list(x.shape)}, but must be one number a row, [{len(mask)}]")
    return x


def counted_rows(x: Tensor, where: Tensor) -> Tensor:
    """The positions of x `[B, T, ...]` where `where` `[B, T]` is not 0, one after the other: `[n, ...]`.

    What is computed from them alone can do no harm elsewhere, and costs nothing there. Floats are float32 or better.
    """
    rows = x[where != 0]
    return _float32(rows) if rows.is_floating_point() else rows


def spread_rows(rows: Tensor, where: Tensor) -> Tensor:
    """Numbers `[n]`, one for each counted row, back at their positions `[B, T]`; 0 elsewhere."""
    return _scattered(rows, where != 0)
