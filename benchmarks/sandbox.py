"""The cost of the sandbox: a loss in the sandbox against the same loss in the engine process, and the time of a kill.

The two sides are interleaved in one run. The exit status is 1 if their gradients differ. The loss runs on the CPU for
every value of --device, because a sandbox uses no other device.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import _common
import torch
from torch import Tensor

from tinker_client import custom_loss
from tinkerbell_core.errors import LossKilled
from tinkerbell_core.functional import target_logprobs
from tinkerbell_core.logits import Head, LocalSource, Logits, plain_logits
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.serialization import pack
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.sandbox.losses import SandboxedLosses, TimeLimits
from tinkerbell_server.sandbox.processes import Sandbox


def likelihood(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """A loss that reads only log-probabilities."""
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
    return LossFnOutput(-(logprobs * attention_mask).sum(), logprobs)


def whole(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """A loss that needs all logits stored: tanh has no lazy form."""
    logits = torch.tanh(model_outputs / 30) * 30
    logprobs = torch.log_softmax(logits, -1).gather(-1, loss_fn_inputs["target_tokens"][..., None])[..., 0]
    return LossFnOutput(-(logprobs * attention_mask).sum(), logprobs)


def hangs(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    while len(attention_mask) == 1:
        pass
    return LossFnOutput(model_outputs.logsumexp(-1).sum())


def guides(model_outputs, loss_fn_inputs, attention_mask):  # type: ignore[no-untyped-def]
    """The example loss of the documentation."""
    target_tokens = loss_fn_inputs["target_tokens"]
    log_probs = torch.nn.functional.log_softmax(model_outputs, dim=-1)
    target_logprobs = log_probs.gather(dim=-1, index=target_tokens.unsqueeze(-1)).squeeze(-1)
    loss = (-target_logprobs * attention_mask).sum()
    return LossFnOutput(loss=loss, logprobs=target_logprobs, diagnostics={"loss": loss.item()})


def upload(fn: Callable[..., Any]) -> RegisterLossRequest:
    return RegisterLossRequest(
        name=fn.__name__,
        kind="source",
        payload=pack(fn),
        magic="",
        python="",
        digest=fn.__name__.encode().hex().ljust(64, "0"),
    )


def pair(
    spec: LossSpec, fn: Callable[..., Any], shape: tuple[int, int, int], width: int, lazy: bool, pairs: int
) -> dict[str, Any]:
    """Times of the loss and its gradient: in the sandbox minus in-process, in seconds, and the ratio of both."""
    batch, length, vocab = shape
    torch.manual_seed(0)
    weight = torch.randn(vocab, width) / width**0.5
    states = torch.randn(batch, length, width)
    inputs = {"target_tokens": torch.randint(vocab, (batch, length))}
    mask = torch.ones(batch, length)

    def once(which: LossSpec) -> tuple[float, Tensor]:
        hidden = states.clone().requires_grad_()
        start = time.perf_counter()
        if lazy:
            logits: Tensor = Logits.over(LocalSource(hidden.flatten(0, 1), Head(weight)), (batch, length))
        else:
            logits = plain_logits(hidden, lambda rows: rows @ weight.T)
        run_loss(which, logits, inputs, mask, {}).loss.backward()
        assert hidden.grad is not None
        return time.perf_counter() - start, hidden.grad

    sides = (spec, replace(spec, fn=fn))
    for side in sides:
        once(side)
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        order = sides if number % 2 else sides[::-1]
        found = {id(side): once(side) for side in order}
        (there, ours), (here, theirs) = (found[id(side)] for side in sides)
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max())):
            raise SystemExit(f"the gradients differ by {(ours - theirs).abs().max()}")
        times.append((there, here))
    return {
        "over": [there - here for there, here in times],
        "ratio": [there / here for there, here in times],
    }


def kill(losses: SandboxedLosses, spec: LossSpec, pairs: int) -> dict[str, Any]:
    """Seconds from the deadline to the error, and of the first successful call after it."""
    late, again = [], []
    for _ in range(pairs):
        start = time.perf_counter()
        with contextlib.suppress(LossKilled):
            spec(torch.zeros(1, 4, 16, requires_grad=True), {}, torch.ones(1, 4))
        late.append(time.perf_counter() - start - losses._time_limits.call - 4 * losses._time_limits.per_token)
        start = time.perf_counter()
        spec(torch.zeros(2, 4, 16, requires_grad=True), {}, torch.ones(2, 4))
        again.append(time.perf_counter() - start)
    return {"after the deadline": late, "next good call": again}


def decorate(times: int) -> list[float]:
    """Seconds from the decorator until the loss can be used, over HTTP on a server that is warmed up."""
    found = []
    with _common.served() as client:
        custom_loss(client, name="warm")(guides)
        for number in range(times):
            start = time.perf_counter()
            custom_loss(client, name=f"guides_{number}")(guides)
            found.append(time.perf_counter() - start)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    sandbox = Sandbox(memory=8 << 30)
    losses = SandboxedLosses(sandbox, TimeLimits(dry_run=60, call=120, per_token=0), 2 << 30, contextlib.nullcontext)
    sandbox.check_confinement()
    try:
        found: dict[str, Any] = {"mechanisms": list(sandbox.mechanisms), "threads": torch.get_num_threads()}
        lazy = losses.spec(upload(likelihood), 512, {})
        found["log-probabilities"] = pair(lazy, likelihood, (4, 64, 512), 64, True, options.pairs * 10)
        stored = losses.spec(upload(whole), 512, {})
        shape = (options.batch, options.length, options.vocab)
        found["full logits"] = pair(stored, whole, shape, options.hidden, False, options.pairs)
        hanging = losses.spec(upload(hangs), 16, {})
        losses._time_limits = TimeLimits(dry_run=60, call=0.5, per_token=0)
        found["kill"] = kill(losses, hanging, options.pairs)
    finally:
        losses.close()
    found["decorator"] = decorate(options.pairs)
    return found


def main() -> None:
    parser = _common.options(__doc__, pairs=5)
    for name, default in {"batch": 8, "length": 512, "vocab": 32000, "hidden": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    found = measure(options)
    rows = [
        _common.row(
            "log-probabilities: ms over in-process", [1000 * one for one in found["log-probabilities"]["over"]], "<= 2"
        ),
        _common.row("full logits: time / in-process", found["full logits"]["ratio"], "<= 1.15"),
        _common.row("kill: s after the deadline", found["kill"]["after the deadline"], "<= 0.5"),
        _common.row("kill: s of the next successful call", found["kill"]["next good call"], "<= 0.5"),
        _common.row("upload: s from decorator to usable", found["decorator"], "<= 1"),
    ]
    details = {"device": "cpu", "pairs": options.pairs, "threads": found["threads"]}
    details |= {
        "sandboxed by": ", ".join(found["mechanisms"]),
        "logits": [options.batch, options.length, options.vocab],
    }
    _common.show("sandbox", rows, details, as_json=options.json)


if __name__ == "__main__":
    main()
