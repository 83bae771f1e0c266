"""A loss that is sent as a graph gives the results of its function, and may use only listed operations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import LP, call, graph, payload_of
from tinkerbell_core.errors import BadData, BadLoss, BadUpload
from tinkerbell_core.fxgraph.execute import load_graph
from tinkerbell_core.fxgraph.graph import MAX_NODES, parse
from tinkerbell_core.fxgraph.operations import FUNCTIONS, METHODS
from tinkerbell_core.fxgraph.resolve import function, method

T, V = 6, 11


def likelihood(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss.detach(), "custom/mean:mean": logprobs.mean()}


def clipped(logprobs: Any, old_logprobs: Any, advantages: Any) -> Any:
    ratio = torch.exp(logprobs - old_logprobs)
    bounded = torch.clamp(ratio, 0.8, max=1.2)
    loss = -torch.minimum(ratio * advantages, bounded * advantages).sum()
    return loss, {"custom/clipped:mean": (ratio != bounded).float().mean()}


def sequence_level(logprobs: Any, old_logprobs: Any, reward: Any) -> Any:
    ratio = (logprobs - old_logprobs).mean().exp()
    margin = F.logsigmoid(ratio * reward) + F.softplus(ratio) + F.huber_loss(ratio, reward)
    return -margin / math.sqrt(2) * logprobs.shape[0], {}


def shifting(logprobs: Any, weights: Any) -> Any:
    late, early = logprobs[1:], logprobs[..., :-1]
    both = torch.stack([late, early])
    kept = torch.where(~(weights[1:] > 0) | (late < -2), late, torch.zeros_like(late))
    best = both.max(dim=0)
    steps = torch.arange(logprobs.shape[0]).to(logprobs.dtype)
    spread = torch.logsumexp(both, 0) + best.values + best[1] + both.sum(dim=0, keepdim=True).squeeze(0)
    return (spread * kept).mean() + (2 - logprobs.softmax(-1) ** 2 * steps).sum() / logprobs.size(0), {}


def several(logprobs: Any, scores: Any) -> Any:
    """A loss of `[T, K]` inputs."""
    return (torch.log_softmax(scores, dim=-1).exp() * -logprobs).sum(-1).mean(), {}


RANK = {"reward": 0, "scores": 2}


def ranks_of(loss: Callable[..., Any]) -> dict[str, int]:
    names = loss.__code__.co_varnames[: loss.__code__.co_argcount]
    return {name: 2 if loss is several else RANK.get(name, 1) for name in names}


@pytest.mark.parametrize("loss", [likelihood, clipped, sequence_level, shifting, several])
def test_a_graph_gives_the_loss_the_metrics_and_the_gradient_of_its_function(loss: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    ranks = ranks_of(loss)
    inputs = [torch.randn((T, 3)[:rank]) for rank in ranks.values()]
    results = []
    for run in (loss, load_graph(payload_of(loss, ranks)).one):
        logprobs = inputs[0].clone().requires_grad_()
        value, metrics = run(logprobs, *inputs[1:])
        results.append((value, torch.autograd.grad(value, logprobs)[0], metrics))
    (value, gradient, metrics), (again, same_gradient, same_metrics) = results
    assert torch.equal(value, again)
    assert torch.equal(gradient, same_gradient)
    assert metrics.keys() == same_metrics.keys()
    assert all(torch.equal(metric, same_metrics[key]) for key, metric in metrics.items())


def test_a_graph_runs_on_each_row_without_padding_and_sums_the_losses() -> None:
    def mean(logprobs: Any, old: Any, reward: Any) -> Any:
        return -((logprobs - old) * reward).mean(), {"custom/n:sum": old.sum(), "custom/m:mean": old.sum()}

    torch.manual_seed(0)
    logits = torch.randn(2, T, V, requires_grad=True)
    targets, mask = torch.randint(V, (2, T)), (torch.arange(T) < torch.tensor([[T], [2]])).long()
    old, reward = torch.ones(2, T), torch.tensor([1.0, -2.0])
    inputs = {"target_tokens": targets, "old": old, "reward": reward}
    output = load_graph(payload_of(mean, {"logprobs": 1, "old": 1, "reward": 0}))(logits, inputs, mask)
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = sum(mean(logprobs[i, :n], old[i, :n], reward[i])[0] for i, n in ((0, T), (1, 2)))
    assert torch.allclose(output.loss, expected)
    assert torch.allclose(*(torch.autograd.grad(loss, logits)[0] for loss in (output.loss, expected)), atol=1e-7)
    assert {key: float(value) for key, value in output.diagnostics.items()} == {"custom/n:sum": 8, "custom/m:mean": 4}


def test_an_input_of_another_rank_and_a_loss_that_is_not_a_scalar_are_refused() -> None:
    inputs = {"target_tokens": torch.zeros(1, T, dtype=torch.long), "weights": torch.ones(1)}
    with pytest.raises(BadData, match="'weights' has one number per row"):
        load_graph(payload_of(likelihood, ranks_of(likelihood)))(torch.zeros(1, T, V), inputs, torch.ones(1, T))
    with pytest.raises(BadLoss, match="not a scalar"):
        load_graph(payload_of(lambda logprobs: (logprobs * 2, {}), {"logprobs": 1})).one(torch.ones(T))


def test_every_operation_of_the_list_exists_in_torch() -> None:
    assert all(callable(function(name)) for name in FUNCTIONS)
    assert all(callable(method(name)) for name in METHODS)
    assert not {"item", "numpy", "tolist", "backward", "register_hook", "share_memory_", "data_ptr"} & set(METHODS)
    assert not [name for name in (*FUNCTIONS, *METHODS) if "__" in name or name.endswith("load")]


BIG = [call("torch.neg", {"ref": "logprobs"}, name=f"n{index}") for index in range(MAX_NODES)]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (graph(call("torch.load", LP)), "'torch.load' is not on the list"),
        (graph(call("torch.ops.load_library", LP)), "not on the list"),
        (graph(call("torch.compile", LP)), "not on the list"),
        (graph(call("builtins.eval", LP)), "not on the list"),
        (graph(call("builtins.__import__", LP)), "not on the list"),
        (graph(call("os.system", LP)), "not on the list"),
        (graph(call("operator.attrgetter", LP)), "not on the list"),
        (graph(call("torch.exp.__globals__", LP)), "not on the list"),
        (graph(call("__class__", LP, op="call_method")), "not on the list"),
        (graph(call("__reduce_ex__", LP, 2, op="call_method")), "not on the list"),
        (graph(call("item", LP, op="call_method")), "not on the list"),
        (graph(call("backward", LP, op="call_method")), "not on the list"),
        (graph(call("exp_", LP, op="call_method")), "not on the list"),
        (graph(call("builtins.getattr", LP, "__class__")), "argument 'attribute' has a value"),
        (graph(call("getattr", LP, "grad_fn")), "argument 'attribute' has a value"),
        (graph(call("getattr", LP, LP)), "argument 'attribute' has a value"),
        (graph(call("builtins.getattr", LP, "shape", None)), "takes at most 2 arguments"),
        (graph(call("weight", op="get_attr")), "'get_attr' is not allowed"),
        (graph(call("layer", LP, op="call_module")), "'call_module' is not allowed"),
        (graph(call("logprobs", op="placeholder")), "'placeholder' is not allowed"),
        (graph(call("torch.exp", {"ref": "x"})), "'x', which is not an earlier node"),
        (graph(call("torch.exp", {"ref": "y"}), call("torch.exp", {"ref": "x"}, name="y")), "not an earlier node"),
        (graph(call("torch.exp", LP), call("torch.exp", LP)), "another node has the same name"),
        (graph(call("torch.exp", LP, name="a b")), "the name of a node consists of"),
        (graph(call("torch.exp")), "the argument 'input' is missing"),
        (graph(call("torch.exp", LP, LP)), "takes at most 1 arguments"),
        (graph(call("torch.exp", LP, input=LP)), "'input' is passed twice"),
        (graph(call("torch.exp", LP, out=LP)), "no argument 'out'"),
        (graph(call("torch.sum", LP, dim="x")), "argument 'dim' has a value"),
        (graph(call("torch.nn.functional.relu", LP, inplace=True)), "argument 'inplace' has a value"),
        (graph(call("torch.zeros", 9, 9)), "only constants"),
        (graph(call("torch.mul", LP, 10**30)), "too large"),
        (graph(call("torch.mul", LP, "a" * 65)), "too long"),
        (graph(call("torch.mul", LP, "a")), "argument 'other' has a value"),
        (graph(call("torch.reshape", LP, list(range(100)))), "too many arguments"),
        (graph(call("torch.mul", LP, [[[[[[[[1]]]]]]]])), "too deeply nested"),
        (graph(call("torch.mul", LP, {"device": "cuda"})), "'device', which a graph may not use"),
        (graph(call("torch.mul", LP, {"code": "1"})), "'code', which a graph may not use"),
        (graph(call("operator.getitem", LP, "shape")), "argument 'item' has a value"),
        (graph(*BIG), "nodes, but the limit is"),
        (graph(call("torch.exp", LP), loss="nothing"), "not an earlier node"),
        (graph(call("torch.exp", LP), inputs=[{"name": "logprobs", "rank": 3}]), "not a loss as a graph"),
        (graph(call("torch.exp", LP), inputs=[{"name": "weights", "rank": 1}]), "'logprobs', of rank 1 or 2"),
        (graph(call("torch.exp", LP), inputs=[]), "1 to 16"),
        (graph(call("torch.exp", LP), more=1), "unknown field"),
        (graph(call("torch.exp", LP)) + b" " * (1 << 20), "bytes, but the limit is"),
        (b"[" * 100_000, "not a loss as a graph"),
        (b"\x80\x04", "not a loss as a graph"),
    ],
)
def test_a_graph_with_anything_that_is_not_allowed_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(BadUpload, match=message):
        parse(payload)


def test_the_error_names_every_operation_that_is_not_on_the_list() -> None:
    nodes = [call("torch.load", LP), call("tolist", LP, name="y", op="call_method"), call("torch.exp", LP, name="z")]
    with pytest.raises(
        BadUpload,
        match=r"node 'x' of the graph: the function 'torch.load' is not .*; also not on it: the method 'tolist'$",
    ):
        parse(graph(*nodes))


@pytest.mark.parametrize("key", ["loss:sum", "custom/A:sum", "custom/a:max", "custom/a", "custom/" + "a" * 65 + ":sum"])
def test_a_metric_with_another_form_of_name_is_refused(key: str) -> None:
    message = json.loads(graph(call("torch.sum", LP)))
    message["graph"]["nodes"][-1]["args"] = [{"tuple": [{"ref": "x"}, {"dict": {key: {"ref": "x"}}}]}]
    with pytest.raises(BadUpload, match="a metric is named"):
        parse(json.dumps(message).encode())


def test_a_method_accepts_only_a_tensor_and_an_error_names_the_node() -> None:
    shape = call("builtins.getattr", LP, "shape", name="s")
    rebuilt = load_graph(graph(shape, call("sum", {"ref": "s"}, op="call_method")))
    with pytest.raises(TypeError) as caught:
        rebuilt.one(torch.ones(T))
    assert caught.value.__notes__ == ["in node 'x' of the graph"]


def test_examples_have_the_declared_ranks() -> None:
    ranks = {"logprobs": 2, "scores": 2, "reward": 0, "weights": 1}
    rebuilt = load_graph(payload_of(lambda logprobs, scores, reward, weights: (logprobs.sum(), {}), ranks))
    examples: dict[str, Tensor] = rebuilt.examples(V)
    assert [examples[name].dim() - 1 for name in ("target_tokens", "scores", "reward", "weights")] == [2, 2, 0, 1]


def test_an_input_that_is_used_as_an_index_is_generated_with_valid_indices() -> None:
    def picked(logprobs: Any, order: Any, where: Any, column: Any, weights: Any) -> Any:
        taken = logprobs[order].sum() + torch.gather(logprobs, 0, where).sum()
        return taken + logprobs.index_select(0, index=column).sum() + weights.sum(), {}

    names = ("logprobs", "order", "where", "column", "weights")
    rebuilt = load_graph(payload_of(picked, dict.fromkeys(names, 1)))
    examples = rebuilt.examples(V)
    assert [examples[name].dtype.is_floating_point for name in names[1:]] == [False, False, False, True]
    assert rebuilt.one(torch.ones(T), *(examples[name][0, :T] for name in names[1:]))[0].isfinite()
