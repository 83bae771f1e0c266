"""The command `tinkerbell`. Each subcommand is a module that is imported when it is asked for, so `--help` is quick."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click

COMMANDS = {
    "serve": "Serve a model: a hub id, a local folder, or the embedded tiny one.",
    "demo": "Train a tiny model from nothing, then with a loss of your own.",
    "loss": "Losses: `list`, `show NAME`; of your own: `new NAME`, `test PATH_OR_NAME`; uploads: `delete`, `publish`.",
    "key": "Who may use a server: `key create NAME`, `key list`, `key revoke ID`.",
    "plugin": "What is installed, and what is broken: `plugin list`.",
    "doctor": "Look for what would stop a server on this machine.",
    "version": "Print the version.",
}


class Subcommands(click.Group):
    """The modules beside this one, named and summed up without importing them."""

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
        except _raised_on_purpose() as error:
            raise click.ClickException(str(error)) from error


def _raised_on_purpose() -> type[Exception]:
    """TinkerbellError; asked for only once something was raised, so that `--help` does without it."""
    from tinkerbell_core.errors import TinkerbellError

    return TinkerbellError


@click.group(cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
def tinkerbell() -> None:
    """Write a loss function; train a language model with it, on your own machine, over HTTP."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` without the program's name, default those of this process."""
    tinkerbell.main(args, prog_name="tinkerbell")


__all__ = ["main"]
