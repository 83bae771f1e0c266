"""Which plugins an engine insists on."""

from __future__ import annotations

import pytest
import torch

from tinkerbell_core import hookimpl
from tinkerbell_core.errors import BadRequest
from tinkerbell_server.engines.torch.losses import Losses


def test_a_required_plugin_that_is_here_is_enough_by_distribution_or_by_entry_point() -> None:
    losses = Losses(50, torch.device("cpu"))
    losses.check_required(["tinkerbell-core", "tinkerbell-core:ppo"])


def test_a_required_plugin_that_is_missing_stops_the_engine() -> None:
    losses = Losses(50, torch.device("cpu"), disabled=["tinkerbell-core:ppo"])
    with pytest.raises(BadRequest, match="required plugin 'tinkerbell-core:ppo' is not installed, or is left out"):
        losses.check_required(["tinkerbell-core:ppo"])


def test_a_required_plugin_that_is_broken_stops_the_engine_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinkerbell_core.losses.ppo.register_losses", hookimpl(lambda: [object()]))
    with pytest.raises(BadRequest, match=r"required plugin 'tinkerbell-core:ppo' is broken: .* is not a loss"):
        Losses(50, torch.device("cpu")).check_required(["tinkerbell-core:ppo"])
