"""Parses the docstring of a loss: formula, name, papers and notes. Imports no torch and does not run the loss."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass

_PAPER = re.compile(r"\b\d{4}\.\d{5}\b")
_REFERENCES = re.compile(r"\s*\((?:[^()]*?,\s*)?(?:arXiv:)?\d{4}\.\d{5}[^()]*\)")


@dataclass(frozen=True, slots=True)
class LossDocstring:
    """formula: the loss of one element. name: the name in the literature, if given. papers: arXiv numbers."""

    formula: str
    name: str
    notes: str
    papers: tuple[str, ...]

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(f"https://arxiv.org/abs/{paper}" for paper in self.papers)


def parse_docstring(summary: str, source: str = "") -> LossDocstring:
    """Parse a docstring of the form `formula: name (arXiv:1234.56789)`, followed by notes.

    summary: the first line of the docstring, used if `source` has no docstring.
    """
    text = _docstring(source) or summary
    first, _, notes = text.partition("\n")
    plain = _REFERENCES.sub("", first).rstrip(". ")
    formula, separator, name = plain.rpartition(": ")
    if not separator:
        formula, name = plain, ""
    return LossDocstring(formula, name, notes.strip(), tuple(dict.fromkeys(_PAPER.findall(text))))


def _docstring(source: str) -> str:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError):  # the text of a lambda, or of another Python version
        return ""
    if not body or not isinstance(body[0], ast.FunctionDef):
        return ""
    return inspect.cleandoc(ast.get_docstring(body[0]) or "")
