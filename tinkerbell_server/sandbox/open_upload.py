"""Makes a LossSpec of an upload. Runs the author's code: in a worker, or in the engine if uploads are trusted."""

from __future__ import annotations

import ast
import linecache
import pickle
import traceback
import types
from dataclasses import replace
from typing import Any, Protocol, cast

from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import BadUpload
from tinkerbell_core.fxgraph.execute import GraphLoss, load_graph
from tinkerbell_core.serialization import unpack
from tinkerbell_core.spec import Coupling, LossSpec, Provenance

_DYNAMIC = "<dynamic-code>"
"""The file of all code that cloudpickle 3.1.3 has unpickled; a traceback shows no line of it."""


class Upload(Protocol):
    """The part of an upload that describes its function: of a RegisterLossRequest or of an OpenUpload message."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def source(self) -> str: ...
    @property
    def filename(self) -> str: ...
    @property
    def first_line(self) -> int: ...
    @property
    def coupling(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def preferred_rows(self) -> tuple[int, ...]: ...
    @property
    def digest(self) -> str: ...


def open_upload(upload: Upload) -> LossSpec:
    """The uploaded loss, before its dry run. Raises BadUpload for a bad payload, BadLoss for a bad signature."""
    if upload.kind == "graph":
        return _open_graph(upload)
    try:
        fn = unpack(upload.payload) if upload.kind == "source" else pickle.loads(upload.payload)
    except BadUpload:
        raise
    # Broad: unpickling, and the lines of a module, run the author's code, which may raise anything.
    except (Exception, SystemExit) as error:
        verb = "rebuilt" if upload.kind == "source" else "unpickled"
        text = f"loss {upload.name!r} cannot be {verb} on the server: {type(error).__name__}: {error}"
        raise BadUpload(text, "".join(traceback.format_exception(error))) from error
    fn = fn.fn if isinstance(fn, LossSpec) else fn
    if not callable(fn):
        raise BadUpload(f"the upload {upload.name!r} is a {type(fn).__name__}, but must be a function")
    if upload.kind != "source":
        if isinstance(fn, types.FunctionType) and fn.__code__.co_filename == _DYNAMIC:
            fn.__code__ = _in_file(fn.__code__, upload.filename)
        _register_source(upload, getattr(fn, "__code__", None))
    coupling = cast(Coupling, upload.coupling)
    decorate = loss(
        name=upload.name,
        coupling=coupling,
        group_size=upload.group_size,
        preferred_rows=upload.preferred_rows,
    )
    spec = decorate(fn)
    return replace(spec, source=upload.source, digest=upload.digest, provenance=Provenance("upload"))


def _in_file(code: types.CodeType, filename: str) -> types.CodeType:
    """The same code, and the functions in it, as of a file."""
    constants = tuple(
        _in_file(constant, filename) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_filename=filename, co_consts=constants)


def graph_examples(spec: LossSpec, vocab_size: int) -> dict[str, Tensor] | None:
    """Example inputs for the dry run of a graph; None for another loss, whose inputs the dry run must guess."""
    return spec.fn.examples(vocab_size) if isinstance(spec.fn, GraphLoss) else None


def _open_graph(upload: Upload) -> LossSpec:
    """A loss that runs no code of the author: it executes operations of our own list in the order of the upload."""
    fn = load_graph(upload.payload)
    return LossSpec(
        name=upload.name,
        fn=fn,
        summary=fn.summary,
        inputs=fn.inputs,
        optional_inputs=(),
        hyperparameters=(),
        coupling="sequence",
        group_size=1,
        finite=(),
        source=upload.source,
        digest=upload.digest,
        provenance=Provenance("upload"),
    )


def _register_source(upload: Upload, code: types.CodeType | None) -> None:
    """Put the author's lines into linecache, so that tracebacks show them.

    The lines of a later upload from the same file replace those of an earlier one.
    """
    if not upload.source or not upload.filename:
        return
    first = _first_line(upload, code)
    cached = linecache.cache.get(upload.filename)
    lines = list(cached[2]) if cached is not None and len(cached) == 4 and cached[1] is None else []
    source = [f"{line}\n" for line in upload.source.splitlines()]
    lines += ["\n"] * (first - 1 + len(source) - len(lines))
    lines[first - 1 : first - 1 + len(source)] = source
    # a modification time of None: linecache does not look for the file on this machine's disk
    linecache.cache[upload.filename] = (sum(map(len, lines)), None, lines, upload.filename)


def _first_line(upload: Upload, code: types.CodeType | None) -> int:
    """The line of the file at which the source text starts: after the decorators, which only `code` counts."""
    try:
        compiled = compile(ast.parse(upload.source), upload.filename, "exec")
    except (SyntaxError, ValueError):
        return upload.first_line
    inner = [constant for constant in compiled.co_consts if isinstance(constant, types.CodeType)]
    if code is None or not inner:
        return upload.first_line
    return max(1, _last_line(code) - _last_line(inner[0]) + 1)


def _last_line(code: types.CodeType) -> int:
    lines: list[Any] = [line for _, _, line in code.co_lines() if line]  # Any: mypy includes None, which is left out
    return max(lines, default=code.co_firstlineno)
