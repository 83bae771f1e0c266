"""The data folder: its databases are migrated, it opens at another path, and only its owner can read it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fake_engine import FAKE_ENGINE
from tests.server.conftest import ROWS, Caller, Serve
from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.types import CreateModelRequest, ModelInfo
from tinkerbell_server.access import keys
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.api.tinker import store as tinker_store
from tinkerbell_server.api.tinker import wire_pb2 as wire
from tinkerbell_server.api.tinker.store import Checkpoint, Run, Sampler, StoredRequest, TinkerStore
from tinkerbell_server.config import Settings
from tinkerbell_server.database import (
    full_path,
    make_private,
    open_database,
    relocated_path,
    stored_path,
)
from tinkerbell_server.launch import running_server
from tinkerbell_server.service import store
from tinkerbell_server.service.store import Store

RELEASE_0_1_0 = Path(__file__).parents[1] / "data" / "data-0.1.0.tar.gz"
"""A data folder that 0.1.0 wrote, at a path that no longer exists. tests/data/write_data_0_1_0.py created it."""

FILES = {"tinkerbell.db": store.MIGRATIONS, "keys.db": keys.MIGRATIONS, "tinker.db": tinker_store.MIGRATIONS}


def unpack(folder: Path) -> dict[str, Any]:
    """Write the data folder of 0.1.0 to `folder/data` and return the facts about it. Any: JSON."""
    with tarfile.open(RELEASE_0_1_0) as tar:
        # Python 3.11.2, which Debian 12 has, knows no filters
        tar.extractall(folder, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))
    return dict(json.loads((folder / "facts.json").read_text()))


@dataclass
class Opened:
    """A server on the data folder of 0.1.0. facts: the ids and paths in it. Any: JSON."""

    folder: Path
    facts: dict[str, Any]
    local: Caller
    tenant: Caller
    revoked: Caller

    def tinker(self, path: str, /, **body: Any) -> dict[str, Any]:
        """The response of the Tinker API to a request."""
        answer = self.local.post(f"/api/v1/{path}", body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def finished(self, future: dict[str, Any]) -> httpx.Response:
        """The result of a request of the Tinker API."""
        answer = self.local.post("/api/v1/retrieve_future", {"request_id": future["request_id"]})
        assert answer.status_code == 200, answer.text
        return answer


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    place = tmp_path_factory.mktemp("moved")
    facts = unpack(place)
    with contextlib.closing(Keys(place / "data")) as file:
        _, key = file.create("local", tenant="local")
    settings = Settings(engine=FAKE_ENGINE, data_dir=str(place / "data"), port=0, uploads="trusted")
    with running_server(settings, timeout=60) as server, contextlib.closing(Caller(server)) as caller:
        texts = (key, facts["key"], facts["revoked"])
        yield Opened(place / "data", facts, *(caller.with_key(text) for text in texts))


def test_the_weights_of_an_unnamed_sampler_are_used_after_a_move(opened: Opened) -> None:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    future = opened.tinker(
        "asample",
        sampling_session_id=opened.facts["sampler"],
        seq_id=50,
        num_samples=1,
        prompt=prompt,
        sampling_params={"max_tokens": 3, "seed": 1},
    )
    sample = wire.SampleResponse.FromString(opened.finished(future).content)
    assert np.frombuffer(sample.sequences[0].tokens, np.int32).tolist() == opened.facts["sampled"]


def test_a_model_of_0_1_0_is_restored_from_its_save_after_a_move(opened: Opened) -> None:
    model = opened.local.models()["life"]
    assert (model["steps"], model["saved_step"]) == (2, 2)
    assert model["saved_path"] == str(opened.folder / "models" / "life" / "first")
    opened.local.done("/forward_backward", model_id="life", data=ROWS)
    assert opened.local.done("/optim_step", model_id="life")["step"] == 3


def test_a_save_of_0_1_0_can_be_loaded_by_name_and_by_path(opened: Opened) -> None:
    assert opened.local.done("/load", model_id="loaded", path=opened.local.models()["life"]["saved_path"])["step"] == 2
    assert opened.local.done("/load", model_id="life", path="first")["step"] == 2


def test_a_reference_to_a_save_is_kept_after_a_move(opened: Opened) -> None:
    assert opened.local.models()["child"]["reference"] == str(opened.folder / "models" / "life" / "first")


def test_steps_that_0_1_0_had_not_saved_are_reported_once(opened: Opened) -> None:
    problem = opened.local.problem("/forward", model_id="child", data=ROWS)
    assert "'child' was never saved and is back at its beginning: 1 optim_step was lost" in problem["message"]
    opened.local.done("/forward", model_id="child", data=ROWS)


def test_a_result_of_0_1_0_has_the_present_path(opened: Opened) -> None:
    result = opened.local.future(opened.facts["save_request"])["result"]
    assert result["path"] == str(opened.folder / "models" / "life" / "first")


def test_an_upload_of_0_1_0_is_registered(opened: Opened) -> None:
    assert "mine" in [loss["name"] for loss in opened.local.losses()]
    opened.local.done("/forward", model_id="life", data=ROWS, loss_fn="mine")


def test_keys_of_0_1_0_are_accepted_and_revoked_ones_are_not(opened: Opened) -> None:
    assert list(opened.tenant.models()) == ["life"]
    assert opened.tenant.done("/load", model_id="life", path="first")["step"] == 1
    assert opened.revoked.http.get("/list_models").status_code == 401


def test_the_checkpoints_of_a_tinker_run_are_found_after_a_move(opened: Opened) -> None:
    run, state, named = (opened.facts[name] for name in ("run", "state", "named"))
    listed = opened.local.http.get(f"/api/v1/training_runs/{run}/checkpoints").json()["checkpoints"]
    assert {checkpoint["tinker_path"] for checkpoint in listed} == {state, named}
    session = opened.tinker("create_session", tags=[], sdk_version="test")["session_id"]
    loaded = opened.tinker("load_weights", session_id=session, model_seq_id=0, path=state, optimizer=True)
    assert opened.finished(loaded).json()["path"] == state
    sampler = opened.tinker("create_sampling_session", session_id=session, sampling_session_seq_id=1, model_path=named)
    assert sampler["sampling_session_id"]


def test_a_tinker_run_of_0_1_0_can_be_trained_further(opened: Opened) -> None:
    future = opened.tinker("load_weights", model_id=opened.facts["run"], seq_id=6, path=opened.facts["state"])
    assert opened.finished(future).json()["path"] == opened.facts["state"]


def test_a_run_on_the_embedded_model_has_its_present_folder_as_its_base(opened: Opened) -> None:
    run = opened.local.http.get(f"/api/v1/training_runs/{opened.facts['run']}").json()
    assert run["base_model"] == str(opened.folder / "models" / "embedded")


def test_everything_in_a_data_folder_of_0_1_0_becomes_private(opened: Opened) -> None:
    assert readable_by_others(opened.folder) == []


def test_a_data_folder_is_moved_twice(serve: Serve, tmp_path: Path) -> None:
    with serve(data_dir=str(tmp_path / "first")) as caller:
        caller.train("m", 2)
        saved = caller.done("/save", model_id="m", name="s")["path"]
        caller.done("/create_model", model_id="child", reference=saved)
    for place in ("second", "third"):
        before = tmp_path / ("first" if place == "second" else "second")
        before.rename(tmp_path / place)
        with serve(data_dir=str(tmp_path / place)) as caller:
            path = str(tmp_path / place / "models" / "m" / "s")
            models = caller.models()
            assert (models["m"]["steps"], models["m"]["saved_path"]) == (2, path)
            assert models["child"]["reference"] == path
            assert caller.done("/create_model", model_id="child", reference=path)["created"] is False
            assert caller.done("/load", model_id="child", path=path)["step"] == 2


def test_the_databases_contain_no_path_of_the_data_folder(serve: Serve, tmp_path: Path) -> None:
    with serve() as caller:
        caller.train("m")
        path = caller.done("/save", model_id="m", name="s")["path"]
        caller.done("/create_model", model_id="child", reference=path)
        caller.done("/load", model_id="m", path="s")
        assert Path(path).is_relative_to(tmp_path / "data")
    for name in FILES:
        assert str(tmp_path).encode() not in (tmp_path / "data" / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_0_1_0_is_migrated_to_the_newest_version(name: str, tmp_path: Path) -> None:
    unpack(tmp_path)
    assert version_of(tmp_path / "data" / name) == 0
    rows = count_rows(tmp_path / "data" / name)
    open_database(tmp_path / "data" / name, FILES[name]).close()
    assert version_of(tmp_path / "data" / name) == len(FILES[name])
    assert count_rows(tmp_path / "data" / name) == rows


@pytest.mark.parametrize("name", FILES)
def test_a_migrated_file_has_the_schema_of_a_new_one(name: str, tmp_path: Path) -> None:
    unpack(tmp_path)
    for file in (tmp_path / "data" / name, tmp_path / "new" / name):
        open_database(file, FILES[name]).close()
    assert schema_of(tmp_path / "data" / name) == schema_of(tmp_path / "new" / name)


@pytest.mark.parametrize("name", FILES)
def test_each_migration_leads_to_the_next_version(name: str, tmp_path: Path) -> None:
    unpack(tmp_path)
    for version in range(1, len(FILES[name]) + 1):
        open_database(tmp_path / "data" / name, FILES[name][:version]).close()
        assert version_of(tmp_path / "data" / name) == version


@pytest.mark.parametrize("name", FILES)
def test_a_newer_version_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    file, newest = tmp_path / name, len(FILES[name])
    open_database(file, FILES[name]).close()
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute(f"PRAGMA user_version = {newest + 1}")
    content = file.read_bytes()
    with pytest.raises(TinkerbellError, match=f"{file} has version {newest + 1}, .* up to {newest}: "):
        open_database(file, FILES[name])
    assert file.read_bytes() == content


def test_a_server_on_a_newer_data_folder_says_why_it_does_not_start(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "tinkerbell.db")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(TinkerbellError, match=r"tinkerbell\.db has version 99"):
        Store(tmp_path)
    Keys(tmp_path).close()


@pytest.mark.parametrize("name", FILES)
def test_a_migration_that_is_interrupted_changes_nothing(name: str, tmp_path: Path) -> None:
    unpack(tmp_path)
    file = tmp_path / "data" / name
    content = file.read_bytes()

    def broken(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE half (id TEXT)")
        for table in tables_of(db):
            db.execute(f"DELETE FROM {table}")
        raise ValueError("on purpose")

    with pytest.raises(TinkerbellError, match=rf"{file} could not be migrated .* unchanged \(ValueError: on purpose"):
        open_database(file, (*FILES[name], broken))
    assert file.read_bytes() == content
    open_database(file, FILES[name]).close()


def test_a_migration_runs_once(tmp_path: Path) -> None:
    file = tmp_path / "some.db"
    ran = []

    def late(_: sqlite3.Connection) -> None:
        ran.append("late")

    def first(_: sqlite3.Connection) -> None:
        ran.append("first")

    open_database(file, (first,)).close()
    open_database(file, (first, late)).close()
    open_database(file, (first, late)).close()
    assert ran == ["first", "late"]


def test_processes_that_open_a_new_file_at_once_migrate_it_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tinkerbell_server.access.keys import Keys; Keys(Path(sys.argv[1]))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "data")]) for _ in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6
    assert version_of(tmp_path / "data" / "keys.db") == len(keys.MIGRATIONS)


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.db").write_bytes(b"not a database" * 100)
    with pytest.raises(TinkerbellError, match=r"keys\.db cannot be opened: file is not a database"):
        Keys(tmp_path)


def test_the_folder_can_be_opened_after_a_refused_file_was_replaced(tmp_path: Path) -> None:
    (tmp_path / "tinkerbell.db").write_bytes(b"not a database" * 100)
    with pytest.raises(TinkerbellError, match="cannot be opened"):
        Store(tmp_path)
    (tmp_path / "tinkerbell.db").unlink()
    Store(tmp_path).close()


def test_a_path_below_the_data_folder_is_stored_relative_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "models" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for path in ("data/models/m", "data/../data/models/m", "link/models/m"):
        assert stored_path(folder, str(tmp_path / path)) == "models/m"
    assert full_path(folder, "models/m") == str(folder / "models" / "m")


def test_a_path_outside_the_data_folder_is_stored_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for path in (str(tmp_path / "elsewhere"), str(tmp_path / "data-2" / "models" / "m"), str(folder)):
        assert stored_path(folder, path) == path
        assert full_path(folder, path) == path


RELOCATED = {
    "/old/data/models/m/s": "models/m/s",
    "/old/data/tenants/ann/models/m/s": "tenants/ann/models/m/s",
    "/old/tenants/x/models/m/s": "models/m/s",
    "/old/models/data/models/m/s": "models/m/s",
    "/old/data/models/m/deleted": "/old/data/models/m/deleted",
    "/old/elsewhere/s": "/old/elsewhere/s",
}


@pytest.mark.parametrize("path", RELOCATED)
def test_the_old_place_of_a_path_is_derived_from_its_end(path: str, tmp_path: Path) -> None:
    for save in ("models/m/s", "tenants/ann/models/m/s"):
        (tmp_path / save).mkdir(parents=True)
    assert relocated_path(tmp_path, path) == RELOCATED[path]


def test_a_copy_of_a_data_folder_uses_its_own_saves(tmp_path: Path) -> None:
    write(tmp_path / "original" / "models" / "m" / "s" / "weights", "12")
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    assert relocated_path(tmp_path / "copy", str(tmp_path / "original" / "models" / "m" / "s")) == "models/m/s"


def test_a_path_in_another_data_folder_is_not_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "other" / "models" / "m" / "s" / "weights", "12").parent
    write(tmp_path / "data" / "models" / "m" / "s" / "weights", "123")
    assert relocated_path(tmp_path / "data", str(path)) == str(path)


def test_new_files_and_folders_are_private(serve: Serve, tmp_path: Path) -> None:
    with serve(data_dir=str(tmp_path / "new" / "data")) as caller:
        caller.train("m")
        session = caller.post("/api/v1/create_session", {"tags": [], "sdk_version": "test"})
        assert session.status_code == 200
        assert readable_by_others(tmp_path / "new") == []


def test_a_folder_with_other_files_keeps_its_mode(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "")
    secret = write(tmp_path / "models" / "m" / "weights", "")
    for path in (tmp_path, secret):
        path.chmod(0o755)
    make_private(tmp_path)
    assert (mode_of(tmp_path), mode_of(secret), mode_of(tmp_path / "models")) == (0o755, 0o700, 0o700)
    (tmp_path / "notes.txt").unlink()
    make_private(tmp_path)
    assert mode_of(tmp_path) == 0o700


def test_the_mode_of_a_symbolic_links_target_is_kept(tmp_path: Path) -> None:
    target = write(tmp_path / "shared" / "weights", "")
    target.chmod(0o644)
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "models" / "weights").symlink_to(target)
    make_private(tmp_path / "data")
    assert mode_of(target) == 0o644


SPEC = CreateModelRequest(model_id="m")
INFO = ModelInfo(
    model_id="m",
    base_model="tiny",
    rank=1,
    alpha=1.0,
    target_modules=None,
    seed=0,
    reference="base",
    trainable_parameters=1,
)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "data")
    yield opened
    opened.close()


def test_two_names_of_one_base_give_one_base(serve: Serve, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with serve(model="tiny") as caller:
        caller.train("m")
        caller.done("/save", model_id="m")
    with serve(model=str(tmp_path / "tiny")) as caller:
        assert caller.done("/forward_backward", model_id="m", data=ROWS)["model_id"] == "m"
        assert caller.models()["m"]["steps"] == 1


def test_a_model_of_another_base_is_refused(serve: Serve, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "tiny").mkdir(parents=True)
    with serve(model=str(tmp_path / "one" / "tiny")) as caller:
        caller.train("m")
    with serve(model=str(tmp_path / "two" / "tiny")) as caller:
        problem = caller.problem("/forward_backward", model_id="m", data=ROWS)
        assert problem["kind"] == "Conflict"
        assert "was made on" in problem["message"]


def test_a_model_of_0_1_0_gets_the_identity_of_the_base_with_its_name(opened: Opened) -> None:
    assert opened.local.health()["status"] == "ok"
    with contextlib.closing(sqlite3.connect(opened.folder / "tinkerbell.db")) as db:
        identities = {identity for (identity,) in db.execute("SELECT base_id FROM models WHERE id != 'ann/life'")}
    assert len(identities) == 1
    assert None not in identities


def test_a_checkpoint_records_the_identity_of_its_base(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    records = TinkerStore(folder)
    saved = Checkpoint(
        id="tinker://r/weights/s",
        tenant="local",
        kind="weights",
        name="s",
        folder=str(folder / "models" / "r" / "weights.s"),
        size=1,
        base_model=str(folder / "models" / "embedded"),
        base_id="ab" * 32,
        rank=1,
    )
    records.put(saved)
    assert records.get(Checkpoint, saved.id) == saved
    records.close()
    folder.rename(tmp_path / "moved")
    records = TinkerStore(tmp_path / "moved")
    moved = records.get(Checkpoint, saved.id)
    records.close()
    assert moved is not None
    assert moved.base_id == saved.base_id
    assert moved.folder == str(tmp_path / "moved" / "models" / "r" / "weights.s")
    assert moved.base_model == str(tmp_path / "moved" / "models" / "embedded")


def test_the_records_of_tinker_clients_are_migrated(tmp_path: Path) -> None:
    facts = unpack(tmp_path)
    records = TinkerStore(tmp_path / "data")
    run, sampler = records.get(Run, facts["run"]), records.get(Sampler, facts["sampler"])
    checkpoint = records.get(Checkpoint, facts["state"])
    requests = records.all(StoredRequest)
    records.close()
    assert run is not None
    assert sampler is not None
    assert checkpoint is not None
    folder = tmp_path / "data" / "models"
    assert sampler.folder == str(folder / facts["run"] / "for-sampler.0")
    assert checkpoint.folder == str(folder / facts["run"] / "weights.state")
    assert {run.base_model, sampler.base_model, checkpoint.base_model} == {str(folder / "embedded")}
    assert "save_weights" in [request.kind for request in requests]


def test_a_model_whose_base_has_no_identity_is_found_by_name(open_store: Store) -> None:
    open_store.add_model(SPEC, INFO, "")
    model = open_store.model("m")
    assert model is not None
    assert model.base_id is None
    open_store.set_base_id("m", "ab" * 32)
    model = open_store.model("m")
    assert model is not None
    assert model.base_id == "ab" * 32


def readable_by_others(folder: Path) -> list[str]:
    """The files and folders below a folder that the group or others may access."""
    return [str(path) for path in sorted(folder.rglob("*")) if not path.is_symlink() and mode_of(path) & 0o077]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def query(file: Path, read: Callable[[sqlite3.Connection], Any]) -> Any:
    with contextlib.closing(sqlite3.connect(file)) as db:
        return read(db)


def version_of(file: Path) -> int:
    return int(query(file, lambda db: db.execute("PRAGMA user_version").fetchone()[0]))


def tables_of(db: sqlite3.Connection) -> list[str]:
    return [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]


def count_rows(file: Path) -> dict[str, int]:
    return dict(
        query(
            file,
            lambda db: {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables_of(db)},
        )
    )


def schema_of(file: Path) -> list[tuple[Any, ...]]:
    """Name, type, nullability, default and key of every column, by table."""
    return list(
        query(
            file,
            lambda db: [
                (table, *column[1:])
                for table in tables_of(db)
                for column in sorted(db.execute(f"PRAGMA table_info({table})").fetchall(), key=lambda row: row[1])
            ],
        )
    )
