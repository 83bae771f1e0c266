"""`tinkerbell version`: prints the version."""

from __future__ import annotations

import click


@click.command()
def version() -> None:
    """Print the version."""
    from tinkerbell_core import __version__

    click.echo(__version__)
