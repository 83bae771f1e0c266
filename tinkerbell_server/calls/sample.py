"""A sample request as a command: its prompt and its settings checked before the device is touched."""

from __future__ import annotations

from typing import Any

from tinkerbell_core.errors import BadData, BadHyperparameter
from tinkerbell_core.types import SampleRequest
from tinkerbell_server.calls.settings import check_sample
from tinkerbell_server.commands import EngineDescription, Sample

Prompt = list[int] | str | list[dict[str, str]]


def sample_command(request: SampleRequest, engine: EngineDescription) -> Sample:
    """The command. Raises BadData for the prompt, BadHyperparameter for a setting."""
    check_sample(request)
    prompt = _prompt(request.prompt, engine)
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        room = engine.max_length - len(prompt)
        if request.max_tokens > room:
            raise BadHyperparameter(
                f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, but the model takes "
                f"{engine.max_length} together; shorten the prompt or ask for at most {max(room, 0)}"
            )
    return Sample(
        model_id=request.model_id,
        prompt=prompt,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=_stop(request.stop, engine.vocab_size),
        seed=request.seed,
        num_samples=request.num_samples,
    )


def _prompt(prompt: Any, engine: EngineDescription) -> Prompt:  # Any: not looked at yet
    if not isinstance(prompt, str | list):
        raise BadData(f"prompt is {type(prompt).__name__}, but must be a string, a chat or a list of token ids")
    if not prompt:
        raise BadData("prompt is empty: give at least one token to continue from")
    if isinstance(prompt, str):
        return prompt
    if all(isinstance(turn, dict) for turn in prompt):
        return _chat(prompt, engine)
    for place, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool):
            raise BadData(f"prompt[{place}] is {str(token)[:40]!r}, but must be a token id")
        if not 0 <= token < engine.vocab_size:
            raise BadData(f"prompt[{place}] is {token}, but token ids go from 0 to {engine.vocab_size - 1}")
    return prompt


def _chat(prompt: list[dict[Any, Any]], engine: EngineDescription) -> list[dict[str, str]]:  # Any: not looked at yet
    if not engine.has_chat_template:
        raise BadData(
            f"{engine.base_model} has no chat template, so a chat cannot be tokenised; send a string or token ids"
        )
    for place, turn in enumerate(prompt):
        if set(turn) != {"role", "content"} or not all(isinstance(part, str) for part in turn.values()):
            raise BadData(f"prompt[{place}] must be {{role, content}}, both strings, but has {sorted(map(str, turn))}")
    return prompt


def _stop(stop: list[str | int] | str | None, vocab_size: int) -> list[str | int]:
    stops: list[str | int] = [stop] if isinstance(stop, str) else list(stop or ())
    for place, one in enumerate(stops):
        if one == "":
            raise BadHyperparameter(f"stop[{place}] is empty: it would stop every sample at once")
        if isinstance(one, int) and not 0 <= one < vocab_size:
            raise BadHyperparameter(f"stop[{place}] is {one}, but token ids go from 0 to {vocab_size - 1}")
    return stops
