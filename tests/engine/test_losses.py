"""The losses of an engine: required plugins, and losses that are imported by a dotted path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.calls import CE, gradients, rows, run, upload
from tests.engine.conftest import MakeEngine
from tinkerbell_core import hookimpl
from tinkerbell_core.errors import BadData, BadLoss, BadRequest, UnknownLoss
from tinkerbell_core.functional import target_logprobs
from tinkerbell_core.output import LossFnOutput
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


@pytest.mark.parametrize("uploaded", [False, True])
def test_an_input_that_no_part_of_the_loss_reads_is_refused_and_no_gradient_is_kept(
    make_engine: MakeEngine, uploaded: bool
) -> None:
    engine = make_engine(uploads="sandboxed") if uploaded else make_engine()

    def branches(model_outputs, loss_fn_inputs, attention_mask, use_margin: bool = False):
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"])
        if use_margin:
            logprobs = logprobs - loss_fn_inputs["margin"]
        return LossFnOutput(-(logprobs * attention_mask).sum())

    name = upload(engine, branches, "branches")
    data = rows([5, 3], margin=[[0.5] * 5, [0.5] * 3])
    with pytest.raises(BadData, match="'branches' has not read the input 'margin' in this call"):
        run(engine, data, name)
    assert not gradients(engine)
    run(engine, data, name, use_margin=True)
    assert gradients(engine)
    # a part of a sum that reads it is sufficient
    run(engine, data, {name: 1.0, CE: 0.1}, **{"branches/use_margin": True})
    with pytest.raises(BadData, match="margin"):
        run(engine, data, {name: 1.0, CE: 0.1})


def test_an_input_that_is_read_in_one_micro_batch_only_counts_as_read(make_engine: MakeEngine) -> None:
    engine = make_engine(micro_batch_tokens=4)

    def sometimes(model_outputs, loss_fn_inputs, attention_mask):
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"])
        if attention_mask.shape[1] == 3:
            logprobs = logprobs * loss_fn_inputs["scale"]
        return LossFnOutput(-(logprobs * attention_mask).sum())

    name = upload(engine, sometimes, "sometimes", coupling="sequence")
    run(engine, rows([4, 3], scale=[[1.0] * 4, [2.0] * 3]), name)
    with pytest.raises(BadData, match="'scale'"):
        run(engine, rows([4, 4], scale=[[1.0] * 4, [2.0] * 4]), name)


def test_a_loss_that_does_not_read_the_weights_of_a_call_gets_a_notice(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def masked(model_outputs, loss_fn_inputs, attention_mask):
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"])
        return LossFnOutput(-(logprobs * attention_mask).sum())

    name = upload(engine, masked, "masked")
    notice = run(engine, rows([3, 2], weights=[[0.0, 1.0, 1.0], [1.0, 1.0]]), name).notice
    assert notice is not None
    assert "'masked' does not read 'weights'" in notice
    assert run(engine, rows([3], weights=[[1.0] * 3]), name).notice is None
    assert run(engine, rows([3], weights=[[0.0, 1.0, 1.0]]), CE).notice is None
