"""A call that was split is put together again, or refused by a sentence that names `group_id`: never run in parts."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import httpx
import pytest

from tests.tinker.hand import Wire

ASKS = "'dpo' sees rows together.*'group_id'"


def failure(wires: Wire, future: httpx.Response) -> str:
    told = wires.done(future)
    assert told["category"] == "user"
    return str(told["error"])


def counted(wires: Wire, model: str, seq: int) -> int:
    return int(wires.done(wires.step(model, seq))["metrics"]["optim/sequences"])


def test_chunks_of_a_loss_that_couples_its_rows_are_one_call(wires: Wire) -> None:
    whole, cut = wires.model(), wires.model()
    config = {"beta": 0.3}
    expected = wires.output(wires.forward_backward(whole, 1, rows=6, loss_fn="dpo", config=config))
    last = wires.forward_backward(cut, 2, rows=3, first=3, loss_fn="dpo", config=config)
    first = wires.forward_backward(cut, 1, rows=3, loss_fn="dpo", config=config)
    outputs = [wires.output(future) for future in (first, last)]
    assert sum(output.metrics["loss:sum"] for output in outputs) == expected.metrics["loss:sum"] > 0
    assert [output.loss_fn_outputs[0].num_datums for output in outputs] == [3, 3]
    norms = [wires.done(wires.step(model, seq))["metrics"]["optim/grad_norm"] for model, seq in ((whole, 2), (cut, 3))]
    assert norms[0] == norms[1]


def test_half_a_pair_alone_is_refused_by_name(wires: Wire) -> None:
    model = wires.model()
    assert "'dpo' takes rows in groups of 2" in failure(wires, wires.forward_backward(model, 1, rows=3, loss_fn="dpo"))
    wires.output(wires.forward_backward(model, 2, rows=2, loss_fn="dpo"))


def test_two_calls_that_come_at_once_behind_another_are_not_taken_for_one(wires: Wire) -> None:
    model = wires.model()
    behind = [wires.forward_backward(model, seq, rows=2, loss_fn="dpo") for seq in (3, 2)]
    wires.output(wires.forward_backward(model, 1))
    for future in behind:
        assert re.search(ASKS, failure(wires, future))
    assert counted(wires, model, 4) == 1


def test_a_call_with_a_hole_in_it_is_refused(wires: Wire) -> None:
    model = wires.model()
    third = wires.forward_backward(model, 3, rows=2, first=4, loss_fn="dpo")
    first = wires.forward_backward(model, 1, rows=2, loss_fn="dpo")
    assert "not those in between" in failure(wires, first)
    wires.forward_backward(model, 2)
    wires.output(third)


@pytest.mark.parametrize(
    ("groups", "calls"),
    [(((1, 1), (2, 2)), 2), (((1, 1, 2), (2, 3, 3)), 1)],
    ids=["of their own", "that one chunk shares with the other"],
)
def test_group_ids_say_which_chunks_are_one_call(wires: Wire, groups: Sequence[Sequence[int]], calls: int) -> None:
    model = wires.model()
    count = len(groups[0])
    behind = [
        wires.forward_backward(model, seq, rows=count, first=count * (seq - 2), loss_fn="dpo", groups=groups[seq - 2])
        for seq in (3, 2)
    ]
    wires.output(wires.forward_backward(model, 1))
    losses = [wires.output(future).metrics["loss:sum"] for future in reversed(behind)]
    assert [loss > 0 for loss in losses] == [True, calls == 2]
    assert counted(wires, model, 4) == 1 + count  # a pair is one


@pytest.mark.parametrize("groups", [(1, 1, 2), (1, 2, 1, 2), (1, 1, 1, 1)])
def test_a_group_that_is_not_whole_is_named(wires: Wire, groups: Sequence[int]) -> None:
    model = wires.model()
    sent = wires.forward_backward(model, 1, rows=len(groups), loss_fn="dpo", groups=groups)
    assert "one 'group_id', but group" in failure(wires, sent)
    wires.output(wires.forward_backward(model, 2, rows=4, loss_fn="dpo", groups=(5, 5, 6, 6)))


def test_a_refused_request_has_used_up_its_number(wires: Wire) -> None:
    model = wires.model()
    refused = wires.post("optim_step", model_id=model, seq_id=1, adam_params={"learning_rate": "fast"})
    assert refused.status_code == 400
    broken = wires.forward_backward(model, 2)
    assert wires.output(broken).metrics["loss:sum"] > 0
    image = {"data": [{"model_input": {"chunks": [{"type": "image"}]}}], "loss_fn": "cross_entropy"}
    assert wires.post("forward_backward", model_id=model, seq_id=3, forward_backward_input=image).status_code == 400
    assert counted(wires, model, 4) == 1


@pytest.mark.slow  # as long as a request is waited for
def test_what_waits_for_a_request_that_never_comes_goes_on_and_a_split_call_does_not(wires: Wire) -> None:
    plain, split = wires.model(), wires.model()
    waiting = wires.forward_backward(plain, 2)
    rest = wires.forward_backward(split, 2, rows=2, loss_fn="dpo")
    began = time.monotonic()
    while wires.result(waiting).status_code == 408 or wires.result(rest).status_code == 408:
        assert time.monotonic() - began < 60
    assert time.monotonic() - began > 15
    assert wires.output(waiting).metrics["loss:sum"] > 0
    assert re.search(ASKS, failure(wires, rest))
    late = wires.forward_backward(plain, 1)
    assert late.status_code == 400
    assert "arrived too late" in late.json()["detail"]
    assert counted(wires, plain, 3) == 1
