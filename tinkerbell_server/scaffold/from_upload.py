"""Converts a loss that was uploaded as source to the text of a module. Opens no pickle and runs no code."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadUpload
from tinkerbell_core.serialization.format import Function, HelperRef, Imported, SerializedLoss, Value
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import RegisterLossRequest, TensorData
from tinkerbell_server.scaffold.literals import literal, tensor_text
from tinkerbell_server.scaffold.source_edit import SourceEdit

_ANNOTATIONS = {
    "Any": "from typing import Any",
    "LossFnOutput": "from tinkerbell_core import LossFnOutput",
    "Mapping": "from collections.abc import Mapping",
    "Tensor": "from torch import Tensor",
}
"""The imports of names in annotations. An upload does not contain them, because nothing evaluates annotations."""


@dataclass(frozen=True, slots=True)
class LossModule:
    """text: the module with the loss; summary: the first line of its docstring; examples: code of a dict of inputs."""

    text: str
    summary: str
    examples: str


def module_from_upload(upload: RegisterLossRequest, name: str) -> LossModule:
    """The module of an uploaded loss, which is renamed to `name`. Raises BadUpload if it cannot be written as code."""
    if upload.kind != "source":
        raise BadUpload(
            f"the loss {upload.name!r} was uploaded as bytecode, which is not opened here: upload it again with "
            "custom_loss(..., via='source'), which reports what cannot be sent as source"
        )
    try:
        serialized = msgspec.msgpack.decode(upload.payload, type=SerializedLoss)
    except msgspec.DecodeError as error:
        raise BadUpload(f"the upload of {upload.name!r} is not a loss as source: {error}") from None
    if not serialized.functions:
        raise BadUpload(f"the upload of {upload.name!r} contains no function")
    writer = _ModuleWriter(upload, serialized, name)
    docstring = ast.get_docstring(_parse(serialized.functions[0]))
    examples = {key: _example(key, value) for key, value in (upload.example_inputs or {}).items()}
    return LossModule(
        writer.text(),
        (docstring or f"an upload called {upload.name}.").partition("\n")[0],
        "{" + ", ".join(f"{key!r}: {value}" for key, value in examples.items()) + "}",
    )


class _ModuleWriter:
    """Collects what each name of the functions is bound to, and writes imports, values, helpers and the loss."""

    def __init__(self, upload: RegisterLossRequest, serialized: SerializedLoss, name: str) -> None:
        self._upload, self._functions, self._name = upload, serialized.functions, name
        self._bindings: dict[str, str] = {}  # name → the line that binds it
        self._defaults: list[str] = []
        self._function_names = [name if number == 0 else f.name for number, f in enumerate(self._functions)]
        if len(set(self._function_names)) < len(self._function_names) or "<lambda>" in self._function_names:
            raise BadUpload(
                f"two functions of {upload.name!r} have the same name, or one has none: "
                "name each function, and upload it again"
            )
        self._texts = [self._function(number) for number in range(len(self._functions))]

    def text(self) -> str:
        imports = {line for line in self._bindings.values() if line.startswith(("import ", "from "))}
        imports |= {"from tinkerbell_core import loss"}
        values = [line for line in self._bindings.values() if line not in imports]
        if "torch" not in self._bindings and any("torch." in line for line in [*values, *self._defaults]):
            imports.add("import torch")
        annotations = {annotation for f in self._functions for annotation in f.annotations.values()}
        for word, line in _ANNOTATIONS.items():
            if word not in self._bindings and any(word in annotation for annotation in annotations):
                imports.add(line)
        docstring = f'"""{self._name}, written from an upload called {self._upload.name}."""'
        head = [docstring, "from __future__ import annotations", "\n".join(sorted(imports)), "\n".join(values)]
        # the loss comes last, below the functions that it calls
        functions = [*self._texts[1:], self._texts[0]]
        return "\n\n".join(filter(None, head)) + "\n\n\n" + "\n\n\n".join(functions) + "\n"

    def _function(self, number: int) -> str:
        function = self._functions[number]
        for name, value in function.scope.items():
            if not isinstance(value, HelperRef):
                self._bind(name, value)
        text = self._edited(function, self._function_names[number])
        if number:
            return text
        group = "" if self._upload.group_size == 1 else f", group_size={self._upload.group_size}"
        rows = f", preferred_rows={self._upload.preferred_rows}" if self._upload.preferred_rows else ""
        return f'@loss(coupling="{self._upload.coupling}"{group}{rows})\n{text}'

    def _bind(self, name: str, value: Value) -> None:
        line = _binding(name, value)
        if name in self._function_names or self._bindings.setdefault(name, line) != line:
            raise BadUpload(
                f"{name!r} has two meanings in {self._upload.name!r}: rename one of them, and upload it again"
            )

    def _edited(self, function: Function, new_name: str) -> str:
        """The text of a function with the new names of functions, and with values in place of default expressions."""
        node = _parse(function)
        edit = SourceEdit(function.text)
        edit.rename(node, new_name)
        for name in (found for found in ast.walk(node) if isinstance(found, ast.Name)):
            value = function.scope.get(name.id)
            if isinstance(value, HelperRef):
                edit.replace(name, self._function_names[value.number])
        names = [argument.arg for argument in node.args.kwonlyargs]
        defaults = list(zip(node.args.defaults, function.defaults, strict=True))
        keywords = zip(names, node.args.kw_defaults, strict=True)
        defaults += [(expression, function.keywords[name]) for name, expression in keywords if expression is not None]
        for expression, default in defaults:
            if not isinstance(expression, ast.Constant):
                self._defaults.append(literal("a default", default))
                edit.replace(expression, self._defaults[-1])
        return str(edit).rstrip()


def _binding(name: str, value: Value) -> str:
    if not isinstance(value, Imported):
        return f"{name} = {literal(name, value)}"
    if not value.name:
        parent, _, last = value.module.rpartition(".")
        if name == value.module:
            return f"import {value.module}"
        return f"from {parent} import {last}" if parent and last == name else f"import {value.module} as {name}"
    if "." in value.name:
        raise BadUpload(
            f"{name!r} is {value.module}.{value.name}, which cannot be imported by itself: use its class instead"
        )
    return f"from {value.module} import {value.name}" + ("" if value.name == name else f" as {name}")


def _parse(function: Function) -> ast.FunctionDef:
    try:
        body = ast.parse(function.text).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadUpload(f"the text of {function.name!r} does not compile: {error}") from None
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise BadUpload(f"{function.name!r} is not a `def` function: write it as one, and upload it again")
    return body[0]


def _example(name: str, data: TensorData) -> str:
    return tensor_text(name, to_numpy(data).tolist(), data.dtype)
