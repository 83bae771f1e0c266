"""`loss`, `plugin` and `doctor` list losses, plugins and problems, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

import tinkerbell_server.cli.loss
from tinkerbell_core import __version__
from tinkerbell_core.registry import build_registry
from tinkerbell_core.types import LossDescription
from tinkerbell_server.cli import tinkerbell

BUILT_IN = {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro"}


def run(*args: str) -> Result:
    return CliRunner().invoke(tinkerbell, list(args))


@pytest.fixture
def broken_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution whose one entry point fails to import."""
    info = tmp_path / "tinkerbell_loss_broken-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinkerbell-loss-broken\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[tinkerbell]\nbroken = tinkerbell_loss_broken\n")
    (tmp_path / "tinkerbell_loss_broken.py").write_text("raise RuntimeError('no such kernel')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_local_listing_has_the_built_in_losses() -> None:
    answer = run("loss", "list", "--local")
    assert answer.exit_code == 0, answer.output
    assert {line.split()[0] for line in answer.output.splitlines()[1:]} >= BUILT_IN


def test_a_listing_can_be_json() -> None:
    losses = json.loads(run("loss", "list", "--local", "--json").output)
    assert {each["name"] for each in losses} >= BUILT_IN
    assert all(each["provenance"]["version"] for each in losses)


def test_a_loss_shows_its_hyperparameters_with_their_defaults() -> None:
    shown = run("loss", "show", "ppo", "--local").output
    assert "tinkerbell-core:ppo" in shown
    assert "clip_low_threshold: float = 0.8" in shown
    assert "def ppo" in shown


def test_a_misspelt_name_is_an_error_that_names_the_nearest() -> None:
    answer = run("loss", "show", "cross_entrpy", "--local")
    assert answer.exit_code == 1
    assert "did you mean 'cross_entropy'?" in answer.output
    assert "Traceback" not in answer.output


def test_without_a_server_the_error_names_the_command_that_starts_one() -> None:
    answer = run("loss", "list", "--url", "http://127.0.0.1:1")
    assert answer.exit_code == 1
    assert "no Tinkerbell server answers at http://127.0.0.1:1" in answer.output
    assert "tinkerbell serve" in answer.output


@pytest.mark.usefixtures("broken_plugin")
def test_a_broken_plugin_is_listed_with_its_error() -> None:
    answer = run("plugin", "list")
    assert answer.exit_code == 0, answer.output
    [line] = [line for line in answer.output.splitlines() if line.startswith("broken")]
    assert "tinkerbell-loss-broken 1.2" in line
    assert "RuntimeError: no such kernel" in line
    assert "cross_entropy" in answer.output


@pytest.mark.usefixtures("broken_plugin")
def test_the_doctor_names_a_broken_plugin_and_fails() -> None:
    answer = run("doctor", "--json")
    found = {each["name"]: each for each in json.loads(answer.output)}
    assert answer.exit_code == 1
    assert not found["tinkerbell-loss-broken:broken"]["ok"]
    assert found["torch"]["ok"]


def test_the_printed_version_is_that_of_the_package() -> None:
    assert run("version").output.strip() == __version__


def test_the_listing_of_a_server_shows_how_each_loss_gets_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, _ = build_registry(enabled=False)
    lazy, sorts, pinned = (LossDescription.of(spec) for spec in list(registry)[:3])
    sorts = msgspec.structs.replace(sorts, materialises=("sort",))
    pinned = msgspec.structs.replace(pinned, plain_logits="the loss puts a hook on its logits")
    answer = {"losses": msgspec.to_builtins([lazy, sorts, pinned])}
    monkeypatch.setattr(tinkerbell_server.cli.loss, "request", lambda url, path: answer)
    lines = {line.split()[0]: line for line in run("loss", "list").output.splitlines()}
    assert "  lazy  " in lines[lazy.name]
    assert "  stored by sort  " in lines[sorts.name]
    assert "  stored  " in lines[pinned.name]
    assert "stored: the loss puts a hook on its logits" in run("loss", "show", pinned.name).output
