"""`python -m tinker_client.demo --url URL`: runs the demo on a server. `tinkerbell demo` starts that server."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec

from tinker_client.client import TinkerClient
from tinker_client.demo.plot import draw
from tinker_client.demo.reporter import Reporter, reporter_for_stdout
from tinker_client.demo.training import Outcome, train
from tinkerbell_core.errors import TinkerbellError


def main() -> None:
    parser = argparse.ArgumentParser(prog="tinkerbell demo", description=__doc__)
    parser.add_argument("--url", required=True, help="a server on this machine that serves the embedded model")
    parser.add_argument("--out", type=Path, default=Path("tinkerbell-demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        run(args.url, args.out, args.seed, as_json=args.json)
    except TinkerbellError as error:
        raise SystemExit(f"Error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run(url: str, out: Path, seed: int, *, as_json: bool) -> None:
    """Train, draw the curves into `out` and print the results."""
    reporter = reporter_for_stdout(quiet=as_json)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with TinkerClient(url) as client:
        outcome = train(client, out, seed, reporter)
    plot = out / "curves.png"
    draw(outcome, plot)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        sys.stdout.buffer.write(
            msgspec.json.encode({**msgspec.to_builtins(outcome), "picture": str(plot), "seconds": seconds}) + b"\n"
        )
    else:
        _summarise(outcome, plot, seconds, reporter)


def _summarise(outcome: Outcome, plot: Path, seconds: float, reporter: Reporter) -> None:
    bits, accuracy = outcome.bits_per_byte, outcome.pair_accuracy
    for line in (
        f"\nbefore: {outcome.sample_before!r}",
        f"after:  {outcome.sample_after!r}",
        f"\nheld-out bits per byte   {bits[0].value:.2f} → {bits[-1].value:.2f} with cross_entropy"
        f" ({outcome.bits_per_byte_at_the_end:.2f} after the preference training)",
        f"held-out pair accuracy   {accuracy[0].value:.3f} → {accuracy[-1].value:.3f} with the uploaded loss",
        f"model saved in {outcome.saved}, curves in {plot}; {seconds:.0f} s",
    ):
        reporter.print(line)


if __name__ == "__main__":
    main()
