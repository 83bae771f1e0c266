"""Reference log-probabilities: computed by the base or by a saved model, and cached."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.nn.functional as F

from tests.engine.calls import create, rows, run, train, upload
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_core.output import LossFnOutput
from tinkerbell_server.commands import Load, Save


def gap(model_outputs, loss_fn_inputs, attention_mask):
    """The distance of the model from its reference."""
    targets = loss_fn_inputs["target_tokens"]
    logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]  # [B, T]
    return LossFnOutput(((logprobs - loss_fn_inputs["ref_logprobs"]).abs() * attention_mask).sum(), logprobs)


def test_the_base_is_the_default_reference_and_its_logprobs_are_cached(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("dropout", base_dropout=True)
    name = upload(engine, gap, "gap")
    data = rows([5, 8, 3])
    assert run(engine, data, name, backward=False).loss < 1e-4
    train(engine, "m", 2)
    trained = run(engine, data, name, backward=False).loss
    assert trained > 1e-2
    monkeypatch.setattr(engine._models, "reference", lambda *_: pytest.fail("the reference was computed again"))
    assert run(engine, data, name, backward=False).loss == trained


@pytest.mark.parametrize("full", [False, True])
def test_a_saved_model_can_be_the_reference(make_engine: MakeEngine, full: bool, tmp_path: Path) -> None:
    engine = make_engine()
    name = upload(engine, gap, "gap")
    create(engine, full=full)
    train(engine, "m", 2)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    create(engine, "after", reference=str(tmp_path / "saved"))
    create(engine, "initial", reference="initial", full=full)
    assert run(engine, rows([5]), name, "initial", backward=False).loss < 1e-4
    engine.execute(Load(model_id="initial", path=str(tmp_path / "saved"), optimizer=False))
    assert run(engine, rows([5]), name, "m", backward=False).loss > 1e-2
    assert run(engine, rows([5]), name, "after", backward=False).loss > 1e-2
    assert run(engine, rows([5]), name, "initial", backward=False).loss < 1e-4


def test_the_initial_reference_of_a_new_model_is_what_was_loaded(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    name = upload(engine, gap, "gap")
    train(engine, "sft", 3)
    engine.execute(Save(model_id="sft", path=str(tmp_path / "saved")))
    create(engine, "preferred", reference="initial")
    engine.execute(Load(model_id="preferred", path=str(tmp_path / "saved"), optimizer=True))
    assert run(engine, rows([5]), name, "preferred", backward=False).loss < 1e-4


def test_a_continued_model_keeps_its_initial_reference(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    name = upload(engine, gap, "gap")
    create(engine, reference="initial")
    train(engine, "m", 3)
    trained = run(engine, rows([5]), name, backward=False).loss
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    fresh = make_engine()
    assert upload(fresh, gap, "gap") == name
    create(fresh, reference="initial")
    fresh.execute(Load(model_id="m", path=str(tmp_path / "saved"), optimizer=True))
    assert run(fresh, rows([5]), name, backward=False).loss == trained > 1e-2


@pytest.mark.parametrize("full", [False, True])
def test_a_path_that_is_saved_again_is_another_reference(make_engine: MakeEngine, full: bool, tmp_path: Path) -> None:
    engine = make_engine()
    name = upload(engine, gap, "gap")
    path = tmp_path / "saved"
    create(engine, full=full)
    engine.execute(Save(model_id="m", path=str(path)))
    create(engine, "follower", full=full, reference=str(path))
    engine.execute(Load(model_id="follower", path=str(path), optimizer=False))
    assert run(engine, rows([5]), name, "follower", backward=False).loss < 1e-4
    train(engine, "m", 3)
    shutil.rmtree(path)
    engine.execute(Save(model_id="m", path=str(path)))
    assert run(engine, rows([5]), name, "follower", backward=False).loss > 1e-2
    engine.execute(Load(model_id="follower", path=str(path), optimizer=False))
    assert run(engine, rows([5]), name, "follower", backward=False).loss < 1e-4


def test_a_reference_that_was_deleted_is_gone(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    name = upload(engine, gap, "gap")
    create(engine)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    create(engine, "after", reference=str(tmp_path / "saved"))
    run(engine, rows([5]), name, "after")
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(BadCheckpoint, match="/saved' is gone") as refusal:
        run(engine, rows([5]), name, "after")
    assert str(tmp_path) not in refusal.value.message


@pytest.mark.parametrize("full", [False, True])
def test_a_new_model_in_bfloat16_equals_its_reference(make_engine: MakeEngine, full: bool) -> None:
    engine = make_engine("llama", "bfloat16")
    name = upload(engine, gap, "gap")
    create(engine, full=full)
    assert run(engine, rows([60, 41, 7]), name, backward=False).loss == 0.0
    assert run(engine, rows([33, 12]), name).loss == 0.0
