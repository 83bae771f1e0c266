"""An uploaded loss as the text of a module. Reads what travelled as source; opens no pickle and runs nothing."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadUpload
from tinkerbell_core.serialization.format import Function, Helper, Named, SerializedLoss, Value
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import RegisterLossRequest, TensorData
from tinkerbell_server.scaffold.literals import literal, tensor_text
from tinkerbell_server.scaffold.source_edit import Edited

_ANNOTATIONS = {
    "Any": "from typing import Any",
    "LossFnOutput": "from tinkerbell_core import LossFnOutput",
    "Mapping": "from collections.abc import Mapping",
    "Tensor": "from torch import Tensor",
}
"""Names that annotations use, which do not travel, since nothing evaluates them."""


@dataclass(frozen=True, slots=True)
class Written:
    """text: of the module that holds the loss; summary: its first line; examples: its inputs for a trial, as code."""

    text: str
    summary: str
    examples: str


def written(upload: RegisterLossRequest, name: str) -> Written:
    """The upload as a loss called `name`. Raises BadUpload for what does not become text."""
    if upload.kind != "source":
        raise BadUpload(
            f"the loss {upload.name!r} was uploaded as bytecode, which is not opened here: upload it again with "
            "custom_loss(..., via='source'), which says what keeps it from travelling as text"
        )
    try:
        baggage = msgspec.msgpack.decode(upload.payload, type=SerializedLoss)
    except msgspec.DecodeError as error:
        raise BadUpload(f"the upload of {upload.name!r} is no loss as source: {error}") from None
    if not baggage.functions:
        raise BadUpload(f"the upload of {upload.name!r} holds no function")
    module = _Module(upload, baggage, name)
    docstring = ast.get_docstring(_parsed(baggage.functions[0]))
    examples = {key: _example(key, value) for key, value in (upload.example_inputs or {}).items()}
    return Written(
        module.text(),
        (docstring or f"an upload called {upload.name}.").partition("\n")[0],
        "{" + ", ".join(f"{key!r}: {value}" for key, value in examples.items()) + "}",
    )


class _Module:
    """Names and what stands under each: imports, values, and functions with the loss last."""

    def __init__(self, upload: RegisterLossRequest, baggage: SerializedLoss, name: str) -> None:
        self._upload, self._functions, self._name = upload, baggage.functions, name
        self._known: dict[str, str] = {}  # name → the line that binds it
        self._defaults: list[str] = []
        self._called = [name if number == 0 else f.name for number, f in enumerate(self._functions)]
        if len(set(self._called)) < len(self._called) or "<lambda>" in self._called:
            raise BadUpload(f"two functions of {upload.name!r} have one name, or none: name each, and upload it again")
        self._bodies = [self._function(number) for number in range(len(self._functions))]

    def text(self) -> str:
        imports = {line for line in self._known.values() if line.startswith(("import ", "from "))}
        imports |= {"from tinkerbell_core import loss"}
        values = [line for line in self._known.values() if line not in imports]
        if "torch" not in self._known and any("torch." in line for line in [*values, *self._defaults]):
            imports.add("import torch")
        spelt = {annotation for f in self._functions for annotation in f.annotations.values()}
        for word, line in _ANNOTATIONS.items():
            if word not in self._known and any(word in annotation for annotation in spelt):
                imports.add(line)
        doc = f'"""{self._name}, made of an upload called {self._upload.name}."""'
        head = [doc, "from __future__ import annotations", "\n".join(sorted(imports)), "\n".join(values)]
        # the loss last: what it calls stands above it
        functions = [*self._bodies[1:], self._bodies[0]]
        return "\n\n".join(filter(None, head)) + "\n\n\n" + "\n\n\n".join(functions) + "\n"

    def _function(self, number: int) -> str:
        function = self._functions[number]
        for name, value in function.scope.items():
            if not isinstance(value, Helper):
                self._bind(name, value)
        text = self._with_values(function, self._called[number])
        if number:
            return text
        group = "" if self._upload.group_size == 1 else f", group_size={self._upload.group_size}"
        return f'@loss(coupling="{self._upload.coupling}"{group})\n{text}'

    def _bind(self, name: str, value: Value) -> None:
        line = _binding(name, value)
        if name in self._called or self._known.setdefault(name, line) != line:
            raise BadUpload(f"{name!r} means two things in {self._upload.name!r}: rename one, and upload it again")

    def _with_values(self, function: Function, called: str) -> str:
        """The function's text: functions under their new names, values where defaults stood as expressions."""
        node = _parsed(function)
        text = Edited(function.text)
        text.rename(node, called)
        for name in (found for found in ast.walk(node) if isinstance(found, ast.Name)):
            meant = function.scope.get(name.id)
            if isinstance(meant, Helper):
                text.replace(name, self._called[meant.number])
        names = [argument.arg for argument in node.args.kwonlyargs]
        pairs = list(zip(node.args.defaults, function.defaults, strict=True))
        keywords = zip(names, node.args.kw_defaults, strict=True)
        pairs += [(default, function.keywords[name]) for name, default in keywords if default is not None]
        for expression, value in pairs:
            if not isinstance(expression, ast.Constant):
                self._defaults.append(literal("a default", value))
                text.replace(expression, self._defaults[-1])
        return str(text).rstrip()


def _binding(name: str, value: Value) -> str:
    if not isinstance(value, Named):
        return f"{name} = {literal(name, value)}"
    if not value.name:
        parent, _, last = value.module.rpartition(".")
        if name == value.module:
            return f"import {value.module}"
        return f"from {parent} import {last}" if parent and last == name else f"import {value.module} as {name}"
    if "." in value.name:
        raise BadUpload(f"{name!r} is {value.module}.{value.name}, which no import gives: import its class instead")
    return f"from {value.module} import {value.name}" + ("" if value.name == name else f" as {name}")


def _parsed(function: Function) -> ast.FunctionDef:
    try:
        body = ast.parse(function.text).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadUpload(f"the text of {function.name!r} does not compile: {error}") from None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise BadUpload(f"{function.name!r} is not a function with `def`: write it so, and upload it again")
    return body[0]


def _example(name: str, data: TensorData) -> str:
    return tensor_text(name, to_numpy(data).tolist(), data.dtype)
