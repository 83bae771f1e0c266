"""Checks a sample request and makes the engine's command of it."""

from __future__ import annotations

from typing import Any

import msgspec

from tinkerbell_core.errors import BadData, BadHyperparameter, ContextTooLong
from tinkerbell_core.types import SampleRequest
from tinkerbell_server.calls.settings import check_sample_settings
from tinkerbell_server.commands import EngineDescription, Sample


class TextPrompt(msgspec.Struct, frozen=True):
    """A prompt that the tokenizer process turns into token ids: a string, or a chat, which its template renders.

    tools, template_kwargs: more arguments of the template. continue_final_message: the sample continues the last
    message.
    """

    text: str | list[dict[str, Any]]  # Any: JSON values; each message has a role
    tools: list[dict[str, Any]] = []
    template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def check_sample_request(request: SampleRequest, engine: EngineDescription) -> list[int] | TextPrompt:
    """Check everything that can be checked without a tokenizer; the token ids of the prompt, or its text.

    Raises BadData for the prompt, BadHyperparameter for a setting.
    """
    check_sample_settings(request)
    _stops(request.stop, engine.vocab_size)
    prompt = _prompt(request.prompt, engine)
    if isinstance(prompt, list):
        _check_length(request, engine, len(prompt))
    return prompt


def sample_command(request: SampleRequest, engine: EngineDescription, ids: list[int]) -> Sample:
    """The command of a checked request. ids: the token ids of its prompt.

    Raises ContextTooLong if the prompt and max_tokens are longer than the model allows.
    """
    _check_length(request, engine, len(ids))
    return Sample(
        model_id=request.model_id,
        prompt=ids,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=_stops(request.stop, engine.vocab_size),
        seed=request.seed,
        num_samples=request.num_samples,
    )


def _check_length(request: SampleRequest, engine: EngineDescription, length: int) -> None:
    room = engine.max_length - length
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {length} tokens, but the model takes {engine.max_length} tokens, prompt and sample "
            "together: shorten the prompt"
        )
    if request.max_tokens > room:
        raise ContextTooLong(
            f"the prompt has {length} tokens and max_tokens is {request.max_tokens}, but the model takes "
            f"{engine.max_length} tokens, prompt and sample together: shorten the prompt or set max_tokens to at most "
            f"{room}"
        )


def _prompt(prompt: Any, engine: EngineDescription) -> list[int] | TextPrompt:  # Any: decoded, not checked yet
    if isinstance(prompt, TextPrompt):
        _check_chat_template(engine)
        return prompt
    if not isinstance(prompt, str | list):
        raise BadData(f"prompt is {type(prompt).__name__}, but must be a string, a chat or a list of token ids")
    if not prompt:
        raise BadData("prompt is empty: send at least one token")
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if all(isinstance(message, dict) for message in prompt):
        return TextPrompt(_chat(prompt, engine))
    for position, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool):
            raise BadData(f"prompt[{position}] is {str(token)[:40]!r}, but must be a token id")
        if not 0 <= token < engine.vocab_size:
            raise BadData(f"prompt[{position}] is {token}, but token ids go from 0 to {engine.vocab_size - 1}")
    return prompt


def _check_chat_template(engine: EngineDescription) -> None:
    if not engine.has_chat_template:
        raise BadData(
            f"{engine.base_model} has no chat template, so a chat cannot be tokenised: send a string or token ids"
        )


def _chat(prompt: list[dict[Any, Any]], engine: EngineDescription) -> list[dict[str, str]]:  # Any: not checked yet
    _check_chat_template(engine)
    for position, message in enumerate(prompt):
        if set(message) != {"role", "content"} or not all(isinstance(part, str) for part in message.values()):
            raise BadData(
                f"prompt[{position}] must be {{role, content}}, both strings, but has {sorted(map(str, message))}"
            )
    return prompt


def _stops(stop: list[str | int] | str | None, vocab_size: int) -> list[str | int]:
    stops: list[str | int] = [stop] if isinstance(stop, str) else list(stop or ())
    for position, one in enumerate(stops):
        if one == "":
            raise BadHyperparameter(f"stop[{position}] is an empty string, which would stop every sample at once")
        if isinstance(one, int) and not 0 <= one < vocab_size:
            raise BadHyperparameter(f"stop[{position}] is {one}, but token ids go from 0 to {vocab_size - 1}")
    return stops
