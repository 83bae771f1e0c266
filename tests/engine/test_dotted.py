"""A loss called by a dotted path is imported where that is allowed, and refused in plain words where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tinkerbell_core.errors import BadLoss, BadRequest, UnknownLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.losses import Losses

CPU = torch.device("cpu")
MODULE = """
from tinkerbell_core import LossFnOutput

def plain(model_outputs, loss_fn_inputs, attention_mask):
    return LossFnOutput((model_outputs.logsumexp(-1) * attention_mask).sum(), None)
"""


def losses(*, allowed: bool) -> Losses:
    return Losses(11, CPU, enabled=False, dotted_losses=allowed)


def test_a_dotted_path_is_imported_once_and_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lagoon.py").write_text(MODULE)
    (tmp_path / "broken_lagoon.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    here = losses(allowed=True)
    spec = here.imported("lagoon:plain")
    assert here.imported("lagoon:plain") is spec
    assert here.get("lagoon:plain") is spec
    # its plain name stays free, so that no call changes what another's means
    with pytest.raises(UnknownLoss):
        here.get("plain")
    with pytest.raises(UnknownLoss, match="did you mean 'plain'"):
        here.imported("lagoon:plane")
    with pytest.raises(UnknownLoss, match="no module 'no_lagoon'"):
        here.imported("no_lagoon:plain")
    with pytest.raises(BadLoss, match="ZeroDivisionError") as raised:
        here.imported("broken_lagoon:plain")
    assert "1 / 0" in str(raised.value.traceback)
    with pytest.raises(BadLoss, match="not a loss"):
        here.imported("lagoon:LossFnOutput")


def test_it_is_off_by_default_and_refused_off_this_machine() -> None:
    assert not Settings().dotted_losses
    with pytest.raises(BadRequest, match="imports no losses"):
        losses(allowed=False).imported("lagoon:plain")
    with pytest.raises(BadRequest, match="refused on host"):
        Settings(host="0.0.0.0", dotted_losses=True)
