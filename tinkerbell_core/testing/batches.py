"""Checks of batches: single rows, the order of rows, coupling, micro-batches and repeated calls."""

from __future__ import annotations

import torch

from tinkerbell_core.testing.case import Case, Failed, Outcome, near, require


def single_row(case: Case, whole: Outcome) -> None:
    """A batch of one row (or group) works."""
    what = "one row" if case.spec.group_size == 1 else f"one group of {case.spec.group_size} rows"
    try:
        case.rows(case.groups[0]).attempt(f"a batch of {what}")
    except Failed as failed:
        raise Failed(
            f"{failed}; statistics over rows, such as a standard deviation, must be defined for one"
        ) from failed


def order(case: Case, whole: Outcome) -> None:
    """The order of rows (or groups) does not matter."""
    index = case.groups.flip(0).flatten()
    outcome = case.rows(index).attempt("the batch in another order")
    what = "sequences" if case.spec.group_size == 1 else f"groups of {case.spec.group_size} rows"
    gradient = torch.zeros_like(whole.gradient)
    gradient[index, : outcome.gradient.shape[1]] = outcome.gradient
    require(
        near(outcome.loss, whole.loss) and near(gradient, whole.gradient),
        f"the order of {what} changes the loss (from {whole.loss.item():.6g} to {outcome.loss.item():.6g}) or its "
        "gradient: if rows form groups, declare group_size",
    )


def coupling(case: Case, whole: Outcome) -> str:
    """With coupling="sequence" the loss of a batch is the sum over its groups."""
    parts = torch.stack([case.rows(rows).attempt("one group alone").loss for rows in case.groups]).sum()
    if not case.sums:
        same = case.spec.coupling == "batch" and near(parts, whole.loss)
        return 'the sum over its groups here: with coupling="sequence" it could run in micro-batches' if same else ""
    require(
        near(parts, whole.loss),
        f"the loss of a batch ({whole.loss.item():.6g}) is not the sum over its groups ({parts.item():.6g}), so it "
        'would depend on how a batch is split: sum over sequences instead of averaging, or declare coupling="batch"',
    )
    return ""


def micro_batches(case: Case, whole: Outcome) -> str:
    """The gradients of the micro-batches sum to the gradient of the batch."""
    if not case.sums:
        return "runs on the whole batch"
    gradient = torch.zeros_like(whole.gradient)
    for rows in (case.groups[:1].flatten(), case.groups[1:].flatten()):
        part = case.rows(rows).attempt("a micro-batch").gradient
        gradient[rows, : part.shape[1]] += part
    require(
        near(gradient, whole.gradient),
        "the gradients of the micro-batches do not sum to the gradient of the batch: "
        'a loss with coupling="sequence" may not use a statistic over rows, even detached; declare coupling="batch"',
    )
    return ""


def same_twice(case: Case, whole: Outcome) -> None:
    """The same call gives the same numbers."""
    again = case.attempt("the same batch again")
    require(
        bool(torch.equal(again.loss, whole.loss)) and bool(torch.equal(again.gradient, whole.gradient)),
        f"the same batch gives another loss or gradient in a second call ({whole.loss.item():.6g}, "
        f"{again.loss.item():.6g}): keep no state between calls, and draw no random numbers",
    )
