"""Rules on hyperparameters: at its limits each is computed with, or refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tinkerbell_core.errors import BadData, BadHyperparameter, TinkerbellError
from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.testing.case import Case, Failed, Ran, require

_NO_SUCH_WORD = "no-such-word"


def hyperparameters(case: Case, whole: Ran) -> str:
    """Zero, negative, small and large numbers, and the ends of its range, give a finite loss, or BadHyperparameter."""
    wrong = [line for hyper in case.spec.hyperparameters for line in _wrong(case, hyper)]
    require(not wrong, "; ".join(wrong))
    return "" if case.spec.hyperparameters else "has none"


def _wrong(case: Case, hyper: Hyperparameter) -> list[str]:
    told = []
    for value in _limits(hyper):
        tried = replace(case, settings=case.settings | {hyper.name: value})
        try:
            tried.attempt(f"{hyper.name}={value!r}")
        except Failed as failed:
            if not isinstance(failed.__cause__, BadHyperparameter | BadData):
                told.append(
                    f"{_brief(failed)} (say which numbers it may be, @loss(allowed={{{hyper.name!r}: above(0)}}), or "
                    "raise BadHyperparameter naming the limit)"
                )
            continue
        if value == _NO_SUCH_WORD:
            told.append(
                f"{hyper.name}={value!r} is taken without a word: raise BadHyperparameter naming the words there are"
            )
    return told


def _brief(failed: Failed) -> str:
    cause = failed.__cause__
    return f"{str(failed).partition(':')[0]}: {cause.message}" if isinstance(cause, TinkerbellError) else str(failed)


def _limits(hyper: Hyperparameter) -> list[Any]:  # Any: a number, a word or None
    if words := re.findall(r"['\"]([^'\"]*)['\"]", hyper.type):
        return [*words, _NO_SUCH_WORD]
    kinds = {word.strip() for word in hyper.type.split("|")}
    values: list[Any] = [None] if "None" in kinds else []
    if "bool" in kinds:
        values += [True, False]
    if "float" in kinds:
        values += [0.0, 1e-3, 100.0, -1.0]
    if "int" in kinds:
        values += [0, 1, 10_000, -1]
    if "str" in kinds:
        values.append(_NO_SUCH_WORD)
    ends = (hyper.allowed.low, hyper.allowed.high) if hyper.allowed else ()
    return values + [end for end in ends if end is not None and end not in values]
