"""Rules on what attention_mask and weights hide."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tinkerbell_core.testing.case import Case, Ran, near, require

_WHERE = "mask with torch.where(attention_mask != 0, x, 0)"


def masked_positions(case: Case, whole: Ran) -> None:
    """What stands where the mask is 0 changes nothing and gets no gradient: other numbers, NaN, a logit of -inf."""
    hidden = case.mask == 0  # [B, T]
    require(
        not whole.gradient[hidden].any(),
        "positions where attention_mask is 0 get a gradient: mask the loss per token before reducing it",
    )
    _unchanged(case, whole, _other(case, hidden), "what stands where attention_mask is 0")
    _unchanged(case, whole, _nan(case, hidden), "NaN in an input where attention_mask is 0")
    added = torch.zeros(*case.mask.shape, len(case.head), dtype=case.hidden.dtype)
    added[hidden] = torch.tensor([-torch.inf] + [0.0] * (len(case.head) - 1), dtype=added.dtype)
    targets = {
        key: value * ~hidden for key, value in case.inputs.items() if key == "target_tokens" and value.dim() == 2
    }
    _unchanged(
        case, whole, replace(case, added=added, inputs=case.inputs | targets), "a logit of -inf at a hidden target"
    )


def zero_weights(case: Case, whole: Ran) -> str:
    """A position of weight 0 gets no gradient, and its inputs change nothing."""
    weights = case.inputs.get("weights")
    if weights is None or weights.shape != case.mask.shape:
        return "reads no weights a position"
    weights = weights.clone()
    weights[:, 1] = 0
    case = replace(case, inputs=case.inputs | {"weights": weights})
    before = case.attempt("a batch with weights of 0")
    hidden = (weights == 0) & (case.mask != 0)
    require(not before.gradient[hidden].any(), "positions of weight 0 get a gradient: use functional.effective_mask")
    _unchanged(case, before, _nan(case, weights == 0), "NaN in an input where the weight is 0")
    return ""


def all_masked(case: Case, whole: Ran) -> None:
    """A batch with everything hidden gives 0 and no gradient; a group with everything hidden does no harm."""
    ran = replace(case, mask=torch.zeros_like(case.mask)).attempt("a batch whose attention_mask is all 0")
    require(
        ran.loss.item() == 0 and not ran.gradient.any(),
        f"a batch whose attention_mask is all 0 has the loss {ran.loss.item():.6g}, but must have 0 and no gradient: "
        "sum over what the mask leaves, and clamp the number you divide by at 1",
    )
    mask = case.mask.clone()
    mask[case.groups[0]] = 0
    ran = replace(case, mask=mask).attempt("a batch with a row whose attention_mask is all 0")
    if case.sums:
        others = case.rows(case.groups[1:].flatten()).attempt("a batch of fewer rows")
        require(
            near(ran.loss, others.loss),
            f"a row whose attention_mask is all 0 adds {ran.loss.item() - others.loss.item():.6g} to the loss, but "
            "must add 0: weigh a loss per sequence with (attention_mask != 0).any(-1)",
        )


def padding(case: Case, whole: Ran) -> None:
    """More padding on the right changes nothing."""
    wider = case.widened(3).attempt("the batch with three more positions of padding")
    require(
        near(wider.loss, whole.loss) and near(wider.gradient[:, :-3], whole.gradient),
        f"three more positions of padding change the loss (from {whole.loss.item():.6g} to {wider.loss.item():.6g}) or "
        "its gradient: divide by the positions that attention_mask counts, not by shape[1]",
    )


def _unchanged(case: Case, whole: Ran, changed: Case, what: str) -> None:
    ran = changed.attempt(what)
    require(
        near(ran.loss, whole.loss) and near(ran.gradient, whole.gradient),
        f"{what} changes the loss (from {whole.loss.item():.6g} to {ran.loss.item():.6g}) or its gradient: {_WHERE}",
    )


def _other(case: Case, hidden: Tensor) -> Case:
    """Other numbers at hidden positions, in the hidden states and every input that has positions."""
    inputs = {}
    for key, value in case.inputs.items():
        if value.shape[:2] == hidden.shape:
            ids = key.endswith(("tokens", "ids"))
            other = torch.randint_like(value, len(case.head)) if ids else value + 3
            value = torch.where(hidden.view(*hidden.shape, *[1] * (value.dim() - 2)), other, value)
        inputs[key] = value
    states = torch.where(hidden[..., None], torch.randn_like(case.hidden), case.hidden)
    return replace(case, hidden=states, inputs=inputs)


def _nan(case: Case, hidden: Tensor) -> Case:
    """NaN at hidden positions of every float input but weights."""
    inputs = {
        key: value.masked_fill(hidden.view(*hidden.shape, *[1] * (value.dim() - 2)), torch.nan)
        if value.is_floating_point() and value.shape[:2] == hidden.shape and not key.endswith(("weights", "mask"))
        else value
        for key, value in case.inputs.items()
    }
    return replace(case, inputs=inputs)
