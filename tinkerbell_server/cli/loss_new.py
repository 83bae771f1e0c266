"""`tinkerbell loss new`: a folder with a complete loss package, to write a loss in or made of an uploaded one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.client import ask, with_url

if TYPE_CHECKING:
    from tinkerbell_core.types import RegisterLossRequest


@click.command()
@click.argument("name")
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=".", help="Where the folder is made.")
@click.option("--from-upload", "upload", metavar="LOSS", help="Make it of this uploaded loss: NAME or NAME@DIGEST.")
@with_url
def new(name: str, parent: Path, upload: str | None, url: str) -> None:
    """Make a complete loss package in the folder tinkerbell-loss-NAME: source, README, tests, CI, licence.

    --from-upload asks the server at --url for a loss that was uploaded there, and writes it as a module.
    """
    from tinkerbell_core.registry import build_registry
    from tinkerbell_server.scaffold import names_for, new_package, written

    registry, _ = build_registry()
    names = names_for(name, {spec.name for spec in registry})
    found = written(stored(upload, url), names.loss) if upload else None
    folder = parent / names.distribution
    made = new_package(names, folder, found)
    click.echo(f"made {folder}:")
    for path in made:
        click.echo(f"  {path.relative_to(folder)}")
    click.echo(f"\nNext: write the loss in {folder / 'src' / names.package / 'losses.py'}, then")
    click.echo(f"  pip install -e '{folder}[test]'\n  tinkerbell loss test {folder}\n  tinkerbell serve")


def stored(name: str, url: str) -> RegisterLossRequest:
    """The upload as the server has it."""
    import msgspec

    from tinkerbell_core.types import RegisterLossRequest

    return msgspec.convert(ask(url, "/get_custom_loss", {"name": name}), RegisterLossRequest)
