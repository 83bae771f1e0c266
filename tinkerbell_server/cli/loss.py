"""`tinkerbell loss`: lists, shows, deletes and publishes losses of a server, or lists those installed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.client import request, with_url
from tinkerbell_server.cli.loss_new import new
from tinkerbell_server.cli.loss_test import check
from tinkerbell_server.cli.output import print_json, print_table

if TYPE_CHECKING:
    from tinkerbell_core.hyperparameters import Hyperparameter
    from tinkerbell_core.types import LossDescription


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select the server or the local plugins, and the output format."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--local", is_flag=True, help="List the losses of the plugins installed here, without a server."),
        with_url,
    ):
        command = option(command)
    return command


@click.group()
def loss() -> None:
    """Losses: list and show them; write and test packages; delete and publish uploads."""


@loss.command("list")
@source_options
def list_(url: str, local: bool, as_json: bool) -> None:
    """List losses: name, id, whether the logits are lazy or stored (only known to a server), and summary."""
    losses = find_losses(url, local)
    if as_json:
        print_json(losses)
    else:
        rows = [(each.name, each.id, "-" if local else each.logits.partition(":")[0], each.summary) for each in losses]
        print_table(["NAME", "ID", "LOGITS", "SUMMARY"], rows)


@loss.command()
@click.argument("name")
@source_options
def show(name: str, url: str, local: bool, as_json: bool) -> None:
    """Show the loss called NAME (a name, an id, or name@digest): formula, inputs, hyperparameters, paper, source."""
    from tinkerbell_core.loss_docstring import parse_docstring
    from tinkerbell_core.registry import resolve

    chosen = resolve(name, find_losses(url, local))
    if as_json:
        print_json(chosen)
        return
    origin = " ".join(filter(None, [chosen.provenance.kind, chosen.provenance.distribution, chosen.provenance.version]))
    parsed = parse_docstring(chosen.summary, chosen.source)
    lines = [
        ("id", chosen.id),
        ("formula", parsed.formula),
        ("known as", parsed.name),
        *(("paper", link) for link in parsed.links),
        ("inputs", ", ".join(chosen.inputs) or "not declared: a server discovers them"),
        ("optional inputs", ", ".join(chosen.optional_inputs)),
        *(("hyperparameter", signature(hyper)) for hyper in chosen.hyperparameters),
        ("coupling", chosen.coupling),
        ("group size", str(chosen.group_size)),
        ("logits", "" if local else chosen.logits),
        ("from", origin),
        ("digest", chosen.digest),
    ]
    for label, text in lines:
        if text:
            click.echo(f"{label:<16} {text}")
    if parsed.notes:
        click.echo(f"\n{parsed.notes}")
    if chosen.source:
        click.echo(f"\n{chosen.source.rstrip()}")


loss.add_command(new)
loss.add_command(check)


@loss.command()
@click.argument("name")
@click.option("--tenant", help="Owner of the loss; an admin can name another tenant.  [default: yours]")
@with_url
def delete(name: str, tenant: str | None, url: str) -> None:
    """Delete an uploaded loss: all versions of NAME, or the version NAME@DIGEST."""
    body = {"name": name} if tenant is None else {"name": name, "tenant": tenant}
    for id in request(url, "/delete_custom_loss", body)["deleted"]:
        click.echo(f"deleted {id}")


@loss.command()
@click.argument("name")
@click.option("--tenant", help="Owner of the loss.  [default: yours]")
@with_url
def publish(name: str, tenant: str | None, url: str) -> None:
    """Make the uploaded loss NAME or NAME@DIGEST available to all tenants. Undo: `loss delete --tenant public`."""
    body = {"name": name} if tenant is None else {"name": name, "tenant": tenant}
    click.echo(f"published {request(url, '/publish_custom_loss', body)['id']}")


def signature(hyper: Hyperparameter) -> str:
    """A hyperparameter as `beta: float = 0.1 (above 0)`."""
    default = "" if hyper.required else f" = {hyper.default!r}"
    return f"{hyper.name}: {hyper.type}{default}" + (f" ({hyper.allowed})" if hyper.allowed else "")


def find_losses(url: str, local: bool) -> Sequence[LossDescription]:
    """The losses of the server at `url`, or of the plugins installed here."""
    from tinkerbell_core.types import LossDescription

    if local:
        from tinkerbell_core.registry import build_registry

        registry, _ = build_registry()
        return [LossDescription.of(spec) for spec in registry]

    import msgspec

    return msgspec.convert(request(url, "/list_loss_functions")["losses"], list[LossDescription])
