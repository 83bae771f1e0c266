"""`loss new` writes a package that installs, passes its tests and trains, also from an upload; `loss test` reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result

from tests.conftest import PATIENT
from tests.live import live_server
from tinker_client import TinkerClient, custom_loss
from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.errors import BadRequest, BadUpload
from tinkerbell_core.functional import effective_mask, masked_sum, target_logprobs
from tinkerbell_core.serialization import pack
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.calls.local_losses import find_specs
from tinkerbell_server.cli import tinkerbell
from tinkerbell_server.scaffold import module_from_upload, names_for, new_package

STRENGTH = 0.25
SCALES = torch.tensor([1.0, 0.5])


def scaled_softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x) * SCALES[1]


def softened(model_outputs, loss_fn_inputs, attention_mask, *, strength: float = STRENGTH):  # type: ignore[no-untyped-def]
    """softplus(-log p(target)) * strength, summed: a loss of these tests."""
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    return LossFnOutput(masked_sum(strength * scaled_softplus(-logprobs), mask), logprobs)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(tinkerbell, [str(arg) for arg in args])


def upload_of_softened(kind: str = "source") -> RegisterLossRequest:
    return RegisterLossRequest(
        name="soft",
        payload=pack(softened),
        magic="",
        python="",
        digest="0" * 64,
        coupling="sequence",
        kind=kind,  # type: ignore[arg-type]
    )


def install(package: Path, into: Path) -> None:
    """Install a package with pip into a folder, because a new environment takes minutes."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(into), str(package)], check=True)


@pytest.fixture(scope="module")
def wendy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package that `loss new` wrote."""
    folder = tmp_path_factory.mktemp("made")
    assert run("loss", "new", "wendy", "--dir", folder).exit_code == 0
    return folder / "tinkerbell-loss-wendy"


@pytest.fixture(scope="module")
def site(wendy: Path) -> Iterator[Path]:
    """The folder in which the package is installed; processes that start from now on import from it."""
    folder = wendy.parent / "site"
    install(wendy, folder)
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), root, os.environ.get("PYTHONPATH")])))
        yield folder


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[str]:
    with live_server(site.parent, **PATIENT, device="cpu", seconds=400) as url:
        yield url


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TINKERBELL_API_KEY", "TINKER_API_KEY", "TINKERBELL_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_a_new_package_installs_and_passes_its_tests(wendy: Path, site: Path) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    subprocess.run(pytest_, cwd=wendy, check=True)
    # a new process finds the package by its entry point
    code = "from tinkerbell_server.cli import main; main(['loss', 'test', 'wendy'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=wendy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks hold" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("no_keys")
def test_a_new_package_trains_on_a_server_and_loss_show_describes_it(server: str) -> None:
    with TinkerClient(server) as client:
        steps = []
        for _ in range(3):
            result = client.hf_backend.forward_backward("m", ["Second star to the right"], loss_fn="wendy")
            client.hf_backend.optim_step("m", learning_rate=3e-3)
            steps.append(result.loss)
        assert steps == sorted(steps, reverse=True)
        custom_loss(client, name="shown", coupling="sequence", via="source")(softened)
    for name, *expected in [
        ("ppo", "tinkerbell-core:ppo", "inputs           target_tokens, logprobs, advantages"),
        ("wendy", "entry_point tinkerbell-loss-wendy 0.1.0", "hyperparameter   strength: float = 0.1"),
        ("shown", "upload:shown@", "formula          softplus(-log p(target)) * strength", "def softened("),
    ]:
        shown = run("loss", "show", name, "--url", server)
        assert shown.exit_code == 0, shown.output
        for line in expected:
            assert line in shown.output
    assert "did you mean 'wendy'" in run("loss", "show", "wendi", "--url", server).output


@pytest.mark.slow
@pytest.mark.usefixtures("no_keys")
def test_only_the_owner_of_an_upload_gets_it_back_as_a_package(
    server: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs last of the tests on this server, which requires a key as soon as one exists."""

    def new_from_upload(name: str) -> Result:
        return run("loss", "new", name, "--dir", tmp_path, "--from-upload", "soft", "--url", server)

    with TinkerClient(server) as client:
        custom_loss(client, name="soft", coupling="sequence", via="source")(softened)
    assert new_from_upload("slightly").exit_code == 0
    [spec] = find_specs(str(tmp_path / "tinkerbell-loss-slightly"))
    assert equals_softened(spec)
    ann, ben = (run("key", "create", who, "--data-dir", site.parent / "data").stdout.strip() for who in ("ann", "ben"))
    assert "requires an API key" in new_from_upload("anonymous").output
    monkeypatch.setenv("TINKERBELL_API_KEY", ann)
    with TinkerClient(server) as client:
        custom_loss(client, name="soft", coupling="sequence", via="source")(softened)
    assert new_from_upload("tootles").exit_code == 0
    [spec] = find_specs(str(tmp_path / "tinkerbell-loss-tootles"))
    assert equals_softened(spec)
    assert "upload:ann/soft@" in run("loss", "show", "soft", "--url", server).output
    monkeypatch.setenv("TINKERBELL_API_KEY", ben)
    refused = new_from_upload("nibs")
    assert refused.exit_code == 1
    assert "no loss named 'soft'" in refused.output
    assert not (tmp_path / "tinkerbell-loss-nibs").exists()


def equals_softened(spec: object) -> bool:
    """Whether a loss has the value of `softened` on a random batch."""
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 7), {"target_tokens": torch.randint(7, (2, 3))}, torch.ones(2, 3)
    return bool(torch.equal(spec(*batch).loss, softened(*batch).loss))  # type: ignore[operator]


def test_a_package_from_an_upload_has_the_values_of_the_upload(tmp_path: Path) -> None:
    module = module_from_upload(upload_of_softened(), "hook")
    new_package(names_for("hook"), tmp_path / "made", module)
    text = (tmp_path / "made/src/tinkerbell_loss_hook/losses.py").read_text()
    assert "strength: float = 0.25" in text
    assert "import torch\n" in text  # for SCALES
    assert "  # [B, T]" in text
    assert not (tmp_path / "made/tests/test_losses.py").exists()
    [spec] = find_specs(str(tmp_path / "made"))
    assert (spec.name, spec.coupling) == ("hook", "sequence")
    assert equals_softened(spec)


def test_an_upload_that_is_bytecode_is_not_opened() -> None:
    with pytest.raises(BadUpload, match="via='source'"):
        module_from_upload(upload_of_softened("cloudpickle"), "hook")


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
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


def test_the_prefix_of_a_name_is_optional() -> None:
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


def test_loss_test_names_what_it_cannot_find(tmp_path: Path) -> None:
    assert "no file or folder" in run("loss", "test", tmp_path / "none.py").output
    assert "is not a loss package" in run("loss", "test", tmp_path).output
    assert "did you mean 'cross_entropy'" in run("loss", "test", "cross_entrpy").output
    assert "has no 'softenedd'; did you mean 'softened'?" in run("loss", "test", f"{__name__}:softenedd").output


def test_loss_show_prints_the_formula_and_the_inputs() -> None:
    output = run("loss", "show", "ppo", "--local").output
    assert "formula          -min(ratio * advantage, clip(ratio) * advantage), summed" in output
    assert "inputs           target_tokens, logprobs, advantages" in output
    assert loss(softened).summary == "softplus(-log p(target)) * strength, summed: a loss of these tests."
