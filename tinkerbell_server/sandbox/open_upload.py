"""An uploaded loss becomes a LossSpec. Runs the uploader's code: in a worker, or where uploads are trusted."""

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


class Envelope(Protocol):
    """The part of an upload that says what the function is."""

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
    def digest(self) -> str: ...


def opened(envelope: Envelope) -> LossSpec:
    """The loss in an envelope, not tried yet. Raises BadUpload for one that cannot be opened, BadLoss for no loss."""
    if envelope.kind == "graph":
        return _of_graph(envelope)
    try:
        fn = unpack(envelope.payload) if envelope.kind == "source" else pickle.loads(envelope.payload)
    except BadUpload:
        raise
    # Broad: unpickling, and a module's own lines, are the uploader's code, and import what they name.
    except (Exception, SystemExit) as error:
        verb = "cannot be rebuilt" if envelope.kind == "source" else "does not unpickle"
        text = f"loss {envelope.name!r} {verb} here: {type(error).__name__}: {error}"
        raise BadUpload(text, "".join(traceback.format_exception(error))) from error
    fn = fn.fn if isinstance(fn, LossSpec) else fn
    if not callable(fn):
        raise BadUpload(f"the upload {envelope.name!r} is a {type(fn).__name__}, but must be a function")
    if envelope.kind != "source":
        show_source(envelope, getattr(fn, "__code__", None))
    coupling = cast(Coupling, envelope.coupling)
    made = loss(name=envelope.name, coupling=coupling, group_size=envelope.group_size)(fn)
    return replace(made, source=envelope.source, digest=envelope.digest, provenance=Provenance("upload"))


def made_up(spec: LossSpec, vocab_size: int) -> dict[str, Tensor] | None:
    """Inputs to try a loss on where its sender gave none; None where a dry run has to guess them."""
    return spec.fn.examples(vocab_size) if isinstance(spec.fn, GraphLoss) else None


def _of_graph(envelope: Envelope) -> LossSpec:
    """No code of the uploader's: operations of our own list, in the order that they sent."""
    fn = load_graph(envelope.payload)
    return LossSpec(
        name=envelope.name,
        fn=fn,
        summary=fn.summary,
        inputs=fn.inputs,
        optional_inputs=(),
        hyperparameters=(),
        coupling="sequence",
        group_size=1,
        finite=(),
        source=envelope.source,
        digest=envelope.digest,
        provenance=Provenance("upload"),
    )


def show_source(envelope: Envelope, code: types.CodeType | None) -> None:
    """Lay the author's lines where tracebacks look for them; a later upload from the same file lies over an earlier."""
    if not envelope.source or not envelope.filename:
        return
    first = _first_line(envelope, code)
    known = linecache.cache.get(envelope.filename)
    lines = list(known[2]) if known is not None and len(known) == 4 and known[1] is None else []
    own = [f"{line}\n" for line in envelope.source.splitlines()]
    lines += ["\n"] * (first - 1 + len(own) - len(lines))
    lines[first - 1 : first - 1 + len(own)] = own
    # a modification time of None: not looked for on this machine's disk
    linecache.cache[envelope.filename] = (sum(map(len, lines)), None, lines, envelope.filename)


def _first_line(envelope: Envelope, code: types.CodeType | None) -> int:
    """Where the source text begins in its file: after the decorators, which the code counts and the text lacks."""
    try:
        compiled = compile(ast.parse(envelope.source), envelope.filename, "exec")
    except (SyntaxError, ValueError):
        return envelope.first_line
    inner = [constant for constant in compiled.co_consts if isinstance(constant, types.CodeType)]
    if code is None or not inner:
        return envelope.first_line
    return max(1, _last_line(code) - _last_line(inner[0]) + 1)


def _last_line(code: types.CodeType) -> int:
    lines: list[Any] = [line for _, _, line in code.co_lines() if line]  # Any: mypy's None, which is left out
    return max(lines, default=code.co_firstlineno)
