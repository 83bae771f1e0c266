"""Draws the curves of the demo as a PNG. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

from tinker_client.demo.training import Outcome, Point


def draw(outcome: Outcome, path: Path) -> None:
    """Write a PNG with bits per byte and pair accuracy over the steps, side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bits, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bits.plot(range(1, len(outcome.train_bits) + 1), outcome.train_bits, color="0.8", label="training batch")
    bits.plot(*_xy(outcome.bits_per_byte), marker="o", label="held out")
    bits.axhline(math.log2(256), color="0.6", linestyle=":", label="uniform prediction")
    bits.set(title="cross_entropy, from random weights", xlabel="step", ylabel="bits per byte")
    bits.legend()
    accuracy.plot(*_xy(outcome.pair_accuracy), marker="o", color="tab:green", label="held out")
    accuracy.axhline(0.5, color="0.6", linestyle=":", label="random choice")
    accuracy.set(title="the uploaded loss", xlabel="step", ylabel="pair accuracy")
    accuracy.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _xy(points: list[Point]) -> tuple[list[int], list[float]]:
    return [point.step for point in points], [point.value for point in points]
