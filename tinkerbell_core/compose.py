"""Losses added up: one forward pass, each part's diagnostics under its own name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.weighted_sum import sum_of


def combine(weighted: Mapping[LossSpec, float] | Sequence[tuple[LossSpec, float]], name: str | None = None) -> LossSpec:
    """The weighted sum of losses, a loss like any other: `combine({dpo: 1.0, cross_entropy: 0.1}, name="rpo")`.

    Its gradient is the weighted sum of theirs; logprobs are those of the first part that gives some. What `part` calls
    `key` is the diagnostic `part/key`, and its unweighted value `part/loss:sum`; its hyperparameter is `part/name`, in
    loss_fn_config `{"part": {"name": ...}}`. Parts that are all "sequence" make a "sequence" loss, and the largest
    group_size is that of the sum. Without a name it is called what it is made of.
    Raises BadLoss for parts, weights or groups that do not go together.
    """
    terms = tuple(weighted.items() if isinstance(weighted, Mapping) else weighted)
    made = sum_of(terms, name)
    specs = [spec for spec, _ in terms]
    return LossSpec(
        name=made.name,
        fn=_Combined(tuple((spec, part.weight) for spec, part in zip(specs, made.parts, strict=True))),
        summary=made.summary,
        inputs=made.inputs,
        optional_inputs=made.optional_inputs,
        hyperparameters=made.hyperparameters,
        coupling=made.coupling,
        group_size=made.group_size,
        finite=made.finite,
        source=made.source,
        digest=made.digest,
        plain_logits="; ".join(f"{spec.name}: {spec.plain_logits}" for spec in specs if spec.plain_logits),
        materialises=tuple(dict.fromkeys(operation for spec in specs for operation in spec.materialises)),
        reads=tuple(sorted({statistic for spec in specs for statistic in spec.reads})),
        reads_beside=tuple(sorted({statistic for spec in specs for statistic in spec.reads_beside})),
        parts=made.parts,
        example_inputs={key: value for spec in specs for key, value in spec.example_inputs.items()},
        example_hyperparameters={
            f"{spec.name}/{name}": value for spec in specs for name, value in spec.example_hyperparameters.items()
        },
    )


@dataclass(frozen=True, slots=True)
class _Combined:
    """The function of a sum."""

    terms: tuple[tuple[LossSpec, float], ...]

    # Any: each part has hyperparameters of its own
    def __call__(
        self,
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *_: Any,
        **hyperparameters: Any,
    ) -> LossFnOutput:
        loss, logprobs = None, None
        diagnostics: dict[str, float | Tensor] = {}
        for spec, weight in self.terms:
            own = {
                key.removeprefix(f"{spec.name}/"): value
                for key, value in hyperparameters.items()
                if key.startswith(f"{spec.name}/")
            }
            output = run_loss(spec, model_outputs, loss_fn_inputs, attention_mask, own)
            loss = output.loss * weight if loss is None else loss + output.loss * weight
            logprobs = output.logprobs if logprobs is None else logprobs
            diagnostics[f"{spec.name}/loss:sum"] = output.loss.detach()
            diagnostics |= {f"{spec.name}/{key}": value for key, value in output.diagnostics.items()}
        assert loss is not None
        return LossFnOutput(loss, logprobs, diagnostics)
