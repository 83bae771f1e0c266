"""A chat template renders every message, tool and argument of a prompt, or the chat is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.test_data_text import make_tokenizer
from tinkerbell_core.errors import BadData, BadHyperparameter, ContextTooLong
from tinkerbell_server.calls.chat_template import render_chat, template_variables
from tinkerbell_server.calls.prompts import prompt_ids
from tinkerbell_server.calls.sample import TextPrompt

USER = {"role": "user", "content": "hi"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "3"}
TOOL = {"type": "function", "function": {"name": "add"}}

# in the style of Qwen: other roles are left out, and the arguments of a call are an object
QWEN = (
    "{%- if tools %}<tools>{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}</tools>{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role in ('user', 'system') %}<{{ message.role }}>{{ message.content | trim }}"
    "{%- elif message.role == 'assistant' %}<assistant>{%- if message.content %}{{ message.content }}{%- endif %}"
    "{%- for call in message.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{%- endfor %}{%- elif message.role == 'tool' %}<result>{{ message.content | tojson }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}<assistant>"
    "{%- if enable_thinking is false %}<think></think>{% endif %}{%- endif %}"
)


def render(messages: list[dict[str, Any]], template: str = QWEN, **options: Any) -> str:
    return render_chat(TextPrompt(messages, **options), make_tokenizer(template))


def test_tools_calls_and_results_are_rendered() -> None:
    text = render([USER, CALL, RESULT], tools=[TOOL])
    assert text == (
        '<tools>{"type": "function", "function": {"name": "add"}}</tools><user>hi<assistant><call>add {"a": 1}'
        '<result>"3"<assistant>'
    )


def test_a_variable_of_the_template_can_be_set() -> None:
    assert render([USER], template_kwargs={"enable_thinking": False}) == "<user>hi<assistant><think></think>"


def test_the_generation_prompt_can_be_left_out_and_the_last_message_continued() -> None:
    answer = {"role": "assistant", "content": "yo"}
    assert render([USER, answer], add_generation_prompt=False) == "<user>hi<assistant>yo"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    continued = render([USER, answer], template, add_generation_prompt=False, continue_final_message=True)
    assert continued == "<user>hi|<assistant>yo"


@pytest.mark.parametrize(
    ("messages", "options", "template", "message"),
    [
        ([{"role": "developer", "content": "be kind"}, USER], {}, QWEN, r"messages\[0\] has the role 'developer'"),
        ([{"role": "developer", "content": "hi"}, USER], {}, QWEN, r"messages\[0\] has the role 'developer'"),
        ([USER], {"tools": [TOOL]}, "{{ messages[0].content }} tools", "does not read them"),
        ([USER, CALL], {}, "{% for m in messages %}{{ m.content }}{% endfor %}", r"messages\[1\].tool_calls is not"),
        ([{**USER, "name": "ann"}], {}, "{{ messages[0].content }}", r"messages\[0\].name is not read"),
        ([{"role": "assistant", "content": None}], {}, "{{ 'a' + messages[0].content }}", "refuses this chat"),
        ([USER], {}, "{{ raise_exception('no user') }}", "refuses this chat: no user"),
    ],
)
def test_what_the_template_leaves_out_is_refused(
    messages: list[dict[str, Any]], options: dict[str, Any], template: str, message: str
) -> None:
    with pytest.raises(BadData, match=message):
        render(messages, template, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_thinkin", "enable_thinkin is not read .*did you mean 'enable_thinking'"),
        ("chat_template", "chat_template cannot be set"),
        ("tokenize", "tokenize cannot be set"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(name: str, message: str) -> None:
    with pytest.raises(BadHyperparameter, match=message):
        render([USER], template_kwargs={name: True})


def test_content_that_the_template_writes_in_another_form_is_accepted() -> None:
    assert render([{"role": "user", "content": "Hi"}], "{{ messages[0].content | upper }}") == "HI"


def test_reasoning_that_a_template_drops_is_accepted() -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert render([USER, {"role": "assistant", "content": "<think>x</think>yo"}, USER], template) == "hiyohi"


def test_the_tag_around_the_tokens_of_an_assistant_does_not_hide_variables() -> None:
    assert template_variables("{% generation %}{{ tools }}{%- endgeneration -%}{{ x }}") == {"tools", "x"}
    assert template_variables("{% unknown %}") is None


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenised"))
    with pytest.raises(ContextTooLong, match="at least 200000 tokens, but the model takes 512"):
        prompt_ids(TextPrompt("a" * 200_000), tokenizer, vocab_size=len(tokenizer), max_length=512)
