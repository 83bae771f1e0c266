"""Rules for the loss functions of torch over a vocabulary. They read only the rows that count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, as_form, require
from tinkerbell_core.logits.lazy.gather_topk import columns
from tinkerbell_core.logits.lazy.softmaxes import softmax
from tinkerbell_core.logits.lazy.sums import row_sum
from tinkerbell_core.logits.lazy.weighted import Weighted


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    form = as_form(input)
    require(isinstance(target, Tensor), size_average is None, reduce is None)
    logprobs = softmax("logprobs", form, min(1, len(form.shape) - 1))
    if target.is_floating_point():
        return _soft_targets(logprobs, target, weight, reduction, label_smoothing)
    return _hard_targets(logprobs, target, weight, ignore_index, reduction, label_smoothing)


def nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    require(isinstance(target, Tensor) and not target.is_floating_point(), size_average is None, reduce is None)
    return _hard_targets(as_form(input), target, weight, ignore_index, reduction, 0.0)


def kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor | Weighted:
    """target * (log target - input), to be summed over the vocabulary. Either argument may be the logits."""
    require(size_average is None, reduce is None, reduction in ("none", "sum", "mean", "batchmean"))
    if isinstance(target, Form):
        divergence = _from_model(target, input, log_target)
    else:
        form = as_form(input)
        require(isinstance(target, Tensor), form.vocab_last, form.constant is None)
        require(target.shape == form.shape, target.dtype == form.dtype, not target.requires_grad)
        weight = target.exp() if log_target else target
        constant = weight * target if log_target else torch.xlogy(target, target)
        divergence = Weighted(weight, form.times(-1.0), constant=constant)
    if reduction == "none":
        return divergence
    summed = row_sum(divergence).sum()
    if reduction == "mean":
        return summed / divergence.shape.numel()
    return summed / divergence.shape[0] if reduction == "batchmean" else summed


def _from_model(target: Form, input: Any, log_target: bool) -> Weighted:
    """The divergence of the probabilities of the model from log-probabilities `input`."""
    require(isinstance(input, Tensor), input.shape == target.shape, input.dtype == target.dtype, target.vocab_last)
    require(target.kind == ("logprobs" if log_target else "probs"), target.unmodified)
    value = replace(replace(target, kind="logprobs").plus_constant(input), constant_scale=-1.0)
    return Weighted(replace(target, kind="probs"), value)


def _hard_targets(
    form: Form, target: Tensor, weight: Any, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    require(form.axis == min(1, len(form.shape) - 1), target.shape == form.rows.shape, target.dtype == torch.int64)
    require(_is_weight(weight, form), reduction in ("none", "mean", "sum"), 0.0 <= label_smoothing <= 1.0)
    counts = target != ignore_index
    # ignored rows are not computed
    counted = form.reindexed(torch.Tensor.flatten if bool(counts.all()) else lambda part: part[counts])
    chosen = target[counts]  # [n]
    share = torch.ones((), dtype=form.dtype, device=form.device).expand(chosen.shape)
    values, _ = columns(counted, chosen[:, None])  # first, because it checks the targets
    if weight is not None:
        share = weight[chosen].to(form.dtype)
    losses = -values[:, 0] * share
    if label_smoothing:
        spread = row_sum(counted) if weight is None else row_sum(Weighted(weight, counted))
        losses = losses * (1 - label_smoothing) - spread * (label_smoothing / form.vocab)
    if reduction == "none":
        return losses.new_zeros(target.shape).masked_scatter(counts, losses)
    return losses.sum() if reduction == "sum" else losses.sum() / share.sum()


def _soft_targets(logprobs: Form, target: Tensor, weight: Any, reduction: str, label_smoothing: float) -> Tensor:
    require(target.shape == logprobs.shape, target.dtype == logprobs.dtype, not target.requires_grad)
    require(_is_weight(weight, logprobs), reduction in ("none", "mean", "sum"), 0.0 <= label_smoothing <= 1.0)
    target = target.movedim(logprobs.axis, -1)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / logprobs.vocab
    if weight is not None:
        target = target * weight
    rows_last = replace(logprobs, axis=logprobs.rows.dim())
    losses = -row_sum(Weighted(target, rows_last))
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / losses.numel()


def _is_weight(weight: Any, form: Form) -> bool:
    if weight is None:
        return True
    return isinstance(weight, Tensor) and weight.shape == (form.vocab,) and not weight.requires_grad


RULES = {"cross_entropy": cross_entropy, "nll_loss": nll_loss, "kl_div": kl_div}
