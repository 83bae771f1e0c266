"""`tinkerbell demo`: runs the client's demo in a process of its own, since the server never imports the client."""

from __future__ import annotations

import subprocess
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
    command = [sys.executable, "-m", "tinker_client.demo", "--out", out, "--seed", str(seed)]
    if as_json:
        command.append("--json")
    process = subprocess.Popen(command)
    while True:
        try:
            raise SystemExit(process.wait())
        except KeyboardInterrupt:  # the terminal has told the demo too, which now stops its server
            continue
