"""`tinkerbell key` changes the keys of a data dir, and `loss delete` and `loss publish` the uploads of a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.fake_engine import FAKE_ENGINE
from tests.live import live_server
from tinker_client import TinkerClient
from tinkerbell_core.errors import Forbidden, Unauthorized
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.cli import tinkerbell


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data dir that tinkerbell.toml in the current folder names."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "tinkerbell.toml").write_text(f'data_dir = "{tmp_path / "data"}"\nport = 1\n')
    monkeypatch.chdir(folder)
    for name in ("TINKERBELL_DATA_DIR", "TINKERBELL_API_KEY", "TINKER_API_KEY", "TINKERBELL_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


def key(*args: str) -> Result:
    return CliRunner().invoke(tinkerbell, ["key", *args])


def test_stdout_contains_only_the_key(data: Path) -> None:
    answer = key("create", "ann", "--days", "30")
    assert answer.exit_code == 0, answer.output
    text = answer.stdout.strip()
    assert text.startswith("tml-")
    assert "tenant ann: read, train, upload, expires" in answer.stderr
    assert "This is the first key" in answer.stderr
    keys = Keys(data)
    found = keys.find(text)
    keys.close()
    assert found is not None
    assert found.state() == "valid"


def test_keys_are_listed_without_their_secrets_and_revoked_by_id(data: Path) -> None:
    text = json.loads(key("create", "ann", "--json").stdout)["key"]
    key("create", "root", "--tenant", "local", "--scope", "admin")
    listed = json.loads(key("list", "--json").output)
    assert [(each["name"], each["tenant"], each["state"]) for each in listed] == [
        ("ann", "ann", "valid"),
        ("root", "local", "valid"),
    ]
    assert text.split("-", 2)[2] not in key("list").output
    assert key("revoke", listed[0]["id"]).exit_code == 0
    assert [each["state"] for each in json.loads(key("list", "--json").output)] == ["revoked", "valid"]
    lines = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["create_key", "create_key", "revoke_key"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["revoke", "unknown"], "no key has the id 'unknown'"),
        (["create", "Ann Smith"], "a tenant cannot be named 'Ann Smith'"),
        (["create", "ann", "--days", "0"], "days must be > 0 and < 36500, but is 0"),
        (["create", "ann", "--tenant", "public"], "not 'public'"),
    ],
)
def test_a_wrong_argument_is_an_error_without_a_traceback(data: Path, args: list[str], message: str) -> None:
    answer = key(*args)
    assert answer.exit_code == 1
    assert message in answer.output
    assert "Traceback" not in answer.output


def test_the_first_key_creates_the_data_dir(data: Path) -> None:
    assert not data.exists()
    key("create", "ann")
    assert (data / "keys.db").exists()


def test_a_key_permits_its_scopes_on_a_running_server(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_upload: Any
) -> None:
    with live_server(tmp_path, engine=FAKE_ENGINE, uploads="trusted") as url:
        text = key("create", "ann").stdout.strip()
        admin = key("create", "root", "--scope", "admin").stdout.strip()
        with TinkerClient(url) as client, pytest.raises(Unauthorized, match="requires an API key"):
            client.list_loss_functions()
        monkeypatch.setenv("TINKER_API_KEY", text)
        with TinkerClient(url) as client:
            client._register(make_upload())
            with pytest.raises(Forbidden):
                client.publish_custom_loss("mine")
        monkeypatch.setenv("TINKERBELL_API_KEY", admin)
        with TinkerClient(url) as root:
            assert root.publish_custom_loss("mine", tenant="ann").provenance.owner == "public"
        loss = CliRunner().invoke(tinkerbell, ["loss", "list", "--url", url])
        assert "upload:public/mine@" in loss.output
        monkeypatch.setenv("TINKERBELL_API_KEY", text)
        deleted = CliRunner().invoke(tinkerbell, ["loss", "delete", "mine", "--url", url])
        assert deleted.output.startswith("deleted upload:ann/mine@")
        refused = CliRunner().invoke(tinkerbell, ["loss", "publish", "mine", "--url", url])
        assert refused.exit_code == 1
        assert "needs a key with the scope 'admin'" in refused.output
        with TinkerClient(url) as client:
            client._register(make_upload())
            assert client.delete_custom_loss("mine")[0].startswith("upload:ann/mine@")


@pytest.fixture
def make_upload() -> Any:
    from tests.server.conftest import upload

    def make() -> RegisterLossRequest:
        return upload("mine")

    return make
