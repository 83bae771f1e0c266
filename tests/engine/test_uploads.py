"""An upload that cannot work is refused with its author's own lines, and nothing is kept."""

from __future__ import annotations

import msgspec
import pytest

from tests.engine.calls import pairs, rows, run, upload
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadLoss, BadUpload, UploadTooLarge
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.commands import RegisterLoss

ENVELOPE = RegisterLossRequest(name="mine", payload=b"garbage", magic="", python="3.9.1", digest="0" * 64)


def test_an_envelope_that_cannot_be_opened_is_refused(make_engine: MakeEngine) -> None:
    import importlib.util

    engine = make_engine()
    here = msgspec.structs.replace(ENVELOPE, magic=importlib.util.MAGIC_NUMBER.hex())
    with pytest.raises(BadUpload, match=r"Python 3\.9\.1"):
        engine.execute(RegisterLoss(upload=ENVELOPE))
    with pytest.raises(BadUpload, match="does not unpickle"):
        engine.execute(RegisterLoss(upload=here))
    with pytest.raises(UploadTooLarge):
        engine.execute(RegisterLoss(upload=msgspec.structs.replace(here, payload=b"x" * (1 << 21))))
    with pytest.raises(BadUpload, match="cross_entropy"):
        engine.execute(RegisterLoss(upload=msgspec.structs.replace(here, name="cross_entropy")))


def test_a_loss_that_raises_shows_its_authors_line(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def wrong(model_outputs, loss_fn_inputs, attention_mask):
        return LossFnOutput(model_outputs @ "a line of mine")

    with pytest.raises(BadLoss) as caught:
        upload(engine, wrong, "wrong")
    assert 'model_outputs @ "a line of mine"' in (caught.value.traceback or "")
    assert "wrong" not in [loss.name for loss in engine.describe().losses]


def test_an_upload_is_listed_with_what_it_reads(make_engine: MakeEngine) -> None:
    engine = make_engine()
    name = upload(engine, pairs, "pairs", group_size=2)
    known = {loss.id: loss for loss in engine.describe().losses}
    assert known[name].inputs == ("target_tokens",)
    assert known[name].group_size == 2
    assert run(engine, rows([3, 4]), "pairs").sequences == 1
