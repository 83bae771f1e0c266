"""A dry run finds the inputs that a loss reads, and refuses a loss that cannot train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, LossSpec, loss
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadData, BadLoss
from tinkerbell_core.functional import hidden_states, target_logprobs

Inputs = dict[str, Tensor]


def returning(result: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def fn(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Any:
        return result(model_outputs)

    return fn


def test_a_dry_run_finds_required_and_optional_inputs() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        per_token = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"]) * loss_fn_inputs["advantages"]
        if "teacher_logprobs" in loss_fn_inputs:
            per_token = per_token + loss_fn_inputs["teacher_logprobs"]
        weights = loss_fn_inputs.get("weights")
        return LossFnOutput((per_token if weights is None else per_token * weights).sum())

    found = dry_run(mine, 50)
    assert found.inputs == ("target_tokens", "advantages")
    assert found.optional_inputs == ("teacher_logprobs", "weights")
    assert (found.digest, found.fn) == (mine.digest, mine.fn)


def test_a_dry_run_finds_an_input_that_is_read_only_if_another_is_missing() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        key = "a" if "a" in loss_fn_inputs else "b"
        return LossFnOutput((model_outputs.sum(-1) * loss_fn_inputs[key]).sum())

    found = dry_run(mine, 50)
    assert (found.inputs, found.optional_inputs) == ((), ("a", "b"))


def test_an_input_is_generated_as_one_number_per_sequence_if_per_token_fails() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"]).sum(-1)
        (rows,) = loss_fn_inputs["reward"].shape
        return LossFnOutput((logprobs * loss_fn_inputs["reward"]).sum() / rows)

    assert dry_run(mine, 50).inputs == ("target_tokens", "reward")


def test_logits_and_topk_inputs_are_generated_with_a_third_dimension() -> None:
    def distil(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        student = model_outputs.log_softmax(-1)
        full = (loss_fn_inputs["teacher_logits"].softmax(-1) * student).sum(-1)
        few = loss_fn_inputs["teacher_topk_logprobs"].exp() * student.gather(-1, loss_fn_inputs["teacher_topk_ids"])
        return LossFnOutput(-((full + few.sum(-1)) * attention_mask).sum())

    inputs = dry_run(loss(distil), 23).inputs
    assert inputs == ("teacher_logits", "teacher_topk_logprobs", "teacher_topk_ids")


def test_the_error_of_a_failed_guess_names_the_guesses_and_example_inputs() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput((model_outputs.sum((1, 2)) * loss_fn_inputs["prototypes"].view(4, 3, 3).sum((1, 2))).sum())

    with pytest.raises(BadLoss, match=r"guessed 'prototypes' as float32 \[B, T\], then \[B\]; .*example_inputs="):
        dry_run(mine, 50)
    assert dry_run(mine, 50, example_inputs={"prototypes": torch.ones(4, 3, 3)}).inputs == ("prototypes",)


def test_example_inputs_of_different_sizes_are_refused() -> None:
    spec = loss(returning(lambda x: LossFnOutput(x.sum())))
    with pytest.raises(BadData, match="rows"):
        dry_run(spec, 50, example_inputs={"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(BadData, match="positions"):
        dry_run(spec, 50, example_inputs={"a": torch.ones(2, 3), "b": torch.ones(2, 4)})
    with pytest.raises(BadData, match="scalar"):
        dry_run(spec, 50, example_inputs={"a": torch.tensor(1.0)})


def test_the_generated_batch_has_whole_groups_ragged_rows_and_the_real_vocabulary() -> None:
    seen: dict[str, Any] = {}

    @loss(group_size=3)
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        seen.update(shape=tuple(model_outputs.shape), lengths=attention_mask.sum(-1).tolist())
        return LossFnOutput(model_outputs.sum())

    dry_run(mine, 321)
    assert seen["shape"] == (6, 8, 321)
    assert len(set(seen["lengths"])) > 1


def test_a_dry_run_provides_hidden_states() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput(hidden_states(model_outputs).square().sum())

    assert dry_run(mine, 50).inputs == ()


def test_a_dry_run_generates_a_hyperparameter_without_a_default() -> None:
    @loss
    def mine(
        model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, *, beta: float, k: int, flag: bool
    ) -> LossFnOutput:
        return LossFnOutput(model_outputs[..., :k].sum() / beta * (not flag))

    dry_run(mine, 50)


def test_a_loss_whose_gradient_is_not_finite_is_refused() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput((model_outputs * 0).sqrt().sum())

    with pytest.raises(BadLoss, match="the loss is finite, but its gradient is not"):
        dry_run(mine, 50)


def test_a_loss_that_does_not_depend_on_the_model_is_refused() -> None:
    @loss
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput(torch.ones((), requires_grad=True) * 2)

    with pytest.raises(BadLoss, match="does not depend on model_outputs"):
        dry_run(mine, 50)


def test_a_dry_run_does_not_change_the_random_state_of_the_process() -> None:
    spec: LossSpec = loss(returning(lambda x: LossFnOutput((x * torch.rand(())).sum())))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    dry_run(spec, 50)
    assert torch.equal(torch.rand(3), expected)


def test_declared_inputs_stay_declared() -> None:
    @loss(inputs=("target_tokens", "extra"), optional_inputs=("weights",))
    def mine(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput(target_logprobs(model_outputs, loss_fn_inputs["target_tokens"]).sum())

    found = dry_run(mine, 50)
    assert (found.inputs, found.optional_inputs) == (("target_tokens", "extra"), ("weights",))
