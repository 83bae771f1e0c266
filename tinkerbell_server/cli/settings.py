"""Where a setting of `serve` comes from: a flag, over TINKERBELL_<NAME>, over tinkerbell.toml, over the default."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

FILE = "tinkerbell.toml"
PREFIX = "TINKERBELL_"

ELSEWHERE = ("TINKERBELL_API_KEY", "TINKERBELL_TEST_DEVICE", "TINKERBELL_URL")
"""Variables that the client and the tests read, and `serve` does not."""


# Any: click's decorators take and give whatever is being decorated
def setting(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """A click option, read from the environment as well."""
    name = next((name for name in names if not name.startswith("-")), names[0].lstrip("-").replace("-", "_"))
    return click.option(*names, envvar=variable(name), show_default=True, **attributes)


def variable(name: str) -> str:
    return PREFIX + name.upper()


class SettingsCommand(click.Command):
    """A command whose parameters are settings; one it does not know is an error that names the nearest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not {"-h", "--help"} & set(args):
            known = [param.name for param in self.params if param.name]
            check_environment(known)
            ctx.default_map = read_file(Path(FILE), known)
        return super().parse_args(ctx, args)


def read_file(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The settings in `path`, by name; none where there is no such file."""
    from tinkerbell_core.errors import did_you_mean

    try:
        settings = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{path} is not TOML: {error}") from error
    for key in settings:
        if key not in known:
            raise click.UsageError(
                f"{path} has no setting {key!r}{did_you_mean(key, known)} (it has: {', '.join(sorted(known))})"
            )
    return settings


def check_environment(known: Collection[str]) -> None:
    """Refuse a TINKERBELL_ variable that nobody reads: it is a setting misspelt."""
    from tinkerbell_core.errors import did_you_mean

    variables = [*map(variable, known), *ELSEWHERE]
    for name in os.environ:
        if name.startswith(PREFIX) and name not in variables:
            raise click.UsageError(f"no setting {name} in the environment{did_you_mean(name, variables)}")
