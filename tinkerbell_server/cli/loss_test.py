"""`tinkerbell loss test`: runs the conformance kit on a loss, or on all losses of a package or a file."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from tinkerbell_server.cli.output import print_json

if TYPE_CHECKING:
    from tinkerbell_core.testing import CheckResult


@click.command("test")
@click.argument("target", metavar="PATH_OR_NAME")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(target: str, as_json: bool) -> None:
    """Run the conformance kit on the installed loss NAME, on the package or file at PATH, or on mod:fn.

    The exit status is 1 if a check fails. Code at PATH runs with your rights.
    """
    from tinkerbell_core.testing import run_checks
    from tinkerbell_server.calls.local_losses import find_specs
    from tinkerbell_server.sandbox.conformance import ConformanceSandbox

    with contextlib.closing(ConformanceSandbox()) as sandbox:
        results = {spec.name: run_checks(spec, sandboxed=sandbox) for spec in find_specs(target)}
    failed = sum(not each.ok for checks in results.values() for each in checks)
    if as_json:
        print_json([{"loss": name, "checks": [_plain(each) for each in checks]} for name, checks in results.items()])
    else:
        for name, checks in results.items():
            click.echo(name)
            for each in checks:
                click.echo(line(each))
        ran = [each for checks in results.values() for each in checks if each.ran]
        skipped = sum(map(len, results.values())) - len(ran)
        click.echo(
            f"\n{len(ran) - failed} of {len(ran)} checks hold"
            + (f", {failed} fail" if failed else "")
            + (f", {skipped} not run" if skipped else "")
        )
    if failed:
        raise SystemExit(1)


def line(result: CheckResult) -> str:
    """One check as a line of text."""
    message = result.message.replace("\n", "\n       ")
    if not result.ran:
        return f"  -    {result.name}: not run: {message}"
    return f"  {'ok  ' if result.ok else 'FAIL'} {result.name}" + (f": {message}" if message else "")


def _plain(result: CheckResult) -> dict[str, str | bool]:
    return {"name": result.name, "ok": result.ok, "ran": result.ran, "message": result.message}
