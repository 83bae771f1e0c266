"""The identity of a base model, and the checks of saved models that depend on it or on the place of the data folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.calls import create, train
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_server.commands import Load, Save
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.base_identity import base_identity, folder_identity, folder_of, weights_files
from tinkerbell_server.engines.torch.engine import TorchEngine

WEIGHTS = {f"layer.{index}.weight": torch.arange(4096.0).reshape(64, 64) + index for index in range(8)}  # 16 KiB each
CONFIG = {"architectures": ["Tiny"], "hidden_size": 64, "text_config": {"layers": 8}}


def write_base(folder: Path, weights: dict[str, torch.Tensor] = WEIGHTS, shards: int = 1, **config: Any) -> Path:
    """A folder with a config and weights, as transformers writes them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, torch.Tensor]:
    """The weights with a change."""
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    change(weights)
    return weights


def test_two_names_of_one_folder_have_one_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "tiny")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = (str(folder), "tiny", "./tiny", str(tmp_path / "link"))
    assert len({base_identity(name, None) for name in names}) == 1
    assert len(base_identity("tiny", None)) == 64


def test_a_model_that_is_saved_again_keeps_its_identity(tmp_path: Path) -> None:
    identity = folder_identity(write_base(tmp_path / "one"))
    again = write_base(tmp_path / "two", transformers_version="99", _name_or_path="/somewhere", dtype="float32")
    assert folder_identity(again) == identity


def test_shards_do_not_change_the_identity(tmp_path: Path) -> None:
    assert folder_identity(write_base(tmp_path / "one")) == folder_identity(write_base(tmp_path / "two", shards=3))


OTHERS: dict[str, dict[str, Any]] = {
    "a fine-tune": {"weights": changed(lambda weights: [value.add_(1e-3) for value in weights.values()])},
    "one tensor": {"weights": changed(lambda weights: weights["layer.7.weight"].mul_(2))},
    "a dtype": {"weights": {name: value.half() for name, value in WEIGHTS.items()}},
    "a shape": {"weights": {name: value.reshape(32, 128) for name, value in WEIGHTS.items()}},
    "a name": {"weights": changed(lambda weights: weights.update(other=weights.pop("layer.0.weight")))},
    "two tensors exchanged": {
        "weights": changed(
            lambda weights: weights.update(
                {"layer.0.weight": weights["layer.1.weight"], "layer.1.weight": weights["layer.0.weight"]}
            )
        )
    },
    "the config": {"hidden_size": 128},
    "a nested part of the config": {"text_config": {"layers": 9}},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_model_has_another_identity(difference: str, tmp_path: Path) -> None:
    other = write_base(tmp_path / "two", **OTHERS[difference])
    assert folder_identity(write_base(tmp_path / "one")) != folder_identity(other)


def test_files_that_transformers_does_not_read_do_not_count(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "tiny")
    identity = folder_identity(folder)
    (folder / "consolidated.safetensors").write_bytes(b"other")
    (folder / "pytorch_model.bin").write_bytes(b"other")
    assert folder_identity(folder) == identity


def test_weights_in_another_format_count_as_bytes(tmp_path: Path) -> None:
    identities = set()
    for name, last in (("one", b"1"), ("two", b"2"), ("three", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "pytorch_model.bin").write_bytes(bytes(500_000) + last)
        assert [file.name for file in weights_files(tmp_path / name)] == ["pytorch_model.bin"]
        identities.add(folder_identity(tmp_path / name))
    assert len(identities) == 2


def test_a_model_of_the_hub_is_identified_by_its_cached_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write_base(tmp_path / "tiny")
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(local, cached / "snapshots" / ("ab" * 20))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("ab" * 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    assert folder_of("someone/tiny", None) == cached / "snapshots" / ("ab" * 20)
    assert base_identity("someone/tiny", "ab" * 20) == folder_identity(local)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x05" + bytes(7) + b"{}"])
def test_a_model_with_a_broken_file_has_no_identity(content: bytes, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(content)
    assert base_identity(str(folder), None) == ""
    assert base_identity(str(tmp_path / "missing"), None) == ""


def test_only_a_part_of_the_weights_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_base(tmp_path / "large", {f"layer.{index}.weight": torch.zeros(256, 1024) for index in range(20)})
    read = []
    pread = os.pread

    def count(handle: int, size: int, offset: int) -> bytes:
        read.append(size)
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", count)
    folder_identity(folder)
    assert (folder / "model.safetensors").stat().st_size > 20_000_000
    assert sum(read) < 100_000


def test_an_engine_describes_the_identity_and_the_name_of_its_base(make_engine: MakeEngine, bases: Any) -> None:
    description = make_engine("plain").describe()
    assert description.base_model == str(bases["plain"])
    assert description.base_id == folder_identity(bases["plain"])
    assert description.revision is None


def engine_on(base: Path | str, data: Path) -> TorchEngine:
    return TorchEngine(
        Settings(model=str(base), data_dir=str(data), device="cpu", dtype="float64", uploads="trusted", plugins=False)
    )


def test_an_adapter_of_another_base_of_equal_shape_is_refused(bases: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases["plain"], other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    engine = engine_on(bases["plain"], tmp_path / "data")
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(tmp_path / "data" / "models" / "m" / "s")))
    fresh = engine_on(other, tmp_path / "data")
    create(fresh, "m")
    with pytest.raises(BadCheckpoint, match="is an adapter of another base model"):
        fresh.execute(Load(model_id="m", path=str(tmp_path / "data" / "models" / "m" / "s"), optimizer=True))


def test_an_adapter_loads_on_a_copy_of_its_base(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bases["plain"], tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    engine = engine_on("copy", tmp_path / "data")
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    fresh = engine_on(bases["plain"], tmp_path / "data")
    create(fresh, "m")
    assert fresh.execute(Load(model_id="m", path=str(tmp_path / "saved"), optimizer=True)).step == 1


def test_an_adapter_of_0_1_0_is_compared_by_the_name_of_its_base(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine("plain")
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    state = json.loads((tmp_path / "saved" / "tinkerbell.json").read_text())
    del state["base_id"]
    (tmp_path / "saved" / "tinkerbell.json").write_text(json.dumps(state))
    assert engine.execute(Load(model_id="m", path=str(tmp_path / "saved"), optimizer=True)).step == 1


@pytest.mark.parametrize("stored", ["relative", "as 0.1.0"])
def test_the_initial_weights_of_a_model_are_found_after_a_move(
    make_engine: MakeEngine, bases: Any, stored: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    first, second = (data / "models" / "m" / name for name in ("first", "second"))
    engine = engine_on(bases["plain"], data)
    create(engine, "m", reference="initial")
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(first)))
    engine.execute(Load(model_id="m", path=str(first), optimizer=False))
    engine.execute(Save(model_id="m", path=str(second)))
    state = json.loads((second / "tinkerbell.json").read_text())
    assert state["initial"] == "models/m/first"
    if stored == "as 0.1.0":
        (second / "tinkerbell.json").write_bytes(msgspec.json.encode({**state, "initial": str(first)}))
    data.rename(tmp_path / "moved")
    fresh = engine_on(bases["plain"], tmp_path / "moved")
    create(fresh, "m", reference="initial")
    fresh.execute(Load(model_id="m", path=str(tmp_path / "moved" / "models" / "m" / "second"), optimizer=True))
    assert fresh._models.get("m").initial == str(tmp_path / "moved" / "models" / "m" / "first")


@pytest.mark.parametrize("full", [False, True])
def test_a_saved_model_is_readable_by_its_owner_only(make_engine: MakeEngine, full: bool, tmp_path: Path) -> None:
    engine = make_engine("plain")
    create(engine, full=full)
    saved = tmp_path / "tenants" / "ann" / "models" / "m" / "s"
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(saved)))
    assert (saved / "tinkerbell.json").exists()
    assert [str(path) for path in (tmp_path / "tenants").rglob("*") if path.stat().st_mode & 0o077] == []
    assert (tmp_path / "tenants").stat().st_mode & 0o077 == 0


def test_the_embedded_model_is_readable_by_its_owner_only(make_engine: MakeEngine, tmp_path: Path) -> None:
    assert make_engine("embedded").describe().base_model == "embedded"
    assert [str(path) for path in tmp_path.rglob("*") if path.stat().st_mode & 0o077] == []
