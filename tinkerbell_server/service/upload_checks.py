"""Checks an uploaded loss before it is sent to the engine. Never unpickles it."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
from collections.abc import Sequence

import msgspec

from tinkerbell_core.errors import BadLoss, BadUpload, UnknownLoss, UploadsOff, UploadTooLarge
from tinkerbell_core.fxgraph.graph import parse
from tinkerbell_core.fxgraph.text import text_of
from tinkerbell_core.registry import check_upload_name, resolve
from tinkerbell_core.spec import check_preferred_rows
from tinkerbell_core.types import UPLOAD_LIMIT, LossDescription, RegisterLossRequest
from tinkerbell_server.commands import EngineDescription

_GUIDE = "(see docs/custom-losses.md#troubleshooting)"

BODY_LIMIT = UPLOAD_LIMIT * 4 // 3 + UPLOAD_LIMIT
"""The most bytes in the body of an upload: the payload in base64, its source and its example inputs."""


def check_uploads_on(engine: EngineDescription) -> None:
    """Raise UploadsOff with the reason if the engine accepts no uploads."""
    if engine.uploads == "off":
        reason = engine.uploads_problem or "its operator can start it with --uploads sandboxed"
        raise UploadsOff(
            f"this server accepts no uploaded losses: {reason}; or install the loss as a plugin "
            "(see docs/operators.md#isolation)"
        )


def too_large(size: int | None = None) -> UploadTooLarge:
    """The error for an upload over the limit."""
    has = "is too large" if size is None else f"has {size} bytes"
    return UploadTooLarge(
        f"the uploaded loss {has}, but may have {UPLOAD_LIMIT} (1 MiB); "
        f"pass tensors through loss_fn_inputs instead of capturing them {_GUIDE}"
    )


def check_upload(upload: RegisterLossRequest, losses: Sequence[LossDescription]) -> None:
    """Raise BadUpload or UploadTooLarge for an upload that must not reach the engine."""
    if len(upload.payload) > UPLOAD_LIMIT:
        raise too_large(len(upload.payload))
    magic = importlib.util.MAGIC_NUMBER.hex()
    if upload.kind == "cloudpickle" and upload.magic != magic:
        raise BadUpload(
            f"the loss {upload.name[:80]!r} was made by Python {upload.python[:40]} (bytecode {upload.magic[:16]}), "
            f"but this server runs Python {platform.python_version()} (bytecode {magic}); use the same minor version "
            f"or via='source' {_GUIDE}"
        )
    if not upload.payload:
        raise BadUpload(
            f"the upload of {upload.name[:80]!r} has no payload; send the function as cloudpickle, source or a graph"
        )
    if not re.fullmatch(r"[0-9a-f]{64}", upload.digest):
        raise BadUpload(f"digest is {upload.digest[:80]!r}, but must be the 64 hex digits of the loss's sha256")
    if upload.group_size < 1:
        raise BadUpload(f"group_size is {upload.group_size}, but must be at least 1")
    try:
        check_preferred_rows(upload.preferred_rows, upload.group_size)
    except BadLoss as error:
        raise BadUpload(error.message) from None
    if upload.kind == "graph" and upload.group_size != 1:
        raise BadUpload(f"group_size is {upload.group_size}, but a graph sees one sequence at a time: it must be 1")
    check_upload_name(upload.name, [loss.name for loss in losses if loss.provenance.kind == "entry_point"])


def with_source(upload: RegisterLossRequest) -> RegisterLossRequest:
    """The upload; if it is a graph without source text, with its text added. Raises BadUpload for an invalid graph.

    The process that rebuilds a graph checks it again.
    """
    if upload.kind != "graph":
        return upload
    graph = parse(upload.payload)
    return upload if upload.source else msgspec.structs.replace(upload, source=text_of(graph))


def find_registered(upload: RegisterLossRequest, losses: Sequence[LossDescription]) -> LossDescription | None:
    """The registered loss with this content, if it is the latest version of its name."""
    try:
        latest = resolve(upload.name, losses)
    except UnknownLoss:
        return None
    same = latest.provenance.kind == "upload" and latest.digest == upload.digest
    return latest if same else None


def job_id(upload: RegisterLossRequest, owner: str) -> str:
    """The id of the job that registers an upload."""
    return "upload-" + hashlib.sha256(f"{owner}/{upload.name}@{upload.digest}".encode()).hexdigest()[:12]
