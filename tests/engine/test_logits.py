"""A loss in the engine gets logits that are not stored, and gives what stored ones give; what is stored is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.engine.calls import CE, create, gradients, normalised, pairs, rows, run, same, step, upload, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import LogitsTooLarge
from tinkerbell_core.functional import hidden_states, target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.types import ForwardOutput
from tinkerbell_server.engines.torch import engine as engine_module
from tinkerbell_server.engines.torch import lm_head, loss_logits
from tinkerbell_server.engines.torch.engine import TorchEngine

LENGTHS = [5, 12, 3, 9, 7, 12, 1, 4]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen head": ("llama", {}),
    "frozen tied head": ("qwen3", {}),
    "frozen capped head": ("softcap", {}),
    "adapter on the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "adapter on a capped head": ("softcap", {"target_modules": ["lm_head", "q_proj"]}),
    "trained head": ("llama", {"full": True}),
    "trained tied head": ("qwen3", {"full": True}),
}


def stored(result: ForwardOutput) -> dict[str, float]:
    """Bytes of logits that a call stored, by what stored them."""
    return {k: v for k, v in result.diagnostics.items() if k.startswith("logits_materialised/")}


def both(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, name: str, **model: Any) -> tuple[Any, Any]:
    """The answer and gradient of a call with lazy logits, and with stored ones."""
    found = []
    for because in ("", "a test"):
        with monkeypatch.context() as patch:
            if because:
                patch.setattr(engine_module, "stored_because", lambda network, spec: "a test")
            create(engine, f"m{because}", **model)
            off_zero(engine, f"m{because}")
            found.append((run(engine, rows(LENGTHS), name, f"m{because}"), gradients(engine, f"m{because}")))
    return found[0], found[1]


def off_zero(engine: TorchEngine, model: str) -> None:
    """Move an adapter off LoRA's start, where half of the gradient is 0."""
    generator = torch.Generator().manual_seed(1)
    if engine._models.get(model).adapter is None:
        return
    for parameter in engine._models.get(model).parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05
        parameter.data.copy_(noise.to(parameter))


@pytest.mark.parametrize(("fn", "settings"), [(normalised, {}), (pairs, {"coupling": "sequence", "group_size": 2})])
@pytest.mark.parametrize("which", MODELS)
def test_a_loss_gives_what_it_gives_on_stored_logits(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, which: str, fn: Any, settings: dict[str, Any]
) -> None:
    base, model = MODELS[which]
    for tokens in (None, 24):
        engine = make_engine(base, micro_batch_tokens=tokens)
        name = upload(engine, fn, "mine", **settings)
        (lazy, gradient), (plain, expected) = both(engine, monkeypatch, name, **model)
        assert stored(lazy) == {}
        assert sum(stored(plain).values()) >= sum(LENGTHS) * 261 * 8
        assert lazy.loss == pytest.approx(plain.loss, rel=1e-12)
        assert same(gradient, expected, 1e-9)
        assert lazy.micro_batches == plain.micro_batches


@pytest.mark.parametrize("which", ["frozen capped head", "adapter on the head", "trained head", "trained tied head"])
def test_in_bfloat16_too(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    base, model = MODELS[which]
    engine = make_engine(base, dtype="bfloat16")
    (lazy, gradient), (plain, expected) = both(engine, monkeypatch, CE, **model)
    assert stored(lazy) == {}
    assert lazy.loss == pytest.approx(plain.loss, rel=1e-3)
    for name, one in gradient.items():
        apart = float((one - expected[name]).float().norm() / expected[name].float().norm())
        assert apart < 5e-2, name


def test_forward_gives_the_numbers_of_forward_backward(make_engine: MakeEngine) -> None:
    engine = make_engine()
    name = upload(engine, normalised, "mine")
    trained, seen = run(engine, rows(LENGTHS), name), run(engine, rows(LENGTHS), name, backward=False)
    assert seen.loss == pytest.approx(trained.loss, rel=1e-12)
    assert seen.diagnostics == pytest.approx(trained.diagnostics, rel=1e-12)
    assert stored(seen) == {}


def test_tokens_that_do_not_count_never_reach_the_head(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    counts = [[0.0] * (length - length // 3) + [1.0] * (length // 3) for length in LENGTHS]
    data = rows(LENGTHS, weights=counts)
    asked = 0

    class Counting(loss_logits.LocalSource):
        def read(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += len(rows)
            return super().read(rows, *args, **kwargs)

    monkeypatch.setattr(loss_logits, "LocalSource", Counting)
    answer = run(engine, data)
    assert 0 < asked <= 2 * sum(map(sum, counts))
    assert answer.logprobs is not None
    nothing = run(engine, rows([3, 4], weights=[[0.0] * 3, [0.0] * 4]))
    assert nothing.loss == 0.0


def ranked(model_outputs, loss_fn_inputs, attention_mask):
    """The margin of the likeliest token over the median one, which no row operation gives."""
    ordered = model_outputs.sort(-1).values
    margin = ordered[..., -1] - ordered[..., ordered.shape[-1] // 2]
    return LossFnOutput((margin * attention_mask).sum())


def test_what_a_loss_has_stored_is_told_with_its_bytes(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    name = upload(engine, ranked, "ranked")
    (lazy, gradient), (plain, expected) = both(engine, monkeypatch, name)
    assert same(gradient, expected, 1e-9)
    assert stored(lazy) == {"logits_materialised/sort:sum": 8 * 12 * 261 * 8}
    assert lazy.loss == pytest.approx(plain.loss, rel=1e-12)


def test_storing_more_than_the_budget_is_refused_and_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(logits_budget=100_000)
    name = upload(engine, ranked, "ranked")
    run(engine, rows([4]), name)
    before, kept = weights(engine), gradients(engine)
    with pytest.raises(LogitsTooLarge, match=r"sort.*200,448.*100,000"):
        run(engine, rows(LENGTHS), name)
    assert same(before, weights(engine))
    assert same(kept, gradients(engine))
    step(engine)
    assert stored(run(engine, rows(LENGTHS), CE)) == {}


def hooked(model_outputs, loss_fn_inputs, attention_mask):
    """Half of the gradient, by a hook on the logits."""
    model_outputs.register_hook(lambda gradient: gradient / 2)
    return LossFnOutput(-(target_logprobs(model_outputs, loss_fn_inputs["target_tokens"]) * attention_mask).sum())


def test_a_loss_that_lazy_logits_cannot_serve_is_pinned_to_stored_ones_and_listed_so(make_engine: MakeEngine) -> None:
    engine = make_engine()
    name = upload(engine, hooked, "hooked")
    answer = run(engine, rows(LENGTHS), name)
    assert stored(answer) == {"logits_materialised/pinned:sum": 8 * 12 * 261 * 8}
    halved = gradients(engine)
    run(engine, rows(LENGTHS), CE, "whole")
    assert same({key: 2 * gradient for key, gradient in halved.items()}, gradients(engine, "whole"), 1e-9)
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
    answer = run(engine, rows(LENGTHS), name, "b", hook=True)
    assert stored(answer) == {"logits_materialised/run again:sum": 8 * 12 * 261 * 8}
    assert same({key: 2 * gradient for key, gradient in gradients(engine, "b").items()}, whole, 1e-9)


def test_hidden_states_come_with_lazy_logits_of_a_capped_model(make_engine: MakeEngine) -> None:
    small, large = make_engine("softcap", micro_batch_tokens=12), make_engine("softcap")

    def contrast(model_outputs, loss_fn_inputs, attention_mask):
        hidden = hidden_states(model_outputs)[:, 0]
        return LossFnOutput(torch.logsumexp(hidden @ hidden.T, 1).sum())

    for engine in (small, large):
        name = upload(engine, contrast, "contrast")
        create(engine)
        off_zero(engine, "m")
        assert stored(run(engine, rows(LENGTHS), name)) == {}
    assert same(gradients(small), gradients(large), 1e-9)


def test_a_model_that_cannot_be_cut_is_within_the_budget_too(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "SOFTCAPS", ())  # as if the cap had a name of its own
    engine = make_engine("softcap", logits_budget=100_000)
    name = upload(engine, normalised, "mine")
    with pytest.raises(LogitsTooLarge, match=r"the model's own forward.*200,448"):
        run(engine, rows(LENGTHS), name)
    assert list(stored(run(engine, rows([5, 3]), name))) == ["logits_materialised/the model's own forward:sum"]


def test_checkpointing_gives_the_same_gradient_under_dropout(make_engine: MakeEngine) -> None:
    found = []
    for settings in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "micro_batch_tokens": 24}):
        engine = make_engine("dropout", **settings)
        name = upload(engine, normalised, "mine")
        create(engine, target_modules=["lm_head", "q_proj"])
        off_zero(engine, "m")
        run(engine, rows(LENGTHS), name)
        found.append(gradients(engine))
    assert same(found[0], found[1], 1e-9)
    assert not same(found[1], found[2], 1e-3)  # each micro-batch has random numbers of its own


def test_references_are_scored_without_storing_logits(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinkerbell_server.engines.torch.network import Network

    engine = make_engine()

    def preferred(model_outputs, loss_fn_inputs, attention_mask):
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
        return LossFnOutput(-F.logsigmoid((logprobs - loss_fn_inputs["ref_logprobs"]).sum()), logprobs)

    name = upload(engine, preferred, "preferred")
    monkeypatch.setattr(Network, "logits", lambda *_: pytest.fail("logits were stored"))
    assert run(engine, rows(LENGTHS), name).loss == pytest.approx(0.6931471805599453)


def _with_budget(engine: TorchEngine, logits: int) -> TorchEngine:
    limited = copy.copy(engine)
    limited._budgets = engine._budgets._replace(logits=logits)
    return limited
