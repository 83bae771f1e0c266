"""Renders a graph as Python text for people to read. The text is not parsed again."""

from __future__ import annotations

from tinkerbell_core.fxgraph.arguments import Dtype, Ref, Slice, Value
from tinkerbell_core.fxgraph.graph import Graph, Step

_MAX_CHARACTERS = 1 << 16


def text_of(graph: Graph) -> str:
    """The graph as the text of a Python function, truncated if it is very long."""
    inputs = ", ".join(graph.names)
    metrics = ", ".join(f"{key!r}: {name}" for key, name in graph.metrics.items())
    lines = [f"def loss({inputs}):", *(_line(step) for step in graph.steps)]
    lines.append(f"    return {graph.loss}, {{{metrics}}}")
    text = "\n".join(lines) + "\n"
    if len(text) <= _MAX_CHARACTERS:
        return text
    return (
        text[: text.rindex("\n", 0, _MAX_CHARACTERS) + 1]
        + f"    # truncated: the graph has {len(graph.steps)} operations\n"
    )


def _line(step: Step) -> str:
    words = [_word(arg) for arg in step.args]
    target = f"{words.pop(0)}.{step.target}" if step.is_method else step.target
    words += [f"{name}={_word(arg)}" for name, arg in step.kwargs.items()]
    return f"    {step.name} = {target}({', '.join(words)})"


def _word(value: Value) -> str:
    match value:
        case Ref():
            return value.name
        case Dtype():
            return f"torch.{value.name}"
        case Slice():
            return f"slice({_word(value.start)}, {_word(value.stop)}, {_word(value.step)})"
        case list():
            return f"[{', '.join(map(_word, value))}]"
        case tuple():
            return f"({', '.join(map(_word, value))}{',' if len(value) == 1 else ''})"
        case _:
            return "..." if value is ... else repr(value)
