"""Every example runs with a real server and trains as it claims."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str) -> Callable[..., Any]:  # Any: each example returns other values
    """The `main` of an example."""
    found: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return found


def test_every_example_is_tested() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tests


def test_example_simple_custom_loss(torch_server: str) -> None:
    losses = main_of("example_simple_custom_loss")(torch_server, steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_example_custom_loss_decorator(torch_server: str) -> None:
    by_loss = main_of("example_custom_loss_decorator")(torch_server)
    assert set(by_loss) == {"my_dpo", "contrastive", "kl_regularised"}
    for losses in by_loss.values():
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_sft(torch_server: str) -> None:
    losses = main_of("sft")(torch_server)
    assert losses[-1] < losses[0] - 1


@pytest.mark.skipif(find_spec("tinkerbell_loss_dpo") is None, reason="the plugin tinkerbell-loss-dpo is not installed")
def test_dpo_plugin(torch_server: str) -> None:
    margins = main_of("dpo_plugin")(torch_server, steps=5)
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > margins[0]


@pytest.mark.slow
def test_rl_importance_sampling(torch_server: str) -> None:
    rewards = main_of("rl_importance_sampling")(torch_server)
    assert sum(rewards[-5:]) / 5 > 1.5 * sum(rewards[:2]) / 2
