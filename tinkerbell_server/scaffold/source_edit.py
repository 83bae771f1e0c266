"""The text of a function with some of its expressions replaced; comments and layout stay."""

from __future__ import annotations

import ast


class Edited:
    """Edits are said in nodes of the parsed text, and made when it is read."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()  # an ast counts columns in bytes
        lines = self._text.splitlines(keepends=True)
        self._starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
        self._edits: list[tuple[int, int, str]] = []

    def replace(self, node: ast.expr, new: str) -> None:
        """Put `new` where an expression stands."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = self._starts[node.lineno - 1] + node.col_offset
        self._edits.append((begin, self._starts[node.end_lineno - 1] + node.end_col_offset, new))

    def rename(self, node: ast.FunctionDef, new: str) -> None:
        """Give a function another name, where it is defined."""
        begin = self._text.index(node.name.encode(), self._starts[node.lineno - 1] + node.col_offset + len("def"))
        self._edits.append((begin, begin + len(node.name.encode()), new))

    def __str__(self) -> str:
        text = self._text
        for begin, end, new in sorted(self._edits, reverse=True):
            text = text[:begin] + new.encode() + text[end:]
        return text.decode()
