"""`tinkerbell loss new`: creates a complete loss package, empty or from an uploaded loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.client import request, with_url

if TYPE_CHECKING:
    from tinkerbell_core.types import RegisterLossRequest


@click.command()
@click.argument("name")
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=".", help="Parent of the new folder.")
@click.option("--from-upload", "upload", metavar="LOSS", help="Use the source of this upload: NAME or NAME@DIGEST.")
@with_url
def new(name: str, parent: Path, upload: str | None, url: str) -> None:
    """Create a complete loss package in the folder tinkerbell-loss-NAME: source, README, tests, CI, licence.

    --from-upload downloads an uploaded loss from the server at --url and writes it as a module.
    """
    from tinkerbell_core.registry import build_registry
    from tinkerbell_server.scaffold import module_from_upload, names_for, new_package

    registry, _ = build_registry()
    names = names_for(name, {spec.name for spec in registry})
    module = module_from_upload(download(upload, url), names.loss) if upload else None
    folder = parent / names.distribution
    files = new_package(names, folder, module)
    click.echo(f"created {folder}:")
    for path in files:
        click.echo(f"  {path.relative_to(folder)}")
    click.echo(f"\nNext: write the loss in {folder / 'src' / names.package / 'losses.py'}, then")
    click.echo(f"  pip install -e '{folder}[test]'\n  tinkerbell loss test {folder}\n  tinkerbell serve")


def download(name: str, url: str) -> RegisterLossRequest:
    """An uploaded loss, from the server."""
    import msgspec

    from tinkerbell_core.types import RegisterLossRequest

    return msgspec.convert(request(url, "/get_custom_loss", {"name": name}), RegisterLossRequest)
