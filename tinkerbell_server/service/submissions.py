"""What an API passes to the intake: a request, with everything that the intake must know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelRequest,
    ForwardRequest,
    LoadRequest,
    LossDescription,
    OptimStepRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_server.access.tenants import Caller, qualified
from tinkerbell_server.calls.settings import check_name
from tinkerbell_server.commands import (
    AnyCommand,
    CreateModel,
    PromptQuestions,
)
from tinkerbell_server.service.save_paths import LoadByName, SaveByName

ModelRequest = (
    CreateModelRequest
    | ForwardRequest
    | OptimStepRequest
    | SampleRequest
    | SaveRequest
    | LoadRequest
    | DeleteModelRequest
)
"""A request of a client, with the model's id as the client writes it."""

QueuedCommand = AnyCommand | SaveByName | LoadByName


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Options of a sample that SampleRequest does not have; as in `commands.Sample`.

    fill: the sample may have as many tokens as the model takes after the prompt, whatever max_tokens is.
    """

    fill: bool = False
    path: str | None = None
    end: bool = True
    top: int = 0
    streamed: bool = False
    questions: PromptQuestions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request as an API received it.

    content: a ModelRequest, or a command that the API has made itself, with the model's qualified id.
    problem: an error in the content of a held request, which is its result when it is queued.
    key, digest: the idempotency key, unique on this server, and the digest that a repetition must have. size: bytes of
    the body.
    loss: of a ForwardRequest, if the API has looked it up already. sample: options of a SampleRequest.
    lane: the queue's lane; the model's by default. parent: the qualified id that the request is recorded under.
    kind, recorded_as: of the job, and of the record if an API has its own name for it.
    action, subject, sha256: how the audit log names a request, if not by its kind and model; the hash of its body.
    before_accept: called before the request is recorded, unless it is a repetition; may raise.
    on_accept: called with the request's id when it has been recorded; on_result, on_error: called with the outcome
    before anyone sees it.
    """

    caller: Caller
    kind: str
    content: ModelRequest | QueuedCommand | None
    problem: TinkerbellError | None = None
    key: str | None = None
    digest: str = ""
    size: int = 0
    loss: LossDescription | None = None
    sample: SampleOptions = SampleOptions()
    lane: str | None = None
    parent: str | None = None
    recorded_as: str | None = None
    action: str | None = None
    subject: str | None = None
    sha256: str | None = None
    before_accept: Callable[[], None] | None = None
    on_accept: Callable[[str], None] | None = None
    on_result: Callable[[bytes], None] | None = None
    on_error: Callable[[TinkerbellError], None] | None = None


def model_of(content: ModelRequest | QueuedCommand | None) -> str | None:
    """The qualified id of the model that a request or a command names."""
    if isinstance(content, CreateModel):
        return content.spec.model_id
    model_id: str | None = getattr(content, "model_id", None)
    return model_id


def qualified_submission(submission: Submission) -> Submission:
    """The submission with its model's id as the engine and the store know it."""
    content = submission.content
    if not isinstance(content, ModelRequest) or content.model_id is None:
        return submission
    check_name("model_id", content.model_id)
    model_id = qualified(submission.caller.tenant, content.model_id)
    return replace(submission, content=msgspec.structs.replace(content, model_id=model_id))
