"""A weighted sum of losses trains as its parts do together, at any micro-batch size, with an uploaded part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from tests.engine.calls import CE, create, gradients, rows, run, same, upload
from tests.engine.conftest import MakeEngine
from tests.engine.exact_models import EXACT
from tests.engine.losses import normalised
from tinkerbell_core import LossFnOutput, functional
from tinkerbell_core.functional import sequence_sum, target_logprobs


def contrast(
    model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor, *, beta: float = 0.5
) -> LossFnOutput:
    """Prefer even rows to odd ones."""
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
    chosen, rejected = functional.pairs(sequence_sum(logprobs, attention_mask))
    margin = beta * (chosen - rejected)
    return LossFnOutput(-F.logsigmoid(margin).sum(), logprobs, {"margin:mean": margin.mean()})


@contextmanager
def forward_passes() -> Iterator[list[int]]:
    """A list with one element, the number of forward passes of the model."""
    count = [0]

    def note(module: torch.nn.Module, *_: object) -> None:
        count[0] += isinstance(module, torch.nn.LayerNorm)

    handle = register_module_forward_hook(note)
    yield count
    handle.remove()


@pytest.mark.parametrize("mode", ["trusted", "sandboxed"])
def test_a_sum_is_one_forward_pass_and_the_weighted_sum_of_its_parts(make_engine: MakeEngine, mode: str) -> None:
    engine = make_engine(uploads=mode, dry_run_seconds=60.0, sandbox_seconds=60.0)
    mine = upload(engine, contrast, "contrast", coupling="sequence", group_size=2)
    data = rows([3, 5, 2, 4])
    terms = {mine: 1.0, CE: 0.1}
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in engine._base.model.modules())
    create(engine, "sum", seed=1)
    with forward_passes() as count:
        whole = run(engine, data, terms, "sum", **{"contrast/beta": 0.2})
    assert count == [norms]
    alone = {}
    for id, settings in ((mine, {"beta": 0.2}), (CE, {})):
        create(engine, id, seed=1)
        alone[id] = run(engine, data, id, id, **settings)
    expected = {
        name: sum(weight * gradients(engine, id)[name] for id, weight in terms.items())
        for name in gradients(engine, "sum")
    }
    assert same(gradients(engine, "sum"), expected, EXACT)
    assert whole.loss == pytest.approx(sum(weight * alone[id].loss for id, weight in terms.items()), rel=1e-12)
    assert whole.diagnostics["contrast/margin:mean"] == pytest.approx(alone[mine].diagnostics["margin:mean"])


@pytest.mark.parametrize("mode", ["trusted", "sandboxed"])
def test_a_sum_with_an_upload_is_exact_at_any_micro_batch_size(make_engine: MakeEngine, mode: str) -> None:
    found = []
    for budget in (None, 6):
        engine = make_engine(uploads=mode, micro_batch_tokens=budget, dry_run_seconds=60.0, sandbox_seconds=60.0)
        mine = upload(engine, normalised, "mine")
        result = run(engine, rows([3, 5, 2, 4]), {CE: 0.1, mine: 2.0})
        assert {"cross_entropy/loss:sum", "mine/loss:sum"} <= set(result.diagnostics)
        found.append(gradients(engine))
    assert same(*found, EXACT)


def test_a_sandboxed_part_runs_in_the_context_of_its_call(make_engine: MakeEngine) -> None:
    engine = make_engine(uploads="sandboxed", dry_run_seconds=60.0, sandbox_seconds=60.0)

    def counts(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        import builtins

        builtins.calls = getattr(builtins, "calls", 0) + 1  # type: ignore[attr-defined]
        return LossFnOutput(model_outputs.logsumexp(-1).sum(), None, {"calls": float(builtins.calls)})  # type: ignore[attr-defined]

    mine = upload(engine, counts, "counts")
    calls = [run(engine, rows([3]), {CE: 1.0, mine: 1.0}, model).diagnostics["counts/calls"] for model in "aab"]
    assert calls == [1.0, 2.0, 1.0]  # each model has its own worker


def test_dpo_with_cross_entropy_raises_the_likelihood_of_the_chosen_answers_only(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=True)
    data = rows([5, 5, 8, 3])
    terms = {"tinkerbell-loss-dpo:dpo": 1.0, CE: 0.1}
    chosen = run(engine, data[0::2], CE, backward=False).loss
    found = run(engine, data, terms)
    assert found.loss == pytest.approx(2 * math.log(2) + 0.1 * chosen, rel=1e-6)
    assert found.diagnostics["cross_entropy/loss:sum"] == pytest.approx(chosen, rel=1e-6)
    every = run(engine, data, CE, backward=False).loss
    both = run(engine, data, terms, backward=False, **{"cross_entropy/rejected_rows": True})
    assert both.loss == pytest.approx(2 * math.log(2) + 0.1 * every, rel=1e-6)


@pytest.mark.parametrize("mode", ["trusted", "sandboxed"])
def test_an_uploaded_preference_loss_declares_its_chosen_rows(make_engine: MakeEngine, mode: str) -> None:
    engine = make_engine(uploads=mode, dry_run_seconds=60.0, sandbox_seconds=60.0)
    mine = upload(engine, contrast, "contrast", coupling="sequence", group_size=2, preferred_rows=(0,))
    data = rows([3, 5, 2, 4])
    chosen = run(engine, data[0::2], CE, backward=False).loss
    found = run(engine, data, {mine: 1.0, CE: 0.1}, backward=False)
    assert found.diagnostics["cross_entropy/loss:sum"] == pytest.approx(chosen, rel=1e-9)
