"""What the docstring of a loss says: formula, name, papers, the rest. Never imports torch, never runs the loss."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass

_PAPER = re.compile(r"\b\d{4}\.\d{5}\b")
_REFERENCES = re.compile(r"\s*\((?:[^()]*?,\s*)?(?:arXiv:)?\d{4}\.\d{5}[^()]*\)")


@dataclass(frozen=True, slots=True)
class LossDocstring:
    """formula: of one element; called: what the literature calls it, where that is said; papers: arXiv numbers."""

    formula: str
    called: str
    notes: str
    papers: tuple[str, ...]

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(f"https://arxiv.org/abs/{paper}" for paper in self.papers)


def parse_docstring(summary: str, source: str = "") -> LossDocstring:
    """Take apart a docstring of the form `formula: name (arXiv:1234.56789)`, with notes below.

    summary: its first line, which is enough where there is no source text of the function.
    """
    text = _docstring(source) or summary
    first, _, notes = text.partition("\n")
    plain = _REFERENCES.sub("", first).rstrip(". ")
    formula, separator, called = plain.rpartition(": ")
    if not separator:
        formula, called = plain, ""
    return LossDocstring(formula, called, notes.strip(), tuple(dict.fromkeys(_PAPER.findall(text))))


def _docstring(source: str) -> str:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError):  # a lambda's text, or another Python's
        return ""
    if not body or not isinstance(body[0], ast.FunctionDef):
        return ""
    return inspect.cleandoc(ast.get_docstring(body[0]) or "")
