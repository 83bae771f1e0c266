"""`tinkerbell loss`: what losses a server has, or the plugins installed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from tinkerbell_server.cli.output import print_json, print_table

if TYPE_CHECKING:
    from tinkerbell_core.spec import Hyperparameter
    from tinkerbell_core.types import LossDescription


def where(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say whose losses are meant, and how they are printed."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--local", is_flag=True, help="Load the plugins here; ask no server."),
        click.option(
            "--url", envvar="TINKERBELL_URL", default="http://127.0.0.1:8000", show_default=True, help="Server to ask."
        ),
    ):
        command = option(command)
    return command


@click.group()
def loss() -> None:
    """What losses there are, and what each reads."""


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
    """Show the loss called NAME: a name, an id, or name@digest."""
    from tinkerbell_core.registry import resolve

    found = resolve(name, find_losses(url, local))
    if as_json:
        print_json(found)
        return
    origin = " ".join(filter(None, [found.provenance.kind, found.provenance.distribution, found.provenance.version]))
    lines = [
        ("id", found.id),
        ("summary", found.summary),
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
    if found.source:
        click.echo(f"\n{found.source.rstrip()}")


def signature(hyper: Hyperparameter) -> str:
    """`beta: float = 0.1`."""
    return f"{hyper.name}: {hyper.type}" + ("" if hyper.required else f" = {hyper.default!r}")


def find_losses(url: str, local: bool) -> Sequence[LossDescription]:
    """The losses of the server at `url`, or of the plugins installed here."""
    from tinkerbell_core.types import LossDescription

    if local:
        from tinkerbell_core.registry import build_registry

        registry, _ = build_registry()
        return [LossDescription.of(spec) for spec in registry]

    import msgspec

    return msgspec.convert(ask(url, "/list_loss_functions")["losses"], list[LossDescription])


def ask(url: str, path: str) -> Any:  # Any: the server's JSON
    """GET `path` of the server at `url`. Raises ServerUnreachable."""
    import os

    import httpx

    from tinkerbell_core.errors import ServerUnreachable

    key = os.environ.get("TINKERBELL_API_KEY")
    try:
        answer = httpx.get(url.rstrip("/") + path, timeout=10, headers={"X-API-Key": key} if key else None)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServerUnreachable(
            f"no Tinkerbell server answers at {url} ({error}): start one with `tinkerbell serve`, "
            "name it with --url, or list what is installed here with --local"
        ) from error
