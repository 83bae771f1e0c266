"""Makes the parameters of `tinkerbell serve` from the declared settings, and reads variables and tinkerbell.toml.

click resolves the sources: a flag takes precedence over TINKERBELL_<NAME>, that over tinkerbell.toml, and that over
the default.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from msgspec import inspect

from tinkerbell_server.config import VARIABLE_PREFIX, Setting, declared

FILE = "tinkerbell.toml"

CLIENT_VARIABLES = ("TINKERBELL_API_KEY", "TINKERBELL_TEST_DEVICE", "TINKERBELL_URL")
"""Variables with the prefix of the settings that only the client and the tests read."""


class SettingsCommand(click.Command):
    """A command with one parameter for each setting. A variable or a key that is no setting is an error."""

    # Any: click's own attributes of a command
    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params = [*map(parameter, declared().values()), *self.params]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not {"-h", "--help"} & set(args):
            check_environment()
            ctx.default_map = read_file()
        return super().parse_args(ctx, args)


class _Argument(click.Argument):
    def get_error_hint(self, ctx: click.Context | None) -> str:
        return _source(self, ctx) or super().get_error_hint(ctx)


class _Option(click.Option):
    def get_error_hint(self, ctx: click.Context | None) -> str:
        return _source(self, ctx) or super().get_error_hint(ctx)


def parameter(setting: Setting) -> click.Parameter:
    """The argument or option of one setting."""
    kind = _click_type(setting)
    if "argument" in setting.extra:
        return _Argument([setting.name], required=False, envvar=setting.variable, type=kind, metavar=setting.flag)
    switch = isinstance(setting.type, inspect.BoolType)
    # a switch that is on needs a flag that turns it off
    flag = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}" if switch and setting.default else setting.flag
    return _Option(
        [flag, setting.name],
        envvar=setting.variable,
        type=None if switch else kind,
        is_flag=switch or None,
        multiple=isinstance(setting.type, inspect.VarTupleType),
        default=setting.default,
        show_default=setting.extra.get("default", True),
        metavar=setting.extra.get("metavar"),
        help=setting.description,
    )


def _click_type(setting: Setting) -> click.ParamType[Any]:
    match setting.type:
        case inspect.LiteralType():
            return click.Choice(setting.choices)
        case inspect.IntType(gt=None, ge=low, le=high):
            return click.IntRange(low, high)
        case inspect.FloatType(gt=above, ge=low, le=high):
            return click.FloatRange(low if above is None else above, high, min_open=above is not None)
        case _:
            return click.STRING


def _source(param: click.Parameter, ctx: click.Context | None) -> str | None:
    """The variable or the key that a value came from; None for the command line."""
    match ctx and param.name and ctx.get_parameter_source(param.name):
        case ParameterSource.ENVIRONMENT:
            return str(param.envvar)
        case ParameterSource.DEFAULT_MAP:
            return f"{param.name!r} in {FILE}"
        case _:
            return None


def read_file(path: Path = Path(FILE)) -> dict[str, Any]:  # Any: one type for each setting
    """The settings in a file, by name; empty if the file does not exist.

    Raises click.UsageError if the file is not TOML, has an unknown key or a value that is not allowed.
    """
    from tinkerbell_core.errors import BadRequest, did_you_mean

    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{path} is not TOML: {error}") from error
    settings = declared()
    for key, value in values.items():
        if key not in settings:
            known = ", ".join(sorted(settings))
            raise click.UsageError(f"{path} has no setting {key!r}{did_you_mean(key, settings)} (it has: {known})")
        try:
            settings[key].check(value, strict=False)
        except BadRequest as error:
            raise click.UsageError(f"{path}: {error.message}") from error
    return values


def check_environment() -> None:
    """Raise click.UsageError for a TINKERBELL_ variable that is no setting: it is probably misspelt."""
    from tinkerbell_core.errors import did_you_mean

    variables = [*(setting.variable for setting in declared().values()), *CLIENT_VARIABLES]
    for name in os.environ:
        if name.startswith(VARIABLE_PREFIX) and name not in variables:
            raise click.UsageError(f"no setting {name} in the environment{did_you_mean(name, variables)}")


def settings_table() -> str:
    """A Markdown table of all settings: key, option, variable, default and meaning."""
    return "\n".join(
        [
            "| key | option | variable | default | meaning |",
            "|---|---|---|---|---|",
            *map(_table_row, declared().values()),
        ]
    )


def _table_row(setting: Setting) -> str:
    param = parameter(setting)
    options = " / ".join([*param.opts, *param.secondary_opts]) if isinstance(param, click.Option) else setting.flag
    choices = f" {'|'.join(setting.choices)}" if setting.choices else ""
    default = setting.default_text if "default" in setting.extra else f"`{setting.default_text}`"
    bounds = f" Must be {setting.allowed}." if isinstance(setting.type, inspect.IntType | inspect.FloatType) else ""
    cells = [
        f"`{setting.name}`",
        f"`{options}{choices}`",
        f"`{setting.variable}`",
        default,
        setting.description + bounds,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
