"""`tinkerbell serve`: settings in, a server out."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tinkerbell_server.cli.settings import SettingsCommand, setting

NEEDED = ("starlette", "uvicorn", "torch", "transformers", "peft", "safetensors")


@click.command(cls=SettingsCommand)
@click.argument("model", required=False, envvar="TINKERBELL_MODEL")
@setting("--host", default="127.0.0.1", help="Address to listen on.")
@setting("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 takes a free one.")
@setting("--data-dir", default=lambda: str(default_data_dir()), help="Where futures, checkpoints and results are kept.")
@setting(
    "--uploads", type=click.Choice(["off", "trusted"]), default="off", help="trusted: run losses that are uploaded."
)
@setting("--device", default="auto", help="auto, cpu, cuda or cuda:<i>.")
@setting("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="auto: bfloat16 on a GPU.")
@setting("--attn", help="Attention implementation, by transformers' name.")
@setting("--revision", help="Revision of a hub model.")
@setting("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@setting("--micro-batch-tokens", type=click.IntRange(min=1), help="Most tokens in one forward pass; default by device.")
@setting(
    "--logits-budget",
    type=click.IntRange(min=0),
    help="Most bytes of logits that a loss may have stored; default: an eighth of what is free at the start.",
)
@setting("--gradient-checkpointing", is_flag=True, help="Store less of each layer, and compute it again in backward.")
@setting("--plugins/--no-plugins", "plugins", default=True, help="Load installed plugins besides the built-in losses.")
@setting(
    "--disable-plugin", "disabled_plugins", multiple=True, help="A plugin or distribution to leave out; repeatable."
)
@setting("--require-plugin", "required_plugins", multiple=True, help="Do not start without this one; repeatable.")
@setting(
    "--chat-tokens",
    type=click.Choice(["assistant", "all"]),
    default="assistant",
    help="Which tokens of a chat count in training.",
)
@setting("--engine", type=click.Choice(["torch", "fake"]), default="torch", hidden=True)
def serve(**settings: Any) -> None:  # Any: one value a setting
    """Serve MODEL: a hub id, a local folder, or nothing for the embedded tiny model.

    Every option is also a variable TINKERBELL_<OPTION> and a key of ./tinkerbell.toml (data_dir = "runs").
    """
    if settings["engine"] == "torch":
        check_extra()
    from tinkerbell_server.config import Settings
    from tinkerbell_server.serve import run

    raise SystemExit(run(Settings(**settings)))


def check_extra() -> None:
    """Raise where the [server] extra is not installed, naming what is missing and what to type."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"serving needs {', '.join(missing)}, which is not installed: pip install 'tinkerbell-core[server]'"
        )


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/tinkerbell`, or its place in the home directory."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "tinkerbell"
