"""`--help` answers before a person notices, because nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "peft", "starlette", "uvicorn", "httpx", "numpy", "rich", "msgspec", "pluggy")
PROGRAM = f"""
import sys
from tinkerbell_server.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""


def run_help(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *args, "--help"], capture_output=True, text=True)


@pytest.mark.parametrize("args", [(), ("serve",), ("loss",), ("loss", "list"), ("plugin",), ("demo",)])
def test_help_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    answer = run_help(*args)
    assert answer.returncode == 0, answer.stderr
    assert "Usage: tinkerbell" in answer.stdout


def test_help_answers_in_a_fifth_of_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        run_help()
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.2


def test_the_help_names_every_command() -> None:
    said = run_help().stdout
    for name in ("serve", "demo", "loss", "plugin", "doctor", "version"):
        assert f"\n  {name} " in said
