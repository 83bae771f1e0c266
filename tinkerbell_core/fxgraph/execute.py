"""Runs a checked graph as a loss: its operations, in order, on the log-probabilities of each sequence."""

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

_K = 3  # targets per position of a generated batch

# operation → its first argument that is an index
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
    """Runs a graph on the real positions of each row, and sums the losses.

    A metric with the suffix `:sum` is summed over the rows; one with the suffix `:mean` is averaged.
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
        """The keys of loss_fn_inputs that the graph reads."""
        return ("target_tokens", *(name for name in self._names if name != "target_tokens"))

    @property
    def summary(self) -> str:
        """One line that describes the graph."""
        return f"a graph of {len(self._steps)} operations on {', '.join(self.graph.inputs)}"

    def __call__(
        self,
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *args: Any,
        **hyperparameters: Any,  # Any: a graph has no hyperparameters
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
        """The loss and the metrics of one sequence. Raises BadLoss if one of them is not a scalar."""
        values: dict[str, Any] = dict(zip(self.graph.names, inputs, strict=True))  # Any: tensors, shapes, numbers
        for name, operation, args, kwargs in self._steps:
            filled = [_filled(arg, values) for arg in args]
            keywords = {key: _filled(arg, values) for key, arg in kwargs.items()}
            try:
                values[name] = operation(*filled, **keywords)
            except Exception as error:
                error.add_note(f"in node {name!r} of the graph")
                raise
        loss = values[self.graph.loss]
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise BadLoss("the loss of the graph is not a scalar tensor: reduce it, for example with .sum()")
        metrics = {key: _metric(key, values[name], loss) for key, name in self.graph.metrics.items()}
        return loss, metrics

    def examples(self, vocab_size: int) -> dict[str, Tensor]:
        """A generated batch with the ranks that the graph declares; inputs used as an index are valid indices."""
        mask = torch.ones(len(LENGTHS), max(LENGTHS))  # [B, T]
        ranks = {**self.graph.inputs, "target_tokens": self.graph.inputs["logprobs"]}
        examples = {name: _example(name, ranks[name], mask, vocab_size) for name in self.inputs}
        indices = self._indices()
        return {name: value.long() % min(LENGTHS) if name in indices else value for name, value in examples.items()}

    def _indices(self) -> set[str]:
        """The names of inputs that an operation uses as an index."""
        input_of = dict(zip(self.graph.names, self.graph.inputs, strict=True))
        arguments = [
            value
            for step in self.graph.steps
            for value in (*step.args[_INDEX_AT.get(step.target, len(step.args)) :], *step.kwargs.values())
            if step.target in _INDEX_AT
        ]
        flat = [item for each in arguments for item in (each if isinstance(each, list | tuple) else [each])]
        return {input_of[each.name] for each in flat if isinstance(each, Ref) and each.name in input_of}

    def _check_rank(self, name: str, value: Tensor, rank: int) -> None:
        if value.dim() - 1 != rank:
            shape = ("one number", "[T]", "[T, K]")
            raise BadData(f"{name!r} has {shape[value.dim() - 1]} per row, but the graph declares {shape[rank]}")


def load_graph(payload: bytes) -> GraphLoss:
    """The loss in `payload`. Raises BadUpload if the payload is not a graph of allowed operations."""
    return GraphLoss(parse(payload))


def _filled(value: Value, values: Mapping[str, Any]) -> Any:  # Any: an argument of an operation
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
        raise BadLoss(f"the metric {key!r} of the graph is not a scalar")
    return value.detach()


def _example(name: str, rank: int, mask: Tensor, vocab_size: int) -> Tensor:
    if rank == 2:
        several = guess(name.replace("topk", "").replace("logits", ""), mask.repeat(1, _K), vocab_size)
        return several.reshape(*mask.shape, _K)
    plain = name.replace("topk", "") if rank == 1 else name
    return guess(plain.removesuffix("logits"), mask, vocab_size, per_sequence=rank == 0)
