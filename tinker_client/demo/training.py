"""Trains the model of the demo in two stages, and measures it before, during and after."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from tinker_client.backend import HFBackend
from tinker_client.client import TinkerClient
from tinker_client.demo import preference
from tinker_client.demo.corpus import Corpus, Pair, pairs, read_corpus, rows
from tinker_client.demo.reporter import Reporter
from tinker_client.results import ForwardBackwardResult

MODEL = "demo"
PROMPT = "def __init__(self, "
IN_FLIGHT = 4
"""Steps submitted ahead of the step whose result is awaited, so that the server is always busy."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of training.

    The learning rate rises over `warmup` steps, and falls to a tenth of `learning_rate` at the end.
    """

    title: str
    loss_fn: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    measure_every: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (1 - 0.9 * step / self.steps)


LEARN = Stage(
    title="learning Python source from random weights",
    loss_fn="cross_entropy",
    steps=300,
    batch=8,
    learning_rate=3e-3,
    warmup=20,
    measure_every=50,
)
PREFER = Stage(
    title=f"training with the uploaded loss {preference.NAME!r}",
    loss_fn=preference.NAME,
    steps=120,
    batch=16,
    learning_rate=5e-4,
    warmup=10,
    measure_every=30,
)


class Point(msgspec.Struct, frozen=True):
    """A measurement on held-out text after a number of steps."""

    step: int
    value: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The results of the demo. bits_per_byte and pair_accuracy are measured on files that are not trained on."""

    bits_per_byte: list[Point]
    pair_accuracy: list[Point]
    train_bits: list[float]
    bits_per_byte_at_the_end: float
    sample_before: str
    sample_after: str
    saved: str


def train(client: TinkerClient, out: Path, seed: int, reporter: Reporter) -> Outcome:
    """Train in both stages, sample before and after, and save the model to `out`."""
    backend = client.hf_backend
    corpus = read_corpus(seed)
    model = backend.create_model(MODEL, full=True)
    reporter.print(f"{len(corpus.train)} files of the standard library to train on, {len(corpus.held_out)} held out")
    reporter.print(f"a model of {model.trainable_parameters / 1e6:.2f} million random parameters")

    before = _sample(backend)
    bits, train_bits = _learn(backend, corpus, Random(seed), reporter)
    preference.upload(client)
    reporter.print(f"uploaded the loss {preference.NAME!r}")
    accuracy = _prefer(backend, corpus, Random(seed + 1), reporter)

    return Outcome(
        bits_per_byte=bits,
        pair_accuracy=accuracy,
        train_bits=train_bits,
        bits_per_byte_at_the_end=_bits(backend.forward(MODEL, _held_out_rows(corpus))),
        sample_before=before,
        sample_after=_sample(backend),
        saved=_save(backend, out),
    )


def _learn(backend: HFBackend, corpus: Corpus, rng: Random, reporter: Reporter) -> tuple[list[Point], list[float]]:
    held_out = _held_out_rows(corpus)

    def measure(step: int) -> Point:
        return Point(step, _bits(backend.forward(MODEL, held_out)))

    data = (rows(corpus.train, LEARN.batch, rng) for _ in range(LEARN.steps))
    points, results = _train(backend, LEARN, data, measure, "held-out bits per byte", reporter)
    return points, [_bits(result) for result in results]


def _prefer(backend: HFBackend, corpus: Corpus, rng: Random, reporter: Reporter) -> list[Point]:
    held_out = pairs(corpus.held_out, 512, Random(1))

    def measure(step: int) -> Point:
        return Point(step, backend.forward(MODEL, held_out, loss_fn=preference.NAME).diagnostics["accuracy"])

    data = (pairs(corpus.train, PREFER.batch, rng) for _ in range(PREFER.steps))
    points, _ = _train(backend, PREFER, data, measure, "held-out pair accuracy", reporter)
    return points


def _train(
    backend: HFBackend,
    stage: Stage,
    data: Iterable[list[str] | list[Pair]],
    measure: Callable[[int], Point],
    label: str,
    reporter: Reporter,
) -> tuple[list[Point], list[ForwardBackwardResult]]:
    """The measurements and the result of each step."""
    points, results = [measure(0)], []
    waiting: deque[Any] = deque()  # Any: `submit` returns futures of several result types
    with reporter.stage(stage.title, stage.steps, label) as progress:
        progress.measured(points[0].value)
        for step, batch in enumerate(data, start=1):
            waiting.append(backend.submit("forward_backward", model_id=MODEL, data=batch, loss_fn=stage.loss_fn))
            backend.submit(
                "optim_step",
                model_id=MODEL,
                learning_rate=stage.rate(step - 1),
                grad_clip_norm=1.0,
                normalize="tokens",
            )
            if len(waiting) > IN_FLIGHT or step == stage.steps:
                results.append(waiting.popleft().result())
            if step % stage.measure_every == 0 or step == stage.steps:
                points.append(measure(step))
                progress.measured(points[-1].value)
            progress.advance()
    results += [future.result() for future in waiting]
    return points, results


def _held_out_rows(corpus: Corpus) -> list[str]:
    return rows(corpus.held_out, 128, Random(0))


def _bits(result: ForwardBackwardResult) -> float:
    """The loss in bits per byte: the tokens of the embedded model are bytes."""
    return result.loss / (result.counted_tokens * math.log(2))


def _sample(backend: HFBackend) -> str:
    # with this seed the untrained model does not sample the end of text first
    sampled = backend.sample(PROMPT, model_id=MODEL, max_tokens=120, temperature=0.7, seed=3)
    return PROMPT + sampled.sequences[0].text


def _save(backend: HFBackend, out: Path) -> str:
    """Save on the server and copy the checkpoint to `out`, because the data of the server is deleted with it."""
    saved = out / "model"
    shutil.rmtree(saved, ignore_errors=True)
    shutil.copytree(backend.save(MODEL, name="demo").path, saved)
    return str(saved)
