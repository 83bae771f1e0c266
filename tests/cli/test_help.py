"""`--help` answers fast, because it imports nothing heavy."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "starlette", "uvicorn", "httpx", "numpy", "rich", "pluggy")
PROGRAM = """
import sys
from tinkerbell_server.cli import main
heavy, arguments = sys.argv[1].split(","), sys.argv[2:]
try:
    main(arguments)
except SystemExit as stop:
    assert not stop.code, stop.code
imported = [name for name in heavy if name in sys.modules]
assert not imported, imported
"""


def run_help(*args: str, heavy: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, ",".join(heavy), *args, "--help"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("args", [("serve",), ("key",), ("loss",), ("loss", "list"), ("plugin",), ("demo",)])
def test_the_help_of_a_subcommand_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    answer = run_help(*args)
    assert answer.returncode == 0, answer.stderr
    assert "Usage: tinkerbell" in answer.stdout


def test_the_help_imports_no_declaration_of_settings() -> None:
    answer = run_help(heavy=(*HEAVY, "msgspec", "tinkerbell_core", "tinkerbell_server.config"))
    assert answer.returncode == 0, answer.stderr


def test_the_help_takes_less_than_a_fifth_of_a_second() -> None:
    def seconds() -> float:
        # processor time does not include that of other processes on a busy machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_help()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.2


def test_the_help_names_every_command() -> None:
    shown = run_help().stdout
    for name in ("serve", "demo", "loss", "key", "plugin", "doctor", "version"):
        assert f"\n  {name} " in shown
