"""`tinkerbell plugin`: what is installed here, and what of it does not load."""

from __future__ import annotations

import click

from tinkerbell_server.cli.output import print_json, print_table


@click.group()
def plugin() -> None:
    """What plugins are installed, what each brought, and why one is broken."""


@plugin.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List installed plugins; a broken one says why."""
    from tinkerbell_core.registry import build_registry

    _, infos = build_registry()
    plugins = [info.describe() for info in infos]
    if as_json:
        print_json(plugins)
        return
    rows = [
        (
            each.id.partition(":")[2],
            f"{each.distribution} {each.version}",
            "broken" if each.error else "ok",
            each.error or ", ".join(id.partition(":")[2] for id in each.losses),
        )
        for each in plugins
    ]
    print_table(["PLUGIN", "DISTRIBUTION", "STATE", "LOSSES"], rows)
