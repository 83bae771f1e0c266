"""Checks of masked positions: attention_mask, weights and padding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tinkerbell_core.testing.case import Case, Outcome, near, require


def masked_positions(case: Case, whole: Outcome) -> None:
    """Masked positions get no gradient, and their values do not matter: other numbers, NaN, a logit of -inf."""
    masked = case.mask == 0  # [B, T]
    require(
        not whole.gradient[masked].any(),
        "positions where attention_mask is 0 get a gradient: mask the loss per token before reducing it",
    )
    _unchanged(case, whole, _other(case, masked), "another value where attention_mask is 0")
    _unchanged(case, whole, _nan(case, masked), "NaN in an input where attention_mask is 0")
    added = torch.zeros(*case.mask.shape, len(case.head), dtype=case.hidden.dtype)
    added[masked] = torch.tensor([-torch.inf] + [0.0] * (len(case.head) - 1), dtype=added.dtype)
    targets = {
        key: value * ~masked for key, value in case.inputs.items() if key == "target_tokens" and value.dim() == 2
    }
    _unchanged(
        case, whole, replace(case, added=added, inputs=case.inputs | targets), "a logit of -inf at a masked target"
    )


def zero_weights(case: Case, whole: Outcome) -> str:
    """Positions of weight 0 get no gradient, and their inputs do not matter."""
    weights = case.inputs.get("weights")
    if weights is None or weights.shape != case.mask.shape:
        return "reads no weights per position"
    weights = weights.clone()
    weights[:, 1] = 0
    case = replace(case, inputs=case.inputs | {"weights": weights})
    before = case.attempt("a batch with weights of 0")
    masked = (weights == 0) & (case.mask != 0)
    require(not before.gradient[masked].any(), "positions of weight 0 get a gradient: use functional.effective_mask")
    _unchanged(case, before, _nan(case, weights == 0), "NaN in an input where the weight is 0")
    return ""


def all_masked(case: Case, whole: Outcome) -> None:
    """A fully masked batch has the loss 0 and no gradient; a fully masked group adds 0."""
    outcome = replace(case, mask=torch.zeros_like(case.mask)).attempt("a batch whose attention_mask is all 0")
    require(
        outcome.loss.item() == 0 and not outcome.gradient.any(),
        f"a batch whose attention_mask is all 0 has the loss {outcome.loss.item():.6g}, but must have 0 and no "
        "gradient: sum over the positions that count, and clamp the divisor at 1",
    )
    mask = case.mask.clone()
    mask[case.groups[0]] = 0
    outcome = replace(case, mask=mask).attempt("a batch with a row whose attention_mask is all 0")
    if case.sums:
        others = case.rows(case.groups[1:].flatten()).attempt("a batch of fewer rows")
        require(
            near(outcome.loss, others.loss),
            f"a row whose attention_mask is all 0 adds {outcome.loss.item() - others.loss.item():.6g} to the loss, but "
            "must add 0: multiply a loss per sequence by (attention_mask != 0).any(-1)",
        )


def padding(case: Case, whole: Outcome) -> None:
    """More padding on the right changes neither the loss nor its gradient."""
    wider = case.widened(3).attempt("the batch with three more positions of padding")
    require(
        near(wider.loss, whole.loss) and near(wider.gradient[:, :-3], whole.gradient),
        f"three more positions of padding change the loss (from {whole.loss.item():.6g} to {wider.loss.item():.6g}) or "
        "its gradient: divide by the number of positions where attention_mask is 1, not by shape[1]",
    )


def _unchanged(case: Case, whole: Outcome, changed: Case, what: str) -> None:
    outcome = changed.attempt(what)
    require(
        near(outcome.loss, whole.loss) and near(outcome.gradient, whole.gradient),
        f"{what} changes the loss (from {whole.loss.item():.6g} to {outcome.loss.item():.6g}) or its gradient: "
        "mask with torch.where(attention_mask != 0, x, 0)",
    )


def _other(case: Case, masked: Tensor) -> Case:
    """The case with other numbers at masked positions, in the hidden states and in every input with positions."""
    inputs = {}
    for key, value in case.inputs.items():
        if value.shape[:2] == masked.shape:
            ids = key.endswith(("tokens", "ids"))
            other = torch.randint_like(value, len(case.head)) if ids else value + 3
            value = torch.where(masked.view(*masked.shape, *[1] * (value.dim() - 2)), other, value)
        inputs[key] = value
    states = torch.where(masked[..., None], torch.randn_like(case.hidden), case.hidden)
    return replace(case, hidden=states, inputs=inputs)


def _nan(case: Case, masked: Tensor) -> Case:
    """The case with NaN at masked positions of every float input except weights and masks."""
    inputs = {
        key: value.masked_fill(masked.view(*masked.shape, *[1] * (value.dim() - 2)), torch.nan)
        if value.is_floating_point() and value.shape[:2] == masked.shape and not key.endswith(("weights", "mask"))
        else value
        for key, value in case.inputs.items()
    }
    return replace(case, inputs=inputs)
