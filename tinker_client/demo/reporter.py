"""Shows the progress of the demo: bars on a terminal, lines in a pipe, nothing if the output is JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """The progress of one stage."""

    def advance(self) -> None:
        """Count one step."""
        ...

    def measured(self, value: float) -> None:
        """Show a measurement."""
        ...


class Reporter:
    """Prints lines, or nothing if `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def print(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)

    @contextmanager
    def stage(self, title: str, steps: int, label: str) -> Iterator[Progress]:
        """A stage of training, whose measurements are shown after `label`."""
        self.print(f"\n{title}: {steps} steps")
        yield _Lines(self, steps, label)


class _Lines:
    def __init__(self, reporter: Reporter, steps: int, label: str) -> None:
        self._reporter, self._steps, self._label = reporter, steps, label
        self._step = 0

    def advance(self) -> None:
        self._step += 1

    def measured(self, value: float) -> None:
        # except for the first, a measurement is shown before its step is counted
        self._reporter.print(f"  step {self._step + (self._step > 0):>4}/{self._steps}  {self._label} {value:.3f}")


class BarReporter(Reporter):
    """Shows a rich progress bar for each stage, with its first and last measurement."""

    @contextmanager
    def stage(self, title: str, steps: int, label: str) -> Iterator[Progress]:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
        )
        self.print(f"\n{title}")
        with progress.Progress(*columns) as bars:
            yield _Bar(bars, bars.add_task("", total=steps, note=""), label)


class _Bar:
    # object and int: the types of rich are not imported before they are needed
    def __init__(self, bars: object, task: int, label: str) -> None:
        from rich.progress import Progress as Bars
        from rich.progress import TaskID

        assert isinstance(bars, Bars)
        self._bars, self._task, self._label = bars, TaskID(task), label
        self._first: float | None = None

    def advance(self) -> None:
        self._bars.advance(self._task)

    def measured(self, value: float) -> None:
        self._first = value if self._first is None else self._first
        self._bars.update(self._task, note=f"{self._label} {self._first:.3f} → {value:.3f}")


def reporter_for_stdout(*, quiet: bool) -> Reporter:
    """Bars if stdout is a terminal, otherwise lines."""
    return BarReporter() if sys.stdout.isatty() and not quiet else Reporter(quiet=quiet)
