"""`tinkerbell demo`: runs the client's demo as a program, since the server never imports the client."""

from __future__ import annotations

import runpy
import sys

import click

from tinkerbell_server.cli.serve import check_extra


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False), default="tinkerbell-demo", show_default=True, help="Output folder."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the data and the samples.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(out: str, seed: int, as_json: bool) -> None:
    """Train a tiny model from nothing, then with a loss of your own: about two minutes on two cores.

    Starts a server of its own on a free port and stops it at the end.
    """
    check_extra()
    sys.argv = ["tinkerbell demo", "--out", out, "--seed", str(seed), *(["--json"] if as_json else [])]
    runpy.run_module("tinker_client.demo", run_name="__main__")
