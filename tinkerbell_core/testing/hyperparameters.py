"""The check of hyperparameters: each extreme value gives a finite loss or an error that names it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tinkerbell_core.errors import BadData, BadHyperparameter, TinkerbellError
from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.testing.case import Case, Failed, Outcome, require

_UNKNOWN_WORD = "no-such-word"


def hyperparameters(case: Case, whole: Outcome) -> str:
    """Zero, negative, small and large numbers and the ends of the range give a finite loss or BadHyperparameter."""
    problems = [problem for hyper in case.spec.hyperparameters for problem in _problems(case, hyper)]
    require(not problems, "; ".join(problems))
    return "" if case.spec.hyperparameters else "has no hyperparameters"


def _problems(case: Case, hyper: Hyperparameter) -> list[str]:
    problems = []
    for value in _extremes(hyper):
        tried = replace(case, settings=case.settings | {hyper.name: value})
        try:
            tried.attempt(f"{hyper.name}={value!r}")
        except Failed as failed:
            if not isinstance(failed.__cause__, BadHyperparameter | BadData):
                problems.append(
                    f"{_brief(failed)} (declare its range, for example @loss(allowed={{{hyper.name!r}: above(0)}}), or "
                    "raise BadHyperparameter that names the limit)"
                )
            continue
        if value == _UNKNOWN_WORD:
            problems.append(f"{hyper.name}={value!r} is accepted: raise BadHyperparameter that lists the valid words")
    return problems


def _brief(failed: Failed) -> str:
    cause = failed.__cause__
    return f"{str(failed).partition(':')[0]}: {cause.message}" if isinstance(cause, TinkerbellError) else str(failed)


def _extremes(hyper: Hyperparameter) -> list[Any]:  # Any: a number, a word or None
    if words := re.findall(r"['\"]([^'\"]*)['\"]", hyper.type):
        return [*words, _UNKNOWN_WORD]
    kinds = {word.strip() for word in hyper.type.split("|")}
    values: list[Any] = [None] if "None" in kinds else []
    if "bool" in kinds:
        values += [True, False]
    if "float" in kinds:
        values += [0.0, 1e-3, 100.0, -1.0]
    if "int" in kinds:
        values += [0, 1, 10_000, -1]
    if "str" in kinds:
        values.append(_UNKNOWN_WORD)
    ends = (hyper.allowed.low, hyper.allowed.high) if hyper.allowed else ()
    return values + [end for end in ends if end is not None and end not in values]
