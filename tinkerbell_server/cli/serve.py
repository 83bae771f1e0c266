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
    "--uploads",
    type=click.Choice(["off", "sandboxed", "trusted"]),
    default="sandboxed",
    help="How uploaded losses run: not, in locked-down processes, or with your rights.",
)
@setting("--sandbox-seconds", type=float, default=10.0, help="Most seconds a call of an uploaded loss may take.")
@setting("--sandbox-seconds-per-token", type=float, default=0.002, help="Seconds more for each token of its batch.")
@setting("--dry-run-seconds", type=float, default=5.0, help="Most seconds the trial of an upload may take.")
@setting("--sandbox-memory", type=click.IntRange(min=256), help="MiB an uploaded loss may use; default by machine.")
@setting("--dotted-losses", is_flag=True, help="Import a loss_fn my.module:function, with your rights.")
@setting(
    "--auth", type=click.Choice(["auto", "on", "off"]), default="auto", help="auto: once a key exists, or off loopback."
)
@setting("--ssl-certfile", type=click.Path(dir_okay=False), help="Serve https with this certificate chain (PEM).")
@setting("--ssl-keyfile", type=click.Path(dir_okay=False), help="Its private key, where the chain does not hold it.")
@setting("--body-limit", type=click.IntRange(min=1), default=256, help="Most MiB in a request with data.")
@setting("--rate-limit", type=click.IntRange(min=0), default=6000, help="Most requests of a key a minute; 0: no limit.")
@setting("--concurrency-limit", type=click.IntRange(min=1), default=64, help="Most requests of a key at once.")
@setting("--queue-limit", type=click.IntRange(min=2), default=2048, help="Most requests that wait for the engine.")
@setting("--upload-limit", type=click.IntRange(min=1), default=1000, help="Most uploads that a tenant keeps.")
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
@setting(
    "--engine",
    default="tinkerbell_server.engines.torch",
    help="Import path of the engine.",
)
def serve(**settings: Any) -> None:  # Any: one value a setting
    """Serve MODEL: a hub id, a local folder, or nothing for the embedded tiny model.

    Every option is also a variable TINKERBELL_<OPTION> and a key of ./tinkerbell.toml (data_dir = "runs").
    """
    check_extra()
    from tinkerbell_server.config import Settings
    from tinkerbell_server.launch import run

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
