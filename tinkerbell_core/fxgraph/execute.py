"""A graph as a loss: each sequence's log-probabilities through its operations, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData, BadLoss
from tinkerbell_core.example_inputs import LENGTHS, guess
from tinkerbell_core.functional import target_logprobs
from tinkerbell_core.fxgraph.arguments import Dtype, Ref, Slice, Value
from tinkerbell_core.fxgraph.graph import Graph, parse
from tinkerbell_core.fxgraph.resolve import function, method
from tinkerbell_core.output import LossFnOutput

_K = 3  # targets a position of a made-up batch

# operation → where its arguments begin to be positions
_INDEX_AT = {
    "operator.getitem": 1,
    "torch.take_along_dim": 1,
    "take_along_dim": 1,
    "torch.gather": 2,
    "gather": 2,
    "torch.index_select": 2,
    "index_select": 2,
}


class GraphLoss:
    """Runs a graph on every row, on its real positions only, and sums the losses.

    A metric named `:sum` is added up over the rows, one named `:mean` averaged.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._names = [name for name in graph.inputs if name != "logprobs"]
        self._steps: list[tuple[str, Callable[..., Any], Sequence[Value], dict[str, Value]]] = [
            (step.name, method(step.target) if step.is_method else function(step.target), step.args, step.kwargs)
            for step in graph.steps
        ]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads of loss_fn_inputs."""
        return ("target_tokens", *(name for name in self._names if name != "target_tokens"))

    @property
    def summary(self) -> str:
        """It in a line."""
        return f"a graph of {len(self._steps)} operations on {', '.join(self.graph.inputs)}"

    def __call__(
        self,
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *args: Any,
        **hyperparameters: Any,  # Any: a graph has none
    ) -> LossFnOutput:
        targets = loss_fn_inputs["target_tokens"]
        self._check_rank("target_tokens", targets, self.graph.inputs["logprobs"])
        for name in self._names:
            self._check_rank(name, loss_fn_inputs[name], self.graph.inputs[name])
        logprobs = target_logprobs(model_outputs, targets, where=attention_mask)  # [B, T] or [B, T, K]
        lengths: list[int] = attention_mask.sum(1).long().tolist()
        losses, metrics = [], dict.fromkeys(self.graph.metrics, logprobs.new_zeros(()))
        for row, length in enumerate(lengths):
            given = [loss_fn_inputs[name][row] for name in self._names]
            loss, found = self.one(logprobs[row, :length], *[each[:length] if each.dim() else each for each in given])
            losses.append(loss)
            metrics = {key: metrics[key] + value for key, value in found.items()}
        means = {key: value / len(lengths) if key.endswith(":mean") else value for key, value in metrics.items()}
        return LossFnOutput(torch.stack(losses).sum(), logprobs, means)

    def one(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics of one sequence. Raises BadLoss where they are no scalars."""
        values: dict[str, Any] = dict(zip(self.graph.names, inputs, strict=True))  # Any: tensors, shapes, numbers
        for name, operation, args, kwargs in self._steps:
            filled = [_filled(arg, values) for arg in args]
            keywords = {key: _filled(arg, values) for key, arg in kwargs.items()}
            try:
                values[name] = operation(*filled, **keywords)
            except Exception as error:
                error.add_note(f"in the graph's node {name!r}")
                raise
        loss = values[self.graph.loss]
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise BadLoss("the graph's loss is not a scalar tensor: reduce it, with .sum()")
        metrics = {key: _metric(key, values[name], loss) for key, name in self.graph.metrics.items()}
        return loss, metrics

    def examples(self, vocab_size: int) -> dict[str, Tensor]:
        """A made-up batch of inputs that have the ranks the graph declares, whole numbers where they are indices."""
        mask = torch.ones(len(LENGTHS), max(LENGTHS))  # [B, T]
        ranks = {**self.graph.inputs, "target_tokens": self.graph.inputs["logprobs"]}
        made = {name: _example(name, ranks[name], mask, vocab_size) for name in self.inputs}
        indices = self._indices()
        return {name: value.long() % min(LENGTHS) if name in indices else value for name, value in made.items()}

    def _indices(self) -> set[str]:
        """Inputs that some operation takes as positions."""
        held = dict(zip(self.graph.names, self.graph.inputs, strict=True))
        places = [
            value
            for step in self.graph.steps
            for value in (*step.args[_INDEX_AT.get(step.target, len(step.args)) :], *step.kwargs.values())
            if step.target in _INDEX_AT
        ]
        flat = [item for place in places for item in (place if isinstance(place, list | tuple) else [place])]
        return {held[each.name] for each in flat if isinstance(each, Ref) and each.name in held}

    def _check_rank(self, name: str, value: Tensor, rank: int) -> None:
        if value.dim() - 1 != rank:
            shape = ("a number", "[T]", "[T, K]")
            raise BadData(f"{name!r} is {shape[value.dim() - 1]} a row, but the graph was declared with {shape[rank]}")


def load_graph(payload: bytes) -> GraphLoss:
    """The loss in `payload`. Raises BadUpload for one that is not made of allowed operations alone."""
    return GraphLoss(parse(payload))


def _filled(value: Value, values: Mapping[str, Any]) -> Any:  # Any: what an operation takes
    match value:
        case Ref():
            return values[value.name]
        case Dtype():
            return getattr(torch, value.name)
        case Slice():
            return slice(*(_filled(bound, values) for bound in (value.start, value.stop, value.step)))
        case list():
            return [_filled(item, values) for item in value]
        case tuple():
            return tuple(_filled(item, values) for item in value)
        case _:
            return value


def _metric(key: str, value: object, like: Tensor) -> Tensor:
    if isinstance(value, bool | int | float):
        return like.new_tensor(value)
    if not isinstance(value, Tensor) or value.dim() != 0 or value.is_complex():
        raise BadLoss(f"the graph's metric {key!r} is not a scalar")
    return value.detach()


def _example(name: str, rank: int, mask: Tensor, vocab_size: int) -> Tensor:
    if rank == 2:
        several = guess(name.replace("topk", "").replace("logits", ""), mask.repeat(1, _K), vocab_size)
        return several.reshape(*mask.shape, _K)
    plain = name.replace("topk", "") if rank == 1 else name
    return guess(plain.removesuffix("logits"), mask, vocab_size, per_sequence=rank == 0)
