"""The command `tinkerbell`: one module for each subcommand, imported when it runs. May import every other package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click

COMMANDS = {
    "serve": "Serve a model: a hub id, a local folder, or the embedded tiny one.",
    "demo": "Train a tiny random model with a built-in loss, then with an uploaded one.",
    "loss": "Losses: `list`, `show NAME`; packages: `new NAME`, `test PATH_OR_NAME`; uploads: `delete`, `publish`.",
    "key": "API keys: `create NAME`, `list`, `revoke ID`.",
    "plugin": "Installed plugins and their errors: `list`.",
    "doctor": "Check whether a server can start on this machine.",
    "version": "Print the version.",
}


class Subcommands(click.Group):
    """The subcommands. It lists them without importing their modules, so that `--help` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tinkerbell_server.cli.{cmd_name}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except _expected_errors() as error:
            raise click.ClickException(str(error)) from error


def _expected_errors() -> type[Exception]:
    """TinkerbellError, imported only after an exception was raised, so that `--help` is fast."""
    from tinkerbell_core.errors import TinkerbellError

    return TinkerbellError


@click.group(cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
def tinkerbell() -> None:
    """Write a loss function; train a language model with it, on your own machine, over HTTP."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. args: without the name of the program; by default those of this process."""
    tinkerbell.main(args, prog_name="tinkerbell")


__all__ = ["main"]
