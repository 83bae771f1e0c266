"""The losses of an engine: required plugins, and losses that are imported by a dotted path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tinkerbell_core import hookimpl
from tinkerbell_core.errors import BadLoss, BadRequest, UnknownLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.losses import Losses

CPU = torch.device("cpu")
MODULE = """
from tinkerbell_core import LossFnOutput

def plain(model_outputs, loss_fn_inputs, attention_mask):
    return LossFnOutput((model_outputs.logsumexp(-1) * attention_mask).sum(), None)
"""


def test_a_plugin_can_be_required_by_its_distribution_or_its_entry_point() -> None:
    losses = Losses(50, CPU)
    losses.check_required(["tinkerbell-core", "tinkerbell-core:ppo"])


def test_a_required_plugin_that_is_disabled_is_an_error() -> None:
    losses = Losses(50, CPU, disabled=["tinkerbell-core:ppo"])
    with pytest.raises(BadRequest, match="required plugin 'tinkerbell-core:ppo' is not installed, or is disabled"):
        losses.check_required(["tinkerbell-core:ppo"])


def test_a_required_plugin_that_is_broken_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinkerbell_core.losses.ppo.register_losses", hookimpl(lambda: [object()]))
    with pytest.raises(BadRequest, match=r"required plugin 'tinkerbell-core:ppo' is broken: .* is not a loss"):
        Losses(50, CPU).check_required(["tinkerbell-core:ppo"])


def importing(*, allowed: bool = True) -> Losses:
    return Losses(11, CPU, enabled=False, dotted_losses=allowed)


def test_a_dotted_path_is_imported_once_and_is_the_name_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lagoon.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    losses = importing()
    spec = losses.imported("lagoon:plain")
    assert losses.imported("lagoon:plain") is spec
    assert losses.get("lagoon:plain") is spec
    # the name of the function stays free, so that an import does not change the meaning of other calls
    with pytest.raises(UnknownLoss):
        losses.get("plain")


def test_a_dotted_path_that_cannot_be_imported_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lagoon.py").write_text(MODULE)
    (tmp_path / "broken_lagoon.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    losses = importing()
    with pytest.raises(UnknownLoss, match="did you mean 'plain'"):
        losses.imported("lagoon:plane")
    with pytest.raises(UnknownLoss, match="no module 'no_lagoon'"):
        losses.imported("no_lagoon:plain")
    with pytest.raises(BadLoss, match="ZeroDivisionError") as raised:
        losses.imported("broken_lagoon:plain")
    assert "1 / 0" in str(raised.value.traceback)
    with pytest.raises(BadLoss, match="not a loss"):
        losses.imported("lagoon:LossFnOutput")


def test_dotted_paths_are_off_by_default_and_refused_on_a_public_host() -> None:
    assert not Settings().dotted_losses
    with pytest.raises(BadRequest, match="imports no losses"):
        importing(allowed=False).imported("lagoon:plain")
    with pytest.raises(BadRequest, match="refused on host"):
        Settings(host="0.0.0.0", dotted_losses=True)
