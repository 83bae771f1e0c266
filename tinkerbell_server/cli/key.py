"""`tinkerbell key`: makes, lists and revokes API keys, in the data dir itself, whether or not a server runs on it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.output import print_json, print_table
from tinkerbell_server.cli.serve import default_data_dir
from tinkerbell_server.cli.settings import FILE, variable

if TYPE_CHECKING:
    from tinkerbell_server.access.keys import Key, Keys


def where(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which server's keys are meant, and how they are printed."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--data-dir",
            envvar=variable("data_dir"),
            default=lambda: configured_data_dir(),
            help="The server's data dir.  [default: the one `serve` takes]",
        ),
    ):
        command = option(command)
    return command


@click.group()
def key() -> None:
    """API keys: who may use a server, and for what.

    Keys are kept in the server's data dir. No server need be running, and one that does sees a change at once.
    """


@key.command()
@click.argument("name")
@click.option("--tenant", help="Whose models and losses it works on.  [default: NAME]")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "train", "upload", "admin"]),
    multiple=True,
    default=("train", "upload"),
    show_default=True,
    help="What it may do; repeatable. Each includes read, and admin all.",
)
@click.option("--days", type=float, help="Days until it expires.  [default: never]")
@where
def create(
    name: str, tenant: str | None, scopes: tuple[str, ...], days: float | None, data_dir: str, as_json: bool
) -> None:
    """Make a key called NAME and print it, this once: the server keeps only its hash.

    Keys of one tenant share models, saves and uploaded losses; no other tenant sees them. What was made before there
    were keys belongs to the tenant `local`.
    """
    with opened(data_dir) as keys:
        first = not keys.exist()
        made, text = keys.create(name, tenant=name if tenant is None else tenant, scopes=scopes, days=days)
        told(data_dir, made, "create_key")
    if as_json:
        print_json({**described(made), "key": text})
        return
    click.echo(text)
    click.echo(f"\nkey {made.id} of tenant {made.tenant}: {', '.join(made.scopes)}, {ends(made)}", err=True)
    click.echo("use it as TINKERBELL_API_KEY, or TinkerClient(url, api_key=...); it is not shown again", err=True)
    if first:
        click.echo("this is the first key: from now on the server asks everybody for one", err=True)


@key.command("list")
@where
def list_(data_dir: str, as_json: bool) -> None:
    """List keys, those that have ended too."""
    with opened(data_dir) as keys:
        known = keys.list()
    if as_json:
        print_json([described(each) for each in known])
        return
    rows = [
        (each.id, each.name, each.tenant, " ".join(each.scopes), when(each.created), each.state(), ends(each))
        for each in known
    ]
    print_table(["ID", "NAME", "TENANT", "SCOPES", "CREATED", "STATE", "ENDS"], rows)


@key.command()
@click.argument("id")
@where
def revoke(id: str, data_dir: str, as_json: bool) -> None:
    """End the key with this ID, from the next request on."""
    with opened(data_dir) as keys:
        ended = keys.revoke(id)
        told(data_dir, ended, "revoke_key")
    if as_json:
        print_json(described(ended))
    else:
        click.echo(f"key {ended.id} ({ended.name}, tenant {ended.tenant}) is revoked")


@contextmanager
def opened(data_dir: str) -> Iterator[Keys]:
    from tinkerbell_server.access.keys import Keys

    keys = Keys(Path(data_dir).expanduser().resolve())
    try:
        yield keys
    finally:
        keys.close()


def told(data_dir: str, key: Key, action: str) -> None:
    """The audit log's line on a change made here."""
    from tinkerbell_server.access.audit import Audit
    from tinkerbell_server.access.tenants import Caller

    audit = Audit(Path(data_dir).expanduser().resolve())
    audit.write(Caller(key.tenant, key.id), action, "done", name=key.name)


def described(key: Key) -> dict[str, object]:
    import msgspec

    return {**msgspec.structs.asdict(key), "state": key.state()}


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def ends(key: Key) -> str:
    if key.revoked is not None:
        return f"revoked {when(key.revoked)}"
    return "never expires" if key.expires is None else f"expires {when(key.expires)} UTC"


def configured_data_dir() -> str:
    """The data dir `serve` takes when it is started here: tinkerbell.toml's, or the default."""
    try:
        configured = tomllib.loads(Path(FILE).read_text()).get("data_dir")
    except FileNotFoundError:
        configured = None
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{FILE} is not TOML: {error}") from error
    return str(configured or default_data_dir())
