"""The demo trains, measures an improvement, and leaves no process running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = [sys.executable, "-c", "from tinkerbell_server.cli import main; main()", "demo"]
PNG = b"\x89PNG\r\n\x1a\n"


def processes_that_mention(word: str) -> list[str]:
    lines = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if word in line and "tinkerbell_server" in line]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_improves_both_measurements(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--json", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    bits = [point["value"] for point in outcome["bits_per_byte"]]
    accuracy = [point["value"] for point in outcome["pair_accuracy"]]
    assert bits[0] > 7
    assert bits[-1] < 3.5
    assert accuracy[0] < 0.85
    assert accuracy[-1] > accuracy[0] + 0.03
    assert outcome["sample_before"] != outcome["sample_after"]
    assert Path(outcome["picture"]).read_bytes().startswith(PNG)
    assert any(Path(outcome["saved"]).iterdir())


@pytest.mark.slow
def test_a_terminated_demo_stops_its_server(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([*DEMO, "--out", str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "held out" in line:  # the server is up
                break
        assert processes_that_mention(str(tmp_path))
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 128 + signal.SIGTERM
    assert not processes_that_mention(str(tmp_path))
