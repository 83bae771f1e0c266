"""`python -m tinker_client.demo`, which is what `tinkerbell demo` runs."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec

from tinker_client.demo.picture import draw
from tinker_client.demo.reporter import Reporter, reporter_for_stdout
from tinker_client.demo.server import running_server
from tinker_client.demo.story import Outcome, tell
from tinkerbell_core.errors import TinkerbellError


def main() -> None:
    options = argparse.ArgumentParser(prog="tinkerbell demo", description=__doc__)
    options.add_argument("--out", type=Path, default=Path("tinkerbell-demo"))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(args.out, args.seed, as_json=args.json)
    except TinkerbellError as error:
        raise SystemExit(f"Error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run(out: Path, seed: int, *, as_json: bool) -> None:
    """The demo from start to end, with its picture and its last words."""
    reporter = reporter_for_stdout(quiet=as_json)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    reporter.say("starting a server on the embedded model")
    with running_server() as client:
        outcome = tell(client, out, seed, reporter)
    picture = out / "curves.png"
    draw(outcome, picture)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        sys.stdout.buffer.write(
            msgspec.json.encode({**msgspec.to_builtins(outcome), "picture": str(picture), "seconds": seconds}) + b"\n"
        )
    else:
        _sum_up(outcome, picture, seconds, reporter)


def _sum_up(outcome: Outcome, picture: Path, seconds: float, reporter: Reporter) -> None:
    bits, accuracy = outcome.bits_per_byte, outcome.pair_accuracy
    for line in (
        f"\nbefore: {outcome.sample_before!r}",
        f"after:  {outcome.sample_after!r}",
        f"\nheld-out bits per byte   {bits[0].value:.2f} → {bits[-1].value:.2f} with cross_entropy"
        f" ({outcome.bits_per_byte_at_the_end:.2f} after the preference training)",
        f"held-out pair accuracy   {accuracy[0].value:.3f} → {accuracy[-1].value:.3f} with a loss of our own",
        f"model saved in {outcome.saved}, curves in {picture}; {seconds:.0f} s",
    ):
        reporter.say(line)


def _stop(signum: int, frame: FrameType | None) -> None:
    """A terminated demo stops its server too, as any other way out does."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    main()
