"""Uploaded losses in the process of the engine: invalid ones are refused, and the others are listed."""

from __future__ import annotations

import importlib.util

import cloudpickle
import msgspec
import pytest

from tests.engine.calls import rows, run, upload
from tests.engine.conftest import MakeEngine
from tests.engine.losses import pairs
from tinkerbell_core.errors import BadLoss, BadUpload
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.commands import RegisterLoss
from tinkerbell_server.sandbox.open_upload import _in_file

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


def test_a_traceback_shows_the_authors_line_also_if_cloudpickle_names_no_file(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def wrong(model_outputs, loss_fn_inputs, attention_mask):
        return [LossFnOutput(model_outputs @ "a line of mine") for _ in range(1)].pop()

    filename = wrong.__code__.co_filename
    # what cloudpickle 3.1.3 makes of each function
    wrong.__code__ = _in_file(wrong.__code__, "<dynamic-code>")
    payload = cloudpickle.dumps(wrong)
    source = 'def wrong(model_outputs, loss_fn_inputs, attention_mask):\n    return model_outputs @ "a line of mine"\n'
    sent = msgspec.structs.replace(
        UPLOAD, name="wrong", kind="cloudpickle", payload=payload, source=source, filename=filename,
        first_line=wrong.__code__.co_firstlineno,
    )  # fmt: skip
    with pytest.raises(BadLoss) as caught:
        engine.execute(RegisterLoss(upload=sent))
    assert f'File "{filename}"' in (caught.value.traceback or "")
    assert "a line of mine" in (caught.value.traceback or "")


def test_an_upload_is_listed_with_the_inputs_that_it_reads(make_engine: MakeEngine) -> None:
    engine = make_engine()
    name = upload(engine, pairs, "pairs", group_size=2)
    listed = {loss.id: loss for loss in engine.describe().losses}
    assert listed[name].inputs == ("target_tokens",)
    assert listed[name].group_size == 2
    assert run(engine, rows([3, 4]), "pairs").sequences == 1
