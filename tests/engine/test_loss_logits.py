"""Lazy logits give a loss the same results as stored ones, and stored logits are reported and limited."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.engine.calls import CE, LENGTHS, create, gradients, off_zero, rows, run, same, step, upload, weights
from tests.engine.conftest import MakeEngine
from tests.engine.exact_models import EXACT
from tests.engine.losses import normalised, pairs
from tinkerbell_core.errors import LogitsTooLarge
from tinkerbell_core.functional import target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.types import ForwardOutput
from tinkerbell_server.engines.torch import loss_calls, loss_logits
from tinkerbell_server.engines.torch.engine import TorchEngine
from tinkerbell_server.engines.torch.network import Network

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen head": ("plain", {}),
    "frozen tied head": ("tied", {}),
    "frozen capped head": ("softcap", {}),
    "adapter on the head": ("plain", {"target_modules": ["lm_head", "q_proj"]}),
    "adapter on a capped head": ("softcap", {"target_modules": ["lm_head", "q_proj"]}),
    "trained head": ("plain", {"full": True}),
    "trained tied head": ("tied", {"full": True}),
}

LOGITS_BYTES = 8 * 12 * 261 * 8
"""Of the rows of LENGTHS, in float64."""


def stored(result: ForwardOutput) -> dict[str, float]:
    """Bytes of logits that a call stored, by the operation that stored them."""
    return {k: v for k, v in result.diagnostics.items() if k.startswith("logits_materialised/")}


def lazy_and_stored(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, name: str, **model: Any) -> tuple[Any, Any]:
    """The result and the gradient of a call with lazy logits, and of one with stored logits."""
    found = []
    for reason in ("", "a test"):
        with monkeypatch.context() as patch:
            if reason:
                patch.setattr(loss_calls, "why_stored", lambda network, spec: "a test")
            create(engine, f"m{reason}", **model)
            off_zero(engine, f"m{reason}")
            found.append((run(engine, rows(LENGTHS), name, f"m{reason}"), gradients(engine, f"m{reason}")))
    return found[0], found[1]


@pytest.mark.parametrize(("fn", "settings"), [(normalised, {}), (pairs, {"coupling": "sequence", "group_size": 2})])
@pytest.mark.parametrize("which", MODELS)
def test_lazy_logits_give_the_results_of_stored_ones(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, which: str, fn: Any, settings: dict[str, Any]
) -> None:
    base, model = MODELS[which]
    for tokens in (None, 24):
        engine = make_engine(base, micro_batch_tokens=tokens)
        name = upload(engine, fn, "mine", **settings)
        (lazy, gradient), (plain, expected) = lazy_and_stored(engine, monkeypatch, name, **model)
        assert stored(lazy) == {}
        assert sum(stored(plain).values()) >= sum(LENGTHS) * 261 * 8
        assert lazy.loss == pytest.approx(plain.loss, rel=1e-12)
        assert same(gradient, expected, EXACT)
        assert lazy.micro_batches == plain.micro_batches


@pytest.mark.parametrize("which", ["frozen capped head", "adapter on the head", "trained head", "trained tied head"])
def test_lazy_logits_give_the_results_of_stored_ones_in_bfloat16(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    base, model = MODELS[which]
    engine = make_engine(base, dtype="bfloat16")
    (lazy, gradient), (plain, expected) = lazy_and_stored(engine, monkeypatch, CE, **model)
    assert stored(lazy) == {}
    assert lazy.loss == pytest.approx(plain.loss, rel=1e-3)
    for name, one in gradient.items():
        difference = float((one - expected[name]).float().norm())
        assert difference <= 5e-2 * float(expected[name].float().norm()), name


def test_forward_returns_the_numbers_of_forward_backward(make_engine: MakeEngine) -> None:
    engine = make_engine()
    name = upload(engine, normalised, "mine")
    trained, forward = run(engine, rows(LENGTHS), name), run(engine, rows(LENGTHS), name, backward=False)
    assert forward.loss == pytest.approx(trained.loss, rel=1e-12)
    assert forward.diagnostics == pytest.approx(trained.diagnostics, rel=1e-12)
    assert stored(forward) == {}


def test_the_head_does_not_run_on_tokens_that_do_not_count(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    counts = [[0.0] * (length - length // 3) + [1.0] * (length // 3) for length in LENGTHS]
    data = rows(LENGTHS, weights=counts)
    read = 0

    class Counting(loss_logits.LocalSource):
        def read(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal read
            read += len(rows)
            return super().read(rows, *args, **kwargs)

    monkeypatch.setattr(loss_logits, "LocalSource", Counting)
    result = run(engine, data)
    assert 0 < read <= 2 * sum(map(sum, counts))
    assert result.logprobs is not None
    assert run(engine, rows([3, 4], weights=[[0.0] * 3, [0.0] * 4])).loss == 0.0


def ranked(model_outputs, loss_fn_inputs, attention_mask):
    """The margin of the likeliest token over the median one, which lazy logits do not support."""
    ordered = model_outputs.sort(-1).values
    margin = ordered[..., -1] - ordered[..., ordered.shape[-1] // 2]
    return LossFnOutput((margin * attention_mask).sum())


def test_an_operation_that_stores_the_logits_is_reported_with_their_bytes(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    name = upload(engine, ranked, "ranked")
    (lazy, gradient), (plain, expected) = lazy_and_stored(engine, monkeypatch, name)
    assert same(gradient, expected, EXACT)
    assert stored(lazy) == {"logits_materialised/sort:sum": LOGITS_BYTES}
    assert lazy.loss == pytest.approx(plain.loss, rel=1e-12)


def test_storing_more_than_the_budget_is_refused_and_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(logits_budget=100_000)
    name = upload(engine, ranked, "ranked")
    run(engine, rows([4]), name)
    before, accumulated = weights(engine), gradients(engine)
    with pytest.raises(LogitsTooLarge, match=r"sort.*200,448.*100,000"):
        run(engine, rows(LENGTHS), name)
    assert same(before, weights(engine))
    assert same(accumulated, gradients(engine))
    step(engine)
    assert stored(run(engine, rows(LENGTHS), CE)) == {}


def hooked(model_outputs, loss_fn_inputs, attention_mask):
    """Half of the gradient, by a hook on the logits."""
    model_outputs.register_hook(lambda gradient: gradient / 2)
    return LossFnOutput(-(target_logprobs(model_outputs, loss_fn_inputs["target_tokens"]) * attention_mask).sum())


def test_a_loss_that_does_not_work_on_lazy_logits_is_pinned_to_stored_ones_and_listed_so(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    name = upload(engine, hooked, "hooked")
    result = run(engine, rows(LENGTHS), name)
    assert stored(result) == {"logits_materialised/pinned:sum": LOGITS_BYTES}
    halved = gradients(engine)
    run(engine, rows(LENGTHS), CE, "whole")
    assert same({key: 2 * gradient for key, gradient in halved.items()}, gradients(engine, "whole"), EXACT)
    (listed,) = [each for each in engine.describe().losses if each.id == name]
    assert "hook" in listed.plain_logits
    with pytest.raises(LogitsTooLarge, match=r"pinned.*200,448"):
        run(_with_budget(engine, 100_000), rows(LENGTHS), name)


def test_a_loss_that_needs_stored_logits_in_one_call_is_run_again_on_them(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def sometimes(model_outputs, loss_fn_inputs, attention_mask, *, hook=False):
        if hook:
            model_outputs.register_hook(lambda gradient: gradient / 2)
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
        return LossFnOutput(-(logprobs * attention_mask).sum(), logprobs)

    name = upload(engine, sometimes, "sometimes")
    create(engine, "a", target_modules=["lm_head", "q_proj"])
    assert stored(run(engine, rows(LENGTHS), name, "a")) == {}
    whole = gradients(engine, "a")
    create(engine, "b", target_modules=["lm_head", "q_proj"])
    result = run(engine, rows(LENGTHS), name, "b", hook=True)
    assert stored(result) == {"logits_materialised/run again:sum": LOGITS_BYTES}
    assert same({key: 2 * gradient for key, gradient in gradients(engine, "b").items()}, whole, EXACT)


def test_the_budget_applies_to_a_model_that_is_run_through_its_own_forward(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tinkerbell_server.engines.torch.network.SOFTCAPS", ()
    )  # then the cap in the config has an unknown name
    engine = make_engine("softcap", logits_budget=100_000)
    name = upload(engine, normalised, "mine")
    with pytest.raises(LogitsTooLarge, match=r"the model's own forward.*200,448"):
        run(engine, rows(LENGTHS), name)
    assert list(stored(run(engine, rows([5, 3]), name))) == ["logits_materialised/the model's own forward:sum"]


def test_gradient_checkpointing_gives_the_same_gradient_with_dropout(make_engine: MakeEngine) -> None:
    def gradient(**settings: Any) -> dict[str, torch.Tensor]:
        engine = make_engine("dropout", base_dropout=True, **settings)
        name = upload(engine, normalised, "mine")
        create(engine, target_modules=["lm_head", "q_proj"])
        off_zero(engine)
        run(engine, rows(LENGTHS), name)
        return gradients(engine)

    checkpointed = gradient(gradient_checkpointing=True)
    assert same(gradient(), checkpointed, EXACT)
    # each micro-batch has its own random numbers
    assert not same(checkpointed, gradient(gradient_checkpointing=True, micro_batch_tokens=24), 1e-3)


def test_reference_logprobs_are_computed_without_storing_logits(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def preferred(model_outputs, loss_fn_inputs, attention_mask):
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
        return LossFnOutput(-F.logsigmoid((logprobs - loss_fn_inputs["ref_logprobs"]).sum()), logprobs)

    name = upload(engine, preferred, "preferred")
    fail: Callable[..., None] = lambda *_: pytest.fail("logits were stored")  # noqa: E731
    monkeypatch.setattr(Network, "logits", fail)
    assert run(engine, rows(LENGTHS), name).loss == pytest.approx(0.6931471805599453)


def _with_budget(engine: TorchEngine, logits: int) -> TorchEngine:
    limited, calls = copy.copy(engine), copy.copy(engine._loss_calls)
    limited._loss_calls = calls
    calls.budgets = calls.budgets._replace(logits=logits)
    return limited
