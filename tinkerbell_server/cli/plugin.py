"""`tinkerbell plugin`: lists the installed plugins and the errors of those that do not load."""

from __future__ import annotations

import click

from tinkerbell_server.cli.output import print_json, print_table


@click.group()
def plugin() -> None:
    """Installed plugins, their losses and their errors."""


@plugin.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the installed plugins, with the error of each that does not load."""
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
