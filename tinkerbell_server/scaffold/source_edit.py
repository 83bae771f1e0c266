"""Replaces expressions in the text of a function, and keeps its comments and layout."""

from __future__ import annotations

import ast


class SourceEdit:
    """Collects replacements of nodes of the parsed text. `str()` gives the text with all of them made."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()  # ast counts columns in bytes
        lines = self._text.splitlines(keepends=True)
        self._line_starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
        self._replacements: list[tuple[int, int, str]] = []

    def replace(self, node: ast.expr, new: str) -> None:
        """Replace an expression."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
        self._replacements.append((start, end, new))

    def rename(self, node: ast.FunctionDef, new: str) -> None:
        """Replace the name of a function in its definition."""
        keyword_end = self._line_starts[node.lineno - 1] + node.col_offset + len("def")
        start = self._text.index(node.name.encode(), keyword_end)
        self._replacements.append((start, start + len(node.name.encode()), new))

    def __str__(self) -> str:
        text = self._text
        for start, end, new in sorted(self._replacements, reverse=True):
            text = text[:start] + new.encode() + text[end:]
        return text.decode()
