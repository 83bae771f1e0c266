"""Completions and chat completions of the OpenAI API: decodes bodies into samples, and samples into choices."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tinkerbell_core.errors import BadHyperparameter, BadRequest, UnknownModel, did_you_mean
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import SampledSequence, SampleOutput, SampleRequest
from tinkerbell_server.access.tenants import Caller, owner_of, qualified, unqualified
from tinkerbell_server.api.tinker.checkpoints import Checkpoints
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import Checkpoint
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.service.submissions import SampleOptions, Submission

Json = dict[str, Any]  # Any: JSON values of several types

_MOST_TOP = 20


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of both kinds of completion.

    An unknown field is ignored; fields that are known but not supported are in `_NEUTRAL`.
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
    """logprobs: how many of the most likely tokens to report, in addition to the one that was drawn."""

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
"""Fields that are not supported, with the values that have no effect; null has none either."""


class Completions:
    """Completions by the base model, the models in training and the saved weights."""

    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._checkpoints = requests, checkpoints

    def models(self, tenant: str) -> list[str]:
        """The names that a tenant can use: the base model, models in training, saved weights."""
        saved = self._requests.store.of_tenant(Checkpoint, tenant)
        live = [unqualified(one.id) for one in self._requests.service.store.models() if owner_of(one.id) == tenant]
        return [self._requests.base.name, *live, *(one.id for one in saved if one.kind != "external_weights")]

    async def complete(self, caller: Caller, body: bytes) -> tuple[Json, bool]:
        """The answer to a completion, and whether it is to be streamed."""
        sent = _parse(body, Completion)
        engine = await self._requests.engine()
        model_id, path = self._find(caller.tenant, sent.model, engine)
        options = SampleOptions(path=path, top=_top(sent.logprobs or 0, engine))
        requests = [_request(sent, model_id, prompt, sent.max_tokens or 16) for prompt in _prompts(sent.prompt)]
        outputs = await self._draw(caller, requests, options)
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

    async def chat(self, caller: Caller, body: bytes) -> tuple[Json, bool]:
        """The answer to a chat completion, and whether it is to be streamed."""
        sent = _parse(body, ChatCompletion)
        engine = await self._requests.engine()
        model_id, path = self._find(caller.tenant, sent.model, engine)
        longest = sent.max_completion_tokens or sent.max_tokens
        messages = [_message(place, one) for place, one in enumerate(sent.messages)]
        top = _top((sent.top_logprobs or 0) if sent.logprobs else 0, engine)
        options = SampleOptions(path=path, top=top, fill=longest is None)
        outputs = await self._draw(caller, [_request(sent, model_id, messages, longest or 1)], options)
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

    def _find(self, tenant: str, name: str, engine: EngineDescription) -> tuple[str | None, str | None]:
        """The model's id, or the folder of its weights; neither for the base. Raises UnknownModel."""
        base = self._requests.base
        if name in (base.name, *base.also):
            return None, None
        if name.startswith("tinker://"):
            return None, self._checkpoints.find(tenant, name).folder
        model = self._requests.service.store.model(qualified(tenant, name))
        if model is None or not model.has_base(engine):
            known = self.models(tenant)
            raise UnknownModel(
                f"no model {name[:160]!r}{did_you_mean(name, known)} (GET /v1/models lists what there is)"
            )
        return name, None

    async def _draw(
        self, caller: Caller, requests: Sequence[SampleRequest], options: SampleOptions
    ) -> list[SampleOutput]:
        """The samples of each prompt, drawn together."""
        submissions = [
            Submission(caller=caller, kind="sample", content=request, sample=options) for request in requests
        ]
        intake = self._requests.service.intake
        results = await asyncio.gather(*(intake.run(submission) for submission in submissions))
        return [msgspec.msgpack.decode(result, type=SampleOutput) for result in results]


def chunks(answer: Json) -> list[Json]:
    """The answer as the events of a stream: the text of each choice, then its finish reason."""
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
                raise BadHyperparameter(
                    f"{name} is {str(value)[:80]!r}, which this server does not support: leave it out"
                )
        return msgspec.convert(fields, type_)
    except msgspec.ValidationError as error:
        raise BadRequest(str(error)[:500]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:500]}") from None


def _prompts(prompt: Any) -> list[Any]:  # Any: strings or token ids, checked by the intake
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


# Any: as in SampleRequest
def _request(sent: Body, model_id: str | None, prompt: Any, max_tokens: int) -> SampleRequest:
    return SampleRequest(
        model_id=model_id,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=1.0 if sent.temperature is None else sent.temperature,
        top_p=1.0 if sent.top_p is None else sent.top_p,
        stop=sent.stop if isinstance(sent.stop, str) else list(sent.stop or ()),
        seed=sent.seed,
        num_samples=1 if sent.n is None else sent.n,
    )


def _top(count: int, engine: EngineDescription) -> int:
    """How many of the most likely tokens to report at each position. Raises BadHyperparameter."""
    if not 0 <= count <= _MOST_TOP:
        raise BadHyperparameter(f"log-probabilities of {count} tokens are requested, but {_MOST_TOP} is the limit")
    return min(count, engine.vocab_size)


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
    """The most likely tokens at each position, written as ids: a token may hold a part of a character."""
    if sequence.top is None:
        return [[] for _ in sequence.tokens]
    ids, logprobs = to_numpy(sequence.top.ids), to_numpy(sequence.top.logprobs)
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
