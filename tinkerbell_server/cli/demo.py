"""`tinkerbell demo`: starts a server and runs the client's demo on it."""

from __future__ import annotations

import runpy
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click

from tinkerbell_server.cli.serve import check_extra

_START_SECONDS = 120.0


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False), default="tinkerbell-demo", show_default=True, help="Output folder."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the data and the samples.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(out: str, seed: int, as_json: bool) -> None:
    """Train a tiny random model with a built-in loss, then with an uploaded one: about two minutes on two cores.

    The demo starts a server on a free port and stops it at the end.
    """
    check_extra()
    from tinkerbell_server.config import Settings
    from tinkerbell_server.launch import running_server

    signal.signal(signal.SIGTERM, _exit)
    if not as_json:
        click.echo("starting a server on the embedded model")
    with tempfile.TemporaryDirectory(prefix="tinkerbell-demo-") as folder:
        settings = Settings(data_dir=str(Path(folder, "data")))
        with running_server(settings, log=Path(folder, "server.log"), timeout=_START_SECONDS) as server:
            arguments = ["--url", server.url, "--out", out, "--seed", str(seed), *(["--json"] if as_json else [])]
            sys.argv = ["tinkerbell demo", *arguments]
            # run as a program: the server's packages never import the client's
            runpy.run_module("tinker_client.demo", run_name="__main__")


def _exit(signum: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that the server is stopped."""
    raise SystemExit(128 + signum)
