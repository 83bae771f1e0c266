"""The step is exact: micro-batches, pairs, dropout and accumulation do not change the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PhiConfig

from tests.engine.calls import CE, LENGTHS, create, gradients, off_zero, rows, run, same, step, upload, weights
from tests.engine.conftest import MakeEngine
from tests.engine.exact_models import EXACT, FLOAT32_PARTS
from tests.engine.losses import normalised, pairs, summed_nll
from tinkerbell_core.errors import BadLoss, NothingAccumulated, UnknownLoss, UnknownModel
from tinkerbell_core.functional import hidden_states
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.tensors import from_torch, to_torch
from tinkerbell_server.commands import RunLoss
from tinkerbell_server.engines.torch.load_network import turn_off_dropout
from tinkerbell_server.engines.torch.memory import Budgets


@pytest.mark.parametrize(("base", "tolerance"), [("plain", EXACT), ("tied", EXACT), ("qwen3", FLOAT32_PARTS)])
@pytest.mark.parametrize(("fn", "settings"), [(normalised, {}), (pairs, {"coupling": "sequence", "group_size": 2})])
def test_the_gradient_is_the_same_at_every_micro_batch_size(
    make_engine: MakeEngine, base, tolerance, fn, settings
) -> None:
    found = {}
    engine = make_engine(base)
    name = upload(engine, fn, "mine", **settings)
    for budget in (1, 13, 24, 40, 1000):
        engine._loss_calls.budgets = Budgets(budget, budget, 1 << 30, 1 << 30)
        create(engine, str(budget))
        off_zero(engine, str(budget))
        result = run(engine, rows(LENGTHS), name, str(budget))
        found[budget] = (gradients(engine, str(budget)), result)
    whole, answer = found[1000]
    assert answer.micro_batches == 1
    assert found[1][1].micro_batches == (4 if settings else 8)
    for budget, (gradient, result) in found.items():
        assert same(whole, gradient, tolerance), budget
        assert result.loss == pytest.approx(answer.loss, rel=tolerance)
        assert result.diagnostics == pytest.approx(answer.diagnostics, rel=tolerance)
        assert result.logprobs is not None
        assert [t.shape for t in result.logprobs] == [(length,) for length in LENGTHS]


def test_the_gradient_equals_that_of_torch_on_the_whole_model(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine)
    off_zero(engine)
    data = rows([6, 6], seed=3)
    run(engine, data)
    found = gradients(engine)
    model = engine._models.get("m")
    tokens = torch.stack([to_torch(row.tokens) for row in data]).to(engine._base.device)
    targets = torch.stack([to_torch(row.inputs["target_tokens"]) for row in data]).to(engine._base.device)
    logits = engine._base.model(tokens).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    expected = {name: p.grad for name, p in model.parameters.items() if p.grad is not None}
    assert same(expected, found, EXACT)


def test_dropout_is_replayed_when_the_backbone_runs_a_second_time(make_engine: MakeEngine) -> None:
    engine = make_engine("dropout", base_dropout=True, micro_batch_tokens=24)
    coupled = upload(engine, lambda o, i, m: summed_nll(o, i, m), "coupled", coupling="batch")
    alone = upload(engine, lambda o, i, m: summed_nll(o, i, m), "alone", coupling="sequence")
    for model in ("two-passes", "one-pass"):
        create(engine, model)
        off_zero(engine, model)
    two = run(engine, rows(LENGTHS), coupled, "two-passes")
    one = run(engine, rows(LENGTHS), alone, "one-pass")
    assert two.micro_batches > 1
    assert two.loss == pytest.approx(one.loss, rel=1e-12)
    assert same(gradients(engine, "two-passes"), gradients(engine, "one-pass"), EXACT)


def test_dropout_of_the_base_is_off_by_default(make_engine: MakeEngine) -> None:
    engine = make_engine("dropout")
    trained, evaluated = (run(engine, rows(LENGTHS), backward=backward) for backward in (True, False))
    assert trained.loss == evaluated.loss


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
DROPOUT = [
    GPT2Config(**SMALL, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    LlamaConfig(**SMALL, intermediate_size=32, attention_dropout=0.5),
    PhiConfig(**SMALL, intermediate_size=32, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5),
]


@pytest.mark.parametrize("config", DROPOUT, ids=lambda config: config.model_type)
def test_a_model_without_dropout_gives_the_same_logits_in_train_mode(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert not torch.equal(model.train()(tokens).logits, expected)
        turn_off_dropout(model)
        assert torch.equal(model.train()(tokens).logits, expected)


def test_dropout_differs_from_call_to_call_and_is_off_without_backward(make_engine: MakeEngine) -> None:
    engine = make_engine("dropout", base_dropout=True)
    first, second = (run(engine, rows(LENGTHS)).loss for _ in range(2))
    assert first != second
    first, second = (run(engine, rows(LENGTHS), backward=False).loss for _ in range(2))
    assert first == second


def test_gradients_of_calls_since_the_last_step_are_summed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    data = rows(LENGTHS)
    run(engine, data)
    whole = gradients(engine)
    create(engine, "twice")
    run(engine, data[:3], model="twice")
    run(engine, data[3:], model="twice")
    assert same(whole, gradients(engine, "twice"), EXACT)
    step(engine)
    with pytest.raises(NothingAccumulated):
        step(engine)


def test_normalising_divides_by_the_tokens_of_the_whole_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    data = rows([4, 4], weights=[[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
    run(engine, data[:1])
    result = run(engine, data[1:])
    assert (result.tokens, result.counted_tokens, result.sequences) == (4, 1, 1)
    summed = torch.stack([g.norm() for g in gradients(engine).values()]).norm()
    stepped = step(engine, normalize="tokens")
    assert (stepped.tokens, stepped.sequences) == (3, 2)
    assert stepped.grad_norm == pytest.approx(float(summed) / 3)


def test_an_aggregation_other_than_sum_gets_the_whole_batch(make_engine: MakeEngine) -> None:
    small, large = make_engine(micro_batch_tokens=8), make_engine()
    for engine in (small, large):
        run(engine, rows(LENGTHS), CE, aggregation="token-mean")
    assert same(gradients(small), gradients(large), EXACT)


def test_a_position_may_have_several_targets(make_engine: MakeEngine) -> None:
    engine = make_engine()
    several = [torch.randint(0, 256, (length, 3)) for length in (4, 2)]
    data = rows([4, 2], target_tokens=several, weights=[torch.ones(4, 3), torch.ones(2, 3)])
    result = run(engine, data)
    assert result.logprobs is not None
    assert [tensor.shape for tensor in result.logprobs] == [(4, 3), (2, 3)]
    assert result.counted_tokens == 6


@pytest.mark.parametrize("splits", [True, False])
def test_a_forward_call_with_weights_0_returns_logprobs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, splits: bool
) -> None:
    if not splits:
        monkeypatch.setattr("tinkerbell_server.engines.torch.network.SOFTCAPS", ())
    engine = make_engine("softcap")
    assert engine._base.splits is splits
    ones = run(engine, rows([5, 3]), backward=False)
    zeros = run(engine, rows([5, 3], weights=[[0.0] * 5, [0.0] * 3]), backward=False)
    assert zeros.loss == 0
    assert ones.logprobs is not None
    assert zeros.logprobs == ones.logprobs


def test_inputs_of_any_dtype_and_shape_reach_the_loss_padded(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def checked(model_outputs, loss_fn_inputs, attention_mask):
        half, score, table = (loss_fn_inputs[key] for key in ("half", "score", "table"))
        if attention_mask.shape[0] == 2:
            assert str(half.dtype) == "torch.bfloat16"
            assert half.tolist() == [[1.5, 2.5, 3.5], [4.5, 0.0, 0.0]]
            assert score.tolist() == [7, 8]
            assert table.shape == (2, 3, 2)
        return LossFnOutput(model_outputs.sum())

    examples = {
        "half": from_torch(torch.ones(4, 8)),
        "score": from_torch(torch.ones(4)),
        "table": from_torch(torch.ones(4, 8, 2)),
    }
    name = upload(engine, checked, "checked", example_inputs=examples)
    half = [torch.tensor([1.5, 2.5, 3.5]).bfloat16(), torch.tensor([4.5]).bfloat16()]
    run(engine, rows([3, 1], half=half, score=[7, 8], table=[torch.ones(3, 2), torch.ones(1, 2)]), name)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_changes_nothing(make_engine: MakeEngine, broken: str) -> None:
    engine = make_engine()

    def poisoned(model_outputs, loss_fn_inputs, attention_mask, *, broken=""):
        x = model_outputs.sum()
        if broken == "loss":
            return LossFnOutput(x * float("nan"))
        return LossFnOutput(x + (torch.sqrt((x - x.detach()).abs()) if broken == "gradient" else 0))

    name = upload(engine, poisoned, "poisoned")
    run(engine, rows([4, 3]))
    before, accumulated = weights(engine), gradients(engine)
    with pytest.raises(BadLoss, match="poisoned"):
        run(engine, rows([4, 3]), name, broken=broken)
    assert same(before, weights(engine))
    assert same(accumulated, gradients(engine))
    step(engine)


def test_a_model_with_an_unknown_logit_transform_is_run_through_its_own_forward(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tinkerbell_server.engines.torch.network.SOFTCAPS", ()
    )  # then the cap in the config has an unknown name
    engine, small = make_engine("softcap"), make_engine("softcap", micro_batch_tokens=12)
    assert not engine._base.splits
    for one in (engine, small):
        name = upload(one, normalised, "mine")
        create(one)
        off_zero(one)
        run(one, rows(LENGTHS), name)
    assert same(gradients(engine), gradients(small), EXACT)


@pytest.mark.parametrize("mode", ["trusted", "sandboxed"])
def test_a_loss_cannot_read_the_hidden_states_of_such_a_model(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("tinkerbell_server.engines.torch.network.SOFTCAPS", ())
    engine = make_engine("softcap", uploads=mode, dry_run_seconds=60.0, sandbox_seconds=60.0)

    def reads_hidden_states(model_outputs, loss_fn_inputs, attention_mask):
        return LossFnOutput(hidden_states(model_outputs).sum())

    name = upload(engine, reads_hidden_states, "reads")
    with pytest.raises(BadLoss, match=r"asks for hidden states, but .* changes its logits"):
        run(engine, rows([3]), name)


@pytest.mark.parametrize("base", ["plain", "softcap"])
def test_a_loss_can_read_hidden_states(make_engine: MakeEngine, base: str) -> None:
    small, large = make_engine(base, micro_batch_tokens=12), make_engine(base)

    def contrast(model_outputs, loss_fn_inputs, attention_mask):
        hidden = hidden_states(model_outputs)[:, 0]
        return LossFnOutput(torch.logsumexp(hidden @ hidden.T, 1).sum())

    for engine in (small, large):
        name = upload(engine, contrast, "contrast")
        create(engine)
        off_zero(engine)
        result = run(engine, rows(LENGTHS), name)
        assert not any(name.startswith("logits_materialised/") for name in result.diagnostics)
    assert same(gradients(small), gradients(large), EXACT)


def test_an_unknown_loss_or_model_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine)
    command = RunLoss(model_id="m", loss="cross_entropi", data=rows([3]), hyperparameters={}, backward=True)
    with pytest.raises(UnknownLoss, match="did you mean"):
        engine.execute(command)
    with pytest.raises(NothingAccumulated):
        step(engine)
    with pytest.raises(UnknownModel):
        step(engine, "another")


@pytest.mark.parametrize("coupled", [False, True])
def test_an_adapter_on_the_head_alone_is_trained(make_engine: MakeEngine, coupled: bool) -> None:
    engine = make_engine(micro_batch_tokens=16)
    create(engine, target_modules=["lm_head"])
    data = rows([7, 5, 6])
    first = run(engine, data, aggregation="token-mean" if coupled else "sum").loss
    for _ in range(3):
        run(engine, data, aggregation="token-mean" if coupled else "sum")
        step(engine, learning_rate=0.1)
    assert run(engine, data, aggregation="token-mean" if coupled else "sum").loss < first
