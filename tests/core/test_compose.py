"""A weighted sum of losses is a loss whose value, gradient and description are derived from its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, LossRegistry, LossSpec, loss
from tinkerbell_core.compose import combine
from tinkerbell_core.dryrun import discover, dry_run
from tinkerbell_core.errors import BadHyperparameter, BadLoss
from tinkerbell_core.example_inputs import ragged_mask
from tinkerbell_core.functional import effective_mask, pairs, sequence_sum, target_logprobs
from tinkerbell_core.logits import Head, LocalSource, Logits, plain_logits
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.losses.ppo import ppo
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import Provenance
from tinkerbell_core.types import LossDescription
from tinkerbell_core.weighted_sum import flat_config

Inputs = dict[str, Tensor]


@loss(coupling="sequence", group_size=2)
def contrast(
    model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, *, beta: float = 0.5
) -> LossFnOutput:
    """Prefer even rows over odd ones."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    chosen, rejected = pairs(sequence_sum(target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], mask), mask))
    margin = beta * (chosen - rejected)
    return LossFnOutput(-torch.nn.functional.logsigmoid(margin).sum(), None, {"margin:mean": margin.mean()})


def gradient(spec: LossSpec, *, lazy: bool = False, **settings: object) -> tuple[LossFnOutput, Tensor]:
    """The output and the gradient of the hidden states on one float64 batch, the same in each call."""
    inputs = discover(combine({cross_entropy: 1, ppo: 1}), 11)[1]
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    mask = ragged_mask(2, {}, "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = torch.randn(*mask.shape, 6, dtype=torch.float64).requires_grad_()
        head = torch.randn(6, 11, dtype=torch.float64)
    source = LocalSource(hidden.flatten(0, 1), Head(head.T), chunk_bytes=3 * 11 * 8)
    logits = Logits.over(source, mask.shape) if lazy else plain_logits(hidden, lambda x: x @ head)
    output = run_loss(spec, logits, inputs, mask, spec.bind(settings))
    return output, torch.autograd.grad(output.loss, hidden)[0]


@pytest.mark.parametrize("lazy", [False, True], ids=["stored", "lazy"])
def test_the_gradient_is_the_weighted_sum_of_the_gradients_of_the_parts(lazy: bool) -> None:
    terms = {contrast: 1.0, cross_entropy: 0.1, ppo: -0.7}
    whole, found = gradient(combine(terms), lazy=lazy)
    alone = [(weight, *gradient(spec, lazy=lazy)) for spec, weight in terms.items()]
    expected = sum(weight * grad for weight, _, grad in alone)
    assert float((found - expected).abs().max()) < 1e-10
    assert whole.loss.item() == pytest.approx(sum(weight * out.loss.item() for weight, out, _ in alone), rel=1e-12)


def test_the_diagnostics_and_hyperparameters_of_a_part_have_its_name_as_prefix() -> None:
    spec = combine([(contrast, 1.0), (ppo, 2.0)])
    output, _ = gradient(spec, **{"contrast/beta": 2.0})
    alone, _ = gradient(contrast, beta=2.0)
    assert output.diagnostics["contrast/margin:mean"] == alone.diagnostics["margin:mean"]
    assert output.diagnostics["contrast/loss:sum"] == alone.loss.detach()
    assert "ppo/clip_fraction:mean" in output.diagnostics
    assert output.logprobs is not None


def test_coupling_group_size_and_inputs_are_derived_from_the_parts() -> None:
    both = combine({contrast: 1.0, cross_entropy: 0.1})
    assert (both.coupling, both.group_size) == ("sequence", 2)
    assert combine({replace(contrast, coupling="batch"): 1.0, cross_entropy: 1.0}).coupling == "batch"
    found = dry_run(combine({contrast: 1.0, ppo: 1.0}), 11)
    assert (found.inputs, found.plain_logits) == (("target_tokens", "logprobs", "advantages"), "")


def test_the_id_and_the_digest_depend_on_the_parts_and_weights() -> None:
    spec = combine({contrast: 1.0, cross_entropy: 0.1})
    assert spec.id == "sum:1*local:contrast+0.1*local:cross_entropy"
    assert [part.digest for part in spec.parts] == [contrast.digest, cross_entropy.digest]
    others = [combine({contrast: 1.0, cross_entropy: 0.2}), combine({replace(contrast, digest="x"): 1.0})]
    assert len({spec.digest, *(other.digest for other in others)}) == 3


def test_a_sum_is_registered_under_its_name() -> None:
    named = combine({contrast: 1.0, cross_entropy: 0.1}, name="mixed").from_(Provenance("entry_point", "pkg", "1"))
    assert LossRegistry([named]).get("mixed").id == "pkg:mixed"
    assert LossDescription.of(named).parts == named.parts


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "has 0 parts"),
        ([(ppo, float("nan"))], "the weight of 'ppo' is nan, but must be a finite number"),
        ([(ppo, 1.0), (ppo, 2.0)], "two parts of a weighted sum are named 'ppo'"),
        ([(contrast, 1.0), (replace(ppo, group_size=3), 1.0)], "'contrast' takes rows in groups of 2 and 'ppo'"),
    ],
)
def test_parts_that_cannot_be_combined_are_refused(terms: list[tuple[LossSpec, float]], message: str) -> None:
    with pytest.raises(BadLoss, match=message):
        combine(terms)


def test_hyperparameters_of_a_sum_must_name_a_part() -> None:
    parts = combine({contrast: 1.0, ppo: 1.0}).parts
    assert flat_config({"contrast": {"beta": 0.2}}, parts) == {"contrast/beta": 0.2}
    assert flat_config({"local:ppo": {"x": 1}}, parts) == {"ppo/x": 1}
    for config, message in [
        ({"contrst": {"beta": 1.0}}, "did you mean 'contrast'"),
        ({"beta": 1.0}, "'beta' is not the name of a part of the sum"),
    ]:
        with pytest.raises(BadHyperparameter, match=message):
            flat_config(config, parts)
    with pytest.raises(BadHyperparameter, match="which only a weighted sum accepts"):
        flat_config({"beta": {"x": 1}}, ())


@loss(coupling="sequence", group_size=2, preferred_rows=(0,))
def preference(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    """Prefer even rows over odd ones."""
    return contrast.fn(model_outputs, loss_fn_inputs, attention_mask)


def of_rows(output_of: LossSpec, rows: slice) -> float:
    """The value of a loss on some of the rows of the batch of `gradient`."""
    mask = ragged_mask(2, {}, "cpu")
    kept = torch.zeros_like(mask)
    kept[rows] = mask[rows]

    @loss(coupling="sequence")
    def masked(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        return output_of.fn(model_outputs, loss_fn_inputs, kept)

    return gradient(masked)[0].loss.item()


@pytest.mark.parametrize("lazy", [False, True], ids=["stored", "lazy"])
def test_a_row_loss_beside_a_preference_loss_counts_the_chosen_rows(lazy: bool) -> None:
    total = combine({preference: 1.0, cross_entropy: 0.1})
    output = gradient(total, lazy=lazy)[0]
    chosen = of_rows(cross_entropy, slice(0, None, 2))
    assert float(output.diagnostics["cross_entropy/loss:sum"]) == pytest.approx(chosen, rel=1e-9)
    assert output.loss.item() == pytest.approx(gradient(preference)[0].loss.item() + 0.1 * chosen, rel=1e-9)
    assert total.preferred_rows == (0,)
    assert LossDescription.of(total).preferred_rows == (0,)


def test_a_part_can_count_the_rejected_rows_too() -> None:
    total = combine({preference: 1.0, cross_entropy: 0.1})
    output = gradient(total, **flat_config({"cross_entropy": {"rejected_rows": True}}, total.parts))[0]
    every = gradient(cross_entropy)[0].loss.item()
    assert float(output.diagnostics["cross_entropy/loss:sum"]) == pytest.approx(every, rel=1e-9)
    with pytest.raises(BadHyperparameter, match="must be bool"):
        total.bind({"cross_entropy/rejected_rows": "no"})


def test_pairs_without_a_preference_count_every_row() -> None:
    output = gradient(combine({contrast: 1.0, cross_entropy: 0.1}))[0]
    every = gradient(cross_entropy)[0].loss.item()
    assert float(output.diagnostics["cross_entropy/loss:sum"]) == pytest.approx(every, rel=1e-9)


def test_the_logprobs_of_a_sum_are_those_of_a_part_that_counts_every_row() -> None:
    total = combine({cross_entropy: 0.1, preference: 1.0, ppo: 0.0})
    output = gradient(total, **{"ppo/rejected_rows": True})[0]
    assert output.logprobs is not None
    assert bool((output.logprobs[1] != 0).any())


@pytest.mark.parametrize("rows", [(2,), (-1,), (0, 1)])
def test_preferred_rows_are_some_places_in_a_group(rows: tuple[int, ...]) -> None:
    with pytest.raises(BadLoss, match="must be some, and not all, of the places 0 to 1"):
        loss(group_size=2, preferred_rows=rows)(contrast.fn)
