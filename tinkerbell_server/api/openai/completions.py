"""Completions and chat completions of the OpenAI API: makes samples of bodies, and choices of samples."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import msgspec

from tinkerbell_core.errors import (
    BadData,
    BadHyperparameter,
    ContextTooLong,
    TinkerbellError,
    did_you_mean,
)
from tinkerbell_core.types import SampleOutput, SampleRequest
from tinkerbell_server.access.tenants import Caller, owner_of, qualified, unqualified
from tinkerbell_server.api.openai.bodies import Body, ChatCompletion, Completion
from tinkerbell_server.api.openai.fields import FIELDS
from tinkerbell_server.api.openai.logprobs import (
    Token,
    TokenNames,
    flat_logprobs,
    ids_in,
    listed_logprobs,
    tokens_of_prompt,
    tokens_of_sample,
)
from tinkerbell_server.api.openai.messages import chat_prompt
from tinkerbell_server.api.openai.stream import OnPiece, Pieces, chunks_of, end_of, head_of, piece_of
from tinkerbell_server.api.tinker.checkpoints import Checkpoints
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Checkpoint
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.commands import EngineDescription, PromptQuestions
from tinkerbell_server.http.openai_errors import OpenAIError
from tinkerbell_server.service.submissions import SampleOptions, Submission

Json = dict[str, Any]  # Any: JSON values of several types

_DEFAULT_TOKENS = 16
"""max_tokens of /v1/completions if the request has none, as in the OpenAI API."""

_NAMES = {"num_samples": "n"}
"""The fields that have another name in the requests of the intake."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What a name stands for: a model in training, a folder of weights, or with neither the base model."""

    engine: EngineDescription
    id: str | None = None
    path: str | None = None


@dataclass(slots=True)
class _Sent:
    """What a stream has sent of a choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)


class Completions:
    """Completions by the base model, the models in training and the saved weights."""

    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._checkpoints = requests, checkpoints

    def models(self, tenant: str) -> list[str]:
        """The names that a tenant can use: the base model, models in training, saved weights."""
        saved = self._requests.store.of_tenant(Checkpoint, tenant)
        live = [unqualified(one.id) for one in self._requests.service.store.models() if owner_of(one.id) == tenant]
        return [self._requests.base.name, *live, *(one.id for one in saved if one.kind != "external_weights")]

    def is_published(self, tenant: str, name: str) -> bool:
        """Whether a tenant may use a checkpoint that `models` does not list: another tenant has published it."""
        if not name.startswith("tinker://"):
            return False
        try:
            self._checkpoints.find(tenant, name)
        except TinkerbellError:
            return False
        return True

    async def stream(self, caller: Caller, sent: Completion | ChatCompletion) -> AsyncIterator[Json]:
        """The chunks of a streamed answer; the last one has the usage. Raises as `complete` and `chat` do."""
        chat = isinstance(sent, ChatCompletion)
        model = await self._find(caller.tenant, sent.model)
        if isinstance(sent, Completion) and (sent.echo or sent.max_tokens == 0):
            for chunk in chunks_of(await self.complete(caller, sent)):
                yield chunk
            return
        if isinstance(sent, ChatCompletion):
            requests, options = self._chat_requests(sent, model)
        else:
            prompts, longest = self._prompts(sent.prompt), sent.max_tokens or _DEFAULT_TOKENS
            requests = [_request(sent, model, prompt, longest) for prompt in prompts]
            options = SampleOptions(
                path=model.path, end=not sent.ignore_eos, top=min(sent.logprobs or 0, model.engine.vocab_size)
            )
        options = replace(options, streamed=True)
        head = head_of(_new_id("chatcmpl" if chat else "cmpl"), int(time.time()), sent.model, chat=chat)
        pieces = Pieces(lambda on_piece: self._draw(caller, requests, options, on_piece))
        sent_before: dict[int, _Sent] = {}  # by choice
        try:
            async for prompt, piece in pieces:
                index = prompt * sent.n + piece.sequence
                first = index not in sent_before
                before = sent_before.setdefault(index, _Sent())
                before.text += piece.text
                before.tokens += tokens_of_sample(piece)
                logprobs = await self._piece_logprobs(sent, before, len(piece.tokens))
                yield {**head, "choices": [piece_of(index, piece.text, logprobs, chat=chat, first=first)]}
                if piece.stop_reason is not None:
                    yield {**head, "choices": [end_of(index, piece.stop_reason, chat=chat)]}
        except TinkerbellError as error:
            _raise_for("messages" if chat else "prompt", error, model.engine)
        yield {**head, "choices": [], "usage": _usage(pieces.output)}

    # Any: JSON values of several types
    async def _piece_logprobs(self, sent: Completion | ChatCompletion, choice: _Sent, count: int) -> Any:
        """The log-probabilities of the last `count` tokens of a choice, if they are asked for."""
        if sent.logprobs is None or sent.logprobs is False:
            return None
        names = await self._token_names(sent, ids_in(choice.tokens))
        if isinstance(sent, ChatCompletion):
            return {"content": listed_logprobs(choice.tokens[-count:], names), "refusal": None}
        # the offsets are those in the text of the whole choice
        return {name: values[-count:] for name, values in flat_logprobs(choice.tokens, names, choice.text).items()}

    async def complete(self, caller: Caller, sent: Completion) -> Json:
        """The answer to a completion. Raises OpenAIError for a field, TinkerbellError for everything else."""
        model = await self._find(caller.tenant, sent.model)
        prompts = self._prompts(sent.prompt)
        top = min(sent.logprobs or 0, model.engine.vocab_size)
        scored = sent.echo and sent.logprobs is not None
        options = SampleOptions(
            path=model.path,
            end=not sent.ignore_eos,
            top=top,
            questions=PromptQuestions(logprobs=True, top=top) if scored else None,
        )
        try:
            # the choices show the prompt as tokens
            ids = [await self._ids(prompt) for prompt in prompts] if sent.echo else prompts
            longest = _DEFAULT_TOKENS if sent.max_tokens is None else max(1, sent.max_tokens)
            outputs = await self._draw(caller, [_request(sent, model, prompt, longest) for prompt in ids], options)
        except TinkerbellError as error:
            _raise_for("prompt", error, model.engine)
        if sent.max_tokens == 0:
            outputs = [_without_sample(output) for output in outputs]
        choices: list[Json] = []
        for prompt, own, output in zip(prompts, ids, outputs, strict=True):
            choices += await self._text_choices(sent, prompt, own, output, len(choices))
        return _answer("text_completion", "cmpl", sent.model, choices, outputs)

    async def chat(self, caller: Caller, sent: ChatCompletion) -> Json:
        """The answer to a chat completion. Raises as `complete` does."""
        model = await self._find(caller.tenant, sent.model)
        requests, options = self._chat_requests(sent, model)
        try:
            outputs = await self._draw(caller, requests, options)
        except TinkerbellError as error:
            _raise_for("messages", error, model.engine)
        choices: list[Json] = []
        for index, sequence in enumerate(outputs[0].sequences):
            logprobs = None
            if sent.logprobs:
                tokens = tokens_of_sample(sequence)
                content = listed_logprobs(tokens, await self._token_names(sent, ids_in(tokens)))
                logprobs = {"content": content, "refusal": None}
            message = {"role": "assistant", "content": sequence.text, "refusal": None}
            choices.append(
                {"index": index, "message": message, "finish_reason": sequence.stop_reason, "logprobs": logprobs}
            )
        return _answer("chat.completion", "chatcmpl", sent.model, choices, outputs)

    def _chat_requests(self, sent: ChatCompletion, model: _Model) -> tuple[list[SampleRequest], SampleOptions]:
        longest = sent.max_completion_tokens or sent.max_tokens
        top = min(sent.top_logprobs or 0, model.engine.vocab_size)
        options = SampleOptions(path=model.path, end=not sent.ignore_eos, top=top, fill=longest is None)
        return [_request(sent, model, chat_prompt(sent), longest or 1)], options

    async def _find(self, tenant: str, name: str) -> _Model:
        """The model of this name. Raises OpenAIError."""
        engine = await self._requests.engine()
        base = self._requests.base
        if name in (base.name, *base.also):
            return _Model(engine)
        if name.startswith("tinker://"):
            return _Model(engine, path=self._checkpoints.find(tenant, name).folder)
        model = self._requests.service.store.model(qualified(tenant, name))
        if model is None or not model.has_base(engine):
            near = did_you_mean(name, self.models(tenant))
            raise OpenAIError(
                f"no model {name[:160]!r}{near} (GET /v1/models lists what there is)",
                param="model",
                code="model_not_found",
                status=404,
            )
        return _Model(engine, id=name)

    def _prompts(self, prompt: Any) -> list[Any]:  # Any: strings or token ids, which the intake checks
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        prompts: list[Any] = prompt if several else [prompt]
        limit = self._requests.service.settings.queue_limit // 2
        if len(prompts) > limit:
            raise _invalid_prompt(f"prompt has {len(prompts)} prompts, but a request can have {limit}: send less")
        for one in prompts:
            if isinstance(one, list) and any(isinstance(item, dict | list) for item in one):
                raise _invalid_prompt(
                    "prompt must be a string, a list of token ids, or a list of either; /v1/chat/completions takes "
                    "messages"
                )
        return prompts

    async def _ids(self, prompt: Any) -> Any:  # Any: as above
        if not isinstance(prompt, str) or not prompt:
            return prompt
        return await self._requests.service.bases.default.tokenizer.prompt(TextPrompt(prompt))

    # Any: as above
    async def _text_choices(
        self, sent: Completion, prompt: Any, ids: Any, output: SampleOutput, first: int
    ) -> list[Json]:
        """The choices of one prompt."""
        before: list[Token] = [] if output.prompt is None else tokens_of_prompt(ids, output.prompt)
        drawn = [tokens_of_sample(sequence) for sequence in output.sequences]
        names = None
        if sent.logprobs is not None or (sent.echo and not isinstance(prompt, str)):
            wanted = ids_in(before).union(*map(ids_in, drawn), ids if sent.echo else ())
            names = await self._token_names(sent, wanted)
        echoed = "" if not sent.echo else prompt if isinstance(prompt, str) or names is None else names.text(ids)
        choices = []
        for index, (sequence, tokens) in enumerate(zip(output.sequences, drawn, strict=True), start=first):
            text = echoed + sequence.text
            logprobs = None
            if sent.logprobs is not None and names is not None:
                logprobs = flat_logprobs([*before, *tokens], names, text)
            choices.append({"index": index, "text": text, "finish_reason": sequence.stop_reason, "logprobs": logprobs})
        return choices

    async def _token_names(self, sent: Body, ids: set[int]) -> TokenNames:
        pieces = await self._requests.service.bases.default.tokenizer.pieces(ids)
        return TokenNames(pieces, as_ids=sent.return_tokens_as_token_ids)

    async def _draw(
        self,
        caller: Caller,
        requests: Sequence[SampleRequest],
        options: SampleOptions,
        on_piece: OnPiece = lambda prompt, piece: None,
    ) -> list[SampleOutput]:
        """The samples of each prompt, drawn together. If the caller is cancelled, or one fails, so are the others."""
        submissions = [
            Submission(caller=caller, kind="sample", content=request, sample=options) for request in requests
        ]
        intake = self._requests.service.intake
        runs = [
            asyncio.ensure_future(intake.run(submission, partial(on_piece, prompt)))
            for prompt, submission in enumerate(submissions)
        ]
        try:
            results = await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
        return [msgspec.msgpack.decode(result, type=SampleOutput) for result in results]


# Any: as in SampleRequest
def _request(sent: Body, model: _Model, prompt: Any, max_tokens: int) -> SampleRequest:
    return SampleRequest(
        model_id=model.id,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=sent.temperature,
        top_p=sent.top_p,
        top_k=sent.top_k or -1,
        stop=sent.stops,
        seed=sent.seed,
        num_samples=sent.n,
    )


def _without_sample(output: SampleOutput) -> SampleOutput:
    """The output of a request for no token, for which the engine has drawn one."""
    empty = [
        msgspec.structs.replace(sequence, tokens=[], logprobs=[], text="", stop_reason="length", top=None)
        for sequence in output.sequences
    ]
    return msgspec.structs.replace(output, sequences=empty)


def _raise_for(prompt: str, error: TinkerbellError, engine: EngineDescription) -> NoReturn:
    """Raise an error of the intake or the engine as clients recognise it. prompt: the field that has the prompt."""
    message = error.message
    if isinstance(error, ContextTooLong):
        # litellm and inspect_ai look for these words, and for the code
        raise OpenAIError(
            f"This model's maximum context length is {engine.max_length} tokens. However, {message}",
            param=prompt,
            code="context_length_exceeded",
        ) from error
    if not isinstance(error, BadData | BadHyperparameter):
        raise error
    begins = re.match(r"\w+", message)
    name = begins[0] if begins else ""
    if name in _NAMES:
        message = _NAMES[name] + message.removeprefix(name)
        name = _NAMES[name]
    known = any(field.name == name for field in FIELDS)
    raise OpenAIError(message, param=name if known else prompt, code="invalid_value") from error


def _invalid_prompt(message: str) -> OpenAIError:
    return OpenAIError(message, param="prompt", code="invalid_value")


def _new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def _usage(outputs: Sequence[SampleOutput]) -> Json:
    prompt = sum(output.prompt_tokens for output in outputs)
    completion = sum(len(sequence.tokens) for output in outputs for sequence in output.sequences)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _answer(kind: str, prefix: str, model: str, choices: list[Json], outputs: Sequence[SampleOutput]) -> Json:
    return {
        "id": _new_id(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": _usage(outputs),
    }
