"""An uploaded loss becomes a LossSpec: checked, unpickled, tried. Runs the uploader's code, which is trusted here."""

from __future__ import annotations

import ast
import importlib.util
import linecache
import pickle
import platform
import traceback
import types
from dataclasses import replace
from typing import Any

import torch

from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadUpload, UploadTooLarge
from tinkerbell_core.spec import LossSpec, Provenance, loss
from tinkerbell_core.types import UPLOAD_LIMIT, RegisterLossRequest
from tinkerbell_server.engines.torch.batching import tensor_of


def uploaded_loss(upload: RegisterLossRequest, vocab_size: int, device: torch.device) -> LossSpec:
    """The loss in an envelope, its inputs discovered.

    Raises BadUpload for an envelope that cannot be opened, BadLoss with the author's traceback for a loss that fails.
    """
    if len(upload.payload) > UPLOAD_LIMIT:
        raise UploadTooLarge(
            f"loss {upload.name!r} is {len(upload.payload):,} bytes, but {UPLOAD_LIMIT:,} is the limit"
        )
    ours = importlib.util.MAGIC_NUMBER.hex()
    if upload.magic != ours:  # before unpickling: bytecode of another Python crashes the process
        raise BadUpload(
            f"loss {upload.name!r} was made by Python {upload.python}, but here runs {platform.python_version()}, "
            "and their bytecode differs: run the client with the server's minor version"
        )
    try:
        fn = pickle.loads(upload.payload)
    # Broad: unpickling runs the uploader's code, and imports what it names.
    except (Exception, SystemExit) as error:
        text = f"loss {upload.name!r} does not unpickle here: {type(error).__name__}: {error}"
        raise BadUpload(text, "".join(traceback.format_exception(error))) from error
    fn = fn.fn if isinstance(fn, LossSpec) else fn
    if not callable(fn):
        raise BadUpload(f"the upload {upload.name!r} is a {type(fn).__name__}, but must be a function")
    show_source(upload, getattr(fn, "__code__", None))
    made = loss(name=upload.name, coupling=upload.coupling, group_size=upload.group_size)(fn)
    spec = replace(made, source=upload.source, digest=upload.digest, provenance=Provenance("upload"))
    examples = {name: tensor_of(data) for name, data in (upload.example_inputs or {}).items()}
    return dry_run(spec, vocab_size, device, examples or None)


def show_source(upload: RegisterLossRequest, code: types.CodeType | None) -> None:
    """Lay the author's lines where tracebacks look for them; a later upload from the same file lies over an earlier."""
    if not upload.source or not upload.filename:
        return
    first = _first_line(upload, code)
    known = linecache.cache.get(upload.filename)
    lines = list(known[2]) if known is not None and len(known) == 4 and known[1] is None else []
    own = [f"{line}\n" for line in upload.source.splitlines()]
    lines += ["\n"] * (first - 1 + len(own) - len(lines))
    lines[first - 1 : first - 1 + len(own)] = own
    # a modification time of None: not looked for on this machine's disk
    linecache.cache[upload.filename] = (sum(map(len, lines)), None, lines, upload.filename)


def _first_line(upload: RegisterLossRequest, code: types.CodeType | None) -> int:
    """Where the source text begins in its file: after the decorators, which the code counts and the text lacks."""
    try:
        compiled = compile(ast.parse(upload.source), upload.filename, "exec")
    except (SyntaxError, ValueError):
        return upload.first_line
    inner = [constant for constant in compiled.co_consts if isinstance(constant, types.CodeType)]
    if code is None or not inner:
        return upload.first_line
    return max(1, _last_line(code) - _last_line(inner[0]) + 1)


def _last_line(code: types.CodeType) -> int:
    lines: list[Any] = [line for _, _, line in code.co_lines() if line]  # Any: mypy's None, which is left out
    return max(lines, default=code.co_firstlineno)
