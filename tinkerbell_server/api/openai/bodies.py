"""The bodies of both kinds of completion: their types, and the checks that need nothing but the body."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from tinkerbell_core.errors import did_you_mean
from tinkerbell_server.api.openai.fields import Route, check_fields
from tinkerbell_server.http.openai_errors import OpenAIError

MOST_TOP = 20
"""The most likely tokens that a request can ask for at each position."""

_MOST_SAMPLES = 1024


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The honoured fields of both kinds of completion; `fields` says what each does."""

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    n: int = 1
    stop: str | int | list[str | int] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None  # Any: checked below
    return_tokens_as_token_ids: bool = False
    user: str | None = None
    metadata: dict[str, Any] | None = None  # Any: not used
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str | int]:
        """Everything that ends a sample, besides an end-of-text token."""
        stops = self.stop if isinstance(self.stop, list) else [self.stop]
        return [*stops, *self.stop_token_ids]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class Completion(Body, frozen=True):
    """prompt: a string, token ids, or a list of either, which the intake checks."""

    prompt: Any  # Any: see above
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None


class ChatCompletion(Body, frozen=True):
    messages: list[dict[str, Any]]  # Any: checked in `messages`
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


_B = TypeVar("_B", Completion, ChatCompletion)


def parse_completion(body: bytes) -> Completion:
    """The body of a completion. Raises OpenAIError that names the field."""
    sent = _parse(body, "completions", Completion)
    _check_range("max_tokens", sent.max_tokens, 0 if sent.echo else 1)
    _check_range("logprobs", sent.logprobs, 0, MOST_TOP)
    if sent.best_of is not None and sent.best_of != sent.n:
        raise _invalid("best_of", f"best_of is {sent.best_of}, but must equal n, which is {sent.n}: leave it out")
    return sent


def parse_chat(body: bytes) -> ChatCompletion:
    """The body of a chat completion. Raises OpenAIError that names the field."""
    sent = _parse(body, "chat/completions", ChatCompletion)
    _check_range("max_tokens", sent.max_tokens, 1)
    _check_range("max_completion_tokens", sent.max_completion_tokens, 1)
    _check_range("top_logprobs", sent.top_logprobs, 0, MOST_TOP)
    if sent.top_logprobs is not None and not sent.logprobs:
        raise _invalid("top_logprobs", "top_logprobs is sent without logprobs: set logprobs to true")
    if None not in (sent.max_tokens, sent.max_completion_tokens) and sent.max_tokens != sent.max_completion_tokens:
        raise _invalid("max_tokens", "max_tokens and max_completion_tokens are different: send one of them")
    return sent


def _parse(body: bytes, route: Route, type_: type[_B]) -> _B:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OpenAIError(f"the body is not JSON: {str(error)[:500]}") from None
    if not isinstance(fields, dict):
        raise OpenAIError(f"the body is {type(fields).__name__}, but must be an object")
    try:
        sent = msgspec.convert(check_fields(fields, route), type_)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    _check_range("n", sent.n, 1, _MOST_SAMPLES)
    if sent.top_k != 0:  # 0 and -1: no limit
        _check_range("top_k", sent.top_k, -1, 1 << 31)
    _check_stream(sent)
    return sent


def _wrong_type(message: str) -> OpenAIError:
    """The error for a message of msgspec, such as "Expected `int`, got `str` - at `$.n`"."""
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        return OpenAIError(f"{missing[1]} is missing", param=missing[1], code="missing_required_parameter")
    what, _, path = message.partition(" - at `$.")
    place = path.rstrip("`")
    return OpenAIError(f"{place[:160]}: {what[:300]}", param=re.split(r"[.\[]", place)[0] or None, code="invalid_type")


def _check_stream(sent: Body) -> None:
    if sent.stream_options is None:
        return
    if not sent.stream:
        raise _invalid("stream_options", "stream_options is sent without stream: set stream to true, or leave it out")
    for name, value in sent.stream_options.items():
        if name == "include_usage" and isinstance(value, bool | None):
            continue
        # options that change nothing if they are off
        if name in ("include_obfuscation", "continuous_usage_stats") and not value:
            continue
        near = did_you_mean(name, ["include_usage"])
        raise _invalid(
            "stream_options", f"stream_options.{name[:80]} is {str(value)[:80]!r}{near}; the option is include_usage"
        )


def _check_range(name: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is None or (value >= low and (high is None or value <= high)):
        return
    most = "" if high is None else f" and at most {high}"
    raise _invalid(name, f"{name} is {value}, but must be at least {low}{most}")


def _invalid(name: str, message: str) -> OpenAIError:
    return OpenAIError(message, param=name, code="invalid_value")
