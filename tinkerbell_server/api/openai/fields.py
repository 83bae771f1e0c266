"""Every field of a completion request: the server honours it, or refuses each value that would change something."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from tinkerbell_core.errors import did_you_mean
from tinkerbell_server.http.openai_errors import OpenAIError

Route = Literal["completions", "chat/completions"]

BOTH: tuple[Route, ...] = ("completions", "chat/completions")
TEXT: tuple[Route, ...] = ("completions",)
CHAT: tuple[Route, ...] = ("chat/completions",)


@dataclass(frozen=True, slots=True)
class Field:
    """A field that a request may have. effect: what it does; if the field is refused, what to do instead.

    neutral: None if the field is honoured. Otherwise the values that are accepted, because they change nothing.
    """

    name: str
    effect: str
    routes: tuple[Route, ...] = BOTH
    neutral: tuple[object, ...] | None = None


_HONOURED = (
    Field("model", "the base model, a model in training, or a `tinker://` path of saved weights"),
    Field("prompt", "a string, a list of token ids, or a list of either", TEXT),
    Field(
        "messages",
        "roles `system`, `developer`, `user`, `assistant` and `tool`; a content is a string or a list of text parts. "
        "The chat template renders all of it; a message that it leaves out is refused",
        CHAT,
    ),
    Field(
        "tools",
        "functions, which the chat template renders; refused if the template does not read `tools`. A call that the "
        "model writes is in `content`, as the model writes it",
        CHAT,
    ),
    Field("tool_choice", "`none` and `auto`; `required` and a named function are refused", CHAT),
    Field("chat_template_kwargs", "variables of the chat template; refused if the template does not read them", CHAT),
    Field("add_generation_prompt", "`false`: the prompt ends after the last message", CHAT),
    Field("continue_final_message", "`true`: the sample continues the last message", CHAT),
    Field("max_tokens", "at least 1; default 16, in a chat all that fits. 0 is accepted together with `echo`"),
    Field("max_completion_tokens", "the same as `max_tokens`", CHAT),
    Field("temperature", "0: the likeliest token; default 1"),
    Field("top_p", "above 0, at most 1"),
    Field("top_k", "the tokens to choose from; 0 or -1: all"),
    Field("n", "samples of each prompt"),
    Field("seed", "the same seed gives the same samples"),
    Field("stop", "strings, which the text leaves out, or token ids"),
    Field("stop_token_ids", "token ids that end a sample; the text contains such a token, unless it is special"),
    Field("ignore_eos", "`true`: an end-of-text token does not end the sample"),
    Field("logprobs", "of the drawn token and of the `logprobs` likeliest, at most 20", TEXT),
    Field("logprobs", "`true`: of each token, with its text and bytes", CHAT),
    Field("top_logprobs", "how many of the likeliest tokens to list, at most 20; needs `logprobs`", CHAT),
    Field("return_tokens_as_token_ids", "`true`: `logprobs` name a token `token_id:<id>`"),
    Field("echo", "`true`: the text and the `logprobs` begin with those of the prompt", TEXT),
    Field("best_of", "must equal `n`: the server does not choose between samples", TEXT),
    Field("stream", "`true`: the answer is a stream of events, one for each token or two"),
    Field("stream_options", "`include_usage`; needs `stream`"),
    Field("user", "accepted and not used"),
    Field("metadata", "accepted and not used"),
    Field("safety_identifier", "accepted and not used"),
    Field("prompt_cache_key", "accepted and not used"),
)

_NO_CONSTRAINT = "the server does not constrain the text of a sample: ask for the form in the prompt, and parse it"
_NO_PENALTY = "the server samples without penalties"
_TEXT_ONLY = "the server only generates text"
_AS_DECODED = "the text of a sample has no special tokens; `logprobs` lists every token"

_REFUSED = (
    Field("frequency_penalty", _NO_PENALTY, neutral=(0,)),
    Field("presence_penalty", _NO_PENALTY, neutral=(0,)),
    Field("repetition_penalty", _NO_PENALTY, neutral=(1,)),
    Field("length_penalty", _NO_PENALTY, neutral=(1,)),
    Field("min_p", "use `top_p` or `top_k`", neutral=(0,)),
    Field("min_tokens", "use `ignore_eos` with `max_tokens`", neutral=(0,)),
    Field("logit_bias", "the server does not change the logits", neutral=({},)),
    Field("allowed_token_ids", _NO_CONSTRAINT, neutral=()),
    Field("bad_words", _NO_CONSTRAINT, neutral=([],)),
    Field("logits_processors", "the server does not change the logits", neutral=([],)),
    Field("use_beam_search", "use `n` samples", neutral=(False,)),
    Field("suffix", "write it into the prompt", TEXT, neutral=("",)),
    Field("echo", "send the last message and `continue_final_message`", CHAT, neutral=(False,)),
    Field("prompt_logprobs", "use `echo` with `logprobs` of /v1/completions", neutral=()),
    Field("skip_special_tokens", _AS_DECODED, neutral=(True,)),
    Field("spaces_between_special_tokens", _AS_DECODED, neutral=(True, False)),
    Field("include_stop_str_in_output", "add the stop string to the text", neutral=(False,)),
    Field("detokenize", "the answer has text: `logprobs` lists the tokens", neutral=(True,)),
    Field("return_token_ids", "use `return_tokens_as_token_ids` with `logprobs`", neutral=(False,)),
    Field("truncate_prompt_tokens", "shorten the prompt", neutral=()),
    Field("add_special_tokens", "send token ids for another form of the prompt", TEXT, neutral=(True,)),
    Field("add_special_tokens", "the chat template writes the special tokens", CHAT, neutral=(False,)),
    Field("chat_template", "the template is that of the model: render the chat and use /v1/completions", CHAT, ()),
    Field("documents", "send them as `chat_template_kwargs`, or in a message", CHAT, neutral=([],)),
    Field("mm_processor_kwargs", _TEXT_ONLY, CHAT, neutral=({},)),
    Field("response_format", _NO_CONSTRAINT, neutral=({"type": "text"},)),
    Field("structured_outputs", _NO_CONSTRAINT, neutral=()),
    Field("guided_json", _NO_CONSTRAINT, neutral=()),
    Field("guided_regex", _NO_CONSTRAINT, neutral=()),
    Field("guided_choice", _NO_CONSTRAINT, neutral=()),
    Field("guided_grammar", _NO_CONSTRAINT, neutral=()),
    Field("guided_decoding_backend", _NO_CONSTRAINT, neutral=()),
    Field("guided_whitespace_pattern", _NO_CONSTRAINT, neutral=()),
    Field("functions", "use `tools`", CHAT, neutral=([],)),
    Field("function_call", "use `tools` and `tool_choice`", CHAT, neutral=("none", "auto")),
    Field("parallel_tool_calls", "the server does not limit how many tools a model calls", CHAT, neutral=(True,)),
    Field("reasoning_effort", "use `chat_template_kwargs`, if the template has a variable for it", CHAT, neutral=()),
    Field("include_reasoning", "the reasoning is part of the text", CHAT, neutral=(True,)),
    Field("thinking_token_budget", "use `max_tokens`", CHAT, neutral=()),
    Field("verbosity", "ask for it in a message", CHAT, neutral=("medium",)),
    Field("modalities", _TEXT_ONLY, CHAT, neutral=(["text"],)),
    Field("audio", _TEXT_ONLY, CHAT, neutral=()),
    Field("prediction", "the server has no predicted outputs", CHAT, neutral=()),
    Field("web_search_options", "the server has no tools: send your own as `tools`", CHAT, neutral=()),
    Field("store", "the server does not store completions", neutral=(False,)),
    Field("service_tier", "every request has the same tier", neutral=("auto", "default")),
    Field("prompt_cache_retention", "the server does not keep prompts", neutral=()),
    Field("priority", "requests are answered in their order", neutral=(0,)),
    Field("request_id", "the server makes the id of an answer", neutral=("",)),
    Field("cache_salt", "the server does not share a cache between requests", neutral=()),
    Field("kv_transfer_params", "the server does not transfer its cache", neutral=()),
    Field("vllm_xargs", "the server has no such arguments", neutral=({},)),
)

FIELDS = (*_HONOURED, *_REFUSED)


def fields_of(route: Route) -> dict[str, Field]:
    """The fields of a route by name."""
    return {field.name: field for field in FIELDS if route in field.routes}


def check_fields(sent: dict[str, Any], route: Route) -> dict[str, Any]:  # Any: JSON values
    """The honoured fields that a request has; null is like a field that is not sent.

    Raises OpenAIError for an unknown field, and for a value that the server does not support.
    """
    fields = fields_of(route)
    kept = {}
    for name, value in sent.items():
        field = fields.get(name)
        if field is None:
            raise _unknown(name, route)
        if value is None:
            continue
        if field.neutral is None:
            kept[name] = value
        elif value not in field.neutral:
            raise OpenAIError(
                f"{name} is {str(value)[:80]!r}, which this server does not support: {field.effect.replace('`', '')}",
                param=name,
                code="unsupported_parameter",
            )
    return kept


def fields_table() -> str:
    """All fields as a table in Markdown, for the documentation."""
    rows = ["| field | of | what happens |", "|---|---|---|"]
    for field in FIELDS:
        routes = "both" if field.routes == BOTH else "`chat/completions`" if field.routes == CHAT else "`completions`"
        effect = field.effect
        if field.neutral is not None:
            values = " and ".join(f"`{json.dumps(value)}`" for value in field.neutral)
            effect = f"refused{f', except {values}' if values else ''}: {effect}"
        rows.append(f"| `{field.name}` | {routes} | {effect} |")
    return "\n".join(rows)


def _unknown(name: str, route: Route) -> OpenAIError:
    other: Route = "completions" if route == "chat/completions" else "chat/completions"
    if name in fields_of(other):
        text = f"{name} is a field of /v1/{other}, and this is /v1/{route}: leave it out"
    else:
        text = f"{name[:80]!r} is not a field of /v1/{route}{did_you_mean(name, fields_of(route))}"
    return OpenAIError(text, param=name[:80], code="unknown_parameter")
