"""`tinkerbell serve`: starts a server with the settings of the command line, the environment and tinkerbell.toml."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import click

from tinkerbell_server.cli.settings import SettingsCommand

NEEDED = ("starlette", "uvicorn", "torch", "transformers", "peft", "safetensors")
"""Packages of the [server] extra without which no server starts."""


@click.command(cls=SettingsCommand)
def serve(**settings: Any) -> None:  # Any: one type for each setting
    """Serve MODEL: a hub id, a local folder, or nothing for the embedded tiny model.

    Each option is also an environment variable TINKERBELL_<KEY> and a key of ./tinkerbell.toml (data_dir = "runs").
    """
    check_extra()
    from tinkerbell_server.config import Settings
    from tinkerbell_server.launch import run

    raise SystemExit(run(Settings(**settings)))


def check_extra() -> None:
    """Raise click.ClickException if the [server] extra is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"serving needs {', '.join(missing)}, which is not installed: pip install 'tinkerbell-core[server]'"
        )
