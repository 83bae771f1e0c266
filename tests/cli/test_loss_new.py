"""`loss new` makes a package that installs, passes its own tests and trains; of an upload too. `loss test` reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result

from tests.live import live_server
from tinker_client import TinkerClient, custom_loss
from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.errors import BadRequest, BadUpload
from tinkerbell_core.functional import effective_mask, masked_sum, target_logprobs
from tinkerbell_core.travel import pack
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.cli import tinkerbell
from tinkerbell_server.finding import find_specs
from tinkerbell_server.scaffold import names_for, new_package, written

STRENGTH = 0.25
SCALES = torch.tensor([1.0, 0.5])


def bent(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x) * SCALES[1]


def softened(model_outputs, loss_fn_inputs, attention_mask, *, strength: float = STRENGTH):  # type: ignore[no-untyped-def]
    """softplus(-log p(target)) * strength, summed: a test's own."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    return LossFnOutput(masked_sum(strength * bent(-logprobs), mask), logprobs)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(tinkerbell, [str(arg) for arg in args])


def envelope(kind: str = "source") -> RegisterLossRequest:
    return RegisterLossRequest(
        name="soft",
        payload=pack(softened),
        magic="",
        python="",
        digest="0" * 64,
        coupling="sequence",
        kind=kind,  # type: ignore[arg-type]
    )


def installed(package: Path, into: Path) -> None:
    """Install a package as pip does, where an environment of its own would take minutes."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(into), str(package)], check=True)


@pytest.mark.slow
def test_a_new_package_installs_passes_its_tests_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("loss", "new", "wendy", "--dir", tmp_path).exit_code == 0
    package, site = tmp_path / "tinkerbell-loss-wendy", tmp_path / "site"
    installed(package, site)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), root, os.environ.get("PYTHONPATH", "")]))
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], cwd=package, check=True)
    with live_server(tmp_path, "--device", "cpu", seconds=400) as url, TinkerClient(url) as client:
        steps = []
        for _ in range(3):
            result = client.hf_backend.forward_backward("m", ["Second star to the right"], loss_fn="wendy")
            client.hf_backend.optim_step("m", learning_rate=1e-2)
            steps.append(result.loss)
        assert steps == sorted(steps, reverse=True)
        # an upload, back from the server as a package
        custom_loss(client, name="soft", coupling="sequence", via="source")(softened)
        assert run("loss", "new", "slightly", "--dir", tmp_path, "--from-upload", "soft", "--url", url).exit_code == 0
    [spec] = find_specs(str(tmp_path / "tinkerbell-loss-slightly"))
    assert same(spec)


def same(spec: object) -> bool:
    """Whether a loss gives what `softened` gives."""
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 7), {"target_tokens": torch.randint(7, (2, 3))}, torch.ones(2, 3)
    return bool(torch.equal(spec(*batch).loss, softened(*batch).loss))  # type: ignore[operator]


def test_an_upload_becomes_a_package_that_gives_the_same(tmp_path: Path) -> None:
    upload = written(envelope(), "hook")
    new_package(names_for("hook"), tmp_path / "made", upload)
    text = (tmp_path / "made/src/tinkerbell_loss_hook/losses.py").read_text()
    assert "strength: float = 0.25" in text
    assert "  # [B, T]" in text
    assert not (tmp_path / "made/tests/test_losses.py").exists()
    [spec] = find_specs(str(tmp_path / "made"))
    assert (spec.name, spec.coupling) == ("hook", "sequence")
    assert same(spec)


def test_an_upload_that_is_bytecode_is_not_opened() -> None:
    with pytest.raises(BadUpload, match="via='source'"):
        written(envelope("cloudpickle"), "hook")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tinkerbell-loss-wendy").mkdir()
    answer = run("loss", "new", "wendy", "--dir", tmp_path)
    assert answer.exit_code == 1
    assert "nothing was written" in answer.output
    assert not list((tmp_path / "tinkerbell-loss-wendy").iterdir())


@pytest.mark.parametrize(
    "name", ["", "Wendy", "a/b", "../up", "9lives", "class", "print", "custom", "dpo", "a" * 80, "match"]
)
def test_a_name_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        names_for(name, {"dpo"})


def test_the_prefix_may_be_written_or_left_out() -> None:
    assert names_for("tinkerbell-loss-lost-boys") == names_for("lost_boys")
    assert names_for("lost_boys").distribution == "tinkerbell-loss-lost-boys"


def test_the_kit_reports_each_check_and_fails_with_1(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from tinkerbell_core import LossFnOutput, loss\n\n\n@loss(coupling='sequence')\n"
        "def leaky(model_outputs, loss_fn_inputs, attention_mask):\n"
        "    return LossFnOutput(model_outputs.square().mean(), None)\n"
    )
    answer = run("loss", "test", wrong)
    assert answer.exit_code == 1
    assert "FAIL" in answer.output
    [found] = json.loads(run("loss", "test", wrong, "--json").output)
    assert found["loss"] == "leaky"
    assert any(not check["ok"] and check["message"] for check in found["checks"])


def test_what_is_not_there_to_test_is_said(tmp_path: Path) -> None:
    assert "no file or folder" in run("loss", "test", tmp_path / "none.py").output
    assert "is no loss package" in run("loss", "test", tmp_path).output
    assert "did you mean 'cross_entropy'" in run("loss", "test", "cross_entrpy").output
    assert "has no 'softenedd'; did you mean 'softened'?" in run("loss", "test", f"{__name__}:softenedd").output


def test_a_loss_shows_formula_and_paper() -> None:
    said = run("loss", "show", "ppo", "--local").output
    assert "formula          -min(ratio * advantage, clip(ratio) * advantage), summed" in said
    assert "inputs           target_tokens, logprobs, advantages" in said
    assert loss(softened).summary == "softplus(-log p(target)) * strength, summed: a test's own."
