"""Completions in OpenAI's words: a body becomes samples, samples become choices. Knows no HTTP; imports no torch."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tinkerbell_core.errors import BadHyperparameter, BadRequest, TinkerbellError, UnknownModel, did_you_mean
from tinkerbell_core.types import SampledSequence, SampleOutput, SampleRequest
from tinkerbell_server.access.tenants import owner_of, qualified, unqualified
from tinkerbell_server.api.tinker.checkpoints import Checkpoints
from tinkerbell_server.api.tinker.requests import TinkerRequests, told
from tinkerbell_server.api.tinker.store import Checkpoint
from tinkerbell_server.calls.sample import sample_command
from tinkerbell_server.calls.tensors import as_array
from tinkerbell_server.commands import EngineDescription, Sample
from tinkerbell_server.service.queue import Job

Json = dict[str, Any]  # Any: JSON values of several types

_MOST_TOP = 20


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion take.

    A field that is new to us is ignored; what we know and cannot honour is in `_NEUTRAL`.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None


class Completion(Body, frozen=True):
    """logprobs: of how many of the likeliest tokens, besides the one that was drawn."""

    prompt: Any  # Any: a string, token ids, or a list of either
    logprobs: int | None = None


class ChatCompletion(Body, frozen=True):
    messages: list[dict[str, Any]]  # Any: content may be a string or parts
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that this server knows and cannot honour, with the values that ask for nothing; null does, too."""


class Completions:
    """The samplers of one server, by name."""

    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._checkpoints = requests, checkpoints

    def models(self, tenant: str) -> list[str]:
        """The base model, models in training, saved weights."""
        saved = self._requests.store.of_tenant(Checkpoint, tenant)
        live = [unqualified(one.id) for one in self._requests.service.store.models() if owner_of(one.id) == tenant]
        return [self._requests.base.name, *live, *(one.id for one in saved if one.kind != "external_weights")]

    async def complete(self, tenant: str, body: bytes) -> tuple[Json, bool]:
        """The answer to a completion, and whether it is wanted as a stream."""
        sent = _parse(body, Completion)
        engine = await self._requests.engine()
        model_id, path = self._named(tenant, sent.model, engine)
        prompts = _prompts(sent.prompt)
        top = sent.logprobs or 0
        requests = [_request(sent, prompt, sent.max_tokens or 16) for prompt in prompts]
        outputs = await self._draw(tenant, [_command(one, engine, model_id, path, top) for one in requests])
        choices: list[Json] = []
        for output in outputs:
            for sequence in output.sequences:
                logprobs = None if sent.logprobs is None else _flat_logprobs(sequence)
                choices.append(
                    {
                        "index": len(choices),
                        "text": sequence.text,
                        "finish_reason": sequence.stop_reason,
                        "logprobs": logprobs,
                    }
                )
        return _answer("text_completion", "cmpl", sent.model, choices, outputs), bool(sent.stream)

    async def chat(self, tenant: str, body: bytes) -> tuple[Json, bool]:
        """The answer to a chat completion, and whether it is wanted as a stream."""
        sent = _parse(body, ChatCompletion)
        engine = await self._requests.engine()
        model_id, path = self._named(tenant, sent.model, engine)
        longest = sent.max_completion_tokens or sent.max_tokens or engine.max_length
        request = _request(sent, [_message(place, one) for place, one in enumerate(sent.messages)], longest)
        command = _command(request, engine, model_id, path, (sent.top_logprobs or 0) if sent.logprobs else 0)
        outputs = await self._draw(tenant, [command])
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": sequence.text, "refusal": None},
                "finish_reason": sequence.stop_reason,
                "logprobs": {"content": _listed_logprobs(sequence), "refusal": None} if sent.logprobs else None,
            }
            for index, sequence in enumerate(outputs[0].sequences)
        ]
        return _answer("chat.completion", "chatcmpl", sent.model, choices, outputs), bool(sent.stream)

    def _named(self, tenant: str, name: str, engine: EngineDescription) -> tuple[str | None, str | None]:
        """The model id, or the folder, of a name; neither: the base."""
        base = self._requests.base
        if name in (base.name, *base.also):
            return None, None
        if name.startswith("tinker://"):
            return None, self._checkpoints.find(tenant, name).folder
        model = self._requests.service.store.model(qualified(tenant, name))
        if model is None or model.info.base_model != engine.base_model:
            known = self.models(tenant)
            raise UnknownModel(
                f"no model {name[:160]!r}{did_you_mean(name, known)} (GET /v1/models lists what there is)"
            )
        return model.id, None

    async def _draw(self, tenant: str, commands: Sequence[Sample]) -> list[SampleOutput]:
        self._requests.check_room(tenant)
        results = [self._queued(tenant, command) for command in commands]
        return [msgspec.msgpack.decode(await result, type=SampleOutput) for result in results]

    def _queued(self, tenant: str, command: Sample) -> asyncio.Future[bytes]:
        result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def failed(error: TinkerbellError) -> None:
            if not result.done():
                result.set_exception(told(error))

        self._requests.service.queue.put(
            Job(
                id=f"completion-{secrets.token_hex(8)}",
                kind="sample",
                tenant=tenant,
                model_id=command.model_id or f"sampler:{command.path or ''}",
                command=lambda: command,
                started=lambda: None,
                done=lambda drawn: None if result.done() else result.set_result(drawn),
                failed=failed,
            )
        )
        return result


def chunks(answer: Json) -> list[Json]:
    """The answer as events of a stream: what each choice says, then why it ended."""
    chat = answer["object"] == "chat.completion"
    head = {key: answer[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    events = []
    for choice in answer["choices"]:
        opened: Json = {"index": choice["index"], "logprobs": choice["logprobs"], "finish_reason": None}
        ended: Json = {"index": choice["index"], "logprobs": None, "finish_reason": choice["finish_reason"]}
        if chat:
            opened["delta"] = {"role": "assistant", "content": choice["message"]["content"]}
            ended["delta"] = {}
        else:
            opened["text"], ended["text"] = choice["text"], ""
        events += [{**head, "choices": [opened]}, {**head, "choices": [ended]}]
    return events


def _parse(body: bytes, type_: type[Any]) -> Any:  # Any: one of the two bodies, as its caller says
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        for name, neutral in _NEUTRAL.items():
            value = fields.get(name)
            if value is not None and value not in neutral:
                raise BadHyperparameter(f"{name} is {str(value)[:80]!r}, which this server cannot do: leave it out")
        return msgspec.convert(fields, type_)
    except msgspec.ValidationError as error:
        raise BadRequest(str(error)[:500]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:500]}") from None


def _prompts(prompt: Any) -> list[Any]:  # Any: strings or token ids, looked at by `sample_command`
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return prompt
    return [prompt]


def _message(place: int, message: Json) -> dict[str, str]:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise BadRequest(f"messages[{place}] must have a role and a content of text")
    return {"role": message["role"], "content": content}


def _request(sent: Body, prompt: Any, max_tokens: int) -> SampleRequest:  # Any: as in SampleRequest
    return SampleRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=1.0 if sent.temperature is None else sent.temperature,
        top_p=1.0 if sent.top_p is None else sent.top_p,
        stop=sent.stop if isinstance(sent.stop, str) else list(sent.stop or ()),
        seed=sent.seed,
        num_samples=1 if sent.n is None else sent.n,
    )


def _command(
    request: SampleRequest, engine: EngineDescription, model_id: str | None, path: str | None, top: int
) -> Sample:
    if not 0 <= top <= _MOST_TOP:
        raise BadHyperparameter(f"log-probabilities of {top} tokens are asked for, but at most {_MOST_TOP} can be")
    command = sample_command(request, engine)
    return msgspec.structs.replace(command, model_id=model_id, path=path, top=min(top, engine.vocab_size))


def _answer(kind: str, prefix: str, model: str, choices: list[Json], outputs: Sequence[SampleOutput]) -> Json:
    prompt = sum(output.prompt_tokens for output in outputs)
    completion = sum(len(sequence.tokens) for output in outputs for sequence in output.sequences)
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def _tops(sequence: SampledSequence) -> list[list[tuple[str, float]]]:
    """The likeliest tokens at each place; a token is told by its id, since half a character is no text."""
    if sequence.top is None:
        return [[] for _ in sequence.tokens]
    ids, logprobs = as_array(sequence.top.ids), as_array(sequence.top.logprobs)
    return [
        [(_token(token), float(logprob)) for token, logprob in zip(*row, strict=True)]
        for row in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]


def _flat_logprobs(sequence: SampledSequence) -> Json:
    return {
        "tokens": [_token(token) for token in sequence.tokens],
        "token_logprobs": sequence.logprobs,
        "top_logprobs": [dict(row) for row in _tops(sequence)],
        "text_offset": [],
    }


def _listed_logprobs(sequence: SampledSequence) -> list[Json]:
    return [
        {
            "token": _token(token),
            "logprob": logprob,
            "bytes": None,
            "top_logprobs": [{"token": name, "logprob": value, "bytes": None} for name, value in row],
        }
        for token, logprob, row in zip(sequence.tokens, sequence.logprobs, _tops(sequence), strict=True)
    ]


def _token(token: int) -> str:
    return f"token_id:{token}"
