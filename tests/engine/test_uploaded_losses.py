"""Uploaded losses in the process of the engine: invalid ones are refused, and the others are listed."""

from __future__ import annotations

import importlib.util

import msgspec
import pytest

from tests.engine.calls import rows, run, upload
from tests.engine.conftest import MakeEngine
from tests.engine.losses import pairs
from tinkerbell_core.errors import BadLoss, BadUpload
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.commands import RegisterLoss

UPLOAD = RegisterLossRequest(
    name="mine",
    payload=b"garbage",
    magic=importlib.util.MAGIC_NUMBER.hex(),
    python="3.9.1",
    digest="0" * 64,
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": ""}, r"made by Python 3\.9\.1"),
        ({}, "does not unpickle|cannot be unpickled"),
        ({"name": "cross_entropy"}, "cross_entropy"),
    ],
    ids=["other bytecode", "garbage", "reserved name"],
)
def test_an_upload_that_cannot_be_opened_is_refused(make_engine: MakeEngine, changes, reason: str) -> None:
    engine = make_engine()
    with pytest.raises(BadUpload, match=reason):
        engine.execute(RegisterLoss(upload=msgspec.structs.replace(UPLOAD, **changes)))


def test_a_loss_that_raises_is_refused_with_its_authors_line(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def wrong(model_outputs, loss_fn_inputs, attention_mask):
        return LossFnOutput(model_outputs @ "a line of mine")

    with pytest.raises(BadLoss) as caught:
        upload(engine, wrong, "wrong")
    assert 'model_outputs @ "a line of mine"' in (caught.value.traceback or "")
    assert "wrong" not in [loss.name for loss in engine.describe().losses]


def test_an_upload_is_listed_with_the_inputs_that_it_reads(make_engine: MakeEngine) -> None:
    engine = make_engine()
    name = upload(engine, pairs, "pairs", group_size=2)
    listed = {loss.id: loss for loss in engine.describe().losses}
    assert listed[name].inputs == ("target_tokens",)
    assert listed[name].group_size == 2
    assert run(engine, rows([3, 4]), "pairs").sequences == 1
