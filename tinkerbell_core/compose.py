"""Combines losses into a weighted sum that is itself a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.weighted_sum import REJECTED_ROWS, sum_of


def combine(weighted: Mapping[LossSpec, float] | Sequence[tuple[LossSpec, float]], name: str | None = None) -> LossSpec:
    """A loss that is the weighted sum of losses: `combine({dpo: 1.0, cross_entropy: 0.1}, name="rpo")`.

    The loss and its gradient are the weighted sums of those of the parts. The logprobs are those of the first part that
    returns some. The diagnostic `key` of a part becomes `part/key`, and its unweighted loss is `part/loss:sum`. The
    hyperparameter `name` of a part becomes `part/name`, in loss_fn_config `{"part": {"name": ...}}`. The sum is a
    "sequence" loss if all parts are, and has the largest group_size. The default name lists the terms. A part that
    takes single rows, beside a part with `preferred_rows`, counts only those: the chosen answers. It counts all rows if
    its hyperparameter `rejected_rows` is true.
    Raises BadLoss for parts, weights or group sizes that cannot be combined.
    """
    terms = tuple(weighted.items() if isinstance(weighted, Mapping) else weighted)
    total = sum_of(terms, name)
    specs = [spec for spec, _ in terms]
    return LossSpec(
        name=total.name,
        fn=_Combined(
            tuple((spec, part.weight) for spec, part in zip(specs, total.parts, strict=True)),
            total.group_size,
            total.preferred_rows,
            total.row_parts,
        ),
        summary=total.summary,
        inputs=total.inputs,
        optional_inputs=total.optional_inputs,
        hyperparameters=total.hyperparameters,
        coupling=total.coupling,
        group_size=total.group_size,
        preferred_rows=total.preferred_rows,
        finite=total.finite,
        source=total.source,
        digest=total.digest,
        plain_logits="; ".join(f"{spec.name}: {spec.plain_logits}" for spec in specs if spec.plain_logits),
        materialises=tuple(dict.fromkeys(operation for spec in specs for operation in spec.materialises)),
        reads=tuple(sorted({statistic for spec in specs for statistic in spec.reads})),
        reads_detached=tuple(sorted({statistic for spec in specs for statistic in spec.reads_detached})),
        parts=total.parts,
        example_inputs={key: value for spec in specs for key, value in spec.example_inputs.items()},
        example_hyperparameters={
            f"{spec.name}/{name}": value for spec in specs for name, value in spec.example_hyperparameters.items()
        },
    )


@dataclass(frozen=True, slots=True)
class _Combined:
    """The function of a weighted sum. The other fields are those of Sum."""

    terms: tuple[tuple[LossSpec, float], ...]
    group_size: int = 1
    preferred_rows: tuple[int, ...] = ()
    row_parts: tuple[str, ...] = ()

    # Any: each part has different hyperparameters
    def __call__(
        self,
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *_: Any,
        **hyperparameters: Any,
    ) -> LossFnOutput:
        loss, logprobs, partial_logprobs = None, None, None
        preferred = self._preferred(attention_mask)
        diagnostics: dict[str, float | Tensor] = {}
        for spec, weight in self.terms:
            own = {
                key.removeprefix(f"{spec.name}/"): value
                for key, value in hyperparameters.items()
                if key.startswith(f"{spec.name}/")
            }
            restricted = spec.name in self.row_parts and not own.pop(REJECTED_ROWS, False)
            mask = preferred if restricted else attention_mask
            output = run_loss(spec, model_outputs, loss_fn_inputs, mask, own)
            loss = output.loss * weight if loss is None else loss + output.loss * weight
            if restricted:  # its logprobs are 0 in the other rows
                partial_logprobs = output.logprobs if partial_logprobs is None else partial_logprobs
            else:
                logprobs = output.logprobs if logprobs is None else logprobs
            diagnostics[f"{spec.name}/loss:sum"] = output.loss.detach()
            diagnostics |= {f"{spec.name}/{key}": value for key, value in output.diagnostics.items()}
        assert loss is not None
        return LossFnOutput(loss, partial_logprobs if logprobs is None else logprobs, diagnostics)

    def _preferred(self, attention_mask: Tensor) -> Tensor:
        """The mask `[B, T]` without the rows that are not preferred."""
        places = torch.arange(len(attention_mask), device=attention_mask.device) % self.group_size  # [B]
        keep = torch.isin(places, torch.tensor(self.preferred_rows, device=places.device, dtype=places.dtype))
        return attention_mask.masked_fill(~keep[:, None], 0)
