"""`tinkerbell loss`: what losses a server has, or the plugins installed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.client import ask, with_url
from tinkerbell_server.cli.loss_new import new
from tinkerbell_server.cli.loss_test import check
from tinkerbell_server.cli.output import print_json, print_table

if TYPE_CHECKING:
    from tinkerbell_core.hyperparameters import Hyperparameter
    from tinkerbell_core.types import LossDescription


def where(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say whose losses are meant, and how they are printed."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--local", is_flag=True, help="Load the plugins here; ask no server."),
        with_url,
    ):
        command = option(command)
    return command


@click.group()
def loss() -> None:
    """What losses there are, what each reads, and which uploaded ones stay."""


@loss.command("list")
@where
def list_(url: str, local: bool, as_json: bool) -> None:
    """List losses: name, id, whether its logits are lazy or stored (a server has tried it), and what it is for."""
    losses = find_losses(url, local)
    if as_json:
        print_json(losses)
    else:
        known = [(each.name, each.id, "-" if local else each.logits.partition(":")[0], each.summary) for each in losses]
        print_table(["NAME", "ID", "LOGITS", "SUMMARY"], known)


@loss.command()
@click.argument("name")
@where
def show(name: str, url: str, local: bool, as_json: bool) -> None:
    """Show the loss called NAME (a name, an id, or name@digest): formula, inputs, hyperparameters, paper, source."""
    from tinkerbell_core.loss_docstring import parse_docstring
    from tinkerbell_core.registry import resolve

    found = resolve(name, find_losses(url, local))
    if as_json:
        print_json(found)
        return
    origin = " ".join(filter(None, [found.provenance.kind, found.provenance.distribution, found.provenance.version]))
    said = parse_docstring(found.summary, found.source)
    lines = [
        ("id", found.id),
        ("formula", said.formula),
        ("called", said.called),
        *(("paper", link) for link in said.links),
        ("inputs", ", ".join(found.inputs) or "not declared: discovered when a server loads it"),
        ("optional inputs", ", ".join(found.optional_inputs)),
        *(("hyperparameter", signature(hyper)) for hyper in found.hyperparameters),
        ("coupling", found.coupling),
        ("group size", str(found.group_size)),
        ("logits", "" if local else found.logits),
        ("from", origin),
        ("digest", found.digest),
    ]
    for label, text in lines:
        if text:
            click.echo(f"{label:<16} {text}")
    if said.notes:
        click.echo(f"\n{said.notes}")
    if found.source:
        click.echo(f"\n{found.source.rstrip()}")


loss.add_command(new)
loss.add_command(check)


@loss.command()
@click.argument("name")
@click.option("--tenant", help="Whose it is; yours by default, another's for an admin.")
@with_url
def delete(name: str, tenant: str | None, url: str) -> None:
    """Delete an uploaded loss: every version of NAME, or the one of NAME@DIGEST."""
    body = {"name": name} if tenant is None else {"name": name, "tenant": tenant}
    for id in ask(url, "/delete_custom_loss", body)["deleted"]:
        click.echo(f"deleted {id}")


@loss.command()
@click.argument("name")
@click.option("--tenant", help="Whose it is; yours by default.")
@with_url
def publish(name: str, tenant: str | None, url: str) -> None:
    """Give every tenant the uploaded loss NAME, or NAME@DIGEST. `loss delete --tenant public` takes it back."""
    body = {"name": name} if tenant is None else {"name": name, "tenant": tenant}
    click.echo(f"published {ask(url, '/publish_custom_loss', body)['id']}")


def signature(hyper: Hyperparameter) -> str:
    """`beta: float = 0.1 (above 0)`."""
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

    return msgspec.convert(ask(url, "/list_loss_functions")["losses"], list[LossDescription])
