"""A split call is reassembled, or refused with an error that names `group_id`. It is never run in parts."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import httpx
import pytest

from tests.tinker.raw_client import RawClient

NEEDS_GROUP_ID = "'dpo' sees rows together.*'group_id'"


def failure(raw_client: RawClient, future: httpx.Response) -> str:
    result = raw_client.done(future)
    assert result["category"] == "user"
    return str(result["error"])


def counted(raw_client: RawClient, model: str, seq: int) -> int:
    return int(raw_client.done(raw_client.step(model, seq))["metrics"]["optim/sequences"])


def test_chunks_of_a_call_of_a_pair_loss_run_as_one_call(raw_client: RawClient) -> None:
    whole, cut = raw_client.model(), raw_client.model()
    config = {"beta": 0.3}
    expected = raw_client.output(raw_client.forward_backward(whole, 1, rows=6, loss_fn="dpo", config=config))
    last = raw_client.forward_backward(cut, 2, rows=3, first=3, loss_fn="dpo", config=config)
    first = raw_client.forward_backward(cut, 1, rows=3, loss_fn="dpo", config=config)
    outputs = [raw_client.output(future) for future in (first, last)]
    assert sum(output.metrics["loss:sum"] for output in outputs) == expected.metrics["loss:sum"] > 0
    assert [output.loss_fn_outputs[0].num_datums for output in outputs] == [3, 3]
    norms = [
        raw_client.done(raw_client.step(model, seq))["metrics"]["optim/grad_norm"]
        for model, seq in ((whole, 2), (cut, 3))
    ]
    assert norms[0] == norms[1]


def test_a_call_with_half_a_pair_is_refused(raw_client: RawClient) -> None:
    model = raw_client.model()
    assert "'dpo' takes rows in groups of 2" in failure(
        raw_client, raw_client.forward_backward(model, 1, rows=3, loss_fn="dpo")
    )
    raw_client.output(raw_client.forward_backward(model, 2, rows=2, loss_fn="dpo"))


def test_two_calls_that_wait_for_an_earlier_one_are_not_run_as_one(raw_client: RawClient) -> None:
    model = raw_client.model()
    waiting = [raw_client.forward_backward(model, seq, rows=2, loss_fn="dpo") for seq in (3, 2)]
    raw_client.output(raw_client.forward_backward(model, 1))
    for future in waiting:
        assert re.search(NEEDS_GROUP_ID, failure(raw_client, future))
    assert counted(raw_client, model, 4) == 1


def test_a_call_without_its_middle_chunk_is_refused(raw_client: RawClient) -> None:
    model = raw_client.model()
    third = raw_client.forward_backward(model, 3, rows=2, first=4, loss_fn="dpo")
    first = raw_client.forward_backward(model, 1, rows=2, loss_fn="dpo")
    assert "not those in between" in failure(raw_client, first)
    raw_client.forward_backward(model, 2)
    raw_client.output(third)


@pytest.mark.parametrize(
    ("groups", "calls"),
    [(((1, 1), (2, 2)), 2), (((1, 1, 2), (2, 3, 3)), 1)],
    ids=["each chunk has its own groups", "two chunks share a group"],
)
def test_group_ids_determine_which_chunks_are_one_call(
    raw_client: RawClient, groups: Sequence[Sequence[int]], calls: int
) -> None:
    model = raw_client.model()
    count = len(groups[0])
    waiting = [
        raw_client.forward_backward(
            model, seq, rows=count, first=count * (seq - 2), loss_fn="dpo", groups=groups[seq - 2]
        )
        for seq in (3, 2)
    ]
    raw_client.output(raw_client.forward_backward(model, 1))
    losses = [raw_client.output(future).metrics["loss:sum"] for future in reversed(waiting)]
    assert [loss > 0 for loss in losses] == [True, calls == 2]
    assert counted(raw_client, model, 4) == 1 + count  # a pair counts as one sequence


@pytest.mark.parametrize("groups", [(1, 1, 2), (1, 2, 1, 2), (1, 1, 1, 1)])
def test_the_error_for_an_incomplete_group_names_it(raw_client: RawClient, groups: Sequence[int]) -> None:
    model = raw_client.model()
    sent = raw_client.forward_backward(model, 1, rows=len(groups), loss_fn="dpo", groups=groups)
    assert "one 'group_id', but group" in failure(raw_client, sent)
    raw_client.output(raw_client.forward_backward(model, 2, rows=4, loss_fn="dpo", groups=(5, 5, 6, 6)))


def test_a_refused_request_uses_its_seq_id(raw_client: RawClient) -> None:
    model = raw_client.model()
    refused = raw_client.post("optim_step", model_id=model, seq_id=1, adam_params={"learning_rate": "fast"})
    assert refused.status_code == 400
    broken = raw_client.forward_backward(model, 2)
    assert raw_client.output(broken).metrics["loss:sum"] > 0
    image = {"data": [{"model_input": {"chunks": [{"type": "image"}]}}], "loss_fn": "cross_entropy"}
    assert (
        raw_client.post("forward_backward", model_id=model, seq_id=3, forward_backward_input=image).status_code == 400
    )
    assert counted(raw_client, model, 4) == 1


@pytest.mark.slow  # the server waits for the missing request
def test_after_a_missing_request_a_whole_call_runs_and_a_split_call_is_refused(raw_client: RawClient) -> None:
    plain, split = raw_client.model(), raw_client.model()
    waiting = raw_client.forward_backward(plain, 2)
    rest = raw_client.forward_backward(split, 2, rows=2, loss_fn="dpo")
    began = time.monotonic()
    while raw_client.result(waiting).status_code == 408 or raw_client.result(rest).status_code == 408:
        assert time.monotonic() - began < 60
    assert time.monotonic() - began > 15
    assert raw_client.output(waiting).metrics["loss:sum"] > 0
    assert re.search(NEEDS_GROUP_ID, failure(raw_client, rest))
    late = raw_client.forward_backward(plain, 1)
    assert late.status_code == 400
    assert "arrived too late" in late.json()["detail"]
    assert counted(raw_client, plain, 3) == 1
