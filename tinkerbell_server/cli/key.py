"""`tinkerbell key`: creates, lists and revokes API keys in a data dir, whether or not a server runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.output import print_json, print_table
from tinkerbell_server.cli.settings import read_file
from tinkerbell_server.config import Settings, declared

if TYPE_CHECKING:
    from tinkerbell_server.access.keys import Key, Keys


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all key commands have."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--data-dir",
            envvar=declared()["data_dir"].variable,
            default=lambda: read_file().get("data_dir"),
            metavar="DIRECTORY",
            help="Data dir of the server.  [default: as for `serve`]",
        ),
    ):
        command = option(command)
    return command


@click.group()
def key() -> None:
    """API keys: create, list and revoke them.

    Keys are stored in the data dir of the server. No server has to run; a running server sees a change at the next
    request.
    """


@key.command()
@click.argument("name")
@click.option("--tenant", help="Tenant of the key, which owns models and losses.  [default: NAME]")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "train", "upload", "admin"]),
    multiple=True,
    default=("train", "upload"),
    show_default=True,
    help="What the key permits; repeatable. Each scope includes read, and admin includes all.",
)
@click.option("--days", type=float, help="Days until the key expires.  [default: never]")
@common_options
def create(
    name: str, tenant: str | None, scopes: tuple[str, ...], days: float | None, data_dir: str | None, as_json: bool
) -> None:
    """Create a key with this NAME and print it once: the server stores only its hash.

    Keys of one tenant share models, checkpoints and uploaded losses; no other tenant sees them. Data that was created
    before there were keys belongs to the tenant `local`.
    """
    with open_keys(data_dir) as keys:
        first = not keys.exist()
        created, text = keys.create(name, tenant=name if tenant is None else tenant, scopes=scopes, days=days)
        write_audit(data_dir, created, "create_key")
    if as_json:
        print_json({**as_dict(created), "key": text})
        return
    click.echo(text)
    click.echo(
        f"\nkey {created.id} of tenant {created.tenant}: {', '.join(created.scopes)}, {end_of(created)}", err=True
    )
    click.echo("Set it as TINKERBELL_API_KEY or pass TinkerClient(url, api_key=...). It is not shown again.", err=True)
    if first:
        click.echo("This is the first key: from now on the server requires a key for each request.", err=True)


@key.command("list")
@common_options
def list_(data_dir: str | None, as_json: bool) -> None:
    """List all keys, including expired and revoked ones."""
    with open_keys(data_dir) as keys:
        found = keys.list()
    if as_json:
        print_json([as_dict(each) for each in found])
        return
    rows = [
        (each.id, each.name, each.tenant, " ".join(each.scopes), utc(each.created), each.state(), end_of(each))
        for each in found
    ]
    print_table(["ID", "NAME", "TENANT", "SCOPES", "CREATED", "STATE", "ENDS"], rows)


@key.command()
@click.argument("id")
@common_options
def revoke(id: str, data_dir: str | None, as_json: bool) -> None:
    """Revoke the key with this ID, from the next request on."""
    with open_keys(data_dir) as keys:
        revoked = keys.revoke(id)
        write_audit(data_dir, revoked, "revoke_key")
    if as_json:
        print_json(as_dict(revoked))
    else:
        click.echo(f"key {revoked.id} ({revoked.name}, tenant {revoked.tenant}) is revoked")


@contextmanager
def open_keys(data_dir: str | None) -> Iterator[Keys]:
    """The keys of a data dir; None: the default data dir."""
    from tinkerbell_server.access.keys import Keys

    keys = Keys(data_path(data_dir))
    try:
        yield keys
    finally:
        keys.close()


def data_path(data_dir: str | None) -> Path:
    return Settings(data_dir=data_dir).data_path


def write_audit(data_dir: str | None, key: Key, action: str) -> None:
    """Record a change of a key in the audit log."""
    from tinkerbell_server.access.audit import Audit
    from tinkerbell_server.access.tenants import Caller

    Audit(data_path(data_dir)).write(Caller(key.tenant, key.id), action, "done", name=key.name)


def as_dict(key: Key) -> dict[str, object]:
    import msgspec

    return {**msgspec.structs.asdict(key), "state": key.state()}


def utc(seconds: float) -> str:
    """A time in seconds since 1970, as date and time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def end_of(key: Key) -> str:
    """When the key ends, in words."""
    if key.revoked is not None:
        return f"revoked {utc(key.revoked)}"
    return "never expires" if key.expires is None else f"expires {utc(key.expires)} UTC"
