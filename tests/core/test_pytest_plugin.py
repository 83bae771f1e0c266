"""`pytest --tinkerbell-losses` runs the conformance kit on the installed losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def kit(names: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # load the module instead of the entry point, so that the code of this checkout is tested
    plugin = [
        "-p",
        "no:tinkerbell",
        "-p",
        "no:tinkerbell_sandbox",
        "-p",
        "tinkerbell_core.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *plugin, f"--tinkerbell-losses={names}", "-q", "-rA", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_check_of_a_loss_is_a_test(tmp_path: Path) -> None:
    done = kit("cross_entropy", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "tinkerbell-core:cross_entropy[gradcheck]" in done.stdout
    assert "not run: no sandbox is available" in done.stdout


def test_a_name_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    done = kit("no-such-loss", tmp_path)
    assert done.returncode == 4
    assert "'no-such-loss' is installed" in done.stderr
