"""Renders the chat of a prompt with the model's chat template, and refuses what the template would leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta

from tinkerbell_core.errors import BadData, BadHyperparameter, did_you_mean
from tinkerbell_server.calls.sample import TextPrompt

Json = dict[str, Any]  # Any: JSON values of several types

_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What the code of a template raises for a chat that it cannot render."""

_RESERVED = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)
"""Arguments and variables that the server or transformers sets."""

_ALWAYS_READ = frozenset(("role", "content", "tool_call_id"))
"""The fields of a message that are not looked for in the template: many leave out the id of a call."""


def render_chat(prompt: TextPrompt, tokenizer: Any) -> str:  # Any: a tokenizer may be code of the model
    """The text of a chat. Raises BadData for a message or tool that the template does not render.

    Raises BadHyperparameter for template arguments that the template does not read.
    """
    assert not isinstance(prompt.text, str)
    template = _template(tokenizer, prompt.tools)
    _check_tools(prompt, template)
    _check_arguments(prompt.template_kwargs, template)
    _check_messages(prompt.text, template)
    try:
        text = _rendered(prompt, prompt.text, tokenizer)
    except _ERRORS as error:
        reason = str(error)[:300] or type(error).__name__
        raise BadData(f"messages: the model's chat template refuses this chat: {reason}") from None
    _check_rendered(prompt, prompt.text, tokenizer)
    return text


def _rendered(prompt: TextPrompt, messages: Sequence[Json], tokenizer: Any) -> str:  # Any: as above
    rendered: str = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=prompt.tools or None,
        tokenize=False,
        add_generation_prompt=prompt.add_generation_prompt,
        continue_final_message=prompt.continue_final_message,
        **prompt.template_kwargs,
    )
    return rendered


def _template(tokenizer: Any, tools: Sequence[Json]) -> str:  # Any: as above
    template = tokenizer.chat_template
    if isinstance(template, dict):
        # transformers chooses in the same way
        template = (template.get("tool_use") if tools else None) or template.get("default")
    if not template:
        raise BadData("the prompt is a chat, but the model has no chat template: send a string or token ids")
    return str(template)


def _check_tools(prompt: TextPrompt, template: str) -> None:
    if prompt.tools and not _reads(template, "tools"):
        raise BadData(
            "tools are sent, but the model's chat template does not read them, so the model would not see them: leave "
            "them out, describe them in a message, or serve a model whose template has tools"
        )


def _check_arguments(arguments: Mapping[str, Any], template: str) -> None:  # Any: JSON values
    variables = template_variables(template)
    for name in arguments:
        if name in _RESERVED:
            raise BadHyperparameter(f"chat_template_kwargs.{name} cannot be set: the server sets {name!r}")
        if not _reads(template, name):
            known = sorted((variables or frozenset()) - _RESERVED)
            listing = f" (it reads: {', '.join(known)})" if known else ""
            near = did_you_mean(name, known)
            raise BadHyperparameter(
                f"chat_template_kwargs.{name[:80]} is not read by the model's chat template{near}{listing}"
            )


def _check_messages(messages: Sequence[Json], template: str) -> None:
    for place, message in enumerate(messages):
        for name in sorted(message.keys() - _ALWAYS_READ):
            # the name of a tool is known from its call
            if not re.search(rf"\b{re.escape(name)}\b", template) and not (
                name == "name" and message["role"] == "tool"
            ):
                raise BadData(
                    f"messages[{place}].{name} is not read by the model's chat template, so the model would not see "
                    "it: leave it out, or write it into the content"
                )


def _check_rendered(prompt: TextPrompt, messages: Sequence[Json], tokenizer: Any) -> None:  # Any: as above
    """Raise BadData if the content of a message is left out. That of an assistant may be: templates drop reasoning."""
    # a word in the place of each content shows which of them are rendered, also if two are equal or are written in
    # another form
    words = {
        place: f"tinkerbellprobe{place}x"
        for place, message in enumerate(messages)
        if message["role"] != "assistant" and message.get("content")
    }
    probes = [
        {**message, "content": words[place]} if place in words else message for place, message in enumerate(messages)
    ]
    try:
        text = _rendered(prompt, probes, tokenizer).lower()
    except _ERRORS:
        return  # the template reads its contents, and refuses these
    for place, word in words.items():
        if word not in text:
            role = messages[place]["role"]
            instead = ", with the role 'system' for example" if role == "developer" else ""
            raise BadData(
                f"messages[{place}] has the role {role!r}, which the model's chat template leaves out: send it in "
                f"another form{instead}"
            )


def _reads(template: str, name: str) -> bool:
    variables = template_variables(template)
    if variables is None:
        return re.search(rf"\b{re.escape(name)}\b", template) is not None
    return name in variables


@lru_cache(maxsize=4)
def template_variables(template: str) -> frozenset[str] | None:
    """The variables that a template reads; None if it has statements that only transformers knows."""
    # the tag of transformers around the tokens of the assistant
    plain = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # not HTML
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(plain)))
    except TemplateSyntaxError:
        return None
